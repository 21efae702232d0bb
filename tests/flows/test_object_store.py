"""A workspace in an object store: the same gallery, registry, waves and compare-and-swap on s3://, against moto."""

import json
import os
import threading

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from benchmarks.mortal_world import object_store
from graceful.files import exists, list_files, read_bytes, set_crash_hook, write_bytes
from graceful.flows.cli import app
from graceful.flows.commands.status import forget_items
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.claim import UpdateInProgressError, claim
from graceful.flows.store.events import Decided
from graceful.flows.store.registry import ServingMovedError
from graceful.flows.store.workspace import Workspace, require_workspace
from graceful.flows.update.rollout import Rollout
from graceful.flows.update.serving import delete, ingest, release_previous, rollback
from graceful.indexing.maintenance import collect, forget
from graceful.training.datasets import load_images
from graceful.training.images import read_payloads
from tests.flows import running, tiny
from tests.flows.moves import carry_out_whole
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, items

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

G1, G2 = "g001-aaaaaa", "g002-bbbbbb"
NUM_ITEMS = 12


@pytest.fixture(scope="module")
def bucket():
    """A bucket of moto's server, whose puts are atomic as those of a real store are."""
    with object_store():
        yield "s3://graceful"


def test_command_line_creates_and_reads_a_workspace_in_the_store(bucket, digits_file):
    root = f"{bucket}/by-command"
    run = CliRunner()
    created = run.invoke(app, ["init", root])
    assert created.exit_code == 0, created.output
    status = json.loads(run.invoke(app, ["status", "--root", root, "--json"]).stdout)
    assert (status["champion"], status["items"]) == (None, 0)
    write_bytes(f"{root}/graceful.toml", tiny.config_text(digits_file).encode())
    assert load_workspace_config(root).training.width == 16
    write_bytes(f"{root}/graceful.toml", b"nam = 1")
    refused = run.invoke(app, ["ingest", str(digits_file), "--root", root])
    assert refused.exit_code == 2
    assert "did you mean 'name'?" in refused.stderr


def test_whole_updates_run_in_the_store_and_are_searched_and_rolled_back(
    bucket, digits_file, tmp_path, monkeypatch, command_environment
):
    """Checkpoints, generations, caches, evidence, report, waves and the lineage; only the index is on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root, run = f"{bucket}/whole", CliRunner()

    write_bytes(f"{root}/graceful.toml", tiny.config_text(digits_file).encode())
    config = load_workspace_config(root)
    Workspace(root).create()
    with open_session(root, config) as session:
        tiny.fill_gallery(session.workspace, config)
    assert not running.update(root).repeated
    write_bytes(f"{root}/graceful.toml", tiny.config_text(digits_file, tiny.grown(5)).encode())
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    updated = tiny.graceful("update", "--root", root, "--json", env={**command_environment, **store})
    assert updated.returncode == 0, updated.stderr
    report = json.loads(updated.stdout)["report"]
    assert report.startswith(root)
    assert b"<html" in read_bytes(report)
    assert running.update(root).repeated

    def graceful(*arguments):
        done = run.invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    status = graceful("status", "--root", root)
    first, second = status["previous"], status["champion"]
    assert (first[:4], second[:4]) == ("g001", "g002")
    # A query and a new item that lie in the store themselves.
    payload = read_payloads(load_images(config.evaluation.queries).sources[:1])[0]
    write_bytes(f"{bucket}/photos/new/query.png", payload)
    assert graceful("ingest", f"{bucket}/photos", "--root", root)["added"] == 1
    hits = graceful("search", f"{bucket}/photos/new/query.png", "--root", root, "-k", "2")["hits"]
    assert "photos/new/query.png" in {hit["item_id"] for hit in hits}
    newest = Workspace(root, tiny.no_encoder).registry.events(Decided)[-1].payload.evaluation
    assert graceful("decide", "--from", f"{root}/evaluations/{newest}")["agrees_with_recorded"]
    graceful("rollback", "--root", root)
    assert graceful("status", "--root", root)["champion"] == first
    # Only the index was written beside the store.
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.fixture
def workspace(bucket, request):
    """Twelve items, served by the first generation."""
    models = SyntheticModels(*[SyntheticGeneration(name) for name in (G1, G2)])
    name = request.node.name.replace("[", "-").rstrip("]")
    opened = Workspace(f"{bucket}/{name}", models, create=True)
    ingest(opened, items(4, 3))
    carry_out_whole(opened, rollout(G1, fraction=1.0, before_move="all", certified=[]), champion=None)
    return opened


def rollout(generation, *, fraction=0.5, before_move="wave_zero", certified=(G1,)):
    pairs = ((generation, generation), *((generation, name) for name in certified))
    return Rollout(
        f"update-{generation}", generation, f"decision-{generation}", fraction, "random", before_move, pairs,
        wave_rows=3,
    )  # fmt: skip


def rows(workspace, generation):
    return workspace.view(generation).rows_by_generation()


def test_gallery_is_reindexed_in_part_and_rolled_back(workspace):
    assert rows(workspace, G1) == {G1: NUM_ITEMS}
    report = carry_out_whole(workspace, rollout(G2), champion=G1)
    assert (report.embedded, report.failures) == (6, ())
    reopened = Workspace(workspace.root, workspace.embed_with)
    require_workspace(workspace.root)
    assert rows(reopened, G2) == {G1: 6, G2: 6}
    view = reopened.view(G2)
    for name in (G1, G2):
        positions = view.owned_by(name)
        sources = view.column("source", positions).to_pylist()
        np.testing.assert_allclose(view.vectors(positions), SyntheticGeneration(name).encode(sources)[0], atol=1e-6)
    assert rollback(reopened).champion == G1
    assert rows(workspace, G1) == {G1: NUM_ITEMS}


def test_serving_state_moves_by_compare_and_swap(workspace):
    other = Workspace(workspace.root, workspace.embed_with)
    seen = workspace.registry.serving()
    assert other.registry.serving() == seen
    workspace.registry.move_serving(seen, moved_by="first")
    with pytest.raises(ServingMovedError, match="another update finished first"):
        other.registry.move_serving(seen, moved_by="second")
    assert [state.moved_by for state in other.registry.serving_history()][-1] == "first"


def test_of_moves_at_the_same_moment_one_wins(workspace):
    seen = workspace.registry.serving()
    handles = [Workspace(workspace.root, workspace.embed_with).registry for _ in range(4)]
    start, outcomes = threading.Barrier(4), []

    def move(number):
        start.wait(30)
        try:
            handles[number].move_serving(seen, moved_by=f"thread-{number}")
            outcomes.append(number)
        except ServingMovedError:
            outcomes.append(None)

    threads = [threading.Thread(target=move, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winners = [number for number in outcomes if number is not None]
    assert len(outcomes) == 4
    assert len(winners) == 1
    assert workspace.registry.serving().moved_by == f"thread-{winners[0]}"


def test_claim_excludes_a_second_update(workspace):
    with claim(workspace.root, "an update"), pytest.raises(UpdateInProgressError), claim(workspace.root, "another"):
        pass
    with claim(workspace.root, "the next"):
        pass


def test_deleted_item_is_forgotten_and_unread_vectors_are_collected(workspace):
    carry_out_whole(workspace, rollout(G2, fraction=1.0), champion=G1)
    release_previous(workspace)
    assert collect(workspace.gallery, workspace.protected).generations == (G1,)
    assert rows(workspace, G2) == {G1: 0, G2: NUM_ITEMS}
    assert delete(workspace, ["item-000-0"]) == 1
    assert forget(workspace.gallery, ["item-000-0"]) == 2
    left = list_files(f"{workspace.root}/gallery")
    assert left
    assert not [file for file in left if b"item-000-0" in read_bytes(file)]
    ingest(workspace, pa.Table.from_pylist([item_row("late", "id001", "x")]))
    assert rows(workspace, G2) == {G1: 0, G2: NUM_ITEMS}
    assert not exists(f"{workspace.root}/nothing")


FORGET_POINTS = [
    "table-file-written", "table-committed", "items-ingested", "vectors-before-commit", "vectors-after-commit",
    "forget-before-gallery", "rewrite-before-commit", "rewrite-after-commit", "collect-after-leases",
]  # fmt: skip


@pytest.mark.parametrize("point", FORGET_POINTS)
def test_forgotten_item_is_nowhere_in_the_store_whatever_was_killed(workspace, point):
    """Every byte below the root is looked at: for the id, the source, the content hash and the vectors."""
    secret = item_row("the-secret-item", "the-secret-person", "its-image")
    table = pa.Table.from_pylist([secret])

    class CrashError(BaseException):
        pass

    def killed_once_then_again(act):
        hits = []

        def crash(name):
            if name == point and not hits:
                hits.append(name)
                raise CrashError

        set_crash_hook(crash)
        try:
            act()
        except CrashError:
            act()
        finally:
            set_crash_hook(None)

    cache = workspace.cache(G1)
    cache.extend([secret["content_sha256"]], [secret["source"]], workspace.embed_with(G1))
    killed_once_then_again(lambda: ingest(workspace, table))
    killed_once_then_again(lambda: delete(workspace, [secret["item_id"]]))
    killed_once_then_again(lambda: forget_items(workspace, [secret["item_id"]]))
    killed_once_then_again(lambda: collect(workspace.gallery, workspace.protected, orphan_age_s=0))
    vectors = [SyntheticGeneration(name).encode([secret["source"]])[0].tobytes() for name in (G1, G2)]
    words = [secret[name].encode() for name in ("item_id", "source", "content_sha256")]
    for file in list_files(workspace.root):
        content = read_bytes(file)
        assert not [word for word in (*words, *vectors) if word in content], file


def test_embedding_cache_and_evaluation_files_live_there_too(workspace):
    from graceful.files import read_json, write_json

    cache = workspace.cache(G1)
    hashes, sources = ["a", "b"], ["synthetic:id1/0", "synthetic:id2/0"]
    assert cache.extend(hashes, sources, workspace.embed_with(G1)) == (2, {})
    np.testing.assert_allclose(cache.read(hashes[::-1]), SyntheticGeneration(G1).encode(sources[::-1])[0], atol=1e-6)
    write_json(workspace.evaluation_uri("e") + "/decision.json", {"outcome": "HOLD"})
    assert read_json(workspace.evaluation_uri("e") + "/decision.json") == {"outcome": "HOLD"}


def test_search_builds_its_index_on_this_machine(workspace, tmp_path, monkeypatch):
    """FAISS reads local files; the index is derived state."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from graceful.flows.search.views import open_view

    followed = open_view(workspace, G1)
    assert list((tmp_path / "cache").rglob("manifest.json"))
    query = SyntheticGeneration(G1).encode(["synthetic:id002/g1"])[0]
    found = followed.index.search(query, 1).revisions[0]
    assert followed.book.entries(found)[int(found[0])][0] == "item-002-1"
