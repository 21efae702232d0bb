"""What has happened: every generation of the lineage, and every move of what serves. Read only."""

import datetime
from collections import defaultdict
from typing import Any

from graceful.flows.store.events import (
    Adopted,
    ApprovalAnswered,
    ApprovalAsked,
    CanaryEnded,
    CanaryStarted,
    CertificateRevoked,
    Decided,
    Event,
    Forwarded,
    Overridden,
    PreviousReleased,
    Promoted,
    Rejected,
    Retired,
    RolledBack,
    Trained,
    VariantJudged,
    VariantTrained,
    Withdrawn,
)
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.training.generation import ordinal_of

TOLD = (
    Trained, Adopted, Decided, ApprovalAsked, ApprovalAnswered, Overridden, Rejected, Promoted, RolledBack, Forwarded,
    CanaryStarted, CanaryEnded, CertificateRevoked, PreviousReleased, Retired, VariantTrained, VariantJudged, Withdrawn,
)  # fmt: skip
"""Kinds of events that a history tells; the others are the machine's own bookkeeping."""
_FIELDS = (
    "outcome", "answer", "to", "ordered", "name", "factory", "gallery_generation", "reference", "reason", "move", "by",
)  # fmt: skip


def lineage_history(root: str) -> dict[str, Any]:
    """Every generation with what was decided about it and by whom, and everything that happened, in order.

    `self_test` is the quality of a generation on its own gallery in the newest evaluation that measured it.
    """
    workspace = open_workspace(root)
    registry = workspace.registry
    history = registry.history()
    about: dict[str, list[Event[Any]]] = defaultdict(list)
    for event in history:
        about[event.generation].append(event)
    names = registry.generations()
    judged = {event.generation for event in history if isinstance(event.payload, Decided)}
    tests = _self_tests(workspace, [name for name in names if name in judged])
    champion = registry.serving().champion
    periods = registry.serving_periods()
    adopted = {event.generation for event in history if isinstance(event.payload, Adopted)}
    return {
        "generations": [
            {
                **_generation(name, about[name], champion),
                "self_test": tests.get(name),
                "serving_periods": [
                    {"since": _when(since), "until": None if until is None else _when(until)}
                    for served, since, until in periods
                    if served == name
                ],
            }
            for name in names
        ],
        "events": [
            _told(event)
            for event in history
            if isinstance(event.payload, TOLD)
            and not (isinstance(event.payload, Trained) and event.generation in adopted)
        ],
    }


def _generation(name: str, events: list[Event[Any]], champion: str | None) -> dict[str, Any]:
    """What one generation's own events come to; the newest word about it counts, the gate's or the operator's."""
    decided = [event.payload for event in events if isinstance(event.payload, Decided)]
    words = [
        event.payload
        for event in events
        if isinstance(event.payload, Decided | Overridden | Rejected | ApprovalAnswered)
    ]
    said = words[-1] if words and not isinstance(words[-1], Decided) else None
    adopted = next((event.payload for event in events if isinstance(event.payload, Adopted)), None)
    retired = [event.payload for event in events if isinstance(event.payload, Retired)]
    made = next(event.at for event in events if isinstance(event.payload, Trained | Adopted))
    return {
        "generation": name,
        "ordinal": ordinal_of(name),
        "made": _when(made),
        "origin": "adopted" if adopted else "trained",
        "name": adopted.name if adopted else None,
        "factory": adopted.factory if adopted else None,
        "decision": decided[-1].outcome if decided else None,
        "why": decided[-1].summary if decided else None,
        "decided_by": _by(said) or ("gate" if decided else None),
        "ordered": _ordered(said),
        "reason": said.reason if said else None,
        "serves": name == champion,
        "retired": bool(retired),
        "retired_because": next((event.reason for event in reversed(retired) if event.reason), None),
    }


def _by(said: Overridden | Rejected | ApprovalAnswered | None) -> str | None:
    if isinstance(said, ApprovalAnswered) and said.answer == "expired":
        return "nobody"
    return None if said is None else f"operator {said.by}"


def _ordered(said: Overridden | Rejected | ApprovalAnswered | None) -> str | None:
    if isinstance(said, Overridden):
        return said.ordered
    if isinstance(said, ApprovalAnswered):
        return said.answer
    return None if said is None else "rejected"


def _self_tests(workspace: Workspace, names: list[str]) -> dict[str, float]:
    """Mean metric of each generation on its own gallery, from the newest evaluation that measured it and is there."""
    import numpy as np

    from graceful.evaluation.outcomes import metric_values, pair_state
    from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation

    found: dict[str, float] = {}
    for event in reversed(workspace.registry.events(Decided)):
        if len(found) == len(names):
            break
        try:
            evaluation = read_evaluation(workspace.evaluation_uri(event.payload.evaluation))
        except EvaluationMissingError:
            continue
        for name in set(names) - set(found):
            state = pair_state(name, name)
            if state in evaluation.outcomes.first_rank:
                values = metric_values(evaluation.outcomes, state, evaluation.policy.metric, evaluation.policy.k)
                if np.isfinite(values).any():
                    found[name] = round(float(np.nanmean(values)), 6)
        if event.generation not in found:  # it could not be measured, and an older evaluation will not know better
            names = [name for name in names if name != event.generation]
    return found


def _told(event: Event[Any]) -> dict[str, Any]:
    fields = {name: getattr(event.payload, name, "") for name in _FIELDS}
    told = {"when": _when(event.at), "what": event.kind, "generation": event.generation}
    return told | {name: value for name, value in fields.items() if value}


def _when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
