"""Several workers are one: gathered rows, synchronised batch norm, and whole trainings on 1, 2 and 4 ranks."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graceful.errors import UsageError
from graceful.files import join
from graceful.training.distributed import SynchronisedBatchNorm, gather_rows, share_weight, synchronised_batch_norm
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef, Preprocessing
from graceful.training.heads import build_head
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.loop import train_worker
from graceful.training.manifest import LabelledImages
from graceful.training.material import Batch, Material
from graceful.training.objective import Objective
from graceful.training.pixels import Held
from graceful.training.predecessors import PredecessorGroup, Predecessors, class_means
from graceful.training.progress import TrailReporter

sys.path.insert(0, str(Path(__file__).parent))
from ranks import on_ranks, trained

MakeJob = Callable[..., TrainingJob]


def own_share(values: Tensor, rank: int, num_ranks: int) -> Tensor:
    return values[rank::num_ranks]


# Gathering


def gathered_and_gradients(rank: int, num_ranks: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    found = []
    for size in sizes:
        values = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
        own = own_share(values, rank, num_ranks).clone().requires_grad_(True)
        everything = gather_rows(own, True)
        weights = torch.arange(size, dtype=torch.float32)[:, None] + 10 * rank  # every rank has a loss of its own
        (everything.square() * weights).sum().backward()
        labels = gather_rows(own_share(torch.arange(size), rank, num_ranks), False, size)
        found.append({"rows": everything.detach(), "labels": labels, "gradient": own.grad, "values": values})
    return found


def test_gathered_rows_are_the_global_batch_and_gradients_are_the_sum_over_ranks() -> None:
    for rank, of_sizes in enumerate(on_ranks(4, gathered_and_gradients, (7, 8))):
        for size, one in zip((7, 8), of_sizes, strict=True):
            assert torch.equal(one["rows"], one["values"])
            assert torch.equal(one["labels"], torch.arange(size))
            weights = sum(torch.arange(size, dtype=torch.float32)[:, None] + 10 * other for other in range(4))
            torch.testing.assert_close(one["gradient"], own_share(2 * one["values"] * weights, rank, 4))


def test_one_rank_gathers_nothing_and_weighs_by_one() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows, True) is rows
    assert share_weight(3, 3) == 1.0
    network = nn.Sequential(nn.BatchNorm1d(2))
    with synchronised_batch_norm(network):
        assert type(network[0]) is nn.BatchNorm1d


def wrong_share(rank: int, num_ranks: int) -> str:
    with pytest.raises(UsageError) as raised:
        gather_rows(torch.zeros(3 if rank else 1, 2), False, 4)
    return str(raised.value)


def test_a_rank_with_another_share_than_its_own_is_refused() -> None:
    assert "expected 2 rows on rank 1, found 3" in on_ranks(2, wrong_share)[1]


# Batch norm


def two_steps(rank: int, num_ranks: int) -> dict[str, Any]:
    """Return gradients and state after two steps, for each momentum, of a loss whose mean over the ranks counts."""
    torch.manual_seed(0)
    # A mean far from zero: E[x^2] - E[x]^2 in float32 would lose the variance.
    batches = [torch.randn(7, 4, 5, 5) + 1000.0, torch.randn(8, 4, 5, 5) * 3]
    network = nn.Sequential(nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4, momentum=None))
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    given, inputs, parameters = list(network), [], []
    with synchronised_batch_norm(network):
        assert isinstance(network[1], SynchronisedBatchNorm) == (num_ranks > 1)
        network.train()
        for images in batches:
            own = own_share(images, rank, num_ranks).clone().requires_grad_(True)
            loss = network(own).pow(3).flatten(1).sum(dim=1).mean() * share_weight(len(own), len(images))
            network.zero_grad()
            loss.backward()
            inputs.append(own.grad)
            parameters.append(torch.cat([parameter.grad for parameter in network.parameters()]))
    assert list(network) == given
    network.eval()
    clean = network(batches[1]).detach()
    return {"inputs": inputs, "parameters": parameters, "state": dict(network.state_dict()), "clean": clean}


def test_batch_norm_over_ranks_is_batch_norm_over_the_global_batch() -> None:
    alone, found = two_steps(0, 1), on_ranks(4, two_steps)
    for rank, one in enumerate(found):
        for name, expected in alone["state"].items():
            torch.testing.assert_close(one["state"][name], expected, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(one["clean"], alone["clean"], rtol=1e-3, atol=1e-3)
        for step in (0, 1):
            expected = own_share(alone["inputs"][step], rank, 4) * 4
            torch.testing.assert_close(one["inputs"][step], expected, rtol=2e-3, atol=1e-3)
    for step in (0, 1):
        averaged = torch.stack([one["parameters"][step] for one in found]).mean(dim=0)
        torch.testing.assert_close(averaged, alone["parameters"][step], rtol=2e-3, atol=1e-3)


class OwnBatchNorm(nn.BatchNorm2d):
    """Stands for a batch norm whose forward does more than torch's."""


def refused(rank: int, num_ranks: int) -> str:
    with pytest.raises(UsageError) as raised, synchronised_batch_norm(nn.Sequential(OwnBatchNorm(2))):
        pass
    return str(raised.value)


def test_a_batch_norm_that_cannot_be_synchronised_is_refused() -> None:
    assert "expected torch's own batch norm, found OwnBatchNorm" in on_ranks(2, refused)[0]


# Whole trainings


def self_test(uri: str, images: LabelledImages) -> float:
    vectors, _ = open_encoder(uri)(images.sources)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    return float((images.labels[scores.argmax(axis=1)] == images.labels).mean())


@pytest.fixture
def constrained(
    make_job: MakeJob, write_embeddings: Callable[..., str], digits: LabelledImages, config: TrainingConfig
) -> Callable[..., TrainingJob]:
    """Return a function that makes the job of a second generation under recipe R, without augmentation."""
    still = config.model_copy(update={"augmentation": AugmentationConfig(kind="none"), "precision": "float32"})
    first = make_job(name="first", config=still.model_copy(update={"epochs": 2}))
    uri = join(first.output_uri, run_training(first).generation_id)
    vectors, _ = open_encoder(uri)(digits.sources)
    reference = PredecessorRef(
        generation_id=uri.rpartition("/")[2], generation_uri=uri, embeddings_uri=write_embeddings("cache", vectors)
    )

    def make(name: str, **changes: Any) -> TrainingJob:
        recipe = still.model_copy(update=changes)
        return make_job(name=name, config=recipe, parent_uri=uri, predecessors=(reference,), ordinal=2)

    return make


def test_one_two_and_four_workers_end_in_the_same_place(
    constrained: Callable[..., TrainingJob], digits: LabelledImages
) -> None:
    """600 images in batches of 61: shares of 15 and 16 images on 4 ranks. The spread of seeds is the yardstick."""
    curves: dict[object, np.ndarray] = {}
    found: dict[object, float] = {}
    for label, num_ranks, seed in [(1, 1, 0), (2, 2, 0), (4, 4, 0), ("seed 1", 1, 1), ("seed 2", 1, 2)]:
        job = constrained(f"on-{label}".replace(" ", "-"), batch_size=61, seed=seed, epochs=3)
        cards = [trained(0, 1, job)] if num_ranks == 1 else on_ranks(num_ranks, trained, job)
        assert cards[1:] == [None] * (num_ranks - 1)
        lines = TrailReporter(job.storage_uri, job.name).metrics()
        curves[label] = np.array(
            [[line[name] for name in ("loss", "task", "ract", "cross_contrast")] for line in lines]
        )
        found[label] = self_test(join(job.output_uri, cards[0].generation_id), digits)
        assert cards[0].training["workers"] == num_ranks
    for num_ranks in (2, 4):
        np.testing.assert_allclose(curves[num_ranks][0], curves[1][0], rtol=1e-3)
        np.testing.assert_allclose(curves[num_ranks], curves[1], rtol=1e-2)
    assert np.abs(curves["seed 1"][0] - curves[1][0]).max() > 1e-2  # the bound above means something
    seeds = [found[label] for label in (1, "seed 1", "seed 2")]
    for num_ranks in (2, 4):
        assert min(seeds) - 0.01 <= found[num_ranks] <= max(seeds) + 0.01


def test_more_workers_than_images_in_a_batch_are_refused_before_training(
    make_job: MakeJob, config: TrainingConfig
) -> None:
    with pytest.raises(ValueError, match="raise batch_size, or use fewer workers"):
        make_job(config=config.model_copy(update={"batch_size": 4}), num_workers=8)
    with pytest.raises(UsageError, match="raise batch_size, or use fewer workers"):
        train_worker(make_job(config=config.model_copy(update={"batch_size": 4})), TrailReporter("x", "y"), 0, 8)


# The loss and its draws

OBJECTIVES: list[dict[str, Any]] = [
    {"constraints": [{"name": "ract"}, *({"name": n, "uncertainty": True} for n in ("cross_contrast", "hoc"))]},
    {"constraints": [{"name": "mixbct"}, {"name": "bct", "against": "latest"}], "sampled_classes": 30},
    {
        "constraints": [
            {"name": "focal_kl"}, {"name": "ldi", "against": "ensemble"},
            {"name": "focal_logits", "uncertainty": True}, {"name": "l2", "focus": 5.0},
        ],
        "sampled_classes": 30,
    },
]  # fmt: skip


def step_gradients(rank: int, num_ranks: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return terms and parameter gradients of one step on 61 images of 40 classes with two predecessors."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 40
    vectors = nn.functional.normalize(torch.randn(120, 2, 8, generator=generator), dim=2)
    means = torch.stack([torch.from_numpy(class_mean) for class_mean in _means(vectors, labels)])
    known = torch.arange(80).reshape(2, 40) % 5 > 0
    group = PredecessorGroup(("g001-000000", "g002-000000"), torch.tensor([1.0, 0.5]), vectors, means, means, known)
    pixels = torch.zeros(120, 1, 4, 4, dtype=torch.uint8)
    predecessors = Predecessors((group,), labels.numpy(), torch.device("cpu"))
    material = Material([f"c{c:02}" for c in range(40)], labels, Held(pixels), predecessors)
    preprocessing = Preprocessing(image_size=4, channels=1, mean=(0.3,), std=(0.37,))
    config = TrainingConfig.model_validate({"preprocessing": preprocessing, "width": 8, "batch_size": 61, **recipe})
    inputs = torch.randn(120, 5, generator=generator)
    torch.manual_seed(1)
    network, head = nn.Linear(5, 8), build_head(config.head, 40, 8)
    rows = torch.randperm(120, generator=generator)[:61]
    own = rows[rank::num_ranks]
    batch = Batch(own, labels[own], pixels[own], 61)
    objective, shared = Objective(config, material, torch.device("cpu")), torch.Generator().manual_seed(5)
    draw = objective.draw(batch.labels, batch, shared)
    embeddings = network(inputs[own])
    terms = {"task": head(draw.mix(embeddings), batch.labels, draw.sample) * share_weight(len(own), 61)}
    terms |= objective.terms(embeddings, batch.labels, batch, shared, draw, head)
    torch.stack(list(terms.values())).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in (*network.parameters(), *head.parameters())])
    return {"terms": {name: value.item() for name, value in terms.items()}, "gradients": gradients.numpy(),
            "classes": None if draw.sample is None else draw.sample.classes.tolist()}  # fmt: skip


def _means(vectors: Tensor, labels: Tensor) -> list[Any]:
    return [class_means(vectors[:, k].numpy(), labels.numpy(), 40).numpy() for k in range(2)]


@pytest.mark.parametrize("recipe", OBJECTIVES, ids=["batch-wise", "drawn", "logits"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_mean_gradient_of_the_ranks_is_that_of_one_worker(num_ranks: int, recipe: dict[str, Any]) -> None:
    alone, found = step_gradients(0, 1, recipe), on_ranks(num_ranks, step_gradients, recipe)
    for name, value in alone["terms"].items():
        assert np.mean([one["terms"][name] for one in found]) == pytest.approx(value, rel=1e-5), name
    mean = np.mean([one["gradients"] for one in found], axis=0)
    np.testing.assert_allclose(mean, alone["gradients"], atol=1e-5 * np.abs(alone["gradients"]).max())
    assert all(one["classes"] == alone["classes"] for one in found)
