"""Compatibility constraints: training losses that tie the new space to those of all predecessors at once.

A constraint is called as in pytorch-metric-learning, `constraint(embeddings, labels, ref_emb, ref_labels)`:

    embeddings  (B, d)      of the generation in training, not normalised
    labels      (B,)        class indices
    ref_emb     (K, M, d_k) unit vectors of K predecessors of one width (or (M, d_k) of one), no gradient
    ref_labels  (M,)        their class indices

and returns one loss per predecessor, (K,) (or a scalar). Where d_k < d the first d_k coordinates are compared,
normalised again. Its attribute `reference` says what the loop hands over as ref_emb: "rows" (classifier rows, M = C),
"instances" (one random cached embedding of each class, M = C) or "batch" (the cached embeddings of the batch's own
images, M = B).

To add one: a file with a class, an entry in CONSTRAINTS and in `training.choices`, a test against its formula.
"""

from collections.abc import Callable
from typing import Any

from graceful.training.constraints.bct import InfluenceLoss
from graceful.training.constraints.cross_contrast import CrossContrast
from graceful.training.constraints.ract import Ract

CONSTRAINTS: dict[str, Callable[..., Any]] = {
    "bct": InfluenceLoss,
    "cross_contrast": CrossContrast,
    "ract": Ract,
}
