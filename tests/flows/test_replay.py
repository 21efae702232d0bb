"""The front door: `graceful replay` as a user runs it, with all it can do, on data that train in a second."""

import json

import pytest

from graceful.flows.store.events import Overridden
from graceful.flows.store.workspace import Workspace
from tests.flows import tiny

CHANGES = {
    "training_data.where": {"instance": {"max": 29}},
    "policy": {"num_resamples": 200},  # the defaults: a hundred queries cannot prove two per cent
    "train_paragon": True,
    "replay": {
        "grow_by": "label", "counts": [3, 5], "when_not_served": "order_backfill",
        "controls": ["fine_tuned_initialised"],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replay_of_two_generations_with_an_ordered_backfill_and_a_control(
    tmp_path, digits_file, command_environment, flow_server
):
    config = tiny.write_config(tmp_path / "config", digits_file, CHANGES)
    root = tmp_path / "workspace"
    environment = {**command_environment, **flow_server}
    arguments = ("replay", str(config), "--root", str(root))
    told = tiny.graceful(*arguments, env=environment, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    for words in ("BOOTSTRAP", "backfill ordered all the same", "Compatibility", "Control without constraints"):
        assert words in told.stdout
    again = tiny.graceful(*arguments, "--json", env=environment, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    result = json.loads(again.stdout)
    first, second = result["lines"]
    assert (first["outcome"], first["overridden"]) == ("BOOTSTRAP", False)
    assert second["outcome"] in ("INCONCLUSIVE", "HOLD")
    assert second["overridden"]
    assert second["tax_points"] is not None
    assert result["champion"] == second["candidate"]
    assert [control["name"] for control in result["controls"]] == ["fine_tuned_initialised"]
    assert len(result["controls"][0]["matrix"]) == 2
    registry = Workspace(str(root)).registry
    ordered = registry.events(Overridden)
    assert [event.generation for event in ordered] == [second["candidate"]]
    assert (ordered[0].payload.ordered, bool(ordered[0].payload.by)) == ("FULL_BACKFILL", True)
    rows = Workspace(str(root)).view(second["candidate"]).rows_by_generation()
    assert rows == {second["candidate"]: 100}, "an ordered backfill embeds everything before it serves"
    assert json.loads((root / "replay.json").read_text())["champion"] == result["champion"]
