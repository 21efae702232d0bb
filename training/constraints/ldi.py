"""Logit-difference inhibition: logits may move by xi, and further only at a price.

Zhao et al., "ELODI: Ensemble Logit Difference Inhibition for Positive-Congruent Training", TPAMI 2024, 2205.06265. Its
reference is the mean of an ensemble, of 8 members in the paper; `against = "ensemble"` takes the mean of all
predecessors, which are there already.
"""

from typing import ClassVar

from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference
from graceful.training.constraints.focal import mean_over_shared


class LogitDifferenceInhibition(PairLoss):
    """mean_i mean_c max(|z_t,ic - z_k,ic| - xi, 0)^2 over the classes that k knows. xi 0 to 0.5 in the paper."""

    reference: ClassVar[Reference] = "logits"

    def __init__(self, xi: float = 0.0) -> None:
        super().__init__()
        check_parameters("ldi", {"xi": xi})
        self.xi = xi

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        is_shared = comparison.stale.isfinite()
        difference = (comparison.fresh - comparison.stale).masked_fill(~is_shared, 0.0).abs()
        return mean_over_shared((difference - self.xi).clamp(min=0.0).square(), is_shared)
