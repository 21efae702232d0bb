"""Focal distillation: keep to the predecessor's logits, and most of all where it was right.

Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021, 2011.09161. Logits of a
predecessor come from its stored embeddings and rows, so that none of its networks runs. Over classes that it knows
alone: an image of a class that it never saw is held to its logits of the others, with the weight alpha.

The paper's loss is (1 - a) CE + a of this, a 0.9: the head's weight 0.1 and this constraint's weight 0.9.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference

_NEVER = -1e9  # in the place of -inf, of which alone a softmax would be NaN


class _Focal(PairLoss):
    """mean_i (alpha + beta [k right on i]) D(z_k,i, z_t,i); a subclass says D."""

    reference: ClassVar[Reference] = "logits"

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    @abstractmethod
    def distances(self, fresh: Tensor, stale: Tensor, is_shared: Tensor) -> Tensor:
        """Return D of every image against every predecessor, (K, B); 0 where no class is shared."""

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        stale = comparison.stale
        weights = self.alpha + self.beta * is_right(stale, comparison.labels).to(stale.dtype)
        return weights * self.distances(comparison.fresh, stale, stale.isfinite())


class FocalKl(_Focal):
    """mean_i (alpha + beta [k right on i]) tau^2 KL(softmax(z_k,i / tau) || softmax(z_t,i / tau)).

    alpha 1, beta 5, tau 100, as in the paper. At so high a temperature the softmax is nearly flat and D nearly half the
    variance of the logits' differences over the classes.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 5.0, tau: float = 100.0) -> None:
        super().__init__(alpha, beta)
        check_parameters("focal_kl", {"alpha": alpha, "beta": beta, "tau": tau})
        self.tau = tau

    def distances(self, fresh: Tensor, stale: Tensor, is_shared: Tensor) -> Tensor:
        """Return tau^2 KL (K, B), with d = (z_t - z_k) / tau as tau^2 log sum_c p_k,c e^(d_c - sum_c p_k,c d_c).

        In this form nothing is lost in float32 although the two distributions hardly differ at a high temperature.
        """
        share = (stale / self.tau).masked_fill(~is_shared, _NEVER).softmax(dim=2)
        change = ((fresh - stale) / self.tau).masked_fill(~is_shared, 0.0)
        change = change - (share * change).sum(dim=2, keepdim=True)
        divergence = (share * change.masked_fill(~is_shared, 0.0).expm1()).sum(dim=2).log1p()
        return self.tau**2 * divergence


class FocalLogits(_Focal):
    """mean_i (alpha + beta [k right on i]) 0.5 mean_c (z_k,ic - z_t,ic)^2: logit matching. alpha 1, beta 5."""

    def __init__(self, alpha: float = 1.0, beta: float = 5.0) -> None:
        super().__init__(alpha, beta)
        check_parameters("focal_logits", {"alpha": alpha, "beta": beta})

    def distances(self, fresh: Tensor, stale: Tensor, is_shared: Tensor) -> Tensor:
        """Return half the mean squared difference (K, B)."""
        return 0.5 * mean_over_shared((fresh - stale).masked_fill(~is_shared, 0.0).square(), is_shared)


def is_right(stale: Tensor, labels: Tensor) -> Tensor:
    """Return whether each predecessor's logits (K, B, C) are right on each image (K, B): no other class is as high.

    An image of a class that it has no row for (-inf) is never right.
    """
    index = labels.view(1, -1, 1).expand(len(stale), -1, 1)
    own = stale.gather(2, index)[:, :, 0]
    return own > stale.scatter(2, index, -torch.inf).amax(dim=2)


def mean_over_shared(values: Tensor, is_shared: Tensor) -> Tensor:
    """Return the mean of values (K, B, C), 0 where not shared, over the shared classes; 0 without any."""
    return values.sum(dim=2) / is_shared.sum(dim=2).clamp(min=1)
