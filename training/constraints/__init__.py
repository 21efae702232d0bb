"""Compatibility constraints: training losses that tie the new space to those of all predecessors at once.

Their contract stands in `contract.py`. To add one: a file with a class, an entry in CONSTRAINTS and in
`training.choices`, a test against its formula. One from outside this project is named by `package.module:Class`.
`mixbct` is none of these losses: it changes what the task sees, and the objective asks it before the task.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from graceful.errors import UsageError
from graceful.training.choices import check_parameters, imported
from graceful.training.constraints.bct import InfluenceLoss
from graceful.training.constraints.contract import REFERENCES, Constraint
from graceful.training.constraints.cross_contrast import CrossContrast
from graceful.training.constraints.focal import FocalKl, FocalLogits
from graceful.training.constraints.hoc import HigherOrder
from graceful.training.constraints.l2 import SquaredDistance
from graceful.training.constraints.ldi import LogitDifferenceInhibition
from graceful.training.constraints.mixbct import MixedFeatures
from graceful.training.constraints.oca import OrthogonalPrefix
from graceful.training.constraints.ract import Ract
from graceful.training.constraints.repulsion import PrototypeRepulsion

CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
    "bct": InfluenceLoss,
    "cross_contrast": CrossContrast,
    "focal_kl": FocalKl,
    "focal_logits": FocalLogits,
    "hoc": HigherOrder,
    "l2": SquaredDistance,
    "ldi": LogitDifferenceInhibition,
    "oca": OrthogonalPrefix,
    "ract": Ract,
    "repulsion": PrototypeRepulsion,
}
TASK_CHANGES: dict[str, Callable[..., MixedFeatures]] = {"mixbct": MixedFeatures}


def build_constraint(name: str, parameters: Mapping[str, float]) -> Constraint | MixedFeatures:
    """Make a constraint, one of ours or `package.module:Class`, with its parameters.

    Raises: UsageError.
    """
    if ":" not in name:
        known: dict[str, Callable[..., Any]] = {**CONSTRAINTS, **TASK_CHANGES}
        if name not in known:
            raise UsageError(f"constraint: expected package.module:Class or one of {sorted(known)}, found {name!r}")
        check_parameters(name, parameters)
        ours: Constraint | MixedFeatures = known[name](**parameters)
        return ours
    factory = imported("constraint", name)
    try:
        inspect.signature(factory).bind(**parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"constraint {name}: expected its own parameters, found {dict(parameters)}: {error}"
        ) from error
    constraint = factory(**parameters)
    reference = getattr(constraint, "reference", None)
    if not callable(constraint) or reference not in REFERENCES:
        raise UsageError(
            f"constraint {name}: expected something to call with an attribute reference of {list(REFERENCES)}, found "
            f"{type(constraint).__name__} with reference {reference!r}"
        )
    made: Constraint = constraint
    return made


def takes(constraint: Constraint | MixedFeatures, keyword: str) -> bool:
    """Whether the constraint has a parameter of this name (contract.py says which are handed over)."""
    target: Any = getattr(constraint, "forward", constraint)
    return keyword in inspect.signature(target).parameters
