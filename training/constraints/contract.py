"""What a constraint is, and the one place where what it is given is checked and brought into shape.

Shapes: B images, d width of the generation in training, K predecessors of one width d_k <= d, M references. A
constraint is called as in pytorch-metric-learning, `constraint(embeddings, labels, ref_emb, ref_labels)`:

    embeddings  (B, d)      of the generation in training, not normalised
    labels      (B,)        class indices
    ref_emb     (K, M, d_k) unit vectors of K predecessors of one width (or (M, d_k) of one), no gradient
    ref_labels  (M,)        their class indices

and returns one loss per predecessor, (K,) (or a scalar); lower is better. Where d_k < d the first d_k coordinates are
compared, normalised again. float64 stays float64, half precision becomes float32. An empty batch costs 0, with a
gradient of 0.

A constraint of the reference "logits" compares classifiers instead: `embeddings` are then the logits (B, C) of the
generation in training, `ref_emb` those (K, B, C) of its predecessors for the same images, -inf for a class that a
predecessor has no row for, and `labels` columns of both. Neither is normalised; of C_k < C the first C_k are compared.

Two keywords are handed over to whoever has parameters of these names: `weights` (K, B), how much each image counts
against each predecessor, and `offsets` (M,), what is added to the logit of each reference because it stands for others
that were not drawn (training/sampling.py).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError

Reference = Literal["rows", "means", "instances", "batch", "logits"]
REFERENCES: tuple[Reference, ...] = ("rows", "means", "instances", "batch", "logits")
BY_IMAGE: tuple[Reference, ...] = ("batch", "logits")
"""References that are those of the batch's own images, in its order (M = B)."""


@runtime_checkable
class Constraint(Protocol):
    """A loss that ties the generation in training to its predecessors.

    reference: what is handed over as ref_emb. "rows": classifier rows, "means": class means, "instances": one random
    cached embedding of each class, drawn anew at every step (M = C, or the classes of a step), "batch": the cached
    embeddings of the batch's own images, in its order (M = B), "logits": their logits by the stored classifier rows.
    """

    reference: ClassVar[Reference]

    def __call__(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Return one loss per predecessor."""
        ...


@dataclass(frozen=True)
class Comparison:
    """A batch and its references, checked."""

    fresh: Tensor  # (B, d_k) unit vectors of the generation in training, or its logits (B, C_k)
    labels: Tensor  # (B,)
    stale: Tensor  # (K, M, d_k) unit vectors of the predecessors, or their logits (K, B, C_k)
    stale_labels: Tensor  # (M,)
    targets: Tensor  # (B,) which reference is an image's own: that of its class, or its own stored embedding
    offsets: Tensor | None  # (M,)


class PairLoss(nn.Module):
    """A constraint whose loss is a mean over the images of a batch: a subclass says `reference` and `losses`."""

    reference: ClassVar[Reference]

    @abstractmethod
    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor,
        ref_labels: Tensor,
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Return one loss per predecessor.

        Raises: UsageError.
        """
        stale, targets = checked(embeddings, labels, ref_emb, ref_labels, self.reference in BY_IMAGE)
        if not len(labels):
            found = embeddings.sum() * torch.zeros(len(stale), dtype=stale.dtype, device=stale.device)
        else:
            fresh = embeddings[:, : stale.shape[2]].to(stale.dtype)
            if self.reference != "logits":
                fresh = functional.normalize(fresh, dim=1)
            losses = self.losses(Comparison(fresh, labels, stale, ref_labels, targets, offsets))
            found = (losses if weights is None else losses * weights).mean(dim=1)
        return found if ref_emb.ndim == 3 else found[0]


def checked(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, by_image: bool
) -> tuple[Tensor, Tensor]:
    """Return references (K, M, d_k) in the precision of the loss, and the place (B,) of each image's own reference.

    Raises: UsageError for shapes that do not fit, and for a label that has no reference.
    """
    shapes = f"embeddings {tuple(embeddings.shape)}, labels {tuple(labels.shape)}, references {tuple(ref_emb.shape)}"
    shapes += f" with labels {tuple(ref_labels.shape)}"
    stale = ref_emb if ref_emb.ndim == 3 else ref_emb[None]
    if embeddings.ndim != 2 or stale.ndim != 3 or labels.shape != embeddings.shape[:1]:
        raise UsageError(f"comparing embeddings: expected (B, d), (B,), (K, M, d_k) and (M,), found {shapes}")
    if ref_labels.shape != stale.shape[1:2] or not 0 < stale.shape[2] <= embeddings.shape[1]:
        raise UsageError(f"comparing embeddings: expected (B, d), (B,), (K, M, d_k <= d) and (M,), found {shapes}")
    stale = stale.to(torch.promote_types(embeddings.dtype, torch.float32))
    if by_image:
        if ref_labels.shape != labels.shape or not torch.equal(labels, ref_labels):
            raise UsageError(
                f"comparing images with their own stored embeddings: expected the same images in the same order, found "
                f"{shapes} that differ"
            )
        return stale, torch.arange(len(labels), device=labels.device)
    matches = labels[:, None] == ref_labels[None, :]
    missing = (matches.sum(dim=1) != 1).nonzero()
    if len(missing):
        label = int(labels[int(missing[0])])
        raise UsageError(
            f"comparing classes: expected one reference for the label {label}, found {int(matches[missing[0]].sum())}; "
            "give each class of the batch exactly one"
        )
    return stale, matches.int().argmax(dim=1)


def cross_entropies(comparison: Comparison, scale: float, margin: float) -> Tensor:
    """Return CE(s (cos(f_i, r_c) - m [c = y_i]) + offset_c, y_i), (K, B). One matrix product serves all predecessors.

    >>> import torch
    >>> f, y = torch.eye(2), torch.tensor([0, 1])
    >>> found = cross_entropies(Comparison(f, y, f[None], y, y, None), scale=1.0, margin=0.0)
    >>> [round(value, 4) for value in found[0].tolist()]  # log(1 + e^-1)
    [0.3133, 0.3133]
    """
    stale, targets = comparison.stale, comparison.targets
    num_predecessors, num_references, width = stale.shape
    queries = comparison.fresh * scale
    logits = (queries @ stale.reshape(-1, width).t()).view(-1, num_predecessors, num_references)
    if comparison.offsets is not None:
        logits = logits + comparison.offsets
    if margin:
        onehot = functional.one_hot(targets, num_references).to(logits.dtype)
        logits = logits - (scale * margin) * onehot[:, None, :]
    losses = functional.cross_entropy(
        logits.reshape(-1, num_references), targets.repeat_interleave(num_predecessors), reduction="none"
    )
    return losses.view(-1, num_predecessors).t()
