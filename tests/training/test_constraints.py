"""Every constraint against its formula written as plain loops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from graceful.training.constraints import CONSTRAINTS

BATCH, CLASSES, WIDTH, PREDECESSORS = 7, 4, 6, 3


def brute_cross_entropy(f: Tensor, y: Tensor, rows: Tensor, scale: float, margin: float) -> float:
    losses = []
    for i in range(len(f)):
        own = normalize(f[i, : rows.shape[1]], dim=0)
        logits = [scale * (float(own @ rows[c]) - (margin if c == int(y[i]) else 0.0)) for c in range(len(rows))]
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[int(y[i])])
    return sum(losses) / len(losses)


def brute_ract(f: Tensor, y: Tensor, o: Tensor, tau: float, hardest: int = 0) -> float:
    losses = []
    n = [normalize(row[: o.shape[1]], dim=0) for row in f]
    for i in range(len(f)):
        others = [j for j in range(len(f)) if y[j] != y[i]]
        stale = sorted((float(n[i] @ o[j]) / tau for j in others), reverse=True)
        fresh = sorted((float(n[i] @ n[j]) / tau for j in others), reverse=True)
        if hardest:
            stale, fresh = stale[:hardest], fresh[:hardest]
        positive = math.exp(float(n[i] @ o[i]) / tau)
        losses.append(-math.log(positive / (positive + sum(map(math.exp, stale)) + sum(map(math.exp, fresh)))))
    return sum(losses) / len(losses)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(BATCH, WIDTH), torch.tensor([0, 1, 2, 3, 0, 1, 0])


@pytest.mark.parametrize("width", [WIDTH, WIDTH - 2])
def test_influence_loss_is_cross_entropy_against_the_predecessors_rows(
    batch: tuple[Tensor, Tensor], width: int
) -> None:
    f, y = batch
    rows = normalize(torch.randn(PREDECESSORS, CLASSES, width), dim=2)
    losses = CONSTRAINTS["bct"](scale=7.0)(f, y, rows, torch.arange(CLASSES))
    expected = [brute_cross_entropy(f, y, rows[k], 7.0, 0.0) for k in range(PREDECESSORS)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width", [WIDTH, WIDTH - 2])
def test_cross_contrast_is_margin_cross_entropy_against_one_instance_per_class(
    batch: tuple[Tensor, Tensor], width: int
) -> None:
    f, y = batch
    instances = normalize(torch.randn(PREDECESSORS, CLASSES, width), dim=2)
    losses = CONSTRAINTS["cross_contrast"](scale=5.0, margin=0.3)(f, y, instances, torch.arange(CLASSES))
    expected = [brute_cross_entropy(f, y, instances[k], 5.0, 0.3) for k in range(PREDECESSORS)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("hardest", [0, 2])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 2])
def test_ract_counts_stale_and_fresh_negatives(batch: tuple[Tensor, Tensor], width: int, hardest: int) -> None:
    f, y = batch
    stale = normalize(torch.randn(PREDECESSORS, BATCH, width), dim=2)
    losses = CONSTRAINTS["ract"](tau=0.2, hardest=hardest)(f, y, stale, y)
    expected = [brute_ract(f, y, stale[k], 0.2, hardest) for k in range(PREDECESSORS)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_ract_without_negatives_is_zero_with_a_finite_gradient() -> None:
    f = torch.randn(3, WIDTH, requires_grad=True)
    y = torch.zeros(3, dtype=torch.long)
    loss = CONSTRAINTS["ract"]()(f, y, normalize(torch.randn(1, 3, WIDTH), dim=2), y).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert f.grad is not None
    assert bool(f.grad.isfinite().all())


def references_for(name: str, y: Tensor) -> tuple[Tensor, Tensor]:
    if CONSTRAINTS[name].reference == "batch":  # type: ignore[attr-defined]
        return normalize(torch.randn(PREDECESSORS, BATCH, WIDTH), dim=2), y
    return normalize(torch.randn(PREDECESSORS, CLASSES, WIDTH), dim=2), torch.arange(CLASSES)


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_a_stack_of_predecessors_gives_what_each_alone_gives(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    constraint: Callable[..., Tensor] = CONSTRAINTS[name]()
    alone = [float(constraint(f, y, reference, ref_labels)) for reference in references]
    assert constraint(f, y, references, ref_labels).tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_gradients_reach_the_embeddings_and_descend(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    constraint: Callable[..., Tensor] = CONSTRAINTS[name]()
    moving = f.clone().requires_grad_(True)
    before = constraint(moving, y, references, ref_labels).sum()
    before.backward()
    assert moving.grad is not None
    assert float(moving.grad.abs().sum(dim=1).min()) > 0
    after = constraint(moving.detach() - 1e-3 * moving.grad, y, references, ref_labels).sum()
    assert float(after) < float(before.detach())


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_the_order_of_classes_or_images_does_not_matter(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    constraint: Callable[..., Tensor] = CONSTRAINTS[name]()
    expected = constraint(f, y, references, ref_labels).tolist()
    order = torch.randperm(references.shape[1])
    if CONSTRAINTS[name].reference == "batch":  # type: ignore[attr-defined]
        shuffled = constraint(f[order], y[order], references[:, order], ref_labels[order])
    else:
        shuffled = constraint(f, y, references[:, order], ref_labels[order])
    assert shuffled.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_rotated_space_is_penalised_more_than_a_slightly_noisy_copy() -> None:
    torch.manual_seed(0)
    y = torch.arange(40) % CLASSES
    centres = normalize(torch.randn(CLASSES, 16), dim=1)
    stale = normalize(centres[y] + 0.2 * torch.randn(40, 16) / 4, dim=1)
    copy = stale + 0.02 * torch.randn(40, 16)
    rotated = stale @ torch.linalg.qr(torch.randn(16, 16))[0]
    for name in sorted(CONSTRAINTS):
        reference, ref_labels = (stale, y) if name == "ract" else (centres, torch.arange(CLASSES))
        constraint = CONSTRAINTS[name]()
        assert float(constraint(copy, y, reference, ref_labels)) < float(constraint(rotated, y, reference, ref_labels))
