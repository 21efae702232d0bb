"""Commands about what has happened: the history of the lineage, and the flips of an evaluation. Read only."""

import datetime
from typing import Any

from graceful.errors import GracefulError
from graceful.flows.store.events import (
    Adopted,
    Decided,
    Forwarded,
    Overridden,
    Promoted,
    Rejected,
    Retired,
    RolledBack,
    Trained,
)
from graceful.flows.store.registry import Registry
from graceful.flows.store.workspace import open_workspace


class NothingDecidedError(GracefulError):
    """No decision was made yet about what is asked for."""


def lineage_history(root: str) -> dict[str, Any]:
    """Every generation with what was decided about it and by whom, and everything that moved, in order."""
    workspace = open_workspace(root)
    registry = workspace.registry
    serving = registry.serving()
    generations = [_generation(registry, name, serving.champion) for name in registry.generations()]
    moves = []
    for event in registry.history():
        happened = event.payload
        if isinstance(happened, Promoted | RolledBack | Forwarded | Overridden | Rejected | Retired):
            told = {name: getattr(happened, name, "") for name in ("to", "ordered", "reason", "by")}
            moves.append(
                {"when": _when(event.at), "what": event.kind, "generation": event.generation}
                | {name: value for name, value in told.items() if value}
            )
    return {"generations": generations, "moves": moves}


def flips_of(root: str, generation: str | None, limit: int) -> dict[str, Any]:
    """Queries that are right with what serves and would be wrong with a candidate, the worst first.

    Wrong in the state that the decision was about: the decided fraction, else the fully re-embedded gallery.
    """
    import numpy as np

    from graceful.evaluation.outcomes import SERVED, fraction_state
    from graceful.flows.store.evaluations import read_evaluation

    workspace = open_workspace(root)
    registry = workspace.registry
    wanted = None if generation is None else registry.resolve(generation)
    decided = [event for event in registry.events(Decided) if wanted in (None, event.generation)]
    if not decided:
        raise NothingDecidedError(
            f"looking for flips: expected a decision about {wanted or 'a candidate'}, found none; run 'graceful update'"
        )
    event = decided[-1]
    evaluation = read_evaluation(workspace.evaluation_uri(event.payload.evaluation))
    outcomes, k, decision = evaluation.outcomes, evaluation.evidence.k, evaluation.decision
    after = fraction_state(1.0 if decision.fraction is None else decision.fraction)
    if SERVED not in outcomes.first_rank or after not in outcomes.first_rank:
        return {
            "generation": event.generation,
            "against": None,
            "state": after,
            "num_queries": len(outcomes),
            "flips": [],
        }
    then, now = outcomes.first_rank[SERVED], outcomes.first_rank[after]
    right_then, right_now = (then > 0) & (then <= k), (now > 0) & (now <= k)
    lost = np.flatnonzero(right_then & ~right_now)
    lost = lost[np.argsort(-np.where(now[lost] > 0, now[lost], np.iinfo(np.int32).max), kind="stable")]
    return {
        "generation": event.generation,
        "against": decision.champion,
        "state": after,
        "num_queries": len(outcomes),
        "num_flips": len(lost),
        "num_repaired": int((~right_then & right_now).sum()),
        "flips": [
            {
                "query": str(outcomes.query_ids[row]),
                "identity": str(outcomes.identities[row]),
                "rank_before": int(then[row]),
                "rank_after": int(now[row]) or None,
                **{name: str(values[row]) for name, values in outcomes.slices.items()},
            }
            for row in lost[:limit]
        ],
    }


def _generation(registry: Registry, name: str, champion: str | None) -> dict[str, Any]:
    decided = [event.payload for event in registry.events(Decided) if event.generation == name]
    last = decided[-1] if decided else None
    orders = [event.payload for event in registry.events(Overridden) if event.generation == name]
    rejected = [event.payload for event in registry.events(Rejected) if event.generation == name]
    retired = [event.payload for event in registry.events(Retired) if event.generation == name]
    said = orders[-1] if orders else (rejected[-1] if rejected else None)
    adopted = any(event.generation == name for event in registry.events(Adopted))
    first = min(event.at for kind in (Trained, Adopted) for event in registry.events(kind) if event.generation == name)
    return {
        "generation": name,
        "made": _when(first),
        "origin": "adopted" if adopted else "trained",
        "decision": last.outcome if last else None,
        "why": last.summary if last else None,
        "decided_by": "gate" if said is None else f"operator {said.by}",
        "reason": said.reason if said is not None else None,
        "serves": name == champion,
        "served_before": name != champion and name in registry.served_generations(),
        "retired": bool(retired),
    }


def _when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
