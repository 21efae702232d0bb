"""Dual ascent on the predecessors' weights: who is read badly gains, who is read well loses; kills change nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.predecessors import PredecessorGroup, Predecessors
from graceful.training.progress import TrailReporter
from graceful.training.weighing import MOST, RATE, DualWeights
from tests.training.mortal import trained_with_kills


def three() -> Predecessors:
    """Two predecessors of one width and one of another; only ids and weights matter."""
    groups = [
        PredecessorGroup(
            names,
            torch.ones(len(names)),
            torch.zeros(4, len(names), d),
            *[torch.zeros(len(names), 2, d)] * 2,
            torch.ones(len(names), 2, dtype=torch.bool),
        )
        for names, d in ((("g001", "g003"), 2), (("g002",), 3))
    ]
    return Predecessors(groups, np.array([0, 0, 1, 1]), torch.device("cpu"))


def test_weights_follow_the_margins_and_stay_within_their_bounds() -> None:
    predecessors = three()
    weights = DualWeights(predecessors, {"g001": 0.5, "g002": 0.6, "g003": 0.7})
    found = weights.ascend({"g001": 0.48, "g002": 0.63, "g003": 0.7})
    assert found == pytest.approx({"g001": 1 + 2 * RATE, "g002": 1 - 3 * RATE, "g003": 1.0})
    assert predecessors.groups[0].weights.tolist() == pytest.approx([1 + 2 * RATE, 1.0])
    for _ in range(100):
        found = weights.ascend({"g001": 0.0, "g002": 1.0, "g003": 0.7})
    assert found == pytest.approx({"g001": MOST, "g002": 0.0, "g003": 1.0})
    fresh = three()
    DualWeights(fresh, {}).load_state_dict(weights.state_dict())
    assert [group.weights.tolist() for group in fresh.groups] == [[MOST, pytest.approx(1.0)], [0.0]]


def test_a_training_moves_them_tells_them_and_resumes_with_them(
    make_job: Callable[..., TrainingJob],
    write_embeddings: Callable[..., str],
    digits: LabelledImages,
    config: TrainingConfig,
    tmp_path: Any,
) -> None:
    first = make_job(digits.take(np.isin(digits.labels, list("0123"))), name="first")
    uri = f"{first.output_uri}/{run_training(first).generation_id}"
    name, encode = uri.rpartition("/")[2], open_encoder(uri)
    aside = np.arange(len(digits)) % 5 == 0
    images, shown = digits.take(~aside), digits.take(aside)
    write_manifest(str(tmp_path / "dev-manifest.parquet"), shown)
    caches = [write_embeddings(part, encode(of.sources)[0]) for part, of in (("train", images), ("dev", shown))]
    train, dev = (PredecessorRef(generation_id=name, generation_uri=uri, embeddings_uri=cache) for cache in caches)
    fields: dict[str, Any] = {
        "predecessors": (train,), "parent_uri": uri, "ordinal": 2, "checkpoint_minutes": 0.0,
        "dev": DevPart(manifest_uri=str(tmp_path / "dev-manifest.parquet"), predecessors=(dev,)),
    }  # fmt: skip
    recipe = config.model_copy(update={"predecessor_weights": "dual", "epochs": 3, "batch_size": 200})
    job = make_job(images, name="dual", config=recipe, **fields)
    card = run_training(job)
    lines = TrailReporter(job.storage_uri, "dual").metrics()
    weights = [line[f"weight of {name}"] for line in lines]
    own = None
    before = 1.0
    for line, weight in zip(lines, weights, strict=True):
        step = weight - before
        if 0 < weight < MOST:
            implied = step / (100 * RATE) + line[f"dev on {name}"]
            own = implied if own is None else own
            assert implied == pytest.approx(own, abs=1e-4)  # M(k, k) is the same in every epoch
        before = weight
    assert own is not None
    assert run_training(
        make_job(images, name="equal", config=config.model_copy(update={"epochs": 3, "batch_size": 200}), **fields)
    ).digest != (card.digest)
    killed = make_job(images, name="killed", config=recipe, **fields)
    resumed, _ = trained_with_kills(killed, 40, lives=1)
    assert resumed.digest == card.digest


def test_without_a_dev_part_it_is_refused(make_job: Callable[..., TrainingJob], config: TrainingConfig) -> None:
    with pytest.raises(ValueError, match=r"predecessor_weights = 'dual'.*give evaluation\.dev"):
        make_job(config=config.model_copy(update={"predecessor_weights": "dual"}))
