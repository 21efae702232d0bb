"""Contrastive loss with regression alleviation (RACT): stale positives must beat stale and fresh negatives.

Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval", ICLR
2022, 2201.09724; formula as in the class. In a gallery that is half re-embedded, a fresh negative
must not overtake a stale positive.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference


class Ract(PairLoss):
    """mean_i -log e^{<n_i,o_i>/tau} / (e^{<n_i,o_i>/tau} + sum_{y_j != y_i} (e^{<n_i,o_j>/tau} + e^{<n_i,n_j>/tau})).

    n_i the new embedding of image i, o_i the predecessor's. tau: 0.05 here, 0.01 in the reference configuration.
    hardest: keep only so many most similar negatives of each kind (10 in the paper); 0 keeps all.
    A batch of a single class has no negatives: the loss is 0.
    """

    reference: ClassVar[Reference] = "batch"

    def __init__(self, tau: float = 0.05, hardest: float = 0) -> None:
        super().__init__()
        check_parameters("ract", {"tau": tau, "hardest": hardest})
        self.tau = tau
        self.hardest = int(hardest)

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B).

        With p the positive's logit, S and F the log-sum-exp of the stale and of the fresh negatives, the loss of one
        image is log(1 + e^(S-p) + e^(F-p)). Its first two summands are a cross entropy, which torch fuses; these
        (K, B, B) logits are most of what a predecessor costs.
        """
        fresh, stale, labels = comparison.fresh, comparison.stale, comparison.labels
        num_predecessors, num_images, _ = stale.shape
        scaled = fresh / self.tau
        hidden = torch.zeros(num_images, num_images, device=fresh.device, dtype=fresh.dtype)
        hidden.masked_fill_(labels[:, None] == labels[None, :], -torch.inf)
        positives = (scaled * stale).sum(dim=2)  # (K, B)
        fresh_negatives = self._hardest(torch.addmm(hidden, scaled, fresh.t()))
        # exp(-inf) rows (no negatives at all) must stay free of NaN in the gradient
        fresh_negatives = fresh_negatives.clamp(min=-1e4).logsumexp(dim=1)
        queries, references = scaled.expand(num_predecessors, -1, -1), stale.transpose(1, 2)
        if 0 < self.hardest < num_images:
            negatives = self._hardest(torch.baddbmm(hidden, queries, references))
            logits, targets = torch.cat([positives[:, :, None], negatives], dim=2), torch.zeros_like(labels)
        else:
            logits = torch.baddbmm(hidden.fill_diagonal_(0.0), queries, references)  # the positive among its negatives
            targets = comparison.targets
        against_stale = functional.cross_entropy(
            logits.flatten(0, 1), targets.repeat(num_predecessors), reduction="none"
        ).view(num_predecessors, num_images)
        return torch.logaddexp(against_stale, fresh_negatives - positives)

    def _hardest(self, similarities: Tensor) -> Tensor:
        if 0 < self.hardest < similarities.shape[-1]:
            return similarities.topk(self.hardest, dim=-1).values
        return similarities
