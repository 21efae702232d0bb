"""What operators run: doctor, collect, status and selftest, on real workspaces of the synthetic world."""

import json
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graceful.files import set_crash_hook
from graceful.flows.cli import app
from graceful.flows.commands.selftest import try_storage
from graceful.flows.commands.status import collect_garbage, delete_items
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan
from graceful.flows.update.serving import ingest
from graceful.indexing import items as items_module
from graceful.indexing.checked_files import forget_verified
from graceful.indexing.maintenance import collect
from tests.flows import tiny
from tests.flows.moves import carry_out_whole
from tests.synthetic import SyntheticGeneration, SyntheticModels, items

G1, G2 = "g001-aaaaaa", "g002-bbbbbb"


@pytest.fixture
def root(tmp_path):
    """Twelve items, served by g2, which has re-embedded half of them."""
    place = str(tmp_path / "workspace")
    workspace = Workspace(place, SyntheticModels(*map(SyntheticGeneration, (G1, G2))), create=True)
    tiny.write_config(Path(place), tmp_path / "nothing.parquet")
    ingest(workspace, items(4, 3))
    for generation, fraction, before, champion in ((G1, 1.0, "all", None), (G2, 0.5, "wave_zero", G1)):
        pairs = ((generation, generation), *([(generation, champion)] if champion else []))
        wanted = Rollout("u-" + generation, generation, "d-" + generation, fraction, "random", before, pairs)
        carry_out_whole(workspace, wanted, champion=champion)
    return place


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert "Traceback" not in done.output + done.stderr
    return done.exit_code, json.loads(done.stdout)


def said(document):
    return " ".join(finding["what"] for finding in document["findings"])


@pytest.mark.parametrize(("fault", "word"), [("flip", "damaged"), ("tear", "torn"), ("remove", "gone")])
def test_damaged_vectors_are_dropped_on_request_and_embedded_again(root, fault, word):
    """The images are there: what is damaged heals, and nothing else is touched."""
    collect(Workspace(root).gallery, lambda: [[G1, G2]], dead_share=0)
    file = next(Path(root, "gallery", "vectors", f"generation={G2}").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content if fault == "flip" else content[:-9])
    if fault == "remove":
        file.unlink()
    forget_verified()
    code, found = run("doctor", "--root", root, "--deep")
    assert code == 1
    assert f"table gallery/vectors: files that are {word}: 1" in said(found)
    code, refused = run("doctor", "--root", root, "--deep", "--repair")
    assert code == 1
    assert "their images must be embedded again" in refused["error"]
    run("doctor", "--root", root, "--deep", "--repair", "--yes")
    workspace = Workspace(root, SyntheticModels(*map(SyntheticGeneration, (G1, G2))))
    assert workspace.view(G2).rows_by_generation() == {G1: 6, G2: 0}
    assert len(workspace.view(G2).unreadable()) == 6, "the rows that g2 superseded were collected from g1"
    assert continue_plan(workspace).embedded == 6
    assert workspace.view(G2).rows_by_generation() == {G1: 6, G2: 6}
    assert "gallery/vectors: files" not in said(run("doctor", "--root", root, "--deep")[1])


def test_doctor_names_what_is_gone_and_repairs_only_what_is_derived(root):
    shutil.rmtree(Path(root, "gallery", "vectors"))
    code, refused = run("doctor", "--root", root, "--repair")
    assert code == 1
    assert "every image must be embedded again" in refused["error"]
    assert not Path(root, "gallery", "vectors").exists()
    run("doctor", "--root", root, "--repair", "--yes")
    code, empty = run("doctor", "--root", root)
    assert code == 1
    assert "12 items that g002-bbbbbb cannot read" in said(empty)


def test_registry_folder_that_is_gone_is_an_error_and_is_never_made_anew(root):
    shutil.rmtree(Path(root, "registry", "serving"))
    code, found = run("doctor", "--root", root)
    assert code == 1
    assert "table registry/serving is gone" in said(found)
    for command in ("status", "collect"):
        code, error = run(command, "--root", root)
        assert code == 1
        assert "restore it" in error["error"]
    again = CliRunner().invoke(app, ["init", root])
    assert again.exit_code == 1
    assert not Path(root, "registry", "serving").exists()


def test_gallery_that_is_gone_is_not_made_anew(root):
    shutil.rmtree(Path(root, "gallery"))
    assert CliRunner().invoke(app, ["init", root]).exit_code == 1
    assert not Path(root, "gallery").exists()


def test_collection_counts_first_and_then_does_it(root):
    Workspace(root).gallery.delete([f"item-000-{number}" for number in range(3)])
    _, expected = run("collect", "--root", root, "--dry-run")
    _, found = run("collect", "--root", root)
    assert (expected["rows"], expected["dry_run"]) == (found["rows"], True)
    assert found["rows"] >= 3
    assert Workspace(root).gallery.generations()[G1] == 9
    assert found["size_bytes"] > 0


def test_forgetting_that_was_killed_finds_caches_and_gallery_again(root):
    workspace = Workspace(root, SyntheticModels(SyntheticGeneration(G1)))
    row = workspace.gallery.items.find(["item-001-1"]).to_pylist()[0]
    cache = workspace.cache("g009-unknown")
    cache.extend([row["content_sha256"]], [row["source"]], workspace.embed_with(G1))

    class KilledError(BaseException):
        pass

    for point in ("forget-before-gallery", "rewrite-before-commit", "rewrite-after-commit"):

        def kill(name, point=point):
            if name == point:
                raise KilledError

        set_crash_hook(kill)
        try:
            with pytest.raises(KilledError):
                delete_items(root, ["item-001-1"], forget=True)
        finally:
            set_crash_hook(None)
    delete_items(root, ["item-001-1"], forget=True)
    collect_garbage(root, orphan_age_s=0)
    wanted = (b"item-001-1", row["source"].encode(), row["content_sha256"].encode())
    left = [path for path in Path(root).rglob("*") if path.is_file() and any(w in path.read_bytes() for w in wanted)]
    assert left == []


def test_status_answers_at_once(root):
    started = time.process_time()
    code, found = run("status", "--root", root)
    assert (code, found["items"], found["unreadable"]) == (0, 12, 0)
    assert time.process_time() - started < 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_selftest_passes_and_leaves_nothing(tmp_path):
    found = try_storage(str(tmp_path), rounds=1, seed=1)
    assert [trial["failures"] for trial in found["trials"]] == [[]] * 6
    assert list(tmp_path.iterdir()) == []


def test_selftest_sees_a_lost_item(tmp_path, monkeypatch):
    from graceful.indexing import selftest

    model = {"item-1": "a", "item-2": "a"}
    gallery = selftest.Gallery(str(tmp_path / "g"), create=True)
    selftest.carry_out_step(gallery, selftest.Step("ingest", (("item-1", "a"),)))
    assert selftest.compare(gallery.location, model, model)
    assert not selftest.compare(gallery.location, {}, {"item-1": "a"})
    assert items_module.NOTHING == -1
    forget_verified()
