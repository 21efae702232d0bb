"""Heads against their formulas."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from graceful.training.heads import HEADS, build_head, initialise_rows

SCALE, MARGIN = 10.0, 0.2


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
    head = build_head(name, 5, 8, SCALE, MARGIN)
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    cosines = normalize(embeddings, dim=1) @ normalize(head.rows, dim=1).t()
    assert head(embeddings, labels).item() == pytest.approx(float(expected_loss(name, cosines, labels)), rel=1e-4)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_gradients_reach_rows_and_embeddings(name: str) -> None:
    head = build_head(name, 5, 8, SCALE, MARGIN)
    embeddings = torch.randn(6, 8, requires_grad=True)
    head(embeddings, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    gradients = [embeddings.grad, *(parameter.grad for parameter in head.parameters())]
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_rows_are_given_and_taken_as_classes_by_width() -> None:
    head = build_head("additive_margin", 3, 4, SCALE, MARGIN)
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
        build_head("softmax", 3, 4, SCALE, MARGIN)
