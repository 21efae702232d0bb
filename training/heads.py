"""Task heads: classifier rows and the loss of the class labels.

A head holds rows (C classes, d) and returns the mean loss of embeddings (n, d) with labels (n,). Rows and embeddings
are normalised inside the loss; only the rows' direction counts, but their length sets how fast an optimiser turns them.

    CE_ls(s g(cos(Q f_i, W_c)) + b [c is new], y_i)

g is the head's margin, ls label smoothing, Q an orthogonal matrix that is learned (`rotation`, otherwise the identity),
b the class-expansion margin. In a sample of classes the softmax runs over these (sampling.py).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal

from graceful.errors import UsageError
from graceful.training.job import HeadConfig
from graceful.training.sampling import ClassSample
from graceful.training.simplex import simplex_vertices

ROW_LENGTH = 1.1  # also the length of rows that start at the predecessor's class means
Margin = Callable[[Tensor, float], Tensor]


def cosine_softmax(own: Tensor, margin: float) -> Tensor:  # noqa: ARG001
    """Normalised softmax: CE(s cos). The margin is not used. Zhai and Wu, BMVC 2019, 1811.12649; scale 20 there."""
    return own


def additive_margin(own: Tensor, margin: float) -> Tensor:
    """CosFace: CE(s (cos - m onehot)). Wang et al., CVPR 2018, 1801.09414; s 64, m 0.35 there, s 20, m 0.2 here."""
    return own - margin


def arcface(own: Tensor, margin: float) -> Tensor:
    """ArcFace: CE(s cos(angle + m onehot)), m in radians. Deng et al., CVPR 2019, 1801.07698; s 64, m 0.5 there.

    Where the angle and m together pass half a turn: cos - m sin m, which goes on falling.
    """
    sine = (1 - own.square()).clamp(min=1e-7).sqrt()
    turned = own * math.cos(margin) - sine * math.sin(margin)
    return torch.where(own >= -math.cos(margin), turned, own - margin * math.sin(margin))


# What becomes of the cosine to an image's own class.
HEADS: dict[str, Margin] = {
    "additive_margin": additive_margin,
    "arcface": arcface,
    "cosine_softmax": cosine_softmax,
    "simplex": cosine_softmax,
}


class Head(nn.Module):
    """A classifier loss with its rows as (C, d)."""

    weight: Tensor
    expansion: Tensor
    rotation: nn.Module | None

    def __init__(self, config: HeadConfig, num_classes: int, width: int) -> None:
        super().__init__()
        if config.name not in HEADS:
            raise UsageError(f"building a head: expected one of {sorted(HEADS)}, found {config.name!r}")
        self.config = config
        self.num_classes = num_classes
        self.width = width
        self.is_fixed = config.name == "simplex"
        self._margin = HEADS[config.name]
        if self.is_fixed:
            self.register_buffer("weight", simplex_vertices(width)[:num_classes].clone())
        else:
            self.weight = nn.Parameter(initialise_rows(torch.randn(num_classes, width)))
        self.rotation = orthogonal(nn.Linear(width, width, bias=False)) if config.rotation else None
        self.register_buffer("expansion", torch.zeros(num_classes))

    def forward(self, embeddings: Tensor, labels: Tensor, sample: ClassSample | None = None) -> Tensor:
        """Return the mean loss times the head's weight, at least in float32; 0 for an empty batch.

        sample: the classes that take part, among them those of `labels`; all by default.
        """
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        if not len(labels):
            return embeddings.sum() * 0.0 + sum(parameter.sum() * 0.0 for parameter in self.parameters())
        weight, targets, offsets = self.weight, labels, self.expansion
        if sample is not None:
            weight = weight.index_select(0, sample.classes)
            targets = torch.searchsorted(sample.classes, labels)
            offsets = offsets[sample.classes] + sample.offsets
        cosines = self._cosines(embeddings, weight)
        index = targets[:, None]
        cosines = cosines.scatter(1, index, self._margin(cosines.gather(1, index), self.config.margin))
        smoothing = self.config.label_smoothing
        loss = functional.cross_entropy(self.config.scale * cosines + offsets, targets, label_smoothing=smoothing)
        return self.config.weight * loss

    def logits(self, embeddings: Tensor, sample: ClassSample | None = None) -> Tensor:
        """Return s cos(Q f_i, W_c) (B, C) of embeddings (B, d), without margins; (B, S) of a sample's classes."""
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        weight = self.weight if sample is None else self.weight.index_select(0, sample.classes)
        return self.config.scale * self._cosines(embeddings, weight)

    def _cosines(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        queries = embeddings if self.rotation is None else self.rotation(embeddings)
        return functional.normalize(queries, dim=1) @ functional.normalize(weight, dim=1).to(queries.dtype).t()

    @property
    def rows(self) -> Tensor:
        """Classifier rows (C, d), as stored in a generation's folder: <W, Q f> = <W Q, f>."""
        return self.weight if self.rotation is None else self.weight @ self._matrix

    def set_rows(self, rows: Tensor) -> None:
        """Replace all rows by `rows` (C, d).

        Raises: UsageError.
        """
        if rows.shape != (self.num_classes, self.width):
            raise UsageError(
                f"setting classifier rows: expected {(self.num_classes, self.width)}, found {tuple(rows.shape)}"
            )
        with torch.no_grad():
            self.weight.copy_(rows if self.rotation is None else rows @ self._matrix.t())

    @property
    def _matrix(self) -> Tensor:
        assert self.rotation is not None
        matrix = self.rotation.weight
        assert isinstance(matrix, Tensor)
        return matrix

    def expand(self, is_new: Tensor) -> None:
        """Add the class-expansion margin b to the logits of the classes (C,) that the parent does not know.

        An image of an old class has to win against new classes by b more, so that fewer of them flip. MPT; b is 0, 1,
        2 or 4 in the paper, on logits of scale s.
        """
        self.expansion.copy_(self.config.new_class_margin * is_new)


def build_head(config: HeadConfig, num_classes: int, width: int) -> Head:
    """Build a head with random rows, or with the first corners of a simplex.

    Raises: UsageError for more classes than corners.
    """
    if config.name == "simplex" and num_classes > width + 1:
        raise UsageError(
            f"building a fixed simplex of width {width}: expected at most {width + 1} classes, found {num_classes}; "
            f"set width to at least {num_classes - 1}, with room for the classes to come, or use another head"
        )
    return Head(config, num_classes, width)


def initialise_rows(class_means: Tensor, scale: float = ROW_LENGTH) -> Tensor:
    """Return rows (C, d) of length `scale` in the directions of the class means (C, d)."""
    return scale * functional.normalize(class_means.float(), dim=1)
