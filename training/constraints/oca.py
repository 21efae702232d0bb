"""Orthogonal compatible prefix (OCA, BT2): old classes are read in the prefix, what is new has room beside it.

BT2: Zhou et al., ICCV 2023, 2211.03989; OCA: 2408.08793. The width grows from generation to generation (there by 32),
the first d_k coordinates stay comparable, and the classifier sees Q f with Q orthogonal and learned
(`[training.head] rotation = true`), so that the task does not have to be solved in the coordinates of the prefix. The
papers' objective: `5 CE_ls0.1 + 10 CE(prefix) + 5 cosine distance` against the one generation before:

    head = { rotation = true, label_smoothing = 0.1, weight = 5.0 }
    constraints = [{ name = "oca", against = "latest" }]

At equal width the prefix is the whole vector and nothing is free beside it: bct with a cosine term, and a classifier
that may still turn.
"""

from typing import ClassVar

from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Comparison, PairLoss, Reference, cross_entropies


class OrthogonalPrefix(PairLoss):
    """mean_i [a CE(s cos(f_i[:d_k], W_k), y_i) + b (1 - cos(f_i[:d_k], W_k,y_i))].

    influence: a, 10, and cosine: b, 5, as in the papers; scale: s, 30 as for bct here.
    """

    reference: ClassVar[Reference] = "rows"

    def __init__(self, scale: float = 30.0, influence: float = 10.0, cosine: float = 5.0) -> None:
        super().__init__()
        check_parameters("oca", {"scale": scale, "influence": influence, "cosine": cosine})
        self.scale = scale
        self.influence = influence
        self.cosine = cosine

    def losses(self, comparison: Comparison) -> Tensor:
        """Return the loss of every image against every predecessor, (K, B)."""
        own = comparison.stale[:, comparison.targets]  # (K, B, d_k)
        distances = 1 - (comparison.fresh * own).sum(dim=2)
        return self.influence * cross_entropies(comparison, self.scale, margin=0.0) + self.cosine * distances
