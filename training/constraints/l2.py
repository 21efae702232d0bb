"""L2: every new embedding must lie where the predecessor's lies. A control: it holds the space and what was bad in it.

The floor of Shen et al., CVPR 2020, 2003.11942, section 4 (the regression of new features on old ones).
"""

from typing import ClassVar

from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference


class SquaredDistance(PairLoss):
    """mean_i ||n_i - o_i||^2 of unit vectors, n_i the new embedding of image i and o_i the predecessor's: 0 to 4."""

    reference: ClassVar[Reference] = "batch"

    def __init__(self) -> None:
        super().__init__()
        check_parameters("l2", {})

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        return (comparison.fresh - comparison.stale).square().sum(dim=2)
