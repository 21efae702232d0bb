"""The main job end to end, under a real Prefect: init, ingest, two updates, and every command on what they leave."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from tests.flows import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_ITEMS = 100


@pytest.fixture(scope="module")
def flow_server(tmp_path_factory):
    """One Prefect server with a database of its own for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_LOGGING_LEVEL", "WARNING")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
        from prefect.testing.utilities import prefect_test_harness

        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), prefect_test_harness(180):
            yield


@pytest.fixture(scope="module")
def gallery_file(tmp_path_factory, digits_file):
    """The production gallery as a Parquet file: the images that the evaluation searches."""
    rows = pq.read_table(digits_file)
    keep = pc.and_(
        pc.is_in(rows["label"], pc.cast(np.array(tiny.DIGITS[:5]), "string")), pc.greater(rows["instance"], 79)
    )
    keep = pc.and_(keep, pc.less(rows["instance"], 100))
    path = tmp_path_factory.mktemp("gallery") / "gallery.parquet"
    pq.write_table(rows.filter(keep), path)
    return path


def command(*arguments, code=0):
    """Run a command in this process; the document that it prints."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, f"{arguments}: exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def history(flow_server, tmp_path_factory, digits_file, gallery_file):
    """A workspace with two generations; what each command said."""
    folder = tmp_path_factory.mktemp("history")
    root = folder / "workspace"
    config = tiny.write_config(folder, digits_file)
    made = CliRunner().invoke(app, ["init", str(root), "--config", str(config)])
    assert made.exit_code == 0, made.output
    said = {"root": root, "ingest": command("ingest", gallery_file, "--root", root, "--label", "label")}
    said["status_before"] = command("status", "--root", root)
    said["first"] = command("update", "--root", root)
    tiny.write_config(root, digits_file, {**tiny.grown(5), "train_paragon": True})
    said["second"] = command("update", "--root", root)
    return said


@pytest.fixture
def copy(history, tmp_path):
    """The same workspace elsewhere, to change."""
    return tiny.copy_workspace(history["root"], tmp_path / "workspace")


def test_gallery_waits_for_its_first_generation(history):
    assert history["ingest"]["added"] == NUM_ITEMS
    assert history["ingest"]["vectors"] == {}
    before = history["status_before"]
    assert (before["champion"], before["items"], before["unreadable"]) == (None, NUM_ITEMS, NUM_ITEMS)


def test_first_update_bootstraps(history):
    first = history["first"]
    assert (first["outcome"], first["num_classes"], first["rows_reindexed"]) == ("BOOTSTRAP", 3, NUM_ITEMS)
    assert first["champion"] == first["candidate"]
    assert first["candidate"].startswith("g001-")
    assert first["failures"] == first["num_unreadable"] == 0


def test_second_update_serves_compatibly_and_reindexes_only_the_decided_part(history):
    second = history["second"]
    assert (second["outcome"], second["num_classes"]) == ("COMPATIBLE_ROLLOUT", 5)
    assert second["champion"] == second["candidate"] != history["first"]["candidate"]
    assert second["rows_reindexed"] == round(second["fraction"] * NUM_ITEMS)
    assert second["paragon"] not in (None, second["candidate"])
    status = command("status", "--root", history["root"])
    assert (status["champion"], status["previous"]) == (second["candidate"], history["first"]["candidate"])
    assert sum(status["rows_by_generation"].values()) == NUM_ITEMS
    assert status["rows_by_generation"][second["candidate"]] == second["rows_reindexed"]
    assert status["unreadable"] == 0


def test_debt_tells_the_measured_tax_and_what_each_predecessor_costs(history):
    found, first, second = command("debt", "--root", history["root"]), history["first"], history["second"]
    assert [name for name, _ in found["taxes"]] == [second["candidate"]]
    assert [row["ordinal"] for row in found["forecast"]] == [3, 4, 5, 6, 7]
    assert [row["num_predecessors"] for row in found["forecast"]] == [2, 3, 4, 5, 6]
    assert [row["num_images"] for row in found["forecast"]] == [210, 270, 330, 390, 450]  # 90 and 150 so far
    assert all(row["step_ratio"] >= 1 and row["tax_points"] is None for row in found["forecast"])
    carried = {row["generation"]: row for row in found["predecessors"]}
    assert list(carried) == [first["candidate"], second["candidate"]]
    rows = command("status", "--root", history["root"])["rows_by_generation"]
    assert {name: row["readable_rows"] for name, row in carried.items()} == {
        name: rows.get(name, 0) for name in carried
    }
    assert all(row["takes_part"] and row["cache_bytes"] > 0 for row in carried.values())
    printed = CliRunner().invoke(app, ["debt", "--root", str(history["root"]), "--generations", "2"])
    assert "g004" in printed.output
    assert "g005" not in printed.output


def test_lineage_tells_the_whole_story_in_order(history):
    from graceful.flows.store.workspace import Workspace

    registry = Workspace(str(history["root"]), None).registry
    kinds = [e.kind for e in registry.history() if e.update_key == history["second"]["update_key"]]
    assert kinds == ["update_started", "trained", "decided", "promoted", "update_completed"]
    assert history["second"]["update_key"] != history["first"]["update_key"]


def test_commands_printed_at_the_end_of_an_update_work(history, copy):
    from graceful.flows.commands.suggestions import next_commands

    report = str(copy / "evaluations" / Path(history["second"]["report"]).parent.name / "report.html")
    commands = next_commands(str(copy), report)
    assert [line.split()[1] for line in commands] == ["-m", "report", "search", "rollback"]
    assert Path(shlex.split(commands[0])[-1].removeprefix("file://")).exists()
    for line in commands[1:]:
        assert line.endswith(f" --root {shlex.quote(str(copy))}")
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}: {done.output}"


def test_report_is_one_offline_page_with_the_decision(history):
    page = Path(history["second"]["report"]).read_text()
    assert history["second"]["candidate"] in page
    assert "COMPATIBLE_ROLLOUT" in page
    assert "tax" in page.lower()
    assert not re.search(r"""(?:src|href)\s*=\s*["']https?://""", page), "the page asks the network"
    assert Path(history["first"]["report"]).exists()


def test_flow_ui_shows_the_steps_and_the_artifacts(history):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_ASC)
        runs = [run for run in runs if run.state_type == "COMPLETED"]
        assert len(runs) >= 2
        tasks = {task.name for task in client.read_task_runs(limit=200)}
        artifacts = {artifact.key for artifact in client.read_artifacts(limit=200) if artifact.key}
    steps = {
        "freeze inputs", "train candidate", "train paragon", "judge", "move serving state", "publish",
        f"extend cache of {history['first']['candidate']}",
        f"embed evaluation set with {history['second']['candidate']}",
    }  # fmt: skip
    assert steps <= {re.sub(r"-[0-9a-f]{3}$", "", name) for name in tasks} | tasks
    assert {"tiny-compatibility-matrix", "tiny-decision", "tiny-report"} <= artifacts


def test_stored_outcomes_give_the_recorded_decision_again(history):
    evaluation = history["second"]["evaluation"]
    again = command("decide", "--from", evaluation)
    assert again["agrees_with_recorded"] is True
    assert again["decision"] == json.loads(Path(evaluation, "decision.json").read_text())


def test_decision_depends_on_the_stored_outcomes_and_not_on_the_recorded_evidence(history, tmp_path):
    """Flip every answer after the update: what is judged again must notice, and must say that it differs."""
    evaluation = shutil.copytree(history["second"]["evaluation"], tmp_path / "evaluation")
    table = pq.read_table(evaluation / "outcomes.parquet")
    rank = table["first_rank"].to_numpy().copy()
    rank[np.char.startswith(table["state"].to_numpy(zero_copy_only=False).astype(str), "fraction/")] = 50
    changed = table.set_column(table.schema.get_field_index("first_rank"), "first_rank", [rank])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), evaluation / "outcomes.parquet")
    again = command("decide", "--from", evaluation, code=1)
    assert again["agrees_with_recorded"] is False


def test_stricter_policy_is_judged_on_the_same_outcomes(history, tmp_path):
    policy = tmp_path / "strict.toml"
    policy.write_text("[policy]\nmax_nfr = 0.001\nfractions = [0.0, 0.5, 1.0]\nnum_resamples = 200\n")
    result = CliRunner().invoke(app, ["decide", "--from", history["second"]["evaluation"], "--policy", str(policy)])
    assert result.exit_code in (3, 4), result.output


def test_finished_update_is_not_repeated_and_again_judges_anew(history, copy):
    again = command("update", "--root", copy)
    assert again["repeated"] is True
    assert (again["update_key"], again["outcome"]) == (history["second"]["update_key"], "COMPATIBLE_ROLLOUT")
    anew = command("update", "--root", copy, "--again")
    assert anew["repeated"] is False
    assert anew["candidate"].startswith("g003-")
    assert anew["update_key"].startswith(history["second"]["update_key"])
    status = command("status", "--root", copy)
    assert status["generations"] == [history["first"]["candidate"], history["second"]["candidate"], anew["candidate"]]


def test_search_finds_the_item_itself_first(history, digits_file, tmp_path):
    image = image_of(digits_file, tmp_path, label="2", instance=85)
    found = command("search", image, "--root", history["root"], "-k", 5)
    assert found["query_generation"] == history["second"]["candidate"]
    assert len(found["hits"]) == 5
    assert found["hits"][0]["label"] == "2"
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    older = command("search", image, "--root", history["root"], "--generation", history["first"]["candidate"])
    assert older["query_generation"] == history["first"]["candidate"]
    assert older["hits"][0]["score"] == pytest.approx(1.0, abs=1e-3)


def test_ingested_image_is_found_and_survives_a_rollback(history, copy, digits_file, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    image = image_of(digits_file, folder, label="4", instance=120)
    said = command("ingest", folder, "--root", copy)
    assert (said["added"], said["changed"], said["unchanged"]) == (1, 0, 0)
    assert said["vectors"] == {history["second"]["candidate"]: 1, history["first"]["candidate"]: 1}
    assert command("ingest", folder, "--root", copy)["unchanged"] == 1
    item = command("search", image, "--root", copy, "-k", 1)["hits"][0]["item_id"]
    assert item == f"new/{image.name}"
    state = command("rollback", "--root", copy, "--reason", "it smelt")
    assert (state["champion"], state["previous"]) == (history["first"]["candidate"], None)
    found = command("search", image, "--root", copy, "-k", 1)
    assert (found["query_generation"], found["hits"][0]["item_id"]) == (history["first"]["candidate"], item)
    refused = CliRunner().invoke(app, ["rollback", "--root", str(copy)])
    assert refused.exit_code == 1
    assert "expected a previous generation, found none" in refused.stderr


def test_deleted_item_is_gone_and_a_forgotten_one_leaves_no_bytes(history, copy, digits_file, tmp_path):
    image = image_of(digits_file, tmp_path, label="2", instance=85)
    command("search", image, "--root", copy, "--generation", history["first"]["candidate"])  # publishes an index
    item = command("search", image, "--root", copy, "--generation", history["first"]["candidate"])["hits"][0]["item_id"]
    assert command("delete", item, "--root", copy) == {"deleted": 1}
    assert item not in {hit["item_id"] for hit in command("search", image, "--root", copy, "-k", 200)["hits"]}
    gone = command("delete", item, "--root", copy, "--forget")
    assert gone["deleted"] == 0
    assert gone["revisions_removed"] == 2
    assert gone["cannot_remove_from_weights_of"] == []
    assert [Path(place).parent.name for place in gone["still_named_in"]] == ["evaluation_sets"]
    left = [file for file in (copy / "gallery").rglob("*.parquet") if item.encode() in file.read_bytes()]
    assert left == []
    status = command("status", "--root", copy)
    assert status["items"] == NUM_ITEMS - 1
    assert status["unreadable"] == 0


def test_item_that_was_trained_on_is_named_when_it_is_forgotten(history, copy, digits_file, tmp_path):
    trained_on = tmp_path / "trained"
    trained_on.mkdir()
    image = image_of(digits_file, trained_on, label="1", instance=3)
    command("ingest", trained_on, "--root", copy)
    cache = copy / "caches" / history["first"]["candidate"]
    digest = content_of(image)
    assert any(digest.encode() in file.read_bytes() for file in cache.rglob("*.parquet"))
    # A second revision: the first one's image must be forgotten too.
    image.write_bytes(image_of(digits_file, tmp_path, label="4", instance=150).read_bytes())
    assert command("ingest", trained_on, "--root", copy)["changed"] == 1
    gone = command("delete", f"trained/{image.name}", "--root", copy, "--forget")
    assert gone["deleted"] == 1
    assert gone["cannot_remove_from_weights_of"] == [history["first"]["candidate"], history["second"]["candidate"]]
    assert not any(digest.encode() in file.read_bytes() for file in cache.rglob("*.parquet"))
    named = [file for file in copy.rglob("*") if file.is_file() and digest.encode() in file.read_bytes()]
    manifests = [str(file) for file in named if file.name == "training.parquet"]
    assert sorted(gone["still_named_in"]) == sorted(manifests)
    assert {file.name for file in named} == {"training.parquet"}


def test_report_command_finds_the_newest_and_a_named_evaluation(history):
    newest = command("report", "--root", history["root"])
    assert newest["report"] == history["second"]["report"]
    assert newest["decision"]["outcome"] == "COMPATIBLE_ROLLOUT"
    first = command("report", history["first"]["update_key"], "--root", history["root"])
    assert first["decision"]["outcome"] == "BOOTSTRAP"


def test_commands_speak_to_people_too(history):
    root = str(history["root"])
    for arguments, words in {
        ("status", "--root", root): (history["second"]["candidate"], "champion"),
        ("report", "--root", root): ("COMPATIBLE_ROLLOUT", "report.html"),
        ("update", "--root", root): ("COMPATIBLE_ROLLOUT", "decided before", "report.html"),
        ("decide", "--from", history["second"]["evaluation"]): ("The recorded decision is the same.",),
    }.items():
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        for word in words:
            assert word in result.output, f"{arguments}: {word!r} is not in\n{result.output}"


def test_replay_without_a_history_is_wrong_use(flow_server, tmp_path, digits_file):
    config = tiny.write_config(tmp_path, digits_file)
    result = CliRunner().invoke(app, ["replay", str(config), "--root", str(tmp_path / "workspace")])
    assert result.exit_code == 2
    assert "expected a [replay] table in the configuration, found none" in result.stderr


def test_error_in_a_step_reaches_the_command_line_as_one_line(flow_server, copy, digits_file, tmp_path):
    """Through Prefect too: the line is the step's own, and the exit code that of a failure."""
    before = tiny.end_state(copy)
    table = pq.read_table(digits_file)
    rows = table.to_pylist()
    for row in rows[:20]:
        row["image"] = {"bytes": b"broken", "path": None}  # no check before an update decodes
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "spoiled.parquet")
    tiny.write_config(copy, digits_file, {**tiny.grown(5), "training_data.path": str(tmp_path / "spoiled.parquet")})
    result = CliRunner().invoke(app, ["update", "--root", str(copy)])
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("graceful: loading images: expected at most 1.00% unreadable, found ")
    assert tiny.end_state(copy) == before


def image_of(digits_file, folder, *, label, instance):
    """One of the digits as an image file."""
    rows = pq.read_table(digits_file)
    keep = pc.and_(pc.equal(rows["label"], label), pc.equal(rows["instance"], instance))
    path = folder / f"digit-{label}-{instance}.png"
    path.write_bytes(rows.filter(keep)["image"][0].as_py()["bytes"])
    return path


def content_of(image):
    import hashlib

    return hashlib.sha256(image.read_bytes()).hexdigest()


def test_adopting_goes_through_the_flow_and_a_failed_one_leaves_no_trace(copy, tmp_path, monkeypatch):
    """A factory beside the caller, weights from a file; judged as a trained candidate is."""
    import torch

    (tmp_path / "beside_me.py").write_text(
        "from torch import nn\n"
        "def linear(width=24): return nn.Sequential(nn.Flatten(), nn.Linear(64, width))\n"
        "def broken(): raise RuntimeError('kaboom')\n"
    )
    weights = tmp_path / "weights.pt"
    torch.manual_seed(1)
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24)).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = tiny.end_state(copy)
    said = CliRunner().invoke(app, ["adopt", "theirs", "--factory", "beside_me:broken", "--root", str(copy)])
    assert (said.exit_code, said.stderr.count("\n")) == (1, 1), said.stderr
    assert "kaboom" in said.stderr
    assert tiny.end_state(copy) == before
    adopting = ["adopt", "theirs", "--factory", "beside_me:linear", "--weights", weights, "--root", copy]
    result = CliRunner().invoke(app, [*map(str, adopting), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == {"HOLD": 3, "INCONCLUSIVE": 4}.get(found["outcome"], 0)
    if found["champion"] == found["candidate"]:  # it can read none of the old rows
        assert command("status", "--root", copy)["rows_by_generation"] == {found["candidate"]: NUM_ITEMS}
    told = {one["generation"]: one for one in command("history", "--root", copy)["generations"]}[found["candidate"]]
    assert (told["origin"], told["name"], told["factory"]) == ("adopted", "theirs", "beside_me:linear")
