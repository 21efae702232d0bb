"""Higher-order compatibility (HOC): a stored embedding must be nearer to its own new one than to those of others.

Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model
Replacements", CVPR 2024. Made for the fixed simplex head (`[training.head] name = "simplex"`), with the task's weight
0.1 and this loss's weight 0.9 (lambda 0.1).
"""

from typing import ClassVar

import torch
from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference


class HigherOrder(PairLoss):
    """mean_i [-mu <o_i,n_i> + log sum_{y_j != y_i} e^{mu <o_i,n_j>}], n new and o stored embeddings.

    mu: 10, as in the paper. The sum holds no positive, so that the loss falls below 0. An image whose batch holds no
    other class counts 0.
    """

    reference: ClassVar[Reference] = "batch"

    def __init__(self, mu: float = 10.0) -> None:
        super().__init__()
        check_parameters("hoc", {"mu": mu})
        self.mu = mu

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        fresh, stale, labels = comparison.fresh, comparison.stale, comparison.labels
        similarities = self.mu * (stale @ fresh.t())  # (K, B stale, B fresh)
        is_same = labels[:, None] == labels[None, :]
        positives = similarities.diagonal(dim1=1, dim2=2)
        # a finite value: a row of -inf alone has no gradient
        negatives = similarities.masked_fill(is_same, -1e4).logsumexp(dim=2)
        return torch.where(is_same.all(dim=1), 0.0, negatives - positives)
