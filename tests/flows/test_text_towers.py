"""Text towers: variants from elsewhere by which the gallery is searched with words; judged before they answer."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

import graceful
from graceful.errors import UsageError
from graceful.flows.search.answering import TextQuery, TextQuestion, VectorQuery, answer_texts
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, UnreadableTextError, WrongQueryError
from graceful.flows.settings.config import ConfigError, load_config
from graceful.flows.store.events import VariantJudged, VariantTrained
from graceful.flows.store.variants import answering
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update.serving import rollback
from graceful.training.encoder import TakesTextError, open_encoder, read_classifier
from graceful.training.generation import read_card
from graceful.training.probes import EncoderChangedError
from graceful.training.text_tower import TextTowerError, open_text_encoder
from graceful.training.texts import MAX_TEXT_CHARS
from tests.flows import running, tiny
from tests.flows.test_variants import embed

pytestmark = pytest.mark.timeout(300)

PHRASES = tuple(
    f"{asked} {named}"
    for asked in ("show me", "I look for", "is there", "find", "please")
    for named in ("a photo of a", "the digit", "one handwritten", "the number", "somebody's", "any")
)
TOWERS = "tests.flows.towers"


def words(root: Path, factory: str = "by_class", **changes: Any) -> dict[str, Any]:
    """A table [variants.words]."""
    queries = {"source": "csv", "path": str(root / "queries.csv"), "cluster": "phrase"}
    return {"factory": f"{TOWERS}:{factory}", "queries": queries, **changes}


def settings(root: Path, num_classes: int, **variants: Any) -> dict[str, Any]:
    return {
        "training_data.where.label": tiny.DIGITS[:num_classes],
        "training.first_max_lr": 0.005,
        "training.epochs": 4,
        "training.batch_size": 32,
        "variants": variants or {"words": words(root)},
        **({"prices": None} if num_classes > 4 else {}),
    }


def write_queries(root: Path, num_classes: int = 5, more: str = "") -> None:
    rows = [f"{phrase} {label},{label},{number}" for number, phrase in enumerate(PHRASES)
            for label in tiny.DIGITS[:num_classes]]  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "queries.csv").write_text("\n".join(["text,label,phrase", *rows, *([more] if more else [])]) + "\n")


def configure(root: Path, num_classes: int = 4, **variants: Any) -> None:
    """Write the configuration anew, its paths in this very workspace."""
    tiny.write_config(root, root / "digits.parquet", settings(root, num_classes, **variants))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> Path:
    """One generation, trained on four of five digits, and its text tower. Copy it before changing it."""
    root = tmp_path_factory.mktemp("first") / "workspace"
    write_queries(root)
    tiny.new_workspace(root, settings(root, 4))
    running.update(root)
    return root


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second generation that owns half of the gallery's rows, and its tower. Copy it to change it."""
    root = copied(first, tmp_path_factory.mktemp("second") / "workspace", 5)
    result = running.update(root)
    assert (result.outcome, result.fraction) == ("COMPATIBLE_ROLLOUT", 0.0), "without prices, the smallest that passes"
    embed(root, result.candidate, 50)
    return root


def copied(source: Path, target: Path, num_classes: int = 4) -> Path:
    tiny.copy_workspace(source, target)
    configure(target, num_classes)
    return target


@pytest.fixture
def root(first: Path, tmp_path: Path) -> Path:
    return copied(first, tmp_path / "workspace")


@pytest.fixture
def two(second: Path, tmp_path: Path) -> Path:
    return copied(second, tmp_path / "workspace", 5)


def towers_of(root: Path) -> list[str]:
    return list(open_workspace(str(root)).registry.variants())


def search(root: Path, text: str, asked_as: str = "words", *, code: int = 0) -> Any:
    return running.document("search", text, "--root", root, "--as", asked_as, code=code)


def make(root: Path, name: str = "words", *, code: int = 0) -> Any:
    """The row of a tower that is made, or the refusal."""
    found = running.document("variant", name, "--root", root, code=code)
    return found["error"] if "error" in found else found["variants"][0]


# Made and judged ------------------------------------------------------------------------------------------------------


def test_an_update_gives_its_generation_a_text_tower_that_only_queries(first):
    workspace = open_workspace(str(first))
    champion, (tower,) = workspace.registry.serving().champion, towers_of(first)
    card = read_card(workspace.generation_uri(tower))
    assert tower == f"g001.words-{card.digest[:6]}"
    assert (card.role, card.of, card.takes, card.origin, card.width) == ("query_only", champion, "text", "adopted", 16)
    assert (card.backbone.name, card.has_classifier) == (f"{TOWERS}:by_class", False)
    assert workspace.registry.readable(tower) == [champion]
    assert workspace.registry.generations() == [champion]
    assert tower not in workspace.gallery.generations()
    assert sorted(path.name for path in Path(workspace.generation_uri(tower)).iterdir()) == ["card.json", "probes.json"]
    (judged,) = workspace.registry.events(VariantJudged)
    assert (judged.payload.approved, judged.payload.takes) == (True, "text")
    assert judged.payload.row.keys() == {champion}, "a text tower has no gallery of its own"
    assert judged.payload.row[champion] >= 0.75, "it knows four digits of five"
    history = " ".join(running.command("history", "--root", first).output.split())
    assert f"{tower} made with {TOWERS}:by_class, a text tower that only queries" in history


def test_the_report_the_status_and_the_command_have_its_row(second):
    _, newer = towers_of(second)
    pages = [page.read_text() for page in (second / "evaluations").glob("*/report.html")]
    assert any(newer in page for page in pages)
    (row,) = [row for row in running.document("status", "--root", second)["variants"] if row["answers"]]
    assert (row["variant"], row["takes"], row["unreadable"]) == (newer, "text", 0)
    text = running.command("variant", "--root", second).output
    assert f"{newer} answers for words: approved" in text


def test_run_again_nothing_is_made_or_judged_twice(two):
    kinds = (VariantTrained, VariantJudged)
    before = [e.event_id for e in open_workspace(str(two)).registry.history() if isinstance(e.payload, kinds)]
    assert running.update(two).repeated
    make(two)
    after = [e.event_id for e in open_workspace(str(two)).registry.history() if isinstance(e.payload, kinds)]
    assert after == before
    assert len(after) == 4


@pytest.mark.parametrize("point", ["after train variant words", "variant-certified"])
def test_an_update_killed_on_the_way_to_its_tower_goes_on(first, tmp_path, point):
    root = tmp_path / "workspace"
    write_queries(root)
    tiny.new_workspace(root, settings(root, 4))
    with running.killed_at(point):
        running.update(root)
    assert answering(open_workspace(str(root)).registry) == {}
    running.update(root)
    registry = open_workspace(str(root)).registry
    assert len(registry.events(VariantTrained)) == len(registry.events(VariantJudged)) == 1
    assert list(answering(registry)) == ["words"]


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("narrow", "expected numbers of shape (8, 16), one vector of its generation's width for each text, found"),
        ("flat", "of shape (128,)"),
        ("words", "found <U1 of shape (8, 16)"),
        ("not_a_number", "found NaN, infinity or zero for 1 (first 'a red shoe with white laces')"),
        ("zero", "found NaN, infinity or zero for 8"),
        ("always_the_same", "found the same one for all 8"),
        ("of_its_place", "expected the same vector for a text alone as among others"),
        ("raises", "it raised MemoryError: no room for weights; a tower takes any text"),
        ("raises_when_built", "towers:raises_when_built raised FileNotFoundError: weights.bin"),
        ("is_nothing", "to return a callable that takes a list of texts, found NoneType"),
    ],
)
def test_what_is_no_tower_is_refused_by_name_and_nothing_is_stored(root, factory, said):
    configure(root, broken=words(root, factory))
    before = sorted(path.name for path in (root / "generations").iterdir())
    line = make(root, "broken", code=1)
    assert said in line
    assert "broken" in line
    assert sorted(path.name for path in (root / "generations").iterdir()) == before
    assert len(towers_of(root)) == 1
    assert search(root, "the digit 1")["query_generation"] == towers_of(root)[0], "the other one goes on"


def test_a_tower_of_chance_is_recorded_with_its_reason_and_answers_nothing(root):
    configure(root, words=words(root), random=words(root, "chance"))
    row = make(root, "random", code=3)
    assert not row["approved"]
    assert "is not above the 20.0 % of a model that knows nothing" in row["reason"], "the margin is 90 points"
    assert not any(query == row["variant"] for query, _ in open_workspace(str(root)).registry.certificates())
    assert "not approved" in search(root, "the digit 1", "random", code=1)["error"]
    assert "may query" in search(root, "the digit 1", row["variant"], code=1)["error"]


def test_a_tower_below_what_is_asked_for_is_refused_and_judged_again_when_less_is_asked(root):
    configure(root, words=words(root, min_quality_points=99.0))
    row = make(root, code=3)
    assert "below the 99 % that are asked for" in row["reason"]
    assert answering(open_workspace(str(root)).registry) == {}, "what it was certified for is revoked"
    configure(root, words=words(root, min_quality_points=30.0))
    assert make(root)["approved"]
    assert len(open_workspace(str(root)).registry.events(VariantTrained)) == 1
    configure(root, words=words(root, min_quality_points=99.0))
    assert not make(root, code=3)["approved"], "an older judgement of the same inputs does not stand any more"
    assert answering(open_workspace(str(root)).registry) == {}


def test_texts_without_a_picture_to_find_are_counted_and_too_few_labels_refused(root):
    write_queries(root, more="a zebra,zebra,99")
    assert "(1 of 151 texts have no item of their label to find)" in make(root)["reason"]
    (root / "queries.csv").write_text("text,label,phrase\nthe digit 1,1,a\nthe digit 2,2,b\n")
    row = make(root, code=3)
    assert "from 2 identities, at least 5" in row["reason"]
    (root / "queries.csv").write_text("text,label,phrase\na zebra,zebra,a\n")
    found = running.document("variant", "words", "--root", root, code=2)["error"]
    assert "expected labels of the evaluation gallery, such as '0', '1', '2', found none" in found


def test_a_labelled_text_without_a_vector_stops_the_judgement(root):
    write_queries(root, more="nothing at all 1,1,99")
    configure(root, words=words(root), shy=words(root, "cannot_say"))
    line = make(root, "shy", code=1)
    assert "found 1 without (first 'nothing at all 1': non-finite embedding)" in line
    write_queries(root, more="raise 1,1,99")
    assert "it raised RuntimeError: no such token" in make(root, "shy", code=1)


# Its successor --------------------------------------------------------------------------------------------------------


def test_a_second_generation_gets_a_tower_of_its_own_that_is_judged_against_the_first(second):
    registry = open_workspace(str(second)).registry
    older, newer = towers_of(second)
    judged = {event.generation: event.payload for event in registry.events(VariantJudged)}
    assert f"; {older}, which it takes the place of, found" in judged[newer].reason
    assert "takes the place" not in judged[older].reason
    assert judged[newer].row.keys() == {*registry.generations()}
    assert answering(registry) == {"words": newer}


def test_a_worse_tower_is_refused_and_the_one_before_goes_on(two):
    better = towers_of(two)[-1]
    strict = {"quality_margin_points": 20.0}
    configure(two, 5, words=words(two, parameters={"noise": 2.0}, **strict))
    row = make(two, code=3)
    assert f"{better}, which it takes the place of, found" in row["reason"]
    assert "worse by more than the margin of 20 points" in row["reason"]
    assert search(two, "the digit 3")["query_generation"] == better
    configure(two, 5, words=words(two, parameters={"version": 2}, **strict))
    row = make(two)
    assert row["variant"] != better
    assert search(two, "the digit 3")["query_generation"] == row["variant"], "of one generation the one judged last"


def test_a_successor_is_compared_although_the_older_towers_module_is_gone(two, monkeypatch):
    """Its vectors of the labelled texts are kept; only for new texts it has to be asked."""
    older, newer = towers_of(two)
    running.document("retire", newer, "--reason", "a test", "--root", two)
    real = open_text_encoder

    def gone(uri: str):
        if older in uri:
            raise TextTowerError("no such module")
        return real(uri)

    monkeypatch.setattr("graceful.flows.update.text_towers.open_text_encoder", gone)
    configure(two, 5, words=words(two, parameters={"version": 2}))
    assert f"; {older}, which it takes the place of" in make(two)["reason"]
    write_queries(two, more="another 3,3,99")
    configure(two, 5, words=words(two, parameters={"version": 3}))
    newest = towers_of(two)[-1]
    running.document("retire", newest, "--reason", "a test", "--root", two)
    line = make(two, code=1)
    assert f"'graceful retire {older} --reason ...'" in line


def test_a_tower_reads_the_rows_that_it_is_certified_for(two):
    workspace = open_workspace(str(two))
    champion, previous = workspace.registry.serving().champion, workspace.registry.serving().previous
    tower = towers_of(two)[-1]
    assert workspace.registry.readable(tower) == [previous, champion]
    found = search(two, "the digit 1")
    assert {hit["generation"] for hit in search(two, "the digit 1")["hits"]} <= {previous, champion}
    assert (found["unreadable"], found["query_generation"]) == (0, tower)
    running.document("revoke", tower, previous, "--reason", "a test", "--root", two)
    found = search(two, "the digit 1")
    assert {hit["generation"] for hit in found["hits"]} == {champion}
    assert found["unreadable"] == 50


def test_a_rollback_moves_the_tower_that_answers(two):
    older, newer = towers_of(two)
    assert search(two, "the digit 1")["query_generation"] == newer
    assert search(two, "the digit 1", older)["query_generation"] == older
    rollback(open_workspace(str(two)))
    assert search(two, "the digit 1")["query_generation"] == older


def test_a_tower_whose_weights_were_exchanged_is_refused_and_made_anew(root):
    weights = root / "weights.json"
    weights.write_text("0")
    configure(root, filed=words(root, "from_file", parameters={"weights": str(weights)}))
    before = make(root, "filed")["variant"]
    uri = open_workspace(str(root)).generation_uri(before)
    vectors, failures = open_text_encoder(uri)(["the digit 1"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert failures == {}
    weights.write_text("3")
    with pytest.raises(EncoderChangedError, match="make it anew with 'graceful variant'"):
        open_text_encoder(uri)
    assert "found a cosine of" in search(root, "the digit 1", "filed", code=1)["error"]
    row = make(root, "filed", code=3)
    assert row["variant"] != before
    assert f"{before}, which it takes the place of, found" in row["reason"], "by the vectors that were kept"
    assert answering(open_workspace(str(root)).registry)["filed"] == before
    weights.write_text("0")
    assert make(root, "filed")["variant"] == before, "it is found again, and judged as before"
    assert search(root, "the digit 1", "filed")["query_generation"] == before
    weights.write_text("3")
    (Path(uri) / "probes.json").unlink()
    assert search(root, "the digit 1", "filed")["query_generation"] == before, "without probes nothing is compared"


def test_a_tower_that_gives_almost_the_same_vectors_is_the_same_variant(root):
    configure(root, words=words(root, "almost_the_same"))
    before = make(root)["variant"]
    assert make(root)["variant"] == before
    assert search(root, "the digit 1")["query_generation"] == before
    assert len(towers_of(root)) == 2


# Asked ----------------------------------------------------------------------------------------------------------------


def test_a_text_finds_the_pictures_that_it_names(first):
    for label in tiny.DIGITS[:4]:
        found = search(first, f"please show me the digit {label}")
        assert found["query_generation"] == towers_of(first)[0]
        assert found["hits"][0]["label"] == label
    shown = running.command("search", "a photo of a 2", "--as", "words", "--root", first, "-k", 1).output
    assert f"Asked by {towers_of(first)[0]}." in shown


def test_a_text_for_images_and_an_image_for_texts_say_what_to_do(first, tmp_path):
    line = running.document("search", "the digit 1", "--root", first, code=1)["error"]
    assert "expected an image, found no file at" in line
    assert "--as" in line
    picture = tmp_path / "query.png"
    picture.write_bytes(b"a picture")
    line = search(first, str(picture), code=1)["error"]
    assert f"expected a text, found the file {picture}" in line
    assert "expected a text, found nothing" in search(first, "  ", code=1)["error"]
    assert "at most 1,000 characters, found 1,001" in search(first, "x" * 1001, code=1)["error"]


def test_the_python_api_searches_with_texts(first):
    shop = graceful.open(first)
    (hits,) = shop.search_texts(["the digit 3"], k=5, generation="words")
    assert [hit.label for hit in hits] == ["3"] * 5
    assert [hit.item_id for hit in hits] == [hit["item_id"] for hit in search(first, "the digit 3")["hits"][:5]]
    assert shop.search_texts([], generation="words") == []
    with pytest.raises(UsageError, match="a list of texts"):
        shop.search_texts("the digit 3", generation="words")
    with pytest.raises(WrongQueryError, match="expected a text, found an image"):
        shop.search([first / "digits.parquet"], generation="words")
    with pytest.raises(WrongQueryError, match="expected an image, found a text"):
        shop.search_texts(["the digit 3"], generation=open_workspace(str(first)).registry.serving().champion)
    with pytest.raises(UnreadableTextError):
        shop.search_texts(["the digit 3", "\n"], generation="words")


def test_a_text_that_fails_does_not_touch_those_that_are_answered_with_it(root):
    configure(root, shy=words(root, "cannot_say"))
    assert make(root, "shy")["approved"]
    served = GallerySearcher(open_workspace(str(root)), "shy").served
    texts = ["the digit 1", "please raise", "nothing", " ", "the digit 2"]
    alone = [served.encode_texts([text])[0] for text in texts]
    found = served.encode_texts(texts)
    assert [type(one) for one in found] == [type(one) for one in alone]
    assert [type(one).__name__ for one in found] == [
        "ndarray", "TextTowerError", "UnreadableTextError", "UnreadableTextError", "ndarray",
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-6)
    answers = answer_texts(served, [TextQuestion(text, 3, with_sources=False) for text in texts])
    assert [isinstance(answer, bytes) for answer in answers] == [True, False, False, False, True]
    assert [hit["label"] for hit in json.loads(answers[4])["hits"]] == ["2"] * 3


def test_the_endpoint_answers_texts_in_a_body_and_in_an_address(root):
    configure(root, words=words(root), shy=words(root, "cannot_say"))
    assert make(root, "shy")["approved"]
    tower, shy = towers_of(root)
    champion = open_workspace(str(root)).registry.serving().champion
    vector = open_text_encoder(open_workspace(str(root)).generation_uri(tower))(["the digit 2"])[0][0].tolist()
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:

        def ask(**request: Any) -> dict[str, Any]:
            return client.post("/search", **request).json()

        expected = ask(json={"text": "the digit 2"}, params={"as": "words", "k": 4})
        assert expected["query_generation"] == tower
        assert [hit["label"] for hit in expected["hits"]] == ["2"] * 4
        assert ask(json={"text": "the digit 2", "as": "words", "k": 4}) == expected
        assert ask(json={"text": "the digit 2", "k": 4}, params={"generation": tower}) == expected
        assert client.get("/search", params={"text": "the digit 2", "as": "words", "k": 4}).json() == expected
        assert client.get("/search", params={"text": "the digit 2", "generation": tower, "k": 4}).json() == expected
        assert ask(json={"vector": vector, "generation": tower, "k": 4}) == expected, "a client that encodes itself"
        assert ask(json={"vector": vector})["query_generation"] == champion
        json_body = {"content-type": "application/json"}
        refused = [
            (client.post("/search", json={"text": "x"}), 422, "wrong_request", "expected an image, found a text"),
            (client.get("/search", params={"text": "x"}), 422, "wrong_request", "expected an image, found a text"),
            (client.post("/search?as=words", content=b"x"), 422, "wrong_request", "expected a text, found an image"),
            (client.get("/search", params={"as": "words"}), 422, "wrong_request", "text"),
            (client.post("/search", json={"text": "x", "as": "w"}), 404, "unknown_variant", "words, shy"),
            (client.post("/search?as=words", json={"text": " "}), 422, "unreadable_text", "found nothing"),
            (client.post("/search?as=words", json={"text": ""}), 422, "wrong_request", "text: "),
            (client.post("/search?as=words", json={"text": 3}), 422, "wrong_request", "text: "),
            (client.post("/search?as=words", json={"text": "x", "vector": [1.0]}), 422, "wrong_request", "vector: "),
            (client.post("/search?as=words", content=b'{"text": "\\ud800"}', headers=json_body), 422,
             "wrong_request", ""),
            (client.post("/search?as=words", json={"text": "x" * 1_001}), 422, "wrong_request", "1000 characters"),
            (client.get("/search", params={"as": "words", "text": "x" * 1_001}), 422, "wrong_request", "1000 char"),
            (client.post("/search?as=words", json={"text": "x" * 100_000}), 413, "too_large", ""),
            (client.post("/search?generation=g001", json={"text": "x", "as": "words"}), 422, "wrong_request", "both"),
            (client.get(f"/search?generation={champion}&as=words&text=x"), 422, "wrong_request", "both"),
            (client.post("/search?as=shy", json={"text": "nothing"}), 422, "unreadable_text", "no finite embedding"),
            (client.post("/search?as=shy", json={"text": "raise"}), 503, "broken_tower", "no such token"),
        ]  # fmt: skip
        for answer, status, kind, said in refused:
            assert (answer.status_code, answer.json()["kind"]) == (status, kind), answer.text
            assert said in answer.json()["detail"]
        longest = client.post("/search?as=words", json={"text": "\N{CAT FACE}" * MAX_TEXT_CHARS})
        assert longest.status_code == 200, longest.text
        status = client.get("/status").json()["variants"]
        assert {name: (found["answers_for"], found["takes"]) for name, found in status.items()} == {
            tower: ("words", "text"),
            shy: ("shy", "text"),
        }
        figures = client.get("/metrics").text
        assert 'graceful_search_seconds_count{kind="text"} 6.0' in figures
        assert 'graceful_search_errors_total{kind="broken_tower"} 1.0' in figures
        document = client.get("/openapi.json").json()
        validate(document)
        body = document["paths"]["/search"]["post"]["requestBody"]["content"]["application/json"]
        TextQuery.model_validate(body["examples"]["text"]["value"])
        VectorQuery.model_validate(body["examples"]["vector"]["value"])
        assert {one["name"] for one in document["paths"]["/search"]["get"]["parameters"]} >= {"text", "as", "k"}
        page = client.get("/docs").text
        assert "GET /search" in page
        assert "a red shoe" in page


def test_a_tower_that_cannot_be_opened_where_it_is_served_disturbs_nobody(root, monkeypatch):
    (tower,) = towers_of(root)

    def gone(uri: str):
        raise TextTowerError(f"making {tower}: no such module")

    monkeypatch.setattr("graceful.flows.search.searcher.open_text_encoder", gone)
    vector = [1.0] * 16
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:
        assert client.post("/search", json={"vector": vector}).status_code == 200
        found = client.get("/status").json()
        assert found["last_look"]["ok"]
        assert "no such module" in found["variants"][tower]["error"]
        refused = client.post("/search?as=words", json={"text": "x"})
        assert (refused.status_code, refused.json()["kind"]) == (404, "unknown_variant")
        assert "no such module" in refused.json()["detail"]


def test_no_threshold_of_images_is_applied_to_the_scores_of_texts(root):
    consumer = {"unlock": {"threshold": 0.1, "guards": "FAR", "limit": 0.5}}
    changes = {**settings(root, 4), "policy.thresholds": consumer}
    tiny.write_config(root, root / "digits.parquet", changes)
    workspace = open_workspace(str(root))
    assert GallerySearcher(workspace).served.thresholds["unlock"], "it is served with hits of images"
    found = search(root, "the digit 1")
    assert found["thresholds"] == {}
    assert all(hit["above"] == {} for hit in found["hits"])


def test_it_is_no_encoder_of_images_and_is_not_exported(first, tmp_path):
    (tower,) = towers_of(first)
    line = running.document("export", "words", "--root", first, "--out", tmp_path / "words.pt2", code=1)["error"]
    assert (
        f"exporting {tower}: expected an encoder of images, found a text tower: its weights are not kept here" in line
    )
    assert not (tmp_path / "words.pt2").exists()
    with pytest.raises(TakesTextError, match="found a text tower"):
        open_encoder(open_workspace(str(first)).generation_uri(tower))


def test_the_function_in_the_documentation_is_a_tower(first):
    page = (tiny.ROOT / "docs" / "howto" / "words.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0], names)
    champion = open_workspace(str(first)).registry.serving().champion
    tower = names["shop"](str(first / "generations" / champion), 16)
    _, _, means = read_classifier(str(first / "generations" / champion))
    found = tower(["the digit 2", "nothing that it knows", "the digit 3"])
    np.testing.assert_array_equal(found[[0, 2]], means.numpy()[2:4])
    np.testing.assert_array_equal(tower(["nothing that it knows"]), found[1:2])


# The configuration ----------------------------------------------------------------------------------------------------

QUERIES = {"source": "csv", "path": "queries.csv"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"factory": "a:b", "queries": QUERIES, "backbone": "small_cnn"}, "found both; keep one of the two"),
        ({"queries": QUERIES}, "found neither; add one of the two"),
        ({"factory": "a:b"}, "expected labelled texts by which its gate can judge it, found none"),
        ({"factory": "a:b", "queries": QUERIES, "epochs": 3, "seed": 1}, "found epochs, seed; leave them out"),
        ({"factory": "a.b", "queries": QUERIES}, "variants.words.factory"),
        ({"backbone": "small_cnn", "parameters": {"x": 1}}, "found parameters; leave it out"),
        ({"factory": "a:b", "queries": {**QUERIES, "text": "x"}}, "did you mean 'text_column'"),
        ({"factory": "a:b", "queries": {**QUERIES, "label_columns": []}}, "label_columns"),
        ({"factory": "a:b", "queries": QUERIES, "min_quality_points": 101}, "min_quality_points"),
    ],
)
def test_a_table_that_is_no_tower_is_refused_before_anything_is_made(tmp_path, digits_file, table, said):
    path = tiny.write_config(tmp_path, digits_file)
    with pytest.raises(ConfigError) as refused:
        load_config(path, str(tmp_path), {"variants.words": table})
    assert said in str(refused.value)


def test_the_check_looks_at_the_factory_and_the_texts(root):
    configure(root, words=words(root, "by_clas"))
    assert "did you mean 'by_class'?" in make(root, code=2)
    configure(root, words={**words(root), "factory": "nowhere.at:all"})
    assert "variants.words.factory nowhere.at:all" in make(root, code=2)
    configure(root, words=words(root))
    (root / "queries.csv").write_text("text,label\nx,1\n")
    assert "expected the columns ['phrase']" in make(root, code=2)
    (root / "queries.csv").unlink()
    assert "expected a CSV file, found none" in make(root, code=2)
    assert (
        "found a text tower; name another variant"
        in running.document("variant", "words", "--search", "--root", first_with_texts(root), code=2)["error"]
    )


def first_with_texts(root: Path) -> Path:
    write_queries(root)
    return root


def test_the_decision_is_the_same_with_a_tower_and_without(first):
    with_it, without = tiny.open_config(first), tiny.open_config(first, {"variants": {}})
    assert with_it.variants
    assert with_it.digest() == without.digest()
