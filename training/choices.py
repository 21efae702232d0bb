"""Names of heads and constraints that a configuration may choose, known without loading torch.

The networks and losses themselves stand in `training.heads.HEADS` and `training.constraints.CONSTRAINTS`; a test holds
these names and parameters to them.
"""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from graceful.errors import UsageError

HEAD_NAMES = ("additive_margin", "arcface", "cosine_softmax", "simplex")


def imported(what: str, name: str) -> Any:
    """Return what `package.module:attribute` names; `what` begins the refusal. Raises UsageError."""
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{what}: expected an importable {name}, found {error}; check the name and PYTHONPATH"
        ) from error


class Range(NamedTuple):
    """What a parameter may be."""

    lowest: float = 0.0
    highest: float = float("inf")
    is_open: bool = False  # whether the lowest value itself is none
    is_whole: bool = False

    def holds(self, value: float) -> bool:
        """Whether the parameter may have this value; never NaN."""
        above = value > self.lowest if self.is_open else value >= self.lowest
        return above and value <= self.highest and value < float("inf") and (not self.is_whole or value == int(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        ends = f"above {self.lowest:g}" if self.is_open else f"of at least {self.lowest:g}"
        return f"{kind} {ends}" + (f" and at most {self.highest:g}" if self.highest < float("inf") else "")


_ABOVE_ZERO = Range(is_open=True)
CONSTRAINT_PARAMETERS: Mapping[str, Mapping[str, Range]] = {
    "bct": {"scale": _ABOVE_ZERO},
    "cross_contrast": {"scale": _ABOVE_ZERO, "margin": Range()},
    "focal_kl": {"alpha": Range(), "beta": Range(), "tau": _ABOVE_ZERO},
    "focal_logits": {"alpha": Range(), "beta": Range()},
    "hoc": {"mu": _ABOVE_ZERO},
    "l2": {},
    "ldi": {"xi": Range()},
    "mixbct": {"share": Range(highest=1.0, is_open=True), "typical": Range(highest=1.0, is_open=True)},
    "oca": {"scale": _ABOVE_ZERO, "influence": Range(), "cosine": Range()},
    "ract": {"tau": _ABOVE_ZERO, "hardest": Range(is_whole=True)},
    "repulsion": {
        "scale": _ABOVE_ZERO,
        "eta": Range(),
        "neighbours": Range(lowest=1, is_whole=True),
        "tau": _ABOVE_ZERO,
    },
}
OF_LOGITS = ("focal_kl", "focal_logits", "ldi")  # compare classifiers, which both sides must have
# Their losses can be weighted by image.
PER_IMAGE = (*OF_LOGITS, "bct", "cross_contrast", "hoc", "l2", "oca", "ract", "repulsion")


def check_parameters(name: str, parameters: Mapping[str, float]) -> None:
    """Refuse parameters that the constraint `name` does not have, or cannot use.

    Raises: UsageError.
    """
    known = CONSTRAINT_PARAMETERS[name]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise UsageError(f"constraint {name}: expected the parameters {list(known)}, found {unknown}")
    for parameter, value in parameters.items():
        if not known[parameter].holds(value):
            raise UsageError(f"constraint {name}: expected {parameter} to be {known[parameter]}, found {value:g}")
