"""The ways of carrying an update out: which states users live through, and which curves were really measured.

A rollout serves every state from nothing re-embedded up to its fraction; a full backfill serves its last state alone,
because the pointer moves last. Where the whole gallery has to be re-embedded before the move there is no way at all:
every fraction is then one and the same state, and a line through them would be no backfill curve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, StateEvidence
from graceful.evaluation.guards import as_hoped, full_option, most_hopeful, rollout_options
from graceful.evaluation.intervals import ShareBounds, share_bounds
from graceful.evaluation.outcomes import SERVED, Outcomes, compare, fraction_state, parse_state
from graceful.evaluation.policy import RolloutPolicy

CARRIED_OUT = ("COMPATIBLE_ROLLOUT", "FULL_BACKFILL")


@dataclass(frozen=True)
class LivedStates:
    """States of all queries that users would live through, in order; `would_be`: nobody has decided to serve them."""

    states: tuple[StateEvidence, ...]
    would_be: bool

    @property
    def worst(self) -> StateEvidence | None:
        """The state in which most of today's right answers are wrong; of equals the one of lowest quality."""
        known = [state for state in self.states if state.nfr is not None]
        return max(known, key=lambda state: (state.nfr or 0.0, -(state.difference or 0.0)), default=None)

    @property
    def last(self) -> StateEvidence | None:
        """The state that stays."""
        return self.states[-1] if self.states else None


class Point(NamedTuple):
    """One state of a curve: the metric with its band where there is one, flips with their bounds."""

    fraction: float
    value: float | None
    lower: float | None
    upper: float | None
    nfr: float | None
    nfr_lower: float | None
    nfr_upper: float | None
    pfr: float | None


class Curve(NamedTuple):
    """States from nothing re-embedded to everything, on one way. `title` says which way that is."""

    title: str
    points: tuple[Point, ...]


def lived_states(evidence: Evidence, decision: Decision, policy: RolloutPolicy) -> LivedStates:
    """States on the decided way; where nothing is decided, on the cheapest way that could still pass."""
    overall = [state for state in evidence.states if state.scope == OVERALL]
    if not overall or any(reason.guard == "missing" for reason in decision.reasons):
        return LivedStates((), decision.outcome not in CARRIED_OUT)
    if decision.outcome == "COMPATIBLE_ROLLOUT":
        return LivedStates(tuple(s for s in overall if s.fraction <= (decision.fraction or 0.0)), False)
    if decision.outcome == "INCONCLUSIVE":
        then = as_hoped(evidence)
        options = [*rollout_options(then, policy), full_option(evidence, policy)]
        undecided = [option for option in options if option.verdict == "UNKNOWN"]
        chosen = most_hopeful(undecided) if undecided else options[-1]
        if chosen is not options[-1]:
            way = (s for s in then.states if s.scope == OVERALL and s.fraction <= chosen.fraction)
            return LivedStates(tuple(way), True)
    return LivedStates((overall[-1],), decision.outcome not in CARRIED_OUT)


def is_whole_gallery(evidence: Evidence) -> bool:
    """Whether all that serves now has to be re-embedded before the move: every fraction is the same state then."""
    overall = [state.state for state in evidence.states if state.scope == OVERALL]
    return len(overall) > 1 and len(set(overall)) == 1


def curves(evidence: Evidence, outcomes: Outcomes | None, policy: RolloutPolicy) -> list[Curve]:
    """Every curve that was measured: the decided way where it is one, and the one of the old vectors beside it."""
    found = []
    overall = [state for state in evidence.states if state.scope == OVERALL]
    if overall and not is_whole_gallery(evidence):
        found.append(Curve("the candidate's view", tuple(map(_point, overall))))
    hoped = [state for state in evidence.hoped_states if state.scope == OVERALL]
    if hoped:
        found.append(Curve("if the open certificates pass", tuple(map(_point, hoped))))
    elif overall and not found and outcomes is not None:
        found += _measured_otherwise(evidence, outcomes, policy)
    return found


def wins(outcomes: Outcomes, evidence: Evidence, state: StateEvidence) -> ShareBounds:
    """Share of queries that are wrong now and right in a state, with bounds at the level of the NFR's."""
    pair = compare(outcomes, SERVED, state.state, k=evidence.k)
    return share_bounds(
        ~pair.right_before & pair.right_after, outcomes.clusters[pair.counted], evidence.alpha / NFR_FAMILIES
    )


def effective_queries(state: StateEvidence, guard: str) -> float | None:
    """Queries that a bound rests on once identities are counted; None where it is not known."""
    effect = state.nfr_design_effect if guard == "NFR" else state.difference_design_effect
    return None if not effect else min(float(state.num_queries), state.num_queries / effect)


def _measured_otherwise(evidence: Evidence, outcomes: Outcomes, policy: RolloutPolicy) -> Iterable[Curve]:
    """The way that re-embeds least before the move, of those that were measured though another one was decided."""
    ways = {parse_state(name).wave_zero for name in outcomes.states} - {None}
    if SERVED not in outcomes.first_rank or not ways:
        return
    least = min((way for way in ways if way is not None), key=lambda way: (len(way), way))
    points = []
    for fraction in policy.fractions:
        name = fraction_state(fraction, None if fraction == 1 else least)
        if name not in outcomes.first_rank:
            return
        pair = compare(outcomes, SERVED, name, metric=evidence.metric, k=evidence.k)
        if not len(pair.before):
            return
        clusters = outcomes.clusters[pair.counted]
        flips = share_bounds(pair.right_before & ~pair.right_after, clusters, evidence.alpha / NFR_FAMILIES)
        won = float((~pair.right_before & pair.right_after).mean())
        points.append(Point(fraction, float(pair.after.mean()), None, None, flips.value, flips.lower, flips.upper, won))
    before = f"only {', '.join(least)} re-embedded before" if least else "the old vectors, as they are"
    yield Curve(before, tuple(points))


def _point(state: StateEvidence) -> Point:
    bounds = (state.difference_lower, state.difference_upper)
    lower, upper = (None if d is None or state.baseline is None else state.baseline + d for d in bounds)
    return Point(
        state.fraction, state.value, _clipped(lower), _clipped(upper), state.nfr, state.nfr_lower, state.nfr_upper,
        state.pfr,
    )  # fmt: skip


def _clipped(share: float | None) -> float | None:
    """A share's bound; no metric is below 0 or above 1, whatever a bootstrap says."""
    return None if share is None else min(1.0, max(0.0, share))
