"""`graceful plan` on a workspace, and what an update does that would most likely end undecided. Real commands."""

from pathlib import Path

import pytest

from graceful.flows.runtime.encoders import GenerationEncoders
from graceful.flows.store.events import Trained
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.foresee import UnderpoweredError
from tests.flows import running, tiny
from tests.flows.running import command as run
from tests.flows.running import document

HOPELESS = {"policy.max_nfr": 0.001, "policy.quality_margin_points": 0.1}
NO_PRICES = {"prices": {}}


def files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def updated(bootstrapped, digits_file, tmp_path_factory):
    """A workspace with two generations, the second of which was judged."""
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("plan") / "workspace")
    tiny.write_config(root, digits_file, tiny.grown(4))
    running.update(root)
    return root


def test_plan_measures_samples_and_changes_nothing(updated):
    before = files(updated)
    found = document("plan", "-r", updated, "--min-power", "0")
    assert files(updated) == before
    probe = found["probe"]
    assert probe["num_rows"] == 100
    assert probe["rows_per_s"] > 0
    assert probe["bytes_per_row"] >= 16 * 4
    status = document("status", "--root", updated)
    most = max(status["rows_by_generation"].values())
    assert (probe["sampled_images"], probe["sampled_vectors"]) == (68, most)
    hold, at_zero, at_best, full = found["options"]
    assert (hold["rows"], hold["price"]) == (0, 0)
    assert full["rows"] == 100
    assert full["extra_bytes"] == 100 * probe["bytes_per_row"]
    assert at_zero["rows"] == 0
    assert at_best["fraction"] == found["best"]["fraction"]
    assert full["price"] == 0
    assert all(0 < ceiling["ceiling"] <= 1 and 0 < ceiling["now"] <= 1 for ceiling in found["ceilings"])
    assert len(found["powers"]) == 4


def test_a_dry_run_measures_nothing(updated, monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing is to be embedded")

    monkeypatch.setattr(GenerationEncoders, "_embed", refuse)
    monkeypatch.setattr("graceful.flows.commands.plan.load_evaluation_set", refuse)
    text = run("plan", "-r", updated, "--dry-run").output
    assert "embed 100 of 100 stored images" in text
    assert document("plan", "-r", updated, "--dry-run")["probe"] is None


def test_what_nobody_knows_is_unavailable_and_never_nothing(bootstrapped, digits_file, tmp_path):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    config = tiny.write_config(root, digits_file, {**tiny.grown(4), "prices": None})
    found = document("plan", "-r", root, "--min-power", "0")
    _, at_zero, at_best, full = found["options"]
    assert (at_zero["rows"], at_zero["price"], at_best["fraction"], found["best"]) == (None, None, None, None)
    assert full["price"] is None
    assert "embedding_price" in full["unavailable"]
    assert (full["gain_points"], full["break_even_days"]) == (None, None)
    assert found["days_from"] == "[schedule]"
    assert found["days_until_next"] == pytest.approx(7)
    text = " ".join(run("plan", "-r", root, "--min-power", "0").output.split())
    assert "unavailable" in text
    assert "Best fraction: unavailable" in text
    assert config.exists()
    over = document("plan", "-r", root, "--min-power", "0", "--max-cost", "1", code=2)
    assert "no rollout and no backfill is known to cost at most 1" in over["refused"][0]


def test_plan_refuses_what_can_never_be_decided_and_says_why(bootstrapped, digits_file, tmp_path):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    tiny.write_config(root, digits_file, {**tiny.grown(4), **HOPELESS})
    found = document("plan", "-r", root, code=2)
    assert found["power"] == 0
    assert "no update can pass" in found["sentences"][0]
    assert "100 queries of 20 identities" in found["sentences"][0]
    assert "are the least for max_nfr 0.1 %" in found["sentences"][0]
    assert run("plan", "-r", root, "--min-power", "0").exit_code == 0


def test_an_update_warns_or_refuses_before_it_trains(bootstrapped, digits_file, tmp_path):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    trained = len(Workspace(str(root)).registry.events(Trained))
    changes = {**tiny.grown(4), **HOPELESS, "policy.when_underpowered": "refuse"}
    tiny.write_config(root, digits_file, changes)
    with pytest.raises(UnderpoweredError, match=r"no update can pass.*see 'graceful plan'"):
        running.update(root)
    assert UnderpoweredError.exit_code == 2
    assert len(Workspace(str(root)).registry.events(Trained)) == trained
    tiny.write_config(root, digits_file, {**changes, "policy.when_underpowered": "warn"})
    assert running.update(root).outcome in ("INCONCLUSIVE", "HOLD")
    assert len(Workspace(str(root)).registry.events(Trained)) == trained + 1
