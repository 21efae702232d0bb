"""What the page about fewer flips shows is run: updates by focal distillation and by LQF, through the ordinary gate."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from graceful.flows.runtime.progress import SilentProgress
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.act import plain
from graceful.flows.update.flow import replay_plainly
from graceful.training.generation import read_card
from tests.flows import running, tiny

pytestmark = pytest.mark.timeout(200)

PAGE = (tiny.ROOT / "docs" / "howto" / "congruent.md").read_text()
BLOCKS = [tomllib.loads(block)["training"] for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
SHOWN: dict[str, dict[str, Any]] = {
    "distillation": {"training.constraints": [entry for block in BLOCKS for entry in block.get("constraints", [])]},
    "lqf": {
        "training.lqf": next(block["lqf"] for block in BLOCKS if "lqf" in block),
        "training.constraints": [],
        "training.mixture": 0.0,
    },
}


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_an_update_as_the_page_shows_it_ends_with_a_decision(
    workspace_root: Path, digits_file: Path, name: str
) -> None:
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), **SHOWN[name]})
    result = running.update(workspace_root)
    workspace = Workspace(str(workspace_root))
    card = read_card(workspace.generation_uri(result.candidate))
    expected = ["cross_contrast", "ract", "focal_kl", "ldi", "l2"] if name == "distillation" else []
    assert card.training["constraints"] == expected
    assert ("lqf" in card.training) == (name == "lqf")
    decision = read_evaluation(result.evaluation).decision
    assert decision.candidate == result.candidate
    assert workspace.registry.serving().champion is not None


@pytest.mark.parametrize("name", ["focal", "lqf"])
def test_the_example_runs_at_a_smaller_size(tmp_path: Path, name: str) -> None:
    """Fewer epochs and images: what it is measured to be is not looked at."""
    smaller = {
        "training.epochs": 1,
        "training_data.where.instance.max": 29,
        "evaluation.queries.where.instance.min": 150,
        "policy.num_resamples": 200,
        "replay.counts": [3, 5],
    }
    root = str(tmp_path / "workspace")
    result = replay_plainly(str(tiny.ROOT / "examples" / f"{name}.toml"), root, smaller, SilentProgress(), plain)
    assert result.lines[0].outcome == "BOOTSTRAP"
    card = read_card(Workspace(root).generation_uri(result.lines[1].candidate))
    assert card.ordinal == 2
    assert card.training["constraints"] == {"focal": ["ract", "focal_kl"], "lqf": []}[name]
    assert ("lqf" in card.training) == (name == "lqf")
