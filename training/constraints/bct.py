"""Backward-compatible training: the new embedding must be classified correctly by the predecessor's frozen rows.

Shen et al., CVPR 2020, 2003.11942 (influence loss), with normalised rows and features.
"""

from typing import ClassVar

from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference, cross_entropies


class InfluenceLoss(PairLoss):
    """mean_i CE(s cos(f_i[:d_k], W_k), y_i), W_k with synthesised rows for classes that k never saw.

    scale: s, 30 (the paper uses raw logits; cosine logits were better in a replication on ImageNet).
    """

    reference: ClassVar[Reference] = "rows"

    def __init__(self, scale: float = 30.0) -> None:
        super().__init__()
        check_parameters("bct", {"scale": scale})
        self.scale = scale

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        return cross_entropies(comparison, self.scale, margin=0.0)
