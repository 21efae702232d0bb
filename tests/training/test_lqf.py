"""Linear quadratic fine-tuning: expansion, loss and curvature against their definitions; whole trainings."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import normalize

from graceful.errors import UsageError
from graceful.files import join
from graceful.training import linear as linear_module
from graceful.training import loop
from graceful.training.backbones import build_backbone
from graceful.training.combinations import IncompatibleParentError
from graceful.training.curvature import Curvature, QuadraticOptimizer
from graceful.training.encoder import open_encoder, open_network, read_classifier
from graceful.training.generation import BackboneSpec, GenerationCard
from graceful.training.job import AugmentationConfig, HeadConfig, LqfConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.linear import Linearised, SquaredHead
from graceful.training.manifest import LabelledImages
from graceful.training.material import load_material
from graceful.training.progress import TrailReporter
from graceful.training.sampling import ClassSample

sys.path.insert(0, str(Path(__file__).parent))
from ranks import on_ranks, trained

MakeJob = Callable[..., TrainingJob]
LEAKY = BackboneSpec(name="small_cnn", kwargs={"block_widths": [6, 8], "negative_slope": 0.1})


@pytest.fixture
def network() -> nn.Module:
    """A small leaky network in float64 whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    made = build_backbone(LEAKY, 5, 1, 8).double()
    made.train()(torch.randn(64, 1, 8, 8, dtype=torch.float64) * 2 + 1)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randn(7, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def changed(linear: Linearised, scale: float) -> list[Tensor]:
    """Set the change to a random one of this scale; returns it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for change in linear.change:
            change.copy_(scale * torch.randn(change.shape, generator=generator, dtype=torch.float64))
    return [change.detach().clone() for change in linear.change]


# The expansion


def test_the_expansion_is_the_derivative_along_the_change(network: nn.Module, images: Tensor) -> None:
    linear = Linearised(network)
    first = network(images)
    torch.testing.assert_close(linear(images), normalize(first, dim=1))
    change = changed(linear, 0.1)
    found = linear(images) * first.norm(dim=1, keepdim=True) - first
    small, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, along in zip(network.parameters(), change, strict=True):
                parameter.add_(sign * small * along)
            ends.append(network(images))
            for parameter, along in zip(network.parameters(), change, strict=True):
                parameter.sub_(sign * small * along)
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * small), rtol=1e-5, atol=1e-7)
    assert float(found.detach().abs().max()) > 0.01
    changed(linear, 0.3)
    torch.testing.assert_close(linear(images) * first.norm(dim=1, keepdim=True) - first, 3 * found)


@pytest.mark.parametrize("at_once", [64, 3])
def test_gradients_are_those_of_the_forward_derivative_itself(
    network: nn.Module, images: Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """J^T by ordinary backward passes, part by part, beside differentiating through the Jacobian-vector product."""
    monkeypatch.setitem(linear_module._AT_ONCE, "cpu", at_once)
    linear = Linearised(network)
    changed(linear, 0.1)
    wanted = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(2):  # gradients of micro-batches add up
        (linear(images) - wanted).square().sum().backward()
    point = {name: parameter.detach() for name, parameter in network.named_parameters()}
    change = {name: part.detach().requires_grad_() for name, part in zip(point, linear.change, strict=True)}
    value, slope = jvp(lambda weights: functional_call(network, weights, (images,)), (point,), (change,))
    expected = (value + slope) / value.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(images), expected)
    (expected - wanted).square().sum().backward()
    for part, slow in zip(linear.change, change.values(), strict=True):
        assert part.grad is not None
        assert slow.grad is not None
        torch.testing.assert_close(part.grad, 2 * slow.grad)


def test_an_expansion_moves_with_its_network(network: nn.Module, images: Tensor) -> None:
    linear = Linearised(network)
    before = linear(images)
    found = linear.float()(images.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, before.float(), rtol=1e-4, atol=1e-5)


def test_a_training_mode_leaves_the_network_in_evaluation_mode(network: nn.Module, images: Tensor) -> None:
    linear = Linearised(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    alone = linear.train()(images[:1])
    changed(linear, 0.1)
    linear(images).sum().backward()
    assert all(change.grad is not None and bool(change.grad.isfinite().all()) for change in linear.change)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    changed(linear, 0.0)
    torch.testing.assert_close(linear.train()(images)[:1], alone)  # an image does not depend on its batch


def test_what_is_stored_is_the_network_at_the_changed_weights(network: nn.Module, images: Tensor) -> None:
    linear = Linearised(network)
    torch.testing.assert_close(linear.moved()(images), network(images))
    differences = []
    for scale in (1e-4, 1e-5):
        change = changed(linear, scale)
        moved = linear.moved()
        for parameter, first, along in zip(moved.parameters(), network.parameters(), change, strict=True):
            assert torch.equal(parameter, first + along)
        expected = linear(images) * network(images).norm(dim=1, keepdim=True)
        differences.append(float((moved(images) - expected).detach().abs().max()))
    assert differences[1] < differences[0] / 50  # of second order
    assert isinstance(moved, type(network))


# The loss and its curvature


def test_the_squared_loss_is_its_formula_over_all_and_over_a_sample() -> None:
    torch.manual_seed(0)
    head = SquaredHead(HeadConfig(scale=20.0, weight=0.5), 15.0, 6, 4)
    f, y = torch.randn(5, 4), torch.tensor([0, 2, 4, 4, 0])
    assert not any(parameter.requires_grad for parameter in head.parameters())

    def slow(classes: list[int], counts: list[float]) -> float:
        losses = []
        for i in range(5):
            rows = [normalize(head.rows[c], dim=0) for c in classes]
            terms = [
                count * (20.0 * float(f[i] @ row) - 15.0 * (c == int(y[i]))) ** 2
                for c, row, count in zip(classes, rows, counts, strict=True)
            ]
            losses.append(0.5 * sum(terms))
        return 0.5 * sum(losses) / 5

    assert float(head(f, y)) == pytest.approx(slow(list(range(6)), [1.0] * 6), rel=1e-5)
    sample = ClassSample(torch.tensor([0, 2, 3, 4]), torch.tensor([0.0, 0.0, 3.0, 0.0]).log().nan_to_num(neginf=0.0))
    assert float(head(f, y, sample)) == pytest.approx(slow([0, 2, 3, 4], [1.0, 1.0, 3.0, 1.0]), rel=1e-5)
    rows = torch.rand(6, 4) + 1.0
    head.set_rows(3 * rows)
    centred = normalize(rows, dim=1) - normalize(rows, dim=1).mean(dim=0)
    torch.testing.assert_close(head.rows, normalize(centred, dim=1))
    empty = head(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert float(empty.detach()) == 0.0
    empty.backward()


def test_factors_of_a_convolution_are_their_definition(images: Tensor) -> None:
    """Patches and gradients by loops, from the same random logits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(27, 5)).double()
    rows = normalize(torch.randn(4, 5, dtype=torch.float64), dim=1)
    found = Curvature(Linearised(network), rows, 20.0, [images], damping=0.01)
    noise = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    inputs, outputs = torch.zeros(9, 9, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    diagonal = torch.zeros(5, dtype=torch.float64)
    matrix = network[2].weight.detach()
    value = network(images).detach()
    back = 20.0 * (noise @ rows) / value.norm(dim=1, keepdim=True)
    for i in range(7):
        gradient = (back[i] @ matrix).view(3, 3, 3)
        for row in range(3):
            for column in range(3):
                patch = images[i, 0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                inputs += torch.outer(patch, patch) / 7
                outputs += torch.outer(gradient[:, row, column], gradient[:, row, column]) / (7 * 9)
    diagonal = back.sum(dim=0).square() / 7

    def damped(factor: Tensor) -> Tensor:
        return torch.linalg.inv(factor + 0.1 * factor.diagonal().mean() * torch.eye(len(factor)).double())

    parameters = [nn.Parameter(torch.zeros_like(parameter)) for parameter in network.parameters()]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    found.precondition(parameters)
    expected = (damped(outputs) @ gradients[0].flatten(1) @ damped(inputs)).view(3, 1, 3, 3)
    torch.testing.assert_close(parameters[0].grad, expected)
    torch.testing.assert_close(parameters[2].grad, gradients[2] / (diagonal + 0.01 * diagonal.mean()))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_one_step_of_the_optimiser_solves_a_problem_whose_curvature_is_a_product() -> None:
    """One linear layer on unit inputs under an orthogonal matrix: H is A x G, and a Newton step ends at the minimum."""
    torch.manual_seed(0)
    network = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.linalg.qr(torch.randn(5, 5))[0])
    inputs, labels = normalize(torch.randn(4000, 5), dim=1), torch.randint(0, 8, (4000,))
    linear, head = Linearised(network), SquaredHead(HeadConfig(), 15.0, 8, 5)
    rows = normalize(head.rows, dim=1)
    curvature = Curvature(linear, rows, 20.0, inputs.split(500), damping=1e-6)
    optimizer = QuadraticOptimizer(list(linear.change), [], curvature, lr=1.0, decay=0.0)
    before = head(linear(inputs), labels)
    before.backward()
    optimizer.step()
    after = float(head(linear(inputs), labels).detach())
    wanted = 15.0 * nn.functional.one_hot(labels, 8).float()
    best = torch.linalg.lstsq(inputs, torch.linalg.lstsq(20.0 * rows, wanted.t()).solution.t()).solution
    lowest = float(0.5 * (20.0 * inputs @ best @ rows.t() - wanted).square().sum(dim=1).mean())
    assert lowest < after < lowest + 0.05 * (float(before.detach()) - lowest)


def test_decay_draws_to_the_predecessor() -> None:
    linear = Linearised(nn.Linear(3, 4, bias=False))
    curvature = Curvature(linear, torch.eye(4), 1.0, [torch.randn(50, 3)], damping=1.0)
    for decay in (0.0, 1e4):
        optimizer = QuadraticOptimizer(list(linear.change), [], curvature, lr=1e-3, decay=decay)
        with torch.no_grad():
            linear.change[0].fill_(1.0)
        linear.change[0].grad = torch.zeros(4, 3)
        optimizer.step()
        assert bool((linear.change[0] < 1.0).any()) == (decay > 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LqfConfig(), 0.1), (LqfConfig(loss="squared"), 0.005), (LqfConfig(loss="squared", max_lr=0.2), 0.2)],
)
def test_the_learning_rate_goes_with_the_loss(config: LqfConfig, expected: float) -> None:
    assert config.peak_lr == expected


# Whole trainings


@pytest.fixture
def update(make_job: MakeJob, config: TrainingConfig, digits: LabelledImages) -> Callable[..., Any]:
    """Return a function that makes the job of an update by LQF, after a first generation of half of the digits."""
    base = config.model_copy(update={"backbone": LEAKY, "constraints": (), "mixture": 0.0, "lqf": LqfConfig()})
    few = digits.take([i for i, label in enumerate(digits.labels) if label in "13579"])

    def make(**changes: Any) -> tuple[str, TrainingJob]:
        first = changes.pop("first", {})
        before = make_job(images=few, name="-".join(["first", *first]), config=base.model_copy(update=first))
        uri = join(before.output_uri, run_training(before).generation_id)
        name = changes.pop("name", "second")
        return uri, make_job(name=name, config=base.model_copy(update=changes), parent_uri=uri, ordinal=2)

    return make


def test_an_update_is_an_ordinary_generation_near_its_predecessor(
    update: Callable[..., Any], digits: LabelledImages
) -> None:
    uri, job = update()
    assert "lqf" not in GenerationCard.model_validate(open_encoder(uri).card).training  # nothing to expand
    card = run_training(job)
    assert card.training["lqf"] == LqfConfig().model_dump(mode="json")
    assert card.training["precision"] == "float32"
    assert (card.backbone, card.calibrated_images) == (LEAKY, 600)
    place = join(job.output_uri, card.generation_id)
    (vectors, _), (earlier, _) = (open_encoder(one, precision="float32")(digits.sources) for one in (place, uri))
    assert 0.5 < float((vectors * earlier).sum(axis=1).mean()) < 0.9999
    lines = [line["task"] for line in TrailReporter(job.storage_uri, job.name).metrics()]
    assert lines[-1] < lines[0]
    state, first = (open_network(one, torch.device("cpu"))[1].state_dict() for one in (place, uri))
    assert state.keys() == first.keys()
    assert any(not torch.equal(state[name], first[name]) for name in state if name.endswith("weight"))
    stored = read_classifier(place)
    assert stored is not None
    assert stored[1].shape == (10, 16)


@pytest.mark.parametrize(
    "changes", [{"loss": "squared"}, {"optimizer": "adam"}, {"loss": "squared", "optimizer": "adam"}]
)
def test_every_ingredient_can_be_left_out(update: Callable[..., Any], changes: dict[str, Any]) -> None:
    _, job = update(lqf=LqfConfig(**changes), epochs=1)
    card = run_training(job)
    assert card.training["lqf"] | changes == card.training["lqf"]


def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    update: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curvature is taken again when a training goes on: at the parent, not at the weights of the checkpoint."""
    _, job = update(epochs=2, name="whole")
    whole = run_training(job)
    look = loop.Validation.look
    ends: list[int] = []

    def stop(self: Any, curve: list[float]) -> dict[str, float]:
        ends.append(1)
        if len(ends) == 2:
            raise KeyboardInterrupt
        return look(self, curve)

    monkeypatch.setattr(loop.Validation, "look", stop)
    stopped = job.model_copy(update={"name": "stopped"})
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped)
    monkeypatch.undo()
    assert run_training(stopped).digest == whole.digest


def test_two_workers_train_the_same_expansion_as_one(update: Callable[..., Any]) -> None:
    """600 images in batches of 61, undistorted: the curvature, the loss and its gradients are of the global batch."""
    curves = []
    for num_ranks in (1, 2):
        still = {"augmentation": AugmentationConfig(kind="none"), "batch_size": 61, "epochs": 2}
        _, job = update(name=f"on-{num_ranks}", **still)
        cards = [run_training(job)] if num_ranks == 1 else on_ranks(num_ranks, trained, job)
        assert cards[0].training["workers"] == num_ranks
        curves.append([line["task"] for line in TrailReporter(job.storage_uri, job.name).metrics()])
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    assert curves[0][-1] < 0.98 * curves[0][0]  # something was learned


# Refusals


def test_what_cannot_be_expanded_is_refused_before_data_are_read(
    update: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])

    def no_data(*_: Any) -> None:
        raise AssertionError("data were read before the recipe was refused")

    batchwise = {"backbone": BackboneSpec(name="factories:batchwise")}
    plain = BackboneSpec(name="small_cnn", kwargs={"block_widths": [6, 8]})
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"backbone": plain}, "the same backbone and preprocessing with .training.lqf.", "keep the backbone"),
        ({"width": 24}, "the width 16 of g001", "keep the width"),
        ({"first": batchwise, **batchwise}, "batch norm with running statistics, found norm", "another norm"),
    ]
    for changes, reason, remedy in cases:
        _, job = update(**changes)
        monkeypatch.setattr(loop, "load_material", no_data)
        with pytest.raises((IncompatibleParentError, UsageError), match=reason) as raised:
            loop.train_worker(job, TrailReporter(job.storage_uri, job.name))
        monkeypatch.setattr(loop, "load_material", load_material)
        assert remedy in str(raised.value)
    assert job.config.without_constraints().lqf is None  # LQF is a tie to the predecessor too
    with pytest.raises(UsageError, match="batch norm with running statistics, found 1 without"):
        Linearised(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))


def test_contradictions_with_lqf_are_refused(config: TrainingConfig) -> None:
    for changes, expected in (
        ({"start": "scratch", "interpolation": 0.0}, "start = 'parent' and rows_from_parent = true"),
        ({"rows_from_parent": False}, "start = 'parent' and rows_from_parent = true"),
        ({"head": {"name": "simplex"}}, "found simplex or rotation"),
        ({"head": {"rotation": True}}, "found simplex or rotation"),
        ({"precision": "bfloat16"}, "expected float32"),
    ):
        with pytest.raises(ValidationError, match=expected):
            TrainingConfig.model_validate({**config.model_dump(mode="json"), "lqf": {}, **changes})


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_leaky_networks_have_the_slope_everywhere_and_the_same_weights(name: str) -> None:
    leaky = build_backbone(BackboneSpec(name=name, kwargs={"negative_slope": 0.2}), 8, 3, 32)
    plain = build_backbone(BackboneSpec(name=name), 8, 3, 32)
    assert leaky.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, nn.ReLU) for module in leaky.modules())
    slopes = [module.negative_slope for module in leaky.modules() if isinstance(module, nn.LeakyReLU)]
    num_plain = sum(isinstance(module, nn.ReLU) for module in plain.modules())
    assert slopes == [0.2] * num_plain
    for kwargs, expected in (({"negative_slope": 1.5}, "above 0 and below 1"), ({"negative_slope": -0.1}, "above 0")):
        with pytest.raises(UsageError, match=expected):
            build_backbone(BackboneSpec(name=name, kwargs=kwargs), 8, 3, 32)
    with pytest.raises(UsageError, match="expected ReLU modules"):
        build_backbone(BackboneSpec(name="efficientnet_b0", kwargs={"negative_slope": 0.1}), 8, 3, 32)
