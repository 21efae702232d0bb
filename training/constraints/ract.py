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
        """Return one loss per predecessor; lower is better. Row i of the references is the same image as row i.

        With p the positive's logit, S and F the log-sum-exp of the stale and of the fresh negatives, the loss of one
        image is log(1 + e^(S-p) + e^(F-p)). Its first two summands are a cross entropy, which torch fuses; these
        (K, B, B) logits are most of what a predecessor costs.
        """
        stacked = ref_emb if ref_emb.ndim == 3 else ref_emb[None]
        num_predecessors, num_images, width = stacked.shape
        fresh = functional.normalize(embeddings[:, :width].float(), dim=1)
        scaled = fresh / self.tau
        hidden = torch.zeros(num_images, num_images, device=fresh.device)
        hidden.masked_fill_(labels[:, None] == ref_labels[None, :], -torch.inf)
        positives = (scaled * stacked).sum(dim=2)  # (K, B)
        fresh_negatives = self._hardest(torch.addmm(hidden, scaled, fresh.t()))
        # exp(-inf) rows (no negatives at all) must stay free of NaN in the gradient
        fresh_negatives = fresh_negatives.clamp(min=-1e4).logsumexp(dim=1)
        queries, references = scaled.expand(num_predecessors, -1, -1), stacked.transpose(1, 2)
        if 0 < self.hardest < num_images:
            negatives = self._hardest(torch.baddbmm(hidden, queries, references))
            logits, targets = torch.cat([positives[:, :, None], negatives], dim=2), torch.zeros_like(labels)
        else:
            logits = torch.baddbmm(hidden.fill_diagonal_(0.0), queries, references)  # the positive among its negatives
            targets = torch.arange(num_images, device=labels.device)
        against_stale = functional.cross_entropy(
            logits.flatten(0, 1), targets.repeat(num_predecessors), reduction="none"
        ).view(num_predecessors, num_images)
        per_predecessor = torch.logaddexp(against_stale, fresh_negatives - positives).mean(dim=1)
        return per_predecessor if ref_emb.ndim == 3 else per_predecessor[0]

    def _hardest(self, similarities: Tensor) -> Tensor:
        if 0 < self.hardest < similarities.shape[-1]:
            return similarities.topk(self.hardest, dim=-1).values
        return similarities
