"""Weights of the predecessors by dual ascent: who is read badly weighs more.

Training under the condition that queries by the new network on predecessor k's vectors are right at least as often as
k's own, M(t, k) >= M(k, k), has a multiplier for every k. After each epoch, on the dev part,

    weight_k <- min(MOST, max(0, weight_k + RATE x 100 (M(k, k) - M(t, k)))),

gradient ascent on the dual (Boyd and Vandenberghe, Convex Optimization, section 5.2): a predecessor that is read well
loses its weight, and its part of the loss, and one that is not gains.
"""

from collections.abc import Mapping
from typing import Any

import torch

from graceful.training.predecessors import Predecessors

RATE = 0.1
"""Change of a weight per point of recall@1 and epoch."""
MOST = 4.0
"""Beyond it a constraint drowns the task."""


class DualWeights:
    """The weights of a training's predecessors, and what moves them."""

    def __init__(self, predecessors: Predecessors, own: Mapping[str, float]) -> None:
        """`own`: M(k, k) on the dev part by generation id, a share."""
        self._predecessors, self._own = predecessors, own

    def ascend(self, crossed: Mapping[str, float]) -> dict[str, float]:
        """Move the weights by M(t, k) on the dev part, shares by generation id; returns them."""
        for group in self._predecessors.groups:
            for place, name in enumerate(group.generation_ids):
                step = RATE * 100 * (self._own[name] - crossed[name])
                group.weights[place] = (group.weights[place] + step).clamp(0.0, MOST)
        return self._weights()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"predecessor_weights": self._weights()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for group in self._predecessors.groups:
            group.weights.copy_(torch.tensor([state["predecessor_weights"][name] for name in group.generation_ids]))

    def _weights(self) -> dict[str, float]:
        groups = self._predecessors.groups
        return {name: float(w) for group in groups for name, w in zip(group.generation_ids, group.weights, strict=True)}
