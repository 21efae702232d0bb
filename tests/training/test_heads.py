"""Heads against their formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from graceful.errors import UsageError
from graceful.training.heads import HEADS, Head, build_head, initialise_rows
from graceful.training.job import HeadConfig
from graceful.training.sampling import ClassSample, sample_classes, sample_size
from graceful.training.simplex import corner_order, simplex_vertices

SCALE, MARGIN = 10.0, 0.2


def made(name: str, num_classes: int, width: int, **changes: Any) -> Head:
    return build_head(HeadConfig(name=name, scale=SCALE, margin=MARGIN, **changes), num_classes, width)


def expected_loss(name: str, cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hot = one_hot(labels, cosines.shape[1]).float()
    if name == "additive_margin":
        return cross_entropy(SCALE * (cosines - MARGIN * hot), labels)
    if name == "arcface":
        return cross_entropy(SCALE * torch.cos(torch.acos(cosines) + MARGIN * hot), labels)
    return cross_entropy(SCALE * cosines, labels)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_head_computes_its_formula_on_normalised_rows_and_embeddings(name: str) -> None:
    torch.manual_seed(0)
    head = made(name, 5, 8)
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    cosines = normalize(embeddings, dim=1) @ normalize(head.rows, dim=1).t()
    assert head(embeddings, labels).item() == pytest.approx(
        float(expected_loss(name, cosines, labels).detach()), rel=1e-4
    )


@pytest.mark.parametrize("name", sorted(HEADS))
def test_gradients_reach_rows_and_embeddings(name: str) -> None:
    head = made(name, 5, 8)
    embeddings = torch.randn(6, 8, requires_grad=True)
    head(embeddings, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    gradients = [embeddings.grad, *(parameter.grad for parameter in head.parameters())]
    assert len(gradients) == (1 if name == "simplex" else 2)
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_rows_are_given_and_taken_as_classes_by_width() -> None:
    head = made("additive_margin", 3, 4)
    rows = torch.arange(12.0).reshape(3, 4)
    head.set_rows(rows)
    assert torch.equal(head.rows, rows)
    with pytest.raises(ValueError, match=r"expected \(3, 4\), found \(4, 3\)"):
        head.set_rows(rows.t())


def test_first_rows_point_to_the_class_means_with_length_1_1() -> None:
    rows = initialise_rows(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    assert torch.allclose(rows, torch.tensor([[0.66, 0.88], [0.0, 1.1]]))
    assert math.isclose(float(rows[0].norm()), 1.1, rel_tol=1e-6)


def test_unknown_head_names_the_choices() -> None:
    with pytest.raises(ValueError, match="additive_margin"):
        HeadConfig(name="softmax")


def test_arcface_goes_on_falling_where_angle_and_margin_pass_half_a_turn() -> None:
    cosines = torch.linspace(-1, 1, 401, dtype=torch.float64)
    found = HEADS["arcface"](cosines, 0.5)
    turned = cosines.acos() + 0.5 <= math.pi
    assert torch.allclose(found[turned], torch.cos(cosines.acos() + 0.5)[turned], atol=2e-4)
    assert torch.allclose(found[~turned], cosines[~turned] - 0.5 * math.sin(0.5))
    assert 0 < int((~turned).sum()) < 401
    ends = torch.tensor([-1.0, 1.0], requires_grad=True)
    HEADS["arcface"](ends, 0.5).sum().backward()
    assert ends.grad is not None
    assert bool(ends.grad.isfinite().all())


def test_weight_and_smoothing_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    head = made("cosine_softmax", 5, 8, weight=5.0, label_smoothing=0.1)
    logits = SCALE * normalize(embeddings, dim=1) @ normalize(head.rows, dim=1).t()
    log_shares = logits.log_softmax(dim=1)
    target = 0.9 * one_hot(labels, 5) + 0.1 / 5
    expected = 5.0 * -(target * log_shares).sum(dim=1).mean()
    assert head(embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_rotated_head_stores_the_rows_that_classify_the_embedding_itself() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    head, plain = made("additive_margin", 5, 8, rotation=True), made("additive_margin", 5, 8)
    rows = torch.randn(5, 8)
    head.set_rows(rows)
    torch.testing.assert_close(head.rows.detach(), rows, atol=1e-5, rtol=1e-5)
    assert head.rotation is not None
    with torch.no_grad():
        for parameter in head.rotation.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    matrix = head.rotation.weight.detach()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(8), atol=1e-5, rtol=0)
    assert not torch.allclose(head.rows, rows, atol=0.1)
    plain.set_rows(head.rows.detach())
    loss = head(embeddings, labels)
    assert loss.item() == pytest.approx(plain(embeddings, labels).item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in head.parameters())


def test_new_classes_have_their_margin_added_to_the_logits() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    head = made("cosine_softmax", 5, 8, new_class_margin=2.0)
    is_new = torch.tensor([False, True, False, False, True])
    logits = SCALE * normalize(embeddings, dim=1) @ normalize(head.rows, dim=1).t()
    assert head(embeddings, labels).item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    head.expand(is_new)
    expected = cross_entropy(logits + torch.tensor([0.0, 2.0, 0.0, 0.0, 2.0]), labels)
    assert head(embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_an_empty_batch_costs_nothing_and_has_a_gradient(name: str) -> None:
    head = made(name, 5, 8)
    embeddings = torch.zeros(0, 8, requires_grad=True)
    loss = head(embeddings, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert all(tensor.grad is not None for tensor in (embeddings, *head.parameters()))


# The fixed simplex


@pytest.mark.parametrize("width", [2, 7, 64])
def test_corners_of_the_simplex_are_equally_far_apart(width: int) -> None:
    corners = simplex_vertices(width)
    assert corners.shape == (width + 1, width)
    expected = torch.full((width + 1, width + 1), -1 / width).fill_diagonal_(1.0)
    torch.testing.assert_close(corners @ corners.t(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(corners.mean(dim=0), torch.zeros(width), atol=1e-6, rtol=0)


def test_corners_are_kept_by_classes_that_are_gone_and_run_out() -> None:
    first = corner_order(["b", "d"], [], 3)
    second = corner_order(["a", "d"], first, 3)
    assert second == ["b", "d", "a"]
    assert corner_order(["a", "c", "b"], second, 3) == ["b", "d", "a", "c"]
    with pytest.raises(UsageError, match=r"at most 4 classes over all generations, found 5"):
        corner_order(["a", "c", "e"], second, 3)
    with pytest.raises(UsageError, match=r"set width to at least 4"):
        made("simplex", 5, 3)


def test_a_simplex_with_a_learned_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="corners from generation to generation"):
        HeadConfig(name="simplex", rotation=True)


# A sample of the classes


def test_a_sample_holds_the_batch_and_random_others_each_once() -> None:
    labels = torch.tensor([3, 90, 3, 41])
    seen: set[int] = set()
    for seed in range(60):
        sample = sample_classes(labels, 100, 20, torch.Generator().manual_seed(seed))
        again = sample_classes(labels, 100, 20, torch.Generator().manual_seed(seed))
        classes = sample.classes.tolist()
        assert classes == sorted(set(classes)) == again.classes.tolist()
        assert len(classes) == 20
        assert {3, 41, 90} <= set(classes) <= set(range(100))
        offsets = dict(zip(classes, sample.offsets.tolist(), strict=True))
        assert all(offsets[c] == (0.0 if c in (3, 41, 90) else pytest.approx(math.log(97 / 17))) for c in classes)
        seen |= set(classes)
    assert seen == set(range(100))
    crowded = sample_classes(torch.arange(10), 100, 4, torch.Generator())
    assert crowded.classes.tolist() == list(range(10))
    assert sample_classes(labels, 4 * 10**6, 20, torch.Generator()).classes.max() > 1000


def test_a_sampled_softmax_is_on_average_the_full_one() -> None:
    """The sum under the logarithm is unbiased; the loss is a little too low (Jensen), and its gradient points there."""
    torch.manual_seed(0)
    head = made("additive_margin", 500, 16).double()
    labels = torch.tensor([7])
    embeddings = (head.rows[labels].detach() + 0.2 * torch.randn(1, 16)).requires_grad_(True)
    full = head(embeddings, labels)
    (expected,) = torch.autograd.grad(full, embeddings)
    sums, plain, gradients = [], [], []
    for seed in range(300):
        sample = sample_classes(labels, 500, 100, torch.Generator().manual_seed(seed))
        loss = head(embeddings, labels, sample)
        sums.append(loss.exp().item())
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
        plain.append(head(embeddings, labels, ClassSample(sample.classes, 0 * sample.offsets)).exp().item())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - full.exp().item()) < 3 * error < 0.1 * full.exp().item()
    assert np.mean(plain) < 0.4 * full.exp().item()  # without the offsets four fifths of the sum are missing
    gradient = torch.stack(gradients).mean(dim=0)
    assert float(torch.cosine_similarity(gradient, expected)) > 0.98


def test_the_default_sample_is_all_classes_up_to_1024() -> None:
    assert sample_size(None, 1024, 256) == 0
    assert sample_size(None, 100_000, 256) == 1024
    assert sample_size(None, 100_000, 4096) == 8192
    assert sample_size(0, 100_000, 256) == 0
    assert sample_size(50, 40, 256) == 0
    assert sample_size(50, 60, 256) == 50
