"""Cross contrast: the predecessor's classifier is one random stored embedding per class, drawn anew at every step.

Stored vectors, not class means, are what a query will meet in the gallery, so the new embedding is trained against
them.
"""

from typing import ClassVar

from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference, cross_entropies


class CrossContrast(PairLoss):
    """mean_i CE(s (cos(f_i[:d_k], O_k) - m onehot), y_i), O_k (C, d_k) one cached clean embedding by k of each class.

    scale s 20 and margin m 0.2, as in the task loss of the default recipe.
    """

    reference: ClassVar[Reference] = "instances"

    def __init__(self, scale: float = 20.0, margin: float = 0.2) -> None:
        super().__init__()
        check_parameters("cross_contrast", {"scale": scale, "margin": margin})
        self.scale = scale
        self.margin = margin

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        return cross_entropies(comparison, self.scale, self.margin)
