"""A fixed classifier: the corners of a regular simplex, one for each class that there ever will be.

CoReS: Biondi et al., "CL2R: Compatible Lifelong Learning Representations" and "CoReS: Compatible Representations via
Stationarity", TPAMI 2023. The rows are never trained, so that every generation has its classes in the same places, and
a new class takes the next corner. Here logits are s cos; a space of width d has d + 1 corners.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from graceful.errors import UsageError


@lru_cache(maxsize=2)
def simplex_vertices(width: int) -> Tensor:
    """Return the corners (width + 1, width) of a regular simplex around 0, of unit length, float32.

    Rows of the identity and ((1 - sqrt(1 + d)) / d) 1, minus their mean, normalised: the cosine of two is -1/d.

    >>> corners = simplex_vertices(2)
    >>> [round(float(corners[0] @ corner), 6) for corner in corners]
    [1.0, -0.5, -0.5]
    """
    last = torch.full((1, width), (1 - (1 + width) ** 0.5) / width, dtype=torch.float64)
    corners = torch.cat([torch.eye(width, dtype=torch.float64), last])
    return functional.normalize(corners - corners.mean(dim=0), dim=1).float()


def corner_order(classes: Sequence[str], earlier: Sequence[str], width: int) -> list[str]:
    """Return every class that ever had a corner, in the order of the corners: the earlier ones, then the new ones.

    A class that is gone keeps its corner. Raises: UsageError where the corners run out.
    """
    order = list(dict.fromkeys([*earlier, *classes]))
    if len(order) > width + 1:
        raise UsageError(
            f"fixed simplex of width {width}: expected at most {width + 1} classes over all generations, found "
            f"{len(order)}; it cannot be widened later: start a chain with a width of at least {len(order) - 1}, or "
            "use another head"
        )
    return order
