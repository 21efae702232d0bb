"""Prototype repulsion: crowded old class means are pushed apart before the new embeddings are classified by them.

After the neighbour-driven perturbation of prototypes (NDPP), 2503.14824, 2025. Only the idea is the paper's: its
weights were not readable, so that eta, neighbours and tau are this project's.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference, cross_entropies


class PrototypeRepulsion(PairLoss):
    """mean_i CE(s cos(f_i[:d_k], p'), y_i) with p'_c = n(p_c + eta sum_{c' in N_m(c)} s_cc' (p_c - p_c')).

    p_c predecessor k's class means, N_m(c) the m means nearest to p_c, s_cc' the softmax over them of
    <p_c, p_c'> / tau. scale: s, 30; eta: 0.5; neighbours: m, 5; tau: 0.1. With eta = 0 it is bct against class means.
    Where a step draws classes, the neighbours are those of the classes that it drew.
    """

    reference: ClassVar[Reference] = "means"

    def __init__(self, scale: float = 30.0, eta: float = 0.5, neighbours: float = 5, tau: float = 0.1) -> None:
        super().__init__()
        check_parameters("repulsion", {"scale": scale, "eta": eta, "neighbours": neighbours, "tau": tau})
        self.scale = scale
        self.eta = eta
        self.neighbours = int(neighbours)
        self.tau = tau
        self._last: tuple[Tensor, Tensor] | None = None  # all classes are the same ones at every step

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        means = comparison.stale
        if self._last is None or self._last[0] is not means:
            self._last = means, self.repelled(means)
        return cross_entropies(replace(comparison, stale=self._last[1]), self.scale, margin=0.0)

    @torch.no_grad()
    def repelled(self, means: Tensor) -> Tensor:
        """Return p' (K, C, d) of unit class means p (K, C, d)."""
        count = min(self.neighbours, means.shape[1] - 1)
        if count < 1:
            return means
        similarities = means @ means.transpose(1, 2)
        similarities.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = similarities.topk(count, dim=2)
        shares = (nearest.values / self.tau).softmax(dim=2)  # (K, C, m)
        moved = torch.empty_like(means)
        for k, prototypes in enumerate(means):
            pull = torch.einsum("cm,cmd->cd", shares[k], prototypes[nearest.indices[k]])
            moved[k] = functional.normalize(prototypes + self.eta * (prototypes - pull), dim=1)
        return moved
