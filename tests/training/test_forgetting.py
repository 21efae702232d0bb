"""Training images left out in closed form: what is stored is the refitted generation, and its traces are measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.encoder import open_encoder, open_network, read_classifier
from graceful.training.forgetting import leave_out, told_apart
from graceful.training.influence import FeatureReader, matrix_of
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages
from tests.training.test_influence import fitted, ridge_of

CPU = torch.device("cpu")


@pytest.fixture
def trained(make_job: Callable[..., TrainingJob], config: TrainingConfig) -> tuple[str, TrainingJob]:
    job = make_job(num_workers=0, config=config)
    return f"{job.output_uri}/{run_training(job).generation_id}", job


def test_the_last_layer_moves_by_what_refitting_without_the_images_moves_it(
    trained: tuple[str, TrainingJob], digits: LabelledImages, tmp_path: Path
) -> None:
    uri, _ = trained
    gone = np.zeros(len(digits), bool)
    gone[::9] = True
    card = leave_out(uri, digits, gone, digits.sources[:5], out_uri=str(tmp_path / "out"), ordinal=7)
    old, new = (open_network(place, CPU) for place in (uri, f"{tmp_path}/out/{card.generation_id}"))
    reader, stored = FeatureReader(uri), read_classifier(uri)
    assert stored is not None
    inputs, start, rows = reader(digits.sources).inputs, matrix_of(reader.layer), stored[1]
    labels = torch.tensor([stored[0].classes.index(label) for label in digits.labels])
    ridge, stay = ridge_of(inputs, rows), torch.from_numpy(~gone)
    whole, without = (fitted(inputs[part], labels[part], rows, start, ridge) for part in (slice(None), stay))
    moved = matrix_of(FeatureReader(f"{tmp_path}/out/{card.generation_id}").layer) - start
    torch.testing.assert_close(moved, without - whole, atol=1e-5, rtol=1e-3)
    states = [network.state_dict() for _, network in (old, new)]
    changed = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert changed == ["projection.weight", "projection.bias"]
    assert (card.ordinal, card.parent, card.origin) == (7, old[0].generation_id, "trained")
    assert (card.training["images"], card.training["forgotten"]) == (int((~gone).sum()), int(gone.sum()))


def told_by(uri: str, images: LabelledImages, gone: np.ndarray, unseen: list[str]) -> float:
    """The membership test of the gone images by a stored generation itself."""
    stored = read_classifier(uri)
    assert stored is not None
    rows = functional.normalize(stored[1], dim=1)
    encode = open_encoder(uri, precision="float32")
    trained, others = (
        (torch.from_numpy(encode(sources)[0]).float() @ rows.t()).amax(dim=1)
        for sources in (images.take(gone).sources, unseen)
    )
    return told_apart(trained, others)


def test_a_class_that_is_forgotten_whole_is_told_no_better_than_what_was_never_seen(
    trained: tuple[str, TrainingJob], digits: LabelledImages, tmp_path: Path
) -> None:
    uri, _ = trained
    label = sorted(set(digits.labels.tolist()))[0]
    gone = digits.labels == label
    unseen = digits.take(~gone).sources[::10]  # of the very kind that stays
    card = leave_out(uri, digits, gone, unseen, out_uri=str(tmp_path / "out"), ordinal=2)
    assert label not in card.classes
    assert len(card.classes) == card.training["classes"] == len(set(digits.labels.tolist())) - 1
    traces = card.training["traces"]
    assert traces["after"] < traces["before"] - 0.2
    assert 0.4 < traces["kept"] < 0.6  # they are what they are compared with
    made = f"{tmp_path}/out/{card.generation_id}"
    assert traces["after"] == pytest.approx(told_by(made, digits, gone, unseen), abs=0.01)
    assert traces["before"] == pytest.approx(told_by(uri, digits, gone, unseen), abs=0.01)
    stored = read_classifier(made)
    assert stored is not None
    vectors, _ = open_encoder(made)(
        [source for source, place in zip(digits.sources, digits.labels, strict=True) if place == card.classes[0]]
    )
    mean = functional.normalize(torch.from_numpy(vectors).mean(dim=0), dim=0)
    torch.testing.assert_close(stored[2][0], mean, atol=2e-3, rtol=0)


@pytest.mark.parametrize("share", [0, 1])
def test_no_image_and_all_images_are_refused(
    trained: tuple[str, TrainingJob], digits: LabelledImages, tmp_path: Path, share: int
) -> None:
    with pytest.raises(UsageError, match="not all of them"):
        leave_out(trained[0], digits, np.full(len(digits), bool(share)), [], out_uri=str(tmp_path / "out"), ordinal=2)
    assert not (tmp_path / "out").exists()


def test_pairs_are_counted_by_a_slow_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    trained = torch.randint(0, 6, (13,), generator=draw).double()
    unseen = torch.randint(0, 6, (9,), generator=draw).double()
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in trained for b in unseen]
    assert told_apart(trained, unseen) == pytest.approx(sum(wins) / len(wins))
