"""Backward-compatible training: the new embedding must be classified correctly by the predecessor's frozen rows.

Shen et al., CVPR 2020, 2003.11942 (influence loss), with normalised rows and features.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class InfluenceLoss(nn.Module):
    """mean_i CE(s cos(f_i[:d_k], W_k), y_i), W_k with synthesised rows for classes that k never saw.

    scale: s, 30 (the paper uses raw logits; cosine logits were better in a replication on ImageNet).
    """

    reference: ClassVar[str] = "rows"

    def __init__(self, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Return one loss per predecessor; lower is better."""
        return reference_cross_entropy(embeddings, labels, ref_emb, ref_labels, self.scale, margin=0.0)


def reference_cross_entropy(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor, scale: float, margin: float
) -> Tensor:
    """Return CE(s (cos(f_i, r_c) - m [c = y_i]), y_i) averaged over i: (K,) for references (K, C, d_k), else a scalar.

    Every label must occur exactly once in `ref_labels`. One matrix product serves all K predecessors.

    >>> import torch
    >>> f, r = torch.eye(2), torch.eye(2)
    >>> y = torch.tensor([0, 1])
    >>> round(float(reference_cross_entropy(f, y, r, y, scale=1.0, margin=0.0)), 4)  # log(1 + e^-1)
    0.3133
    """
    stacked = ref_emb if ref_emb.ndim == 3 else ref_emb[None]
    num_predecessors, num_classes, width = stacked.shape
    queries = functional.normalize(embeddings[:, :width].float(), dim=1) * scale
    logits = (queries @ stacked.reshape(-1, width).t()).view(-1, num_predecessors, num_classes)
    matches = labels[:, None] == ref_labels[None, :]
    targets = matches.int().argmax(dim=1)
    if margin:
        onehot = functional.one_hot(targets, num_classes).to(logits.dtype)
        logits = logits - (scale * margin) * onehot[:, None, :]
    losses = functional.cross_entropy(
        logits.reshape(-1, num_classes), targets.repeat_interleave(num_predecessors), reduction="none"
    )
    per_predecessor = losses.view(-1, num_predecessors).mean(dim=0)
    return per_predecessor if ref_emb.ndim == 3 else per_predecessor[0]
