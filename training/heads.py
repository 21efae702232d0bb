"""Task heads: classifier rows and the loss of the class labels, from pytorch-metric-learning.

A head holds rows (C classes, d) and returns the mean loss of embeddings (n, d) with labels (n,). Rows and embeddings
are normalised inside the loss; only the rows' direction counts, but their length sets how fast an optimiser turns them.
"""

from collections.abc import Callable

import torch
from pytorch_metric_learning import losses
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError

ROW_LENGTH = 1.1  # also the length of rows that start at the predecessor's class means


class Head(nn.Module):
    """A classifier loss with its rows as (C, d)."""

    def __init__(self, loss: nn.Module, num_classes: int, width: int) -> None:
        super().__init__()
        self.loss = loss
        self.num_classes = num_classes
        self.width = width
        self.set_rows(initialise_rows(torch.randn(num_classes, width)))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss; float32 whatever the precision around it is."""
        return self.loss(embeddings.float(), labels)

    @property
    def rows(self) -> Tensor:
        """Classifier rows (C, d), as stored in a generation's folder."""
        return self._weight.t()

    def set_rows(self, rows: Tensor) -> None:
        """Replace all rows by `rows` (C, d)."""
        if rows.shape != (self.num_classes, self.width):
            raise UsageError(
                f"setting classifier rows: expected {(self.num_classes, self.width)}, found {tuple(rows.shape)}"
            )
        with torch.no_grad():
            self._weight.copy_(rows.t())

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.get_parameter("loss.W")  # (d, C), as pytorch-metric-learning stores it
        return weight


def cosine_softmax(num_classes: int, width: int, scale: float, margin: float) -> Head:  # noqa: ARG001
    """Normalised softmax: CE(s cos). The margin is not used. Zhai and Wu, BMVC 2019, 1811.12649; scale 20 there."""
    return Head(losses.NormalizedSoftmaxLoss(num_classes, width, temperature=1.0 / scale), num_classes, width)


def additive_margin(num_classes: int, width: int, scale: float, margin: float) -> Head:
    """CosFace: CE(s (cos - m onehot)). Wang et al., CVPR 2018, 1801.09414; s 64, m 0.35 there, s 20, m 0.2 here."""
    return Head(losses.CosFaceLoss(num_classes, width, margin=margin, scale=scale), num_classes, width)


def arcface(num_classes: int, width: int, scale: float, margin: float) -> Head:
    """ArcFace: CE(s cos(angle + m onehot)), m in radians. Deng et al., CVPR 2019, 1801.07698; s 64, m 0.5 there."""
    degrees = float(torch.rad2deg(torch.tensor(margin)))
    return Head(losses.ArcFaceLoss(num_classes, width, margin=degrees, scale=scale), num_classes, width)


HEADS: dict[str, Callable[[int, int, float, float], Head]] = {
    "additive_margin": additive_margin,
    "arcface": arcface,
    "cosine_softmax": cosine_softmax,
}


def build_head(name: str, num_classes: int, width: int, scale: float, margin: float) -> Head:
    """Build the head `name` with random rows."""
    if name not in HEADS:
        raise UsageError(f"building a head: expected one of {sorted(HEADS)}, found {name!r}")
    return HEADS[name](num_classes, width, scale, margin)


def initialise_rows(class_means: Tensor, scale: float = ROW_LENGTH) -> Tensor:
    """Return rows (C, d) of length `scale` in the directions of the class means (C, d)."""
    return scale * functional.normalize(class_means.float(), dim=1)
