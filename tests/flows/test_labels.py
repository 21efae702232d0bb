"""Label only what changed: from a query log to a decision, by the real commands on a tiny workspace."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from graceful.evaluation.changed import NOTHING_SHOWN, RIGHT, UNCLEAR, UNKNOWN, WRONG, ChangedAnswersError
from graceful.evaluation.label_page import LABEL_COLUMNS, ToLabel, label_page
from graceful.flows.cli import app
from graceful.flows.store.evaluation_set import EvaluationSet, load_evaluation_set, separate
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import UpdateStarted
from graceful.flows.store.labels import AnswerLabel, AnswerLabels, ContradictoryLabelsError, add_labels, read_labels
from graceful.flows.store.leaks import TrainedOnQueriesError, refuse_trained_on
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import labelling
from graceful.flows.update.bench import Bench
from graceful.flows.update.query_log import QueryLog, labelling_order
from graceful.training.datasets import DatasetConfig, OverlapError, load_images
from graceful.training.manifest import LabelledImages
from tests.flows import running, tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOG = {
    "source": "digits", "label_columns": [], "where": {"label": tiny.DIGITS[:5], "instance": {"min": 100, "max": 149}},
    "attributes": ["instance"],
}  # fmt: skip
# A fifth of the digits' own queries is lost or won: nothing can be shown by them, and something by the log.
LIMITS = {"policy.quality_margin_points": 12.0, "policy.max_nfr": 0.15, "policy.max_dip_points": 12.0}


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose second generation could not be decided about, with the list of what to label."""
    root = tmp_path_factory.mktemp("labels") / "workspace"
    log = {"evaluation.log": {**LOG, "path": str(root / "digits.parquet")}}
    few = {"evaluation.queries.where.instance": {"min": 80, "max": 85}}
    tiny.new_workspace(root, log)
    tiny.write_config(root, root / "digits.parquet", {**log, **few})
    assert running.update(root).outcome == "BOOTSTRAP"
    tiny.write_config(root, root / "digits.parquet", {**log, **few, **tiny.grown(5), **LIMITS})
    assert running.update(root).outcome == "INCONCLUSIVE"
    return root


@pytest.fixture
def workspace(undecided: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undecided, tmp_path / "workspace"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def asked(root: Path, *options: str) -> dict[str, Any]:
    result = invoke("evalset", "label", "--next", "-r", root, "--json", *options)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def rows_of(file: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(file).read_text(), newline="")))


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, LABEL_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file


def truth(root: Path) -> dict[str, str]:
    """What each logged digit really is: what a person sees."""
    config = DatasetConfig.model_validate({**LOG, "path": str(root / "digits.parquet"), "label_columns": ["label"]})
    images = load_images(config)
    return dict(zip(images.content_sha256, images.labels.tolist(), strict=True))


def labelled(root: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    really = truth(root)
    words = {(True, True): "both", (True, False): "before", (False, True): "after", (False, False): "neither"}
    right = [tuple(row[side] == f"is:{really[row['query']]}" for side in ("before", "after")) for row in rows]
    return [{**row, "label": words[one]} for row, one in zip(rows, right, strict=True)]  # type: ignore[index]


def newest(root: Path) -> Any:
    return labelling.newest_with_log(Workspace(str(root), tiny.no_encoder))


def test_an_undecided_update_writes_the_list_of_exactly_what_changed(workspace: Path) -> None:
    name, evaluation = newest(workspace)
    log = evaluation.outcomes.log
    rows = rows_of(workspace / "evaluations" / name / "label-next.csv")
    pairs = labelling.wanted_pairs(evaluation)
    assert set(pairs) < set(labelling.pairs_of(evaluation)), "of the cheapest option alone"
    moved = {
        (str(log.query_ids[i]), str(log.answers[before][i]), str(log.answers[after][i]))
        for before, after in pairs
        for i in range(len(log))
        if log.answers[before][i] != log.answers[after][i]
    }
    assert {(row["query"], row["before"], row["after"]) for row in rows} == moved
    assert len(rows) == len(moved) > 10
    assert len({row["query"] for row in rows}) < len(log) / 2
    order = [row["query"] for row in rows]
    assert order == sorted(order, key=log.query_ids.tolist().index), "in the order of the log"
    assert not any(row["label"] for row in rows)


def test_labels_of_what_changed_decide_what_labels_of_everything_decide(workspace: Path, tmp_path: Path) -> None:
    found = asked(workspace)
    file = write_rows(tmp_path / "labels.csv", labelled(workspace, rows_of(found["csv"])))
    taken = json.loads(invoke("evalset", "label", file, "-r", workspace, "--json").stdout)
    assert (taken["num_settled"], taken["num_labelled"]) == (250, taken["num_changed"])
    result = running.update(workspace, again=True)
    assert result.outcome == "COMPATIBLE_ROLLOUT", result.summary
    evaluation = read_evaluation(str(workspace / "evaluations" / result.evaluation))
    really, log = truth(workspace), evaluation.outcomes.log
    assert log is not None
    state = evaluation.evidence.states[0]
    right = {
        name: log.answers[name] == np.char.add("is:", [really[q] for q in log.query_ids.tolist()])
        for name in ("served", state.state)
    }
    known = evaluation.outcomes.first_rank
    losses = (right["served"] & ~right[state.state]).sum() + ((known["served"] == 1) & (known[state.state] != 1)).sum()
    assert (state.num_queries, state.num_log_queries) == (280, 250)
    assert state.nfr == pytest.approx(losses / 280)


def test_labels_are_taken_piece_by_piece_and_only_once(workspace: Path, tmp_path: Path) -> None:
    rows = labelled(workspace, rows_of(asked(workspace)["csv"]))
    half = write_rows(tmp_path / "half.csv", [*rows[:5], *({**row, "label": ""} for row in rows[5:])])
    first = json.loads(invoke("evalset", "label", half, "-r", workspace, "--json").stdout)
    assert (first["rows_without_label"], first["new"] > 0) == (len(rows) - 5, True)
    again = json.loads(invoke("evalset", "label", half, "-r", workspace, "--json").stdout)
    assert (again["new"], again["corrected"]) == (0, 0)
    assert len(list((workspace / "labels").iterdir())) == 1
    rest = rows_of(asked(workspace)["csv"])
    assert not {(row["query"], row["before"], row["after"]) for row in rest} & {
        (row["query"], row["before"], row["after"]) for row in rows[:5]
    }
    assert json.loads(invoke("evalset", "show", "-r", workspace, "--json").stdout)["log"]["num_settled"] < 250


def test_contradictory_labels_are_refused_and_corrected_only_when_asked(workspace: Path, tmp_path: Path) -> None:
    row = next(row for row in rows_of(asked(workspace)["csv"]) if row["before"] and row["after"])
    invoke("evalset", "label", write_rows(tmp_path / "a.csv", [{**row, "label": "before"}]), "-r", workspace)
    other = write_rows(tmp_path / "b.csv", [{**row, "label": "after"}])
    refused = invoke("evalset", "label", other, "-r", workspace)
    assert refused.exit_code == 1
    assert row["query"][:12] in refused.stderr
    assert "--correct" in refused.stderr
    twice = write_rows(tmp_path / "c.csv", [{**row, "label": "before"}, {**row, "label": "after"}])
    assert "in the file" in invoke("evalset", "label", twice, "-r", workspace).stderr
    done = invoke("evalset", "label", other, "-r", workspace, "--correct", "--json")
    assert json.loads(done.stdout)["corrected"] == 2
    assert read_labels(str(workspace)).said[row["query"], row["after"]] == RIGHT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "yes"}, "expected a label of both, before, after, neither, unclear"),
        ({"query": "0" * 64, "label": "both"}, "expected a query and its two answers"),
        ({"after": "is:nobody", "label": "both"}, "expected a query and its two answers"),
        ({"evaluation": "../elsewhere", "label": "both"}, "expected the name of an evaluation"),
        ({"label": ""}, "expected a row with a label, found 1 without"),
    ],
)
def test_rubbish_in_a_row_is_refused_by_name(workspace: Path, tmp_path: Path, change: Any, said: str) -> None:
    row = {**rows_of(asked(workspace)["csv"])[0], **change}
    result = invoke("evalset", "label", write_rows(tmp_path / "bad.csv", [row]), "-r", workspace)
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (workspace / "labels").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected the columns"),
        (b"a,b\n1,2\n", "expected the columns"),
        (b"\xff\xfe\x00", "expected UTF-8"),
        (b"evaluation,query,before,after,label\n1,2\n", "without"),
    ],
)
def test_a_file_that_is_no_list_is_refused_in_one_line(
    workspace: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    result = invoke("evalset", "label", tmp_path / "bad.csv", "-r", workspace)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert said in result.stderr
    missing = invoke("evalset", "label", tmp_path / "none.csv", "-r", workspace)
    assert "found none" in missing.stderr
    assert invoke("evalset", "label", "-r", workspace).exit_code != 0


def test_a_label_is_about_a_query_and_an_answer_whatever_shows_it() -> None:
    said = AnswerLabels({("q", "is:cat"): RIGHT, ("r", "is:cat"): WRONG, ("s", "is:cat"): UNCLEAR})
    identities = said.identities
    assert identities == {"q": "cat"}
    assert said.verdict("q", "is:dog", identities) == WRONG, "one identity is right, so another is not"
    assert said.verdict("r", "is:dog", identities) == UNKNOWN
    assert said.verdict("q", "item:1", identities) == UNKNOWN, "an item without an identity may show a cat as well"
    assert said.verdict("s", "is:cat", identities) == UNCLEAR
    assert said.verdict("x", NOTHING_SHOWN, identities) == WRONG


def test_an_unclear_word_neither_contradicts_nor_replaces_a_clear_one(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert add_labels(root, [AnswerLabel("q", "is:a", UNCLEAR)]) == (1, 0)
    assert add_labels(root, [AnswerLabel("q", "is:a", RIGHT), AnswerLabel("q", "is:a", UNCLEAR)]) == (1, 0)
    assert add_labels(root, [AnswerLabel("q", "is:a", UNCLEAR)]) == (0, 0)
    assert read_labels(root).said == {("q", "is:a"): RIGHT}
    with pytest.raises(ContradictoryLabelsError):
        add_labels(root, [AnswerLabel("q", "is:a", WRONG)])


@pytest.mark.parametrize("k", [1, 3])
def test_answers_are_those_of_a_loop_over_rows(k: int) -> None:
    rng = np.random.default_rng(k)
    num_queries, num_rows = 40, 30
    vectors = {name: rng.normal(size=(num_queries + num_rows, 8)).astype(np.float32) for name in ("g1", "g2")}
    hashes = [f"{i:064x}" for i in range(num_rows)]
    labels = np.array([f"c{i % 5}" if i % 6 else "" for i in range(num_rows)])
    # The first ten queries are rows of the gallery themselves.
    asked_hashes = [*hashes[:10], *(f"{i:064x}" for i in range(1000, 1030))]
    gallery = LabelledImages([f"g{i}" for i in range(num_rows)], labels, hashes)
    log = LabelledImages([f"q{i}" for i in range(num_queries)], np.full(num_queries, ""), asked_hashes)
    chosen = EvaluationSet("set", gallery, gallery, labels, {}, log, np.full(num_queries, "alike"))
    owners = rng.choice(["g1", "g2", ""], num_rows)
    queries = {name: found[:num_queries] for name, found in vectors.items()}
    rows = {name: found[num_queries:] for name, found in vectors.items()}
    asked_log = QueryLog(chosen, queries, rows, {}, k=k, labels=AnswerLabels())
    asked_log.show("served", "g2", owners)
    found = asked_log.answers()
    for query, shown in zip(found.query_ids.tolist(), found.answers["served"].tolist(), strict=True):
        place = asked_hashes.index(query)
        scores = {
            row: float(queries["g2"][place] @ rows[owners[row]][row])
            for row in range(num_rows)
            if owners[row] and hashes[row] != query
        }
        best = sorted(scores, key=lambda row: -scores[row])[:k]
        names = sorted({f"is:{labels[row]}" if labels[row] else f"item:{hashes[row]}" for row in best})
        assert shown == (names[0] if k == 1 else json.dumps(names))
    asked_log.show("nothing", "g2", np.full(num_rows, ""))
    assert set(asked_log.answers().answers["nothing"].tolist()) == {NOTHING_SHOWN}


def test_one_owner_among_several_is_not_asked_of_a_log() -> None:
    class Log:
        shown: ClassVar[list[str]] = []

        def show(self, state: str, *_: object) -> None:
            self.shown.append(state)

    rng = np.random.default_rng(0)
    images = LabelledImages([f"i{i}" for i in range(6)], np.array(list("aabbcc")), [f"{i:064x}" for i in range(6)])
    vectors = {name: rng.normal(size=(6, 4)).astype(np.float32) for name in ("g1", "g2")}
    bench = Bench(EvaluationSet("set", images, images, images.labels, {}), vectors, vectors, log=Log())  # type: ignore[arg-type]
    bench.measure_live("g2", np.array(["g1", "g1", "g1", "g2", "g2", ""]), ["g1", "g2"])
    assert Log.shown == []
    bench.measure_live("g2", np.array(["g1", "g1", "g1", "g1", "g1", ""]), ["g1"])
    assert Log.shown == ["live/g2/g1"]


def test_what_is_lost_is_alike_by_its_identity_and_the_rest_by_what_is_shown_now() -> None:
    vectors = np.eye(4, dtype=np.float32)
    hashes = [f"{i:064x}" for i in range(4)]
    gallery = LabelledImages([f"g{i}" for i in range(4)], np.array(["a", "b", "c", ""]), hashes)
    log = LabelledImages(["p", "q", "r"], np.full(3, ""), ["d" * 64, "e" * 64, "f" * 64])
    chosen = EvaluationSet("set", gallery, gallery, gallery.labels, {}, log)
    said = AnswerLabels({("d" * 64, "is:a"): RIGHT, ("e" * 64, "is:a"): WRONG, ("e" * 64, "is:b"): RIGHT})
    queries = {"g1": vectors[[0, 0, 3]], "g2": vectors[[1, 1, 3]]}
    both = QueryLog(chosen, queries, {"g1": vectors, "g2": vectors}, {}, k=1, labels=said)
    both.show("served", "g1", np.full(4, "g1"))
    both.show("fraction/1", "g2", np.full(4, "g2"))
    found = both.answers()
    alike = dict(zip(found.query_ids.tolist(), found.clusters.tolist(), strict=True))
    assert alike == {"d" * 64: "a", "e" * 64: "b", "f" * 64: f"item:{hashes[3]}"}
    verdicts = dict(zip(found.query_ids.tolist(), found.verdicts["fraction/1"].tolist(), strict=True))
    assert verdicts == {"d" * 64: WRONG, "e" * 64: RIGHT, "f" * 64: UNKNOWN}


def test_a_log_that_is_trained_on_is_refused(workspace: Path) -> None:
    config = tiny.open_config(workspace, {"evaluation.log.where.instance": {"min": 0, "max": 149}})
    chosen = load_evaluation_set(config.evaluation)
    with pytest.raises(OverlapError, match="no common images"):
        separate(config.evaluation, load_images(config.training_data), chosen)
    with pytest.raises(TrainedOnQueriesError):
        refuse_trained_on(Workspace(str(workspace), tiny.no_encoder), chosen)


def test_the_order_of_a_log_is_kept_when_it_grows() -> None:
    hashes = [f"{i:064x}" for i in range(300)]
    before = [hashes[i] for i in labelling_order(hashes[:200])]
    after = [hashes[i] for i in labelling_order(hashes)]
    assert [digest for digest in after if digest in set(before)] == before
    assert before != hashes[:200]


def test_the_page_holds_all_it_shows_and_asks_nobody(workspace: Path) -> None:
    found = asked(workspace)
    page = Path(found["page"]).read_text()
    assert not re.search(r"https?://|src=\"[^d]|@import|url\(", page)
    assert "default-src 'none'" in page
    rows = rows_of(found["csv"])
    embedded = json.loads(re.search(r"const rows = (.*?), pictures = ", page).group(1))  # type: ignore[union-attr]
    assert [row["query"] for row in embedded] == [row["query"] for row in rows]
    assert {row["swapped"] for row in embedded} == {True, False}
    assert page.count("data:image/jpeg;base64,") >= len({row["query"] for row in rows})
    assert len(page) < 3_000_000


def test_a_forgotten_picture_is_on_no_page(workspace: Path) -> None:
    found = asked(workspace)
    opened = Workspace(str(workspace), tiny.no_encoder)
    shown = Path(found["page"]).read_text()
    items = opened.gallery.view([]).items(["item_id", "content_sha256"]).to_pylist()
    item = next(item for item in items if item["content_sha256"] in shown)
    assert invoke("delete", item["item_id"], "--forget", "-r", workspace).exit_code == 0
    assert not Path(found["page"]).exists()


def test_names_from_outside_cannot_leave_their_place_in_the_page() -> None:
    nasty = '</script><img src=x onerror=alert(1)>"'
    page = label_page([ToLabel("e", "a" * 64, nasty, nasty, nasty)], {}, title=nasty, file_name="label-next.csv")
    assert "<img src=x" not in page
    assert page.count("</script>") == 1


def test_at_most_so_many_are_asked(workspace: Path, tmp_path: Path) -> None:
    found = asked(workspace, "--limit", "7", "--into", str(tmp_path / "out"))
    assert found["to_label"] == len(rows_of(tmp_path / "out" / "label-next.csv")) == 7


def test_a_log_under_a_metric_that_answers_do_not_settle_is_refused_before_training(workspace: Path) -> None:
    text = (workspace / "graceful.toml").read_text()
    (workspace / "graceful.toml").write_text(text.replace("policy = { ", 'policy = { metric = "mAP", '))
    with pytest.raises(ChangedAnswersError, match=r"policy\.metric = 'recall@k', found 'mAP'"):
        running.update(workspace)
    (workspace / "graceful.toml").write_text(
        text.replace("policy = { ", "policy = { k = 5, ").replace('cluster = "instance", ', "")
    )
    with pytest.raises(ChangedAnswersError, match=r"expected evaluation\.cluster where policy\.k is 5"):
        running.update(workspace)


def test_a_workspace_without_a_log_says_how_to_get_one(tmp_path: Path) -> None:
    tiny.new_workspace(tmp_path / "w")
    result = invoke("evalset", "label", "--next", "-r", tmp_path / "w")
    assert result.exit_code == 1
    assert "evaluation.log" in result.stderr


def test_a_set_is_made_grown_named_in_the_configuration_and_used(tmp_path: Path) -> None:
    root = tmp_path / "w"
    tiny.new_workspace(root)
    assert running.update(root).outcome == "BOOTSTRAP"
    made = json.loads(
        invoke(
            "evalset", "create", "main", "-r", root, "--identities", 4, "--queries-per-identity", 10, "--json"
        ).stdout
    )
    assert sum(made["identities"].values()) == 4
    assert made["distractors"] == 20, "the fifth digit"
    assert sum(made["queries"].values()) == 40
    (tmp_path / "log.csv").write_text(
        "file\n" + "".join(f"{root / 'digits.parquet'}#{row}\n" for row in range(600, 640))
    )
    grown = json.loads(invoke("evalset", "grow", "main", "-r", root, "--log", tmp_path / "log.csv", "--json").stdout)
    assert (grown["log"], sum(grown["identities"].values())) == (40, 5)
    assert [version["number"] for version in grown["versions"]] == [1, 2]
    refused = invoke("evalset", "grow", "main", "-r", root, "--log", tmp_path / "log.csv")
    assert "expected something that it does not hold yet" in refused.stderr
    assert "found one" in invoke("evalset", "create", "main", "-r", root).stderr
    assert "sets: main" in invoke("evalset", "show", "other", "-r", root).stderr
    child = json.loads(invoke("evalset", "create", "next", "-r", root, "--from", "main", "--json").stdout)
    assert child["parent"] == "main version 2"
    config = {"evaluation.queries": None, "evaluation.cluster": None, "evaluation.set": "evalsets/main"}
    tiny.write_config(root, root / "digits.parquet", {**config, "evaluation.part": "dev"})
    dev = load_evaluation_set(tiny.open_config(root).evaluation)
    tiny.write_config(root, root / "digits.parquet", config)
    test = load_evaluation_set(tiny.open_config(root).evaluation)
    assert not {*dev.queries.labels.tolist()} & {*test.queries.labels.tolist()}
    assert dev.log is not None
    assert len(dev.log) == 40
    tiny.write_config(root, root / "digits.parquet", {**config, **tiny.grown(5)})
    result = running.update(root)
    assert result.outcome in {"HOLD", "INCONCLUSIVE"}, (
        "weights, and with them which of the two, depend on the processor"
    )
    said = {"HOLD": "identities, at least 5 are needed", "INCONCLUSIVE": "the evaluation is too small to tell"}
    assert said[result.outcome] in result.summary
    opened = Workspace(str(root), tiny.no_encoder)
    assert opened.registry.events(UpdateStarted, result.update_key)[-1].payload.evaluation_set == test.set_id
    answers = read_evaluation(str(root / "evaluations" / result.evaluation)).outcomes.log
    assert answers is not None
    assert len(answers) == 40


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_set_has_the_name_of_a_folder(workspace: Path, name: str) -> None:
    assert "naming an evaluation set" in invoke("evalset", "create", name, "-r", workspace).stderr


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium fonts-dejavu-core")
def test_a_person_labels_by_keys_and_the_saved_file_is_taken(workspace: Path, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = asked(workspace)
    rows = rows_of(found["csv"])
    wanted = labelled(workspace, rows)
    embedded = json.loads(re.search(r"const rows = (.*?), pictures = ", Path(found["page"]).read_text()).group(1))  # type: ignore[union-attr]
    outside: list[str] = []
    complaints: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800}, accept_downloads=True)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
        page.goto(f"file://{found['page']}")
        assert page.locator("figure img").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing to scroll sideways"
        keys = {"both": "y", "neither": "n", "unclear": "u"}
        page.keyboard.press("n")
        page.keyboard.press("ArrowUp")  # a slip: back, and say it again
        for row, shown in zip(wanted, embedded, strict=True):
            left = "after" if shown["swapped"] else "before"
            side = "ArrowLeft" if row["label"] == left else "ArrowRight"
            page.keyboard.press(keys.get(row["label"], side))
        assert f"{len(rows)} labelled" in page.locator("#count").inner_text()
        with page.expect_download() as download:
            page.keyboard.press("s")
        download.value.save_as(tmp_path / "saved.csv")
        browser.close()
    assert rows_of(tmp_path / "saved.csv") == wanted
    assert (outside, complaints) == ([], [])
    taken = invoke("evalset", "label", tmp_path / "saved.csv", "-r", workspace, "--json")
    assert json.loads(taken.stdout)["num_settled"] == 250
