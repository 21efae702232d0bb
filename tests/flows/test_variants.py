"""Variants that only query: trained after the decision, judged, and never anything but another query generation."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient

from graceful.files import write_json
from graceful.flows.runtime.progress import SilentProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.search.http import make_app
from graceful.flows.settings.config import ConfigError, load_config
from graceful.flows.store.events import VariantJudged, VariantTrained
from graceful.flows.store.items import item_table
from graceful.flows.store.variants import QueryOnlyError, answering, settle
from graceful.flows.store.workspace import UnsupportedGenerationError, open_workspace
from graceful.flows.update import architecture
from graceful.flows.update.act import Order, plain
from graceful.flows.update.flow import replay_plainly
from graceful.flows.update.gate import move
from graceful.flows.update.order import accept
from graceful.flows.update.serving import (
    generations_to_write,
    go_forward,
    ingest,
    reject,
    release_previous,
    rollback,
)
from graceful.flows.update.variants import train_variant
from graceful.indexing.maintenance import collect
from graceful.indexing.reindex import embed_missing
from graceful.training.architecture import Architecture, propose
from graceful.training.datasets import load_images
from graceful.training.encoder import open_encoder
from graceful.training.exporting import MIN_COSINE
from graceful.training.generation import read_card
from graceful.training.images import decode, read_payloads
from graceful.training.search import cost_of
from tests.flows import running, tiny

pytestmark = pytest.mark.timeout(300)

EDGE = {
    "training_data.where.label": tiny.DIGITS[:4],
    "training.first_max_lr": 0.005,
    "training.epochs": 4,
    "training.batch_size": 32,
    "variants.edge": {
        "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [8, 8]}},
        "epochs": 24,
        "max_lr": 0.005,
    },
}
GROWN = {**EDGE, "training_data.where.label": tiny.DIGITS[:5], "prices": None}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> Path:
    """One generation and its variant. Copy it before changing it."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("first") / "workspace", EDGE)
    running.update(root)
    return root


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second generation, with vectors of its own for half of the gallery, and its variant. Copy it to change it."""
    root = tiny.copy_workspace(first, tmp_path_factory.mktemp("second") / "workspace")
    tiny.write_config(root, root / "digits.parquet", GROWN)
    result = running.update(root)
    assert (result.outcome, result.fraction) == ("COMPATIBLE_ROLLOUT", 0.0), "without prices, the smallest that passes"
    embed(root, result.candidate, 50)
    return root


def embed(root: Path, generation: str, num_items: int) -> None:
    """Write a generation's vectors of the first items."""
    with open_session(str(root), tiny.open_config(root)) as session:
        gallery, encoder = session.workspace.gallery, session.workspace.embed_with(generation)
        embed_missing(gallery, generation, encoder, revisions=gallery.view([]).revisions[:num_items])


@pytest.fixture
def root(second: Path, tmp_path: Path) -> Path:
    """Two generations and their variants, of one's own."""
    return tiny.copy_workspace(second, tmp_path / "workspace")


def variants_of(root: Path) -> list[str]:
    return list(open_workspace(str(root)).registry.variants())


def a_query(root: Path) -> Path:
    """An image that is no item of the gallery."""
    row = pq.read_table(root / "digits.parquet", filters=[("instance", "=", 40)])["image"][0].as_py()
    path = root / "query.png"
    path.write_bytes(row["bytes"])
    return path


def search(root: Path, asked_as: str, *, code: int = 0) -> Any:
    return running.document("search", a_query(root), "--root", root, "--as", asked_as, code=code)


# Made and judged ------------------------------------------------------------------------------------------------------


def test_an_update_gives_its_generation_a_variant_that_only_queries(first):
    workspace = open_workspace(str(first))
    champion, (variant,) = workspace.registry.serving().champion, variants_of(first)
    card = read_card(workspace.generation_uri(variant))
    assert (card.role, card.of, card.ordinal) == ("query_only", champion, 1)
    assert variant == f"g001.edge-{card.digest[:6]}"
    assert card.predecessors == (champion,)
    assert workspace.registry.readable(variant) == [champion]
    assert workspace.registry.generations() == [champion], "nothing that compares generations sees it"
    (judged,) = workspace.registry.events(VariantJudged)
    assert judged.payload.approved
    assert judged.payload.row.keys() == {champion, variant}


def test_the_decision_is_the_same_with_variants_and_without(first):
    with_them, without = tiny.open_config(first), tiny.open_config(first, {"variants": {}})
    assert with_them.variants
    assert with_them.digest() == without.digest()


def test_a_variant_that_knows_nothing_is_recorded_with_its_reason_and_answers_nothing(first, tmp_path):
    root = tiny.copy_workspace(first, tmp_path / "workspace")
    untrained = {**EDGE["variants.edge"], "max_lr": 1e-12, "epochs": 1}
    tiny.write_config(root, root / "digits.parquet", {**EDGE, "variants.blind": untrained})
    made = running.document("variant", "blind", "--root", root, code=3)
    (row,) = made["variants"]
    assert not row["approved"]
    assert "not above" in row["reason"], "with so wide a margin it is chance that refuses it"
    assert row["metric_on"][row["of"]] < 0.5
    registry = open_workspace(str(root)).registry
    assert not any(query == row["variant"] for query, _ in registry.certificates())
    assert "not approved" in search(root, "blind", code=1)["error"]
    assert "may query" in search(root, row["variant"], code=1)["error"]
    assert search(root, "edge")["query_generation"] == variants_of(first)[0], "the other one goes on"


def test_a_tighter_margin_refuses_a_variant_that_is_better_off_on_its_own(first, tmp_path):
    root = tiny.copy_workspace(first, tmp_path / "workspace")
    strict = {**EDGE["variants.edge"], "quality_margin_points": 1.0}
    tiny.write_config(root, root / "digits.parquet", {**EDGE, "variants.edge": strict})
    (row,) = running.document("variant", "edge", "--root", root, code=3)["variants"]
    assert not row["approved"]
    assert "margin of 1 points" in row["reason"]
    registry = open_workspace(str(root)).registry
    assert answering(registry) == {}, "what it was certified for with another margin is revoked"
    assert not any(query == row["variant"] for query, _ in registry.certificates())
    assert len(registry.events(VariantTrained)) == 1, "it was judged again, not trained again"
    tiny.write_config(root, root / "digits.parquet", EDGE)
    assert running.document("variant", "edge", "--root", root)["variants"][0]["approved"]
    assert answering(registry) == {"edge": row["variant"]}, "as it was at first, and judged so again"


def test_run_again_nothing_is_trained_or_judged_twice(root):
    before = open_workspace(str(root)).registry.history()
    assert running.update(root).repeated
    running.document("variant", "edge", "--root", root)
    kinds = (VariantTrained, VariantJudged)
    after = open_workspace(str(root)).registry.history()
    assert [e.event_id for e in after if isinstance(e.payload, kinds)] == [
        e.event_id for e in before if isinstance(e.payload, kinds)
    ]


@pytest.mark.parametrize("point", ["after conclude", "after train variant edge", "variant-certified"])
def test_an_update_killed_on_the_way_to_its_variant_goes_on(first, tmp_path, point):
    root = tiny.new_workspace(tmp_path / "workspace", EDGE)
    with running.killed_at(point):
        running.update(root)
    assert answering(open_workspace(str(root)).registry) == {}
    running.update(root)
    registry, whole = open_workspace(str(root)).registry, open_workspace(str(first)).registry
    assert by_role(registry) == by_role(whole)
    assert len(registry.events(VariantTrained)) == len(registry.events(VariantJudged)) == 1


def by_role(registry):
    """Certificates without digests: weights may differ in their last bits from run to run."""
    return {tuple(name.partition("-")[0] for name in pair) for pair in registry.certificates()}


# Its architecture ----------------------------------------------------------------------------------------------------

SEARCH = {
    "block_widths": [[4, 8], [8, 16]],
    "image_sizes": [6, 8],
    "max_multiply_adds": 20_000,
    "evaluations": 6,
    "population": 3,
    "epochs": 2,
}
SEARCHED = {
    **EDGE,
    "evaluation.dev": {"share": 0.3},
    "variants.edge": {**EDGE["variants.edge"], "epochs": 2, "search": SEARCH},
}


def test_a_search_that_is_killed_goes_on_and_what_it_finds_makes_the_variant(tmp_path, monkeypatch):
    def write(where: str, value: Any) -> None:
        write_json(where, value)
        if len(value["candidates"]) == 2:
            raise running.Killed

    root = tiny.new_workspace(tmp_path / "workspace", SEARCHED)
    running.update(root)
    config = tiny.open_config(root)
    with open_session(str(root), config) as session:
        with monkeypatch.context() as patch:
            patch.setattr(architecture, "write_json", write)
            with pytest.raises(running.Killed):
                architecture.search_architectures(session, ["edge"])
        (stored,) = (root / "searches").iterdir()
        first = json.loads(stored.read_text())["candidates"]
        assert len(first) == 2
        trained = sorted(path.name for path in (root / "generations").iterdir())
        (record,) = architecture.search_architectures(session, ["edge"])
    assert sorted(path.name for path in (root / "generations").iterdir()) == trained, "the super-net is trained once"
    candidates = record.candidates
    assert [candidate.model_dump(mode="json") for candidate in candidates[:2]] == first
    assert len({candidate.architecture for candidate in candidates}) == len(candidates) == 6
    assert all(candidate.cost.multiply_adds <= 20_000 for candidate in candidates)
    assert json.loads(stored.read_text())["candidates"] == record.model_dump(mode="json")["candidates"]
    recipe = config.variants["edge"].recipe(config.training)

    def is_within(tried: Architecture) -> bool:
        return cost_of(recipe, tried, timed=False).multiply_adds <= 20_000

    for number, candidate in enumerate(candidates):  # what one that was never killed would have tried
        asked = propose(record.search.at(8), record.search, candidates[:number], (), is_within, recipe.seed)
        assert asked == candidate.architecture
    assert len(open_workspace(str(root)).registry.variants()) == 1, "a super-net is no variant"

    (found,) = running.document("variant", "edge", "--search", "--root", root)["searches"]
    chosen = max(found["candidates"], key=lambda candidate: candidate["reward"])
    assert found["image_size"] == chosen["architecture"]["image_size"]
    shown = running.command("variant", "edge", "--search", "--root", root).output
    table = tomllib.loads(shown[shown.index("[variants.edge]") :])["variants"]["edge"]
    assert table == {"backbone": found["backbone"], "image_size": found["image_size"]}
    made = {**SEARCHED, "variants.edge": {**SEARCHED["variants.edge"], **table}}
    tiny.write_config(root, root / "digits.parquet", made)
    with open_session(str(root), tiny.open_config(root)) as session:
        card = read_card(session.workspace.generation_uri(train_variant(session, "edge", record.of)))
    assert card.backbone.model_dump(mode="json") == found["backbone"]
    assert card.preprocessing.image_size == found["image_size"]


@pytest.mark.parametrize(
    ("search", "names", "said", "code"),
    [
        (None, ["edge"], "expected a table [variants.edge.search]", 2),
        (SEARCH, ["edge"], "set evaluation.dev", 2),
        (SEARCH, [], "expected the name of a variant", 1),
        ({"block_widths": [[4]]}, ["edge"], "expected a limit", 2),
    ],
)
def test_a_search_that_cannot_be_made_says_what_is_missing(first, tmp_path, search, names, said, code):
    root = tiny.copy_workspace(first, tmp_path / "workspace")
    table = EDGE["variants.edge"] if search is None else {**EDGE["variants.edge"], "search": search}
    tiny.write_config(root, root / "digits.parquet", {**EDGE, "variants.edge": table})
    assert said in running.document("variant", *names, "--search", "--root", root, code=code)["error"]
    assert not (root / "searches").exists()


# What it reads --------------------------------------------------------------------------------------------------------


def test_a_variant_reads_the_rows_that_it_is_certified_for_and_no_others(root):
    workspace = open_workspace(str(root))
    champion, previous = workspace.registry.serving().champion, workspace.registry.serving().previous
    variant = answering(workspace.registry)["edge"]
    assert workspace.registry.readable(variant) == [previous, champion]
    found = search(root, "edge")
    assert found["query_generation"] == variant
    assert {hit["generation"] for hit in found["hits"]} == {previous, champion}
    mixed = workspace.view(variant).rows_by_generation()
    assert mixed == workspace.view(champion).rows_by_generation()
    running.document("revoke", variant, previous, "--reason", "a test", "--root", root)
    assert len(workspace.view(variant).unreadable()) == mixed[previous]
    found = search(root, "edge")
    assert {hit["generation"] for hit in found["hits"]} == {champion}
    assert found["unreadable"] == mixed[previous]
    status = running.document("status", "--root", root)
    (row,) = [row for row in status["variants"] if row["answers"]]
    assert (row["variant"], row["unreadable"]) == (variant, mixed[previous])
    assert status["unreadable"] == 0, "the champion reads all of them still"


def test_no_vector_is_ever_written_by_a_variant(root):
    config = tiny.open_config(root)
    variants = variants_of(root)
    with open_session(str(root), config) as session:
        workspace, registry = session.workspace, session.workspace.registry
        assert not {*workspace.gallery.generations()} & {*variants}
        with pytest.raises(QueryOnlyError, match="only queries; name its generation, g002-"):
            embed_missing(workspace.gallery, variants[1], workspace.embed_with(variants[1]))
        for act in (
            lambda: move(workspace, variants[1], lambda _: {}, act="serving it", remedy=""),
            lambda: go_forward(workspace, variants[1], reason="a test"),
            lambda: accept(session, variants[1], Order("a test")),
            lambda: reject(workspace, variants[1], reason="a test"),
        ):
            with pytest.raises(QueryOnlyError, match="a variant, which only queries"):
                act()
        # A supported client that cannot read the champion's rows: those of its generation are written.
        owner = registry.variants()[variants[0]]
        writing = generations_to_write(workspace, [variants[0]])
        assert writing == [registry.serving().champion, owner]
        late = load_images(config.training_data)
        ingest(workspace, item_table(late).slice(0, 3), supported=[variants[0]])
        assert not {*workspace.gallery.generations()} & {*variants}
        assert not len(workspace.view(variants[0]).unreadable())


def test_a_rollback_moves_the_variant_that_answers(root):
    workspace = open_workspace(str(root))
    older, newer = variants_of(root)
    assert search(root, "edge")["query_generation"] == newer
    assert search(root, older)["query_generation"] == older, "an old phone goes on"
    rollback(workspace)
    assert search(root, "edge")["query_generation"] == older
    assert {hit["generation"] for hit in search(root, "edge")["hits"]} == {workspace.registry.serving().champion}
    go_forward(workspace, workspace.registry.variants()[newer], reason="a test")
    assert search(root, "edge")["query_generation"] == newer


def test_what_a_live_variant_reads_is_kept_and_what_a_dead_one_read_is_not(root):
    workspace = open_workspace(str(root))
    registry, (older, newer) = workspace.registry, variants_of(root)
    champion, previous = registry.serving().champion, registry.serving().previous
    embed(root, champion, 100)
    release_previous(workspace)
    with pytest.raises(UnsupportedGenerationError):
        workspace.may_query(older)
    # Nobody may ask as the newer one: the older one answers, and what it reads is kept.
    running.document("revoke", newer, newer, "--reason", "a test", "--root", root)
    assert answering(registry) == {"edge": older}
    collect(workspace.gallery, workspace.protected, dead_share=0.0)
    assert workspace.gallery.generations()[previous] == 100
    assert len(search(root, "edge")["hits"]) == 10
    made = next(event.payload for event in registry.events(VariantJudged) if event.generation == newer)
    settle(registry, newer, made, update_key="again")
    assert answering(registry) == {"edge": newer}
    collect(workspace.gallery, workspace.protected, dead_share=0.0)
    assert workspace.gallery.generations() == {champion: 100}


def test_a_variant_that_is_retired_answers_no_longer(root):
    older, newer = variants_of(root)
    running.document("retire", newer, "--reason", "a test", "--root", root)
    assert search(root, "edge")["query_generation"] == older
    assert running.update(root).repeated, "the update sees no reason to make it again"
    assert search(root, "edge")["query_generation"] == older


# Over HTTP ------------------------------------------------------------------------------------------------------------


def test_the_endpoint_answers_variants_by_name_and_by_who_made_a_vector(root):
    older, newer = variants_of(root)
    image = a_query(root).read_bytes()
    encoder = open_encoder(open_workspace(str(root)).generation_uri(older), precision="float32")
    vector = encoder([str(root / "query.png")])[0][0].tolist()
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:

        def ask(**request: Any) -> dict[str, Any]:
            return client.post("/search", **request).json()

        champion = ask(content=image)["query_generation"]
        assert champion.startswith("g002-")
        assert ask(content=image, params={"as": "edge"})["query_generation"] == newer
        assert ask(json={"vector": vector, "as": "edge"})["query_generation"] == newer
        by_older = ask(json={"vector": vector, "generation": older})
        assert by_older["query_generation"] == older, "a phone that was not updated yet"
        found, expected = (
            [hit["item_id"] for hit in answer["hits"]] for answer in (by_older, search(root, older))
        )  # the command may encode in 16 bits, where these are faster: near ties change places
        assert found[0] == expected[0]
        assert len({*found} & {*expected}) >= 0.7 * len(expected)
        assert ask(json={"vector": vector, "generation": older, "as": "edge"})["kind"] == "other_generation"
        refused = client.post("/search", content=image, params={"as": "watch"})
        assert (refused.status_code, refused.json()["kind"]) == (404, "unknown_variant")
        status = client.get("/status").json()
        assert {name: found["answers_for"] for name, found in status["variants"].items()} == {
            older: None,
            newer: "edge",
        }


def test_the_report_and_the_command_have_a_row_for_every_variant(second):
    variants = variants_of(second)
    registry = open_workspace(str(second)).registry
    rows = running.document("variant", "--root", second)["variants"]
    assert [row["variant"] for row in rows] == variants
    assert rows[1]["metric_on"].keys() == {*registry.generations(), variants[1]}
    pages = [page.read_text() for page in (second / "evaluations").glob("*/report.html")]
    for variant in variants:
        assert any(variant in page for page in pages)
    text = running.command("variant", "--root", second).output
    assert "Queries by row, gallery of column" in text
    assert f"{variants[1]} answers for edge" in text
    history = " ".join(running.command("history", "--root", second).output.split())
    for variant in variants:
        assert f"{variant} trained, a variant that only queries" in history
        assert f"{variant} judged: approved" in history


# Taken elsewhere ------------------------------------------------------------------------------------------------------


def test_a_variant_is_exported_by_its_name_with_what_was_measured_beside_it(second, tmp_path):
    (_, newer), file = variants_of(second), tmp_path / "edge.pt2"
    found = running.document("export", "edge", "--root", second, "--out", file)
    assert found == json.loads(Path(f"{file}.json").read_text())
    assert (found["generation"], found["size_bytes"]) == (newer, file.stat().st_size)
    encoder = open_encoder(open_workspace(str(second)).generation_uri(newer), precision="float32")
    program = torch.export.load(file).module()
    sources = load_images(tiny.open_config(second).evaluation.queries).sources[:20]
    pixels = np.stack([decode(payload, encoder.card.preprocessing) for payload in read_payloads(sources)])
    cosines = (program(torch.from_numpy(pixels)).detach().numpy() * encoder(sources)[0]).sum(axis=1)
    assert cosines.min() >= MIN_COSINE
    text = running.command("export", "g001", "--root", second, "--out", file).output
    assert "multiply-adds" in text
    assert "outside the graph" in text
    for wrong, said in ((("edge", "--format", "coreml"), "torch or onnx"), (("watch",), "approved variant")):
        refused = running.document("export", *wrong, "--root", second, "--out", file, code=1)
        assert said in refused["error"]


def test_the_example_runs_at_a_smaller_size(tmp_path):
    """Fewer alphabets and epochs: what it is measured to be is not looked at."""
    smaller = {
        "training.epochs": 1,
        "variants.edge.epochs": 1,
        "replay.counts": [2],
        "evaluation.queries.where.alphabet.max": 25,
        "evaluation.gallery.where.alphabet.max": 25,
    }
    root = str(tmp_path / "workspace")
    result = replay_plainly(str(tiny.ROOT / "examples" / "edge.toml"), root, smaller, SilentProgress(), plain)
    (verdict,) = open_workspace(root).registry.events(VariantJudged)
    assert (verdict.payload.of, verdict.payload.name) == (result.champion, "edge")


# The configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("variants.edge.width", 8, "expected the width 16 of its generation"),
        ("variants.edge.width", 32, "expected the width 16 of its generation"),
        ("variants.g002", {"backbone": "small_cnn"}, "is not like a generation's"),
        ("variants.Edge", {"backbone": "small_cnn"}, "small letters"),
        ("variants.edge.image_sizes", 8, "did you mean 'image_size'"),
        ("variants.edge.constraints", [], "constraints"),
        ("variants.edge.constraints", [{"name": "l3"}], "expected package.module:Class or one of"),
        ("variants.edge.batch_size", 1, "batch_size"),
        ("variants.phone", {"epochs": 3}, "found neither; add one of the two"),
        (
            "variants.both",
            {"backbone": "small_cnn", "image_size": 8, "preprocessing": {**tiny.BASE["training"]["preprocessing"]}},
            "found both; give one",
        ),
    ],
)
def test_a_variant_that_cannot_search_is_refused_before_anything_is_trained(tmp_path, digits_file, key, value, said):
    path = tiny.write_config(tmp_path, digits_file, EDGE)
    with pytest.raises(ConfigError) as refused:
        load_config(path, str(tmp_path), {key: value})
    assert said in str(refused.value)


def test_an_unknown_network_of_a_variant_is_found_by_the_check(first, tmp_path):
    root = tiny.copy_workspace(first, tmp_path / "workspace")
    tiny.write_config(root, root / "digits.parquet", {**EDGE, "variants.phone": {"backbone": "resnet19"}})
    found = running.document("check", "--root", root, code=2)
    (error,) = [finding for finding in found["findings"] if finding["level"] == "error"]
    assert "variants.phone.backbone resnet19" in error["what"]
    assert "resnet18" in error["remedy"]
    refused = running.document("variant", "phone", "--root", root, code=2)
    assert "resnet19" in refused["error"]
    refused = running.document("variant", "watch", "--root", first, code=2)
    assert "[variants.watch]" in refused["error"]


def test_a_recipe_takes_from_training_what_a_variant_does_not_say(tmp_path, digits_file):
    changes = {
        **EDGE,
        "training.preprocessing.resize_size": 10,
        "training.mixture": 0.5,
        "variants.edge.image_size": 16,
    }
    config = load_config(tiny.write_config(tmp_path, digits_file, changes), str(tmp_path))
    recipe = config.variants["edge"].recipe(config.training)
    assert (recipe.preprocessing.image_size, recipe.preprocessing.resize_size) == (16, 20)
    assert (recipe.start, recipe.mixture, recipe.interpolation) == ("scratch", 0.0, 0.0)
    assert (recipe.epochs, recipe.first_max_lr, recipe.batch_size) == (24, 0.005, 32)
    assert [entry.name for entry in recipe.constraints] == ["l2", "cross_contrast", "ract"]
    assert recipe.constraints[0].against == "latest"


def test_a_wider_variant_with_the_width_of_its_generation_among_its_prefixes_is_allowed(tmp_path, digits_file):
    path = tiny.write_config(tmp_path, digits_file, EDGE)
    wider = {"variants.edge.width": 24, "variants.edge.prefix_widths": [16]}
    assert load_config(path, str(tmp_path), wider).variants["edge"].width == 24
