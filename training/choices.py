"""Names of heads and constraints that a configuration may choose, known without loading torch.

The networks and losses themselves stand in `training.heads.HEADS` and `training.constraints.CONSTRAINTS`; a test holds
these names and parameters to them.
"""

from collections.abc import Mapping

HEAD_NAMES = ("additive_margin", "arcface", "cosine_softmax")
CONSTRAINT_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "bct": ("scale",),
    "cross_contrast": ("scale", "margin"),
    "ract": ("tau", "hardest"),
}
