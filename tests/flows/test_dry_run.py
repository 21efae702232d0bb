"""`graceful update --dry-run`: real steps, a plausible estimate, exit code 0, and a workspace that is left alone."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.commands import rehearsal
from graceful.training.manifest import LabelledImages
from tests.flows import tiny

pytestmark = pytest.mark.timeout(200)


def contents(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def root(bootstrapped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bootstrapped, tmp_path / "workspace")


def test_a_dry_run_measures_and_changes_nothing(root: Path, command_environment: dict[str, str]) -> None:
    before = contents(root)
    done = tiny.graceful("update", "--dry-run", "--root", str(root), "--json", env=command_environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert contents(root) == before
    assert (found["images"], found["classes"], found["steps"], found["predecessors"]) == (150, 5, 6, 1)
    assert found["images_to_embed"] == 150  # the first generation has embedded the evaluation set alone
    assert found["images_per_s"] == pytest.approx(found["batch_images"] / found["step_s"], rel=0.01)
    assert found["training_s"] == pytest.approx(6 * found["step_s"], abs=0.1)
    assert found["total_s"] == pytest.approx(found["load_s"] + found["training_s"] + found["embed_s"], abs=0.2)
    assert found["memory_mib"] > 50
    assert found["predecessors_step_share"] > -0.5


def test_a_dry_run_says_it_in_words_and_for_a_share_of_the_batch(root: Path) -> None:
    config = root / "graceful.toml"
    config.write_text(config.read_text().replace("num_workers = 0", "num_workers = 4"))
    done = CliRunner().invoke(app, ["update", "--dry-run", "--root", str(root)])
    assert done.exit_code == 0, done.output
    assert "Training on 150 images of 5 classes: 6 steps." in done.output
    assert "images for each of 4 worker(s)" in done.output
    assert "Predecessors: 1, which add" in done.output
    assert "of embedding 150 images with predecessors" in done.output


def test_a_dry_run_of_a_recipe_that_cannot_train_says_so(root: Path) -> None:
    config = root / "graceful.toml"
    config.write_text(config.read_text().replace("width = 16", "width = 8"))
    done = CliRunner().invoke(app, ["update", "--dry-run", "--root", str(root)])
    assert done.exit_code == 2  # 'graceful check' comes first
    assert "expected a width of at least 16" in done.stderr


def test_the_sample_has_whole_classes() -> None:
    labels = np.array([f"c{row % 300}" for row in range(1200)])
    sources = [str(row) for row in range(1200)]
    images = LabelledImages(sources, labels, sources)
    sample = rehearsal._sample(images, 128, seed=0)
    assert 128 <= len(sample) <= 136
    assert set(np.unique(sample.labels, return_counts=True)[1]) == {4}
    assert len(rehearsal._sample(images, 5000, seed=0)) == 1200
