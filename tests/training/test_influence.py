"""Influence through the last layer: against fitting it anew without an image; images with wrong labels are found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from graceful.errors import UsageError
from graceful.training.encoder import open_encoder, read_classifier, save_generation
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.influence import (
    RIDGE,
    SCALE,
    TARGET,
    Answer,
    FeatureReader,
    Features,
    LastLayer,
    influences,
    matrix_of,
)
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages

N, M, D, C = 40, 7, 5, 6


@pytest.fixture
def problem() -> tuple[Features, Tensor, Tensor, Tensor]:
    """Inputs with a 1, labels, rows and the stored layer, all random."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(D, M + 1, generator=draw).double()
    features = torch.cat([torch.randn(N, M, generator=draw).double(), torch.ones(N, 1)], dim=1)
    lengths = (features @ matrix.t()).norm(dim=1, keepdim=True)
    inputs = features / lengths
    labels = torch.randint(0, C, (N,), generator=draw)
    return Features(inputs, inputs @ matrix.t()), labels, torch.randn(C, D, generator=draw), matrix


def fitted(inputs: Tensor, labels: Tensor, rows: Tensor, matrix: Tensor, ridge: float) -> Tensor:
    """The layer (d, m + 1) that minimises the loss of the module's docstring, as one system of linear equations."""
    rows = normalize(rows.double(), dim=1)
    rows = normalize(rows - rows.mean(dim=0), dim=1)
    system = ridge * torch.eye(matrix.numel(), dtype=torch.float64)
    right = ridge * matrix.reshape(-1)
    for given, label in zip(inputs, labels, strict=True):
        jacobian = SCALE * torch.kron(rows, given[None])  # (C, d (m + 1))
        wanted = TARGET * nn.functional.one_hot(label, len(rows)).double()
        system += jacobian.t() @ jacobian
        right += jacobian.t() @ wanted
    return torch.linalg.solve(system, right).view_as(matrix)


def ridge_of(inputs: Tensor, rows: Tensor) -> float:
    rows = normalize(rows.double(), dim=1)
    rows = normalize(rows - rows.mean(dim=0), dim=1)
    curvatures = torch.linalg.eigvalsh(SCALE**2 * rows.t() @ rows)
    return RIDGE * float(torch.linalg.eigvalsh(inputs.t() @ inputs).mean() * curvatures[curvatures > 1e-6].mean())


def test_leaving_images_out_is_fitting_without_them(problem: tuple[Features, Tensor, Tensor, Tensor]) -> None:
    features, labels, rows, matrix = problem
    layer = LastLayer(features, labels, rows, matrix)
    ridge = ridge_of(features.inputs, rows)
    whole = fitted(features.inputs, labels, rows, matrix, ridge)
    draw = torch.Generator().manual_seed(1)
    probe, direction = torch.randn(M + 1, generator=draw).double(), torch.randn(D, generator=draw).double()
    effects = layer.effects(probe, direction)
    for place in (0, 7, N - 1):
        kept = torch.arange(N) != place
        anew = fitted(features.inputs[kept], labels[kept], rows, matrix, ridge)
        torch.testing.assert_close(effects[place], direction @ (anew - whole) @ probe)
    gone = torch.tensor([3, 4, 20])
    kept = ~torch.isin(torch.arange(N), gone)
    anew = fitted(features.inputs[kept], labels[kept], rows, matrix, ridge)
    torch.testing.assert_close(layer.without(gone), anew - whole)
    assert float(layer.without(gone[:0]).abs().max()) == 0.0


def test_an_influence_is_the_change_of_the_margin_of_the_network_without_an_image(
    problem: tuple[Features, Tensor, Tensor, Tensor],
) -> None:
    """All three vectors come from the layer; of a small change the margin moves as its derivative says."""
    features, labels, rows, matrix = problem
    layer = LastLayer(features, labels, rows, matrix, ridge=1e4)  # so that the layer hardly moves
    shown = features.inputs[:3]
    vectors = normalize(shown @ matrix.t(), dim=1)
    answer = Answer(shown[0], vectors[0], vectors[1], vectors[2], shown[1], shown[2])
    found = influences(layer, answer)
    for place in (0, 5, 11):
        moved = normalize(shown @ (matrix + layer.without(torch.tensor([place]))).t(), dim=1)
        after = float(moved[0] @ (moved[1] - moved[2]))
        assert float(found[place]) == pytest.approx(after - answer.margin, rel=0.02, abs=1e-9)
    fixed = influences(layer, Answer(shown[0], vectors[0], vectors[1], vectors[2]))
    assert float((fixed - found).abs().max()) > 1e-6


def test_images_that_carry_a_wrong_label_are_named(
    make_job: Callable[..., TrainingJob], config: TrainingConfig, digits: LabelledImages
) -> None:
    """A tenth of one class is called another one: behind an answer that mistakes the one for the other stand these."""
    first, second = sorted(set(digits.labels.tolist()))[:2]
    of_first = [place for place, label in enumerate(digits.labels) if label == first]
    wrong = of_first[: max(2, len(of_first) // 4)]
    labels = digits.labels.copy()
    labels[wrong] = second
    uri = _trained(make_job, config, LabelledImages(digits.sources, labels, digits.content_sha256))
    reader, stored = FeatureReader(uri), read_classifier(uri)
    assert stored is not None
    card, rows, _ = stored
    seen = reader(digits.sources)
    codes = torch.tensor([card.classes.index(str(label)) for label in labels])
    layer = LastLayer(seen, codes, rows, matrix_of(reader.layer))
    query = of_first[-1]
    other = next(place for place, label in enumerate(digits.labels) if label == second)
    right = seen.vectors[of_first[-2]]
    answer = Answer(seen.inputs[query], seen.vectors[query], right, seen.vectors[other])
    worst = influences(layer, answer).argsort(descending=True)[: len(wrong)].tolist()
    assert len(set(worst) & set(wrong)) >= len(wrong) / 2


def test_features_are_those_of_the_encoder(
    make_job: Callable[..., TrainingJob], config: TrainingConfig, digits: LabelledImages
) -> None:
    uri = _trained(make_job, config, digits)
    found = FeatureReader(uri)(digits.sources[:9])
    vectors, _ = open_encoder(uri, precision="float32")(digits.sources[:9])
    torch.testing.assert_close(found.vectors.float(), torch.from_numpy(vectors))
    reader = FeatureReader(uri)
    torch.testing.assert_close(found.inputs @ matrix_of(reader.layer).t(), found.vectors, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"that cannot \(first nowhere\.png"):
        reader(["nowhere.png"])


class Scaled(nn.Module):
    """A network whose output is not that of its last linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, width)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layer(pictures.flatten(1)).square()


@pytest.mark.parametrize(("factory", "reason"), [("Scaled", "its last linear layer"), ("no_layer", "found none")])
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(
    tmp_path: Path, digits: LabelledImages, factory: str, reason: str
) -> None:
    look = Preprocessing(image_size=8, channels=1, mean=(0.0,), std=(1.0,))
    network: Any = Scaled(4) if factory == "Scaled" else no_layer(64)
    uri, _ = save_generation(
        str(tmp_path), network, ordinal=1, backbone=BackboneSpec(name=f"{__name__}:{factory}"), preprocessing=look,
        width=4 if factory == "Scaled" else 64,
    )  # fmt: skip
    with pytest.raises(UsageError, match=reason):
        FeatureReader(uri)(digits.sources[:2])


def no_layer(width: int) -> nn.Module:
    return nn.Flatten()


def _trained(make_job: Callable[..., TrainingJob], config: TrainingConfig, images: LabelledImages) -> str:
    job = make_job(images=images, config=config.model_copy(update={"constraints": (), "epochs": 4}))
    return f"{job.output_uri}/{run_training(job).generation_id}"
