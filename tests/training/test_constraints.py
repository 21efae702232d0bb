"""Every constraint against its formula written as plain loops, and the contract that all of them keep."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from graceful.errors import UsageError
from graceful.training.constraints import CONSTRAINTS, build_constraint, takes
from graceful.training.constraints.contract import BY_IMAGE, Constraint
from graceful.training.constraints.mixbct import MixedFeatures, typical_images
from graceful.training.uncertainty import class_margins, focused, trust

BATCH, CLASSES, WIDTH, PREDECESSORS = 7, 4, 6, 3


def brute_cross_entropy(f: Tensor, y: Tensor, rows: Tensor, scale: float, margin: float) -> list[float]:
    losses = []
    for i in range(len(f)):
        own = normalize(f[i, : rows.shape[1]], dim=0)
        logits = [scale * (float(own @ rows[c]) - (margin if c == int(y[i]) else 0.0)) for c in range(len(rows))]
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[int(y[i])])
    return losses


def brute_ract(f: Tensor, y: Tensor, o: Tensor, tau: float, hardest: int = 0) -> list[float]:
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
    return losses


def brute_l2(f: Tensor, y: Tensor, o: Tensor) -> list[float]:
    losses = []
    for i in range(len(f)):
        n = normalize(f[i, : o.shape[1]], dim=0)
        losses.append(sum((float(n[c]) - float(o[i, c])) ** 2 for c in range(o.shape[1])))
    return losses


def brute_hoc(f: Tensor, y: Tensor, o: Tensor, mu: float) -> list[float]:
    n = [normalize(row[: o.shape[1]], dim=0) for row in f]
    losses = []
    for i in range(len(f)):
        others = [math.exp(mu * float(o[i] @ n[j])) for j in range(len(f)) if y[j] != y[i]]
        losses.append(-mu * float(o[i] @ n[i]) + math.log(sum(others)))
    return losses


def brute_oca(f: Tensor, y: Tensor, rows: Tensor, scale: float, influence: float, cosine: float) -> list[float]:
    losses = []
    for i, cross_entropy in enumerate(brute_cross_entropy(f, y, rows, scale, 0.0)):
        own = normalize(f[i, : rows.shape[1]], dim=0)
        losses.append(influence * cross_entropy + cosine * (1 - float(own @ rows[int(y[i])])))
    return losses


def brute_repulsion(
    f: Tensor, y: Tensor, p: Tensor, scale: float, eta: float, neighbours: int, tau: float
) -> list[float]:
    moved = []
    for c in range(len(p)):
        others = sorted((float(p[c] @ p[o]), o) for o in range(len(p)) if o != c)[::-1][:neighbours]
        total = sum(math.exp(similarity / tau) for similarity, _ in others)
        step = sum(math.exp(similarity / tau) / total * (p[c] - p[o]) for similarity, o in others)
        moved.append(normalize(p[c] + eta * step, dim=0))
    return brute_cross_entropy(f, y, torch.stack(moved), scale, 0.0)


def brute_logits(f: Tensor, y: Tensor, z: Tensor, distance: Callable[[list[float], list[float]], float]) -> list[float]:
    """`distance` of the logits of the classes that the predecessor knows, and whether it is right."""
    losses = []
    for i in range(len(f)):
        known = [c for c in range(z.shape[1]) if math.isfinite(float(z[i, c]))]
        losses.append(distance([float(f[i, c]) for c in known], [float(z[i, c]) for c in known]) if known else 0.0)
    return losses


def brute_focal(f: Tensor, y: Tensor, z: Tensor, alpha: float, beta: float, losses: list[float]) -> list[float]:
    found = []
    for i, loss in enumerate(losses):
        own = float(z[i, int(y[i])])
        is_right = all(own > float(z[i, c]) for c in range(z.shape[1]) if c != int(y[i]))
        found.append((alpha + beta * is_right) * loss)
    return found


def brute_focal_kl(f: Tensor, y: Tensor, z: Tensor, alpha: float, beta: float, tau: float) -> list[float]:
    def divergence(new: list[float], old: list[float]) -> float:
        p, q = ([math.exp(v / tau) / sum(math.exp(w / tau) for w in values) for v in values] for values in (old, new))
        return tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    return brute_focal(f, y, z, alpha, beta, brute_logits(f, y, z, divergence))


def brute_focal_logits(f: Tensor, y: Tensor, z: Tensor, alpha: float, beta: float) -> list[float]:
    def half_mean(new: list[float], old: list[float]) -> float:
        return 0.5 * sum((a - b) ** 2 for a, b in zip(new, old, strict=True)) / len(new)

    return brute_focal(f, y, z, alpha, beta, brute_logits(f, y, z, half_mean))


def brute_ldi(f: Tensor, y: Tensor, z: Tensor, xi: float) -> list[float]:
    def beyond(new: list[float], old: list[float]) -> float:
        return sum(max(abs(a - b) - xi, 0.0) ** 2 for a, b in zip(new, old, strict=True)) / len(new)

    return brute_logits(f, y, z, beyond)


BRUTE: dict[str, tuple[Callable[..., list[float]], list[dict[str, float]]]] = {
    "bct": (lambda f, y, r, scale: brute_cross_entropy(f, y, r, scale, 0.0), [{"scale": 7.0}]),
    "cross_contrast": (brute_cross_entropy, [{"scale": 5.0, "margin": 0.3}]),
    "focal_kl": (brute_focal_kl, [{"alpha": 1.0, "beta": 5.0, "tau": 100.0}, {"alpha": 0.0, "beta": 2.0, "tau": 1.0}]),
    "focal_logits": (brute_focal_logits, [{"alpha": 1.0, "beta": 5.0}, {"alpha": 0.5, "beta": 0.0}]),
    "hoc": (brute_hoc, [{"mu": 10.0}, {"mu": 2.0}]),
    "l2": (brute_l2, [{}]),
    "ldi": (brute_ldi, [{"xi": 0.0}, {"xi": 0.5}]),
    "oca": (
        brute_oca,
        [{"scale": 5.0, "influence": 10.0, "cosine": 5.0}, {"scale": 30.0, "influence": 0.5, "cosine": 2}],
    ),
    "ract": (brute_ract, [{"tau": 0.2, "hardest": 0}, {"tau": 0.2, "hardest": 2}]),
    "repulsion": (
        brute_repulsion,
        [
            {"scale": 5.0, "eta": 0.5, "neighbours": 2, "tau": 0.1},
            {"scale": 5.0, "eta": 2.0, "neighbours": 9, "tau": 0.5},
        ],
    ),
}
CASES = [(name, parameters) for name, (_, cases) in sorted(BRUTE.items()) for parameters in cases]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1, 0])


def references_for(name: str, y: Tensor, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    if CONSTRAINTS[name].reference in BY_IMAGE:  # type: ignore[attr-defined]
        return normalize(torch.randn(PREDECESSORS, len(y), width, dtype=torch.float64), dim=2), y
    return normalize(torch.randn(PREDECESSORS, CLASSES, width, dtype=torch.float64), dim=2), torch.arange(CLASSES)


def test_every_constraint_has_its_slow_loop() -> None:
    assert sorted(BRUTE) == sorted(CONSTRAINTS)
    for name, build in CONSTRAINTS.items():
        assert isinstance(build(), Constraint), name


@pytest.mark.parametrize("width", [WIDTH, WIDTH - 2])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_constraint_is_its_formula(
    batch: tuple[Tensor, Tensor], width: int, name: str, parameters: dict[str, float]
) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y, width)
    losses = [BRUTE[name][0](f, y, reference, **parameters) for reference in references]
    constraint = build_constraint(name, parameters)
    found = constraint(f, y, references, ref_labels)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([sum(of_k) / BATCH for of_k in losses], rel=1e-9)
    weights = torch.rand(PREDECESSORS, BATCH, dtype=torch.float64)
    weighted = (torch.tensor(losses, dtype=torch.float64) * weights).mean(dim=1)
    assert constraint(f, y, references, ref_labels, weights=weights).tolist() == pytest.approx(
        weighted.tolist(), rel=1e-9
    )
    if CONSTRAINTS[name].reference not in BY_IMAGE:  # type: ignore[attr-defined]
        order = torch.randperm(CLASSES)
        shuffled = constraint(f, y, references[:, order], ref_labels[order])
        assert shuffled.tolist() == pytest.approx(found.tolist(), rel=1e-9)
    single = constraint(f.float(), y, references.float(), ref_labels)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(found.tolist(), rel=1e-4)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_gradients_are_those_of_finite_differences(
    batch: tuple[Tensor, Tensor], name: str, parameters: dict[str, float]
) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y, WIDTH - 2)
    constraint = build_constraint(name, parameters)
    assert torch.autograd.gradcheck(lambda given: constraint(given, y, references, ref_labels), f.requires_grad_(True))


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_a_stack_of_predecessors_gives_what_each_alone_gives(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    constraint = CONSTRAINTS[name]()
    alone = [float(constraint(f, y, reference, ref_labels)) for reference in references]
    assert constraint(f, y, references, ref_labels).tolist() == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_the_order_of_images_does_not_matter(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    constraint = CONSTRAINTS[name]()
    expected = constraint(f, y, references, ref_labels).tolist()
    order = torch.randperm(BATCH)
    if CONSTRAINTS[name].reference in BY_IMAGE:  # type: ignore[attr-defined]
        references, ref_labels = references[:, order], ref_labels[order]
    assert constraint(f[order], y[order], references, ref_labels).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_rotated_space_is_penalised_more_than_a_slightly_noisy_copy() -> None:
    torch.manual_seed(0)
    y = torch.arange(40) % CLASSES
    centres = normalize(torch.randn(CLASSES, 16), dim=1)
    stale = normalize(centres[y] + 0.2 * torch.randn(40, 16) / 4, dim=1)
    copy = stale + 0.02 * torch.randn(40, 16)
    rotated = stale @ torch.linalg.qr(torch.randn(16, 16))[0]
    for name in sorted(CONSTRAINTS):
        constraint = CONSTRAINTS[name]()
        by_image = constraint.reference in BY_IMAGE
        reference, ref_labels = (stale, y) if by_image else (centres, torch.arange(CLASSES))
        assert float(constraint(copy, y, reference, ref_labels)) < float(constraint(rotated, y, reference, ref_labels))


@pytest.mark.parametrize(("name", "parameters"), [case for case in CASES if CONSTRAINTS[case[0]].reference == "logits"])  # type: ignore[attr-defined]
def test_classes_that_a_predecessor_does_not_know_are_left_out(
    batch: tuple[Tensor, Tensor], name: str, parameters: dict[str, float]
) -> None:
    f, y = batch
    stale, _ = references_for(name, y)
    for k in range(PREDECESSORS):
        stale[k, :, k] = -torch.inf  # the images of this class are right by no logit of its own
    stale[0, 2] = -torch.inf  # an image with nothing to be compared with
    f.requires_grad_(True)
    found = build_constraint(name, parameters)(f, y, stale, y)
    expected = [sum(BRUTE[name][0](f.detach(), y, of_k, **parameters)) / BATCH for of_k in stale]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    found.sum().backward()
    assert f.grad is not None
    assert bool(f.grad.isfinite().all())
    nothing = build_constraint(name, parameters)(f, y, torch.full_like(stale, -torch.inf), y)
    assert nothing.tolist() == [0.0] * PREDECESSORS


# The edges


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_an_empty_batch_costs_nothing_and_has_a_gradient(name: str) -> None:
    f, y = torch.zeros(0, WIDTH, requires_grad=True), torch.zeros(0, dtype=torch.long)
    references, ref_labels = references_for(name, y)
    losses = CONSTRAINTS[name]()(f, y, references, ref_labels)
    assert losses.tolist() == [0.0] * PREDECESSORS
    losses.sum().backward()
    assert f.grad is not None


@pytest.mark.parametrize("name", ["ract", "hoc"])
def test_without_negatives_the_loss_is_zero_with_a_finite_gradient(name: str) -> None:
    f = torch.randn(3, WIDTH, requires_grad=True)
    y = torch.zeros(3, dtype=torch.long)
    loss = CONSTRAINTS[name]()(f, y, normalize(torch.randn(1, 3, WIDTH), dim=2), y).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert f.grad is not None
    assert bool(f.grad.isfinite().all())


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_a_label_without_its_reference_is_refused(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y)
    with pytest.raises(UsageError, match=r"one reference for the label 3, found 0|same images"):
        CONSTRAINTS[name]()(f, y, references[:, :3], ref_labels[:3])
    with pytest.raises(UsageError, match=r"one reference for the label 0, found 4|same images"):
        CONSTRAINTS[name]()(f, y, references, ref_labels.flip(0) * 0)


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_shapes_that_do_not_fit_are_refused(name: str, batch: tuple[Tensor, Tensor]) -> None:
    f, y = batch
    references, ref_labels = references_for(name, y, WIDTH)
    for wrong in (
        (f[:, :-1], y, references, ref_labels),  # predecessors wider than the generation in training
        (f, y[:-1], references, ref_labels),
        (f, y, references[:, :-1], ref_labels),
        (f[0], y, references, ref_labels),
        (f, y, references[0, 0], ref_labels),
    ):
        with pytest.raises(UsageError, match=r"expected \(B, d\)"):
            CONSTRAINTS[name]()(*wrong)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("ract", {"hardest": 0.5}, "hardest to be a whole number of at least 0, found 0.5"),
        ("ract", {"hardest": -1}, "whole number"),
        ("ract", {"tau": 0.0}, "tau to be a number above 0"),
        ("bct", {"scale": float("nan")}, "scale"),
        ("cross_contrast", {"margin": float("inf")}, "margin"),
        ("hoc", {"mu": 0.0}, "mu"),
        ("oca", {"influence": -1.0}, "influence"),
        ("repulsion", {"neighbours": 0}, "whole number of at least 1"),
        ("focal_kl", {"tau": 0.0}, "tau to be a number above 0"),
        ("focal_logits", {"beta": -1.0}, "beta"),
        ("ldi", {"xi": -0.1}, "xi"),
        ("mixbct", {"share": 1.5}, "above 0 and at most 1"),
        ("l2", {"scale": 1.0}, r"parameters \[\]"),
        ("bcd", {}, "package.module:Class or one of"),
    ],
)
def test_parameters_that_cannot_be_are_refused(name: str, parameters: dict[str, float], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        build_constraint(name, parameters)
    known = CONSTRAINTS.get(name)
    if known is not None and name != "l2":
        with pytest.raises(UsageError, match=expected):
            known(**parameters)


def test_a_constraint_from_elsewhere_is_found_by_module_and_name(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    f, y = batch
    references, ref_labels = references_for("l2", y)
    found = build_constraint("factories:Absolute", {"power": 2.0})
    assert found(f, y, references, ref_labels).tolist() == pytest.approx(
        CONSTRAINTS["l2"]()(f, y, references, ref_labels).tolist()
    )
    assert not takes(found, "weights")
    assert takes(CONSTRAINTS["bct"](), "weights")
    for name, parameters, expected in (
        ("factories:Missing", {}, "an importable factories:Missing"),
        ("no_such_package:Absolute", {}, "PYTHONPATH"),
        ("factories:Absolute", {"scale": 1.0}, "its own parameters"),
        ("factories:Flat", {"pixels": 1, "width": 1}, "an attribute reference"),
    ):
        with pytest.raises(UsageError, match=expected):
            build_constraint(name, parameters)


# Mixed features and uncertainty


def test_mixed_features_replace_the_share_of_the_batch_by_typical_vectors_alone() -> None:
    is_typical = torch.rand(PREDECESSORS, 100, generator=torch.Generator().manual_seed(1)) < 0.9
    counts = torch.zeros(PREDECESSORS)
    for seed in range(50):
        chosen = MixedFeatures().draw(is_typical, torch.Generator().manual_seed(seed))
        assert torch.equal(chosen, MixedFeatures().draw(is_typical, torch.Generator().manual_seed(seed)))
        assert int((chosen >= 0).sum()) == 30
        replaced = (chosen >= 0).nonzero()[:, 0]
        assert bool(is_typical[chosen[replaced], replaced].all())
        counts += torch.bincount(chosen[replaced], minlength=PREDECESSORS)
    assert counts.min() > 400  # of 1,500, by three predecessors
    rare = torch.zeros(1, 10, dtype=torch.bool)
    rare[0, 3] = True
    assert MixedFeatures().draw(rare, torch.Generator()).tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, -1, -1]


def test_typical_images_are_the_nearest_to_their_class_mean() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    similarities = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2, 0.6, 0.8])
    for share, expected in ((0.5, [0, 3, 4, 6]), (0.8, [0, 1, 3, 4, 5, 6]), (1.0, list(range(7)))):
        assert typical_images(similarities, labels, share).nonzero()[:, 0].tolist() == expected


def test_class_margins_and_trust_are_their_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    stale, means = (
        normalize(torch.randn(PREDECESSORS, count, WIDTH, generator=generator, dtype=torch.float64), dim=2)
        for count in (BATCH, CLASSES)
    )
    y = torch.tensor([0, 1, 2, 3, 0, 1, 0])
    margins = class_margins(stale, means, y)
    weights = trust(margins)
    for k in range(PREDECESSORS):
        expected = []
        for i in range(BATCH):
            similarities = [float(stale[k, i] @ means[k, c]) for c in range(CLASSES)]
            own = similarities.pop(int(y[i]))
            expected.append(own - max(similarities))
        assert margins[k].tolist() == pytest.approx(expected)
        mean = sum(expected) / BATCH
        deviation = math.sqrt(sum((m - mean) ** 2 for m in expected) / BATCH)
        shares = [1 / (1 + math.exp(-(m - mean) / deviation)) for m in expected]
        assert weights[k].tolist() == pytest.approx([share * BATCH / sum(shares) for share in shares])
        assert focused(margins, 5.0)[k].tolist() == [6.0 if m > 0 else 1.0 for m in expected]
    assert not trust(margins.requires_grad_(True)).requires_grad
    assert not focused(margins, 5.0).requires_grad
