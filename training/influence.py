"""Which training images an answer hangs on: their influence through the last linear layer, in closed form.

The last layer V (d, m) of a network is refitted by the squared loss of linear quadratic fine-tuning (Achille et al.,
CVPR 2021, 2012.11140), near the layer V_0 that is stored, everything below it as it is:

    min_V  sum_i 1/2 |s W (V h_i / n_i) - a e(y_i)|^2 + ridge/2 |V - V_0|^2

h_i (m,) are the features of image i, with a 1 for the bias, n_i = |V_0 h_i|, W (C, d) the classifier rows less their
mean, of unit length, s and a the scale and target of the logits. In the eigenvectors of s^2 W^T W the problem falls
into d ridge regressions with one Gram matrix sum_i h_i h_i^T / n_i^2, and what each would be without one image is known
exactly (Sherman and Morrison, 1950), without fitting anything anew. For a generation that LQF trained this is its own
loss in its last layer, for any other one a model of it.

Shapes: N training images, m features, d width, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.encoder import SourceEncoder, open_network, read_classifier
from graceful.training.generation import GenerationCard, read_card
from graceful.training.linear import centred
from graceful.training.manifest import LabelledImages

SCALE, TARGET, RIDGE = 20.0, 15.0, 0.1


@dataclass(frozen=True)
class Features:
    """What the last layer sees of images, and what it makes of them."""

    inputs: Tensor  # (n, m + 1) float64: features with a 1 (a 0 without a bias), over the length of the embedding
    vectors: Tensor  # (n, d) float64, of unit length


class FeatureReader:
    """The network of a generation up to its last linear layer."""

    def __init__(self, generation_uri: str) -> None:
        """Raises: GenerationNotFoundError, CorruptedWeightsError, UsageError for a network without such a layer."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.card, self.network = open_network(generation_uri, device)
        self.layer = _last_layer(self.network, self.card.width, self.card.generation_id)
        self._encoder = SourceEncoder(self.card, self.network, 256, "float32")

    def __call__(self, sources: Sequence[str]) -> Features:
        """Return what the last layer sees of images, by name. Raises UsageError for one that cannot be embedded."""
        with _captured(self.layer) as seen:
            vectors, failures = self._encoder(sources)
        if failures:
            place, reason = next(iter(failures.items()))
            raise UsageError(
                f"reading features of {self.card.generation_id}: expected images that can be embedded, found "
                f"{len(failures)} that cannot (first {sources[place]}: {reason}); restore them"
            )
        one = 0.0 if self.layer.bias is None else 1.0
        features = functional.pad(torch.cat([*seen, torch.empty(0, self.layer.in_features)]), (0, 1), value=one)
        features = features.double()
        matrix = matrix_of(self.layer)
        lengths = (features @ matrix.t()).norm(dim=1, keepdim=True)
        unit = torch.from_numpy(vectors).double()
        if len(unit) and float((features @ matrix.t() / lengths * unit).sum(dim=1).min()) < 1 - 1e-4:
            raise UsageError(
                f"reading features of {self.card.generation_id}: expected a network whose output is that of its last "
                "linear layer, found another; only such networks can be explained"
            )
        return Features(features / lengths, unit)


class LastLayer:
    """The refitted last layer, and what it would be without some of the training images."""

    def __init__(
        self,
        features: Features,
        labels: Tensor,
        rows: Tensor,
        matrix: Tensor,
        *,
        scale: float = SCALE,
        target: float = TARGET,
        ridge: float = RIDGE,
    ) -> None:
        """Fit it. Labels (N,) index the classifier rows (C, d); matrix (d, m + 1) is V_0 with its bias.

        ridge: relative to the mean eigenvalue of the problem.
        """
        rows = centred(rows.double())
        curvatures, basis = torch.linalg.eigh(scale**2 * rows.t() @ rows)
        kept = curvatures > 1e-9 * curvatures.max()
        self._basis, self._curvatures = basis[:, kept], curvatures[kept]
        self._inputs = features.inputs
        gram = self._inputs.t() @ self._inputs
        eigenvalues, self._axes = torch.linalg.eigh(gram)
        self._ridge = ridge * float(eigenvalues.clamp(min=0).mean() * self._curvatures.mean())
        # One column for each of the d' directions that the loss sees: 1 / (g_j a_k + ridge).
        self._inverse = 1 / (self._curvatures * eigenvalues.clamp(min=0)[:, None] + self._ridge)
        self._targets = target * scale * (rows @ self._basis)[labels] / self._curvatures
        self._turned = self._inputs @ self._axes
        start = self._basis.t() @ matrix.double()
        right = self._curvatures[:, None] * (self._targets.t() @ self._inputs) + self._ridge * start
        self.fitted = ((right @ self._axes) * self._inverse.t()) @ self._axes.t()
        self._errors = self._inputs @ self.fitted.t() - self._targets
        self._leverages = self._curvatures * (self._turned.square() @ self._inverse)

    def effects(self, probe: Tensor, direction: Tensor) -> Tensor:
        """Return by how much <direction, V probe> grows when one training image is left out, for each (N,).

        probe: inputs (m + 1,) of an image; direction (d,).
        """
        seen = (direction @ self._basis) * self._curvatures
        weights = (probe @ self._axes)[:, None] * self._inverse * seen
        return ((self._turned @ weights) * self._errors / (1 - self._leverages)).sum(dim=1)

    def without(self, places: Tensor) -> Tensor:
        """Return by how much V (d, m + 1) changes when the training images at these places (S,) are all left out."""
        inputs = self._inputs[places]
        turned = inputs @ self._axes
        changes = []
        for j, curvature in enumerate(self._curvatures):
            solved = (turned * self._inverse[:, j]) @ self._axes.t()
            inner = torch.eye(len(places), dtype=inputs.dtype) / curvature - inputs @ solved.t()
            changes.append(torch.linalg.solve(inner, self._errors[places, j]) @ solved)
        return self._basis @ torch.stack(changes)


class Explained:
    """A generation whose last layer was fitted to its training images, and what its wrong answers hang on."""

    def __init__(self, generation_uri: str, images: LabelledImages) -> None:
        """images: those that it was trained on, or a sample of them; N forward passes.

        Raises: UsageError for a generation without classifier, or a network that does not end in a linear layer.
        """
        self._uri = generation_uri
        self._reader = FeatureReader(generation_uri)
        self._readers = {generation_uri: self._reader}
        _, rows, labels = open_classifier(generation_uri, images)
        self._layer = LastLayer(self._reader(images.sources), labels, rows, matrix_of(self._reader.layer))

    def search(self, query: str, right: tuple[str, str], wrong: tuple[str, str], count: int) -> "Hangs":
        """Return what the answer to a query hangs on.

        `query` is its source; `right`, which should come first, and `wrong`, which does, are each a source and the
        folder of the generation whose vector is read.

        Raises: UsageError for an image that cannot be embedded.
        """
        asked = self._reader([query])
        sides: dict[str, Tensor] = {}
        for side, (source, uri) in (("right", right), ("wrong", wrong)):
            if uri not in self._readers:
                self._readers[uri] = FeatureReader(uri)
            seen = self._readers[uri]([source])
            sides[side] = seen.vectors[0]
            if uri == self._uri:
                sides[f"{side}_inputs"] = seen.inputs[0]
        answer = Answer(asked.inputs[0], asked.vectors[0], **sides)
        effects = influences(self._layer, answer)
        against, held_by = _largest(effects, count), _largest(-effects, count)
        change = self._layer.without(against)
        moved = sum(float(direction @ change @ probe) for probe, direction in answer.parts())
        return Hangs(answer.margin, answer.margin + moved, _named(against, effects), _named(held_by, effects))


@dataclass(frozen=True)
class Hangs:
    """The lead of the right answer over the wrong one (difference of cosines), and the images that it hangs on."""

    margin: float
    margin_without: float
    """What it would be without all of `against`."""
    against: list[tuple[int, float]]
    """Places of training images and by how much the lead would grow without each, the largest first."""
    held_by: list[tuple[int, float]]
    """Those without which it would shrink most."""


@dataclass(frozen=True)
class Answer:
    """A query and two answers to it; whether a generation makes the vectors of the answers too, or old ones stand."""

    query: Tensor  # (m + 1,) inputs
    query_vector: Tensor  # (d,)
    right: Tensor  # (d,) the vector that should come first
    wrong: Tensor  # (d,) the one that does
    right_inputs: Tensor | None = None  # (m + 1,) where it changes with the layer
    wrong_inputs: Tensor | None = None

    @property
    def margin(self) -> float:
        """<query, right> - <query, wrong>."""
        return float(self.query_vector @ (self.right - self.wrong))

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return probes and directions of which the change of the margin is the sum, to first order."""
        yield self.query, _across(self.right - self.wrong, self.query_vector)
        if self.right_inputs is not None:
            yield self.right_inputs, _across(self.query_vector, self.right)
        if self.wrong_inputs is not None:
            yield self.wrong_inputs, -_across(self.query_vector, self.wrong)


def influences(layer: LastLayer, answer: Answer) -> Tensor:
    """Return by how much the margin of the right answer grows when one training image is left out, for each (N,)."""
    return torch.stack([layer.effects(probe, direction) for probe, direction in answer.parts()]).sum(dim=0)


def open_classifier(generation_uri: str, images: LabelledImages) -> tuple[GenerationCard, Tensor, Tensor]:
    """Return card, classifier rows (C, d), and which row each training image (N,) belongs to.

    Raises: UsageError for a generation without a classifier.
    """
    stored = read_classifier(generation_uri)
    if stored is None:
        raise UsageError(
            f"explaining {read_card(generation_uri).generation_id}: expected a generation with classifier rows, found "
            "none"
        )
    card, rows, _ = stored
    place = {name: index for index, name in enumerate(card.classes)}
    return card, rows, torch.tensor([place[str(label)] for label in images.labels])


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest values that are above 0, the largest first."""
    order = values.argsort(descending=True, stable=True)[:count]
    return order[values[order] > 0]


def _named(places: Tensor, effects: Tensor) -> list[tuple[int, float]]:
    return [(int(place), float(effects[place])) for place in places]


def matrix_of(layer: nn.Linear) -> Tensor:
    """Return a linear layer as one matrix (d, m + 1) float64, its bias in the last column."""
    weight = layer.weight.detach().cpu().double()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
    return torch.cat([weight, bias.double()[:, None]], dim=1)


def _across(direction: Tensor, unit: Tensor) -> Tensor:
    """The part of a direction that a unit vector, which stays one, can move along."""
    return direction - (direction @ unit) * unit


def _last_layer(network: nn.Module, width: int, name: str) -> nn.Linear:
    found = [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == width]
    if not found:
        raise UsageError(
            f"reading features of {name}: expected a network that ends in a linear layer of width {width}, found none; "
            "only such networks can be explained"
        )
    return found[-1]


@contextmanager
def _captured(layer: nn.Linear) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
    try:
        yield seen
    finally:
        handle.remove()
