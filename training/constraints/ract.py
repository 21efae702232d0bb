"""Contrastive loss with regression alleviation (RACT): stale positives must beat stale and fresh negatives.

Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval", ICLR
2022, 2201.09724; formula as in the class. In a gallery that is half re-embedded, a fresh negative
must not overtake a stale positive.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Ract(nn.Module):
    """mean_i -log e^{<n_i,o_i>/tau} / (e^{<n_i,o_i>/tau} + sum_{y_j != y_i} (e^{<n_i,o_j>/tau} + e^{<n_i,n_j>/tau})).

    n_i the new embedding of image i, o_i the predecessor's. tau: 0.05 here, 0.01 in the reference configuration.
    hardest: keep only so many most similar negatives of each kind (10 in the paper); 0 keeps all.
    A batch of a single class has no negatives: the loss is 0.
    """

    reference: ClassVar[str] = "batch"

    def __init__(self, tau: float = 0.05, hardest: float = 0) -> None:
        super().__init__()
        self.tau = tau
        self.hardest = int(hardest)

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Return one loss per predecessor; lower is better. Row i of the references is the same image as row i."""
        stacked = ref_emb if ref_emb.ndim == 3 else ref_emb[None]
        num_predecessors, num_images, width = stacked.shape
        fresh = functional.normalize(embeddings[:, :width].float(), dim=1)
        same = labels[:, None] == ref_labels[None, :]
        to_stale = ((fresh / self.tau) @ stacked.reshape(-1, width).t()).view(-1, num_predecessors, num_images)
        to_fresh = (fresh / self.tau) @ fresh.t()
        positives = to_stale.diagonal(dim1=0, dim2=2).t()  # (B, K)
        stale_negatives = self._log_sum_exp(to_stale.masked_fill(same[:, None, :], -torch.inf))
        fresh_negatives = self._log_sum_exp(to_fresh.masked_fill(same, -torch.inf))
        denominator = torch.logaddexp(torch.logaddexp(positives, stale_negatives), fresh_negatives[:, None])
        per_predecessor = (denominator - positives).mean(dim=0)
        return per_predecessor if ref_emb.ndim == 3 else per_predecessor[0]

    def _log_sum_exp(self, similarities: Tensor) -> Tensor:
        if 0 < self.hardest < similarities.shape[-1]:
            similarities = similarities.topk(self.hardest, dim=-1).values
        # exp(-inf) rows (no negatives at all) must stay free of NaN in the gradient
        return similarities.clamp(min=-1e4).logsumexp(dim=-1)
