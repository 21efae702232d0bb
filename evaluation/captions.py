"""Numbers as sentences and as Markdown: captions that say what to conclude, the decision and the matrix as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.backfill import area_under_curve
from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, StateEvidence
from graceful.evaluation.guards import Reason
from graceful.evaluation.matrix import CompatibilityMatrix, average_compatibility, average_multimodel, criterion
from graceful.evaluation.outcomes import parse_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.ways import Curve, effective_queries

FULLY = "with everything re-embedded"


def matrix_markdown(matrix: CompatibilityMatrix) -> str:
    """The matrix as a Markdown table in per cent; bold = criterion met, (x) = not met, blank = not measured."""
    met = criterion(matrix)
    lines = ["| queries by / gallery of | " + " | ".join(matrix.generations) + " |", "|---" * (len(met) + 1) + "|"]
    for t, generation in enumerate(matrix.generations):
        cells = []
        for k, value in enumerate(matrix.values[t]):
            text = "" if np.isnan(value) else f"{100 * value:.1f}"
            cells.append(f"**{text}**" if met[t, k] == 1 else f"{text} (x)" if met[t, k] == 0 else text)
        lines.append(f"| {generation} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", matrix_caption(matrix)])


def matrix_caption(matrix: CompatibilityMatrix) -> str:
    """What to conclude from the matrix."""
    met = criterion(matrix)
    pairs = np.argwhere(~np.isnan(met))
    if not len(pairs):
        return "No pair of generations was measured: compatibility is undefined."
    margins = {(t, k): matrix.values[t, k] - matrix.self_tests[k] for t, k in map(tuple, pairs)}
    (t, k), smallest = min(margins.items(), key=lambda item: item[1])
    passed = int(np.nansum(met))
    ac = average_compatibility(matrix)
    ac_text = "undefined, pairs are missing" if np.isnan(ac) else f"{ac:.2f}"
    names = matrix.generations
    text = (
        f"{passed} of {len(pairs)} measured pairs meet the published criterion (a later generation's queries do "
        f"better on an earlier gallery than its own did): AC {ac_text}, AM {100 * average_multimodel(matrix):.1f}. "
    )
    place = f"{names[t]} on the gallery of {names[k]}"
    if passed == len(pairs):
        return (
            text
            + f"Old vectors stay usable throughout; the narrowest margin is {place} ({100 * smallest:+.1f} points)."
        )
    return text + f"The worst is {place} ({100 * smallest:+.1f} points). The decision rests on its guards, not on this."


def nfr_caption(nfr: NDArray[np.float64], generations: Sequence[str]) -> str:
    """What to conclude from the NFR between generations."""
    steps = [(float(nfr[t - 1, t]), t) for t in range(1, len(generations)) if not np.isnan(nfr[t - 1, t])]
    if not steps:
        return "No neighbouring generations were measured on the same queries."
    worst, t = max(steps)
    return (
        f"Between neighbours, each on its own gallery, the update from {generations[t - 1]} to {generations[t]} broke "
        f"the most: {100 * worst:.1f} % of queries were right before and wrong after (mean of {len(steps)} update(s): "
        f"{100 * np.mean([value for value, _ in steps]):.1f} %). Read it beside the gain: changing nothing breaks "
        "nothing."
    )


def curve_caption(states: Sequence[StateEvidence], decision: Decision, policy: RolloutPolicy) -> str:
    """What to conclude from the backfill curve."""
    known = [state for state in states if state.difference is not None and state.difference_lower is not None]
    if not known:
        return "No state has enough queries for a band: nothing can be concluded from this curve."
    first, last = known[0], known[-1]
    lowest = min(known, key=lambda state: state.difference or 0.0)
    values = [np.nan if state.value is None else state.value for state in states]
    auc = area_under_curve([state.fraction for state in states], values)
    text = (
        f"At {share_text(first.fraction)} re-embedded the view changes by {points(first.difference)} points against "
        f"what is served now (at least {points(first.difference_lower)}), at {share_text(last.fraction)} by "
        f"{points(last.difference)} (at least {points(last.difference_lower)}). Lowest point: "
        f"{points(lowest.difference)} at {share_text(lowest.fraction)}. "
    )
    if decision.outcome in ("COMPATIBLE_ROLLOUT", "FULL_BACKFILL") and decision.fraction is not None:
        text += f"Chosen: {share_text(decision.fraction)}. "
    auc_text = "" if np.isnan(auc) else f" Mean over evenly spaced fractions (AUC): {100 * auc:.1f}."
    return (
        text
        + f"The band holds for all fractions at once with confidence {share_text(1 - policy.alpha)} per side.{auc_text}"
    )


def no_curve_caption(state: StateEvidence, drawn: Sequence[Curve]) -> str:
    """What to conclude where the whole gallery would be re-embedded before the move: there is no backfill curve."""
    text = (
        "This is no backfill curve of the gallery as it is: no stored vector may be read by the candidate, so "
        "everything is re-embedded before it serves, and every fraction is one and the same state: "
        f"{points(state.difference)} points against what is served now (at least {points(state.difference_lower)}). "
    )
    for curve in drawn:
        first = curve.points[0]
        if first.value is not None and state.baseline is not None:
            text += (
                f"The line ({curve.title}) is what was measured beside it and would not be served today: with nothing "
                f"re-embedded {points(first.value - state.baseline)} points. "
            )
    return text.rstrip()


def flips_caption(states: Sequence[StateEvidence], policy: RolloutPolicy) -> str:
    """What to conclude from flips by fraction, of the states that users live through."""
    known = [state for state in states if state.nfr is not None]
    if not known:
        return "No flips were measured."
    worst = max(known, key=lambda state: state.nfr or 0.0)
    limit = "" if policy.nfr_limit is None else f" The limit is {share_text(policy.nfr_limit)}."
    wins = "" if worst.pfr is None else f", {percent(worst.pfr)} are won"
    each = "" if not worst.nfr or worst.pfr is None else f": {worst.pfr / worst.nfr:.1f} for each one lost"
    where = (
        f"Most is lost at {share_text(worst.fraction)} re-embedded"
        if len(known) > 1
        else f"Users would live through one state alone, {moment(worst.fraction)}"
    )
    return (
        f"{where}: {percent(worst.nfr)} of the searches work now and "
        f"fail then (at most {percent(worst.nfr_upper)}){wins}{each}.{limit} Bars are one-sided bounds, each with "
        f"confidence {share_text(1 - policy.alpha / NFR_FAMILIES)}."
    )


def metric_name(evidence: Evidence) -> str:
    """recall@1, recall@5, mAP."""
    return f"recall@{evidence.k}" if evidence.metric == "recall@k" else evidence.metric


def reason_row(reason: Reason, evidence: Evidence | None = None) -> dict[str, Any]:
    """A guard as texts, by column; with the evidence also the effective n that its bound rests on."""
    form = {"quality": points, "dip": points, "certificate": points, "cost": number}.get(reason.guard, percent)
    unit = {"quality": " points", "dip": " points", "certificate": " points", "cost": " days"}.get(reason.guard, "")
    numbers = {
        name: "" if value is None else form(value) + unit
        for name, value in (("limit", reason.threshold), ("value", reason.value), ("bound", reason.bound))
    }
    n = "" if reason.n is None else f"{reason.n:,}"
    states = () if evidence is None else (*evidence.states, *evidence.hoped_states)
    state = next((s for s in states if (s.scope, s.state) == (reason.scope, reason.state)), None)
    if n and state is not None and reason.guard in ("quality", "dip", "NFR"):
        effective = effective_queries(state, reason.guard)
        n += "" if effective is None else f" ({effective:,.0f})"
    return {
        "guard": reason.guard,
        "where": where_text(reason),
        **numbers,
        "n": n,
        "verdict": reason.verdict,
        "text": reason.text,
    }


def moment(fraction: float, *, whole: bool = False) -> str:
    """A state in words.

    >>> moment(0.0), moment(0.25), moment(1.0)
    ('with nothing re-embedded yet', 'with 25 % re-embedded', 'with everything re-embedded')
    """
    if whole or fraction == 1:
        return FULLY
    return f"with {share_text(fraction)} re-embedded" if fraction else "with nothing re-embedded yet"


def where_text(reason: Reason) -> str:
    """Where a guard looks: at which searches, in which state.

    >>> where_text(Reason(guard="NFR", state="fraction/0.5", verdict="PASS", text=""))
    'all searches, with 50 % re-embedded'
    """
    if reason.guard == "wave zero":
        return "vectors it may not read"
    if reason.guard == "certificate":
        return f"vectors of {reason.scope}"
    scope = "all searches" if reason.scope == OVERALL else reason.scope
    if reason.state is None:
        return "" if reason.guard == "cost" else scope
    state = parse_state(reason.state)
    if state.fraction is None:
        return "on its own gallery" if state.query_generation == state.gallery_generation else reason.state
    before = f", {'+'.join(state.wave_zero)} before" if state.wave_zero else ""
    return f"{scope}, {moment(state.fraction)}{before}"


def points(share: float | None) -> str:
    """A difference of shares in points, signed."""
    return "-" if share is None or np.isnan(share) else f"{100 * share:+.2f}"


def percent(share: float | None) -> str:
    """A measured share."""
    return "-" if share is None or np.isnan(share) else f"{100 * share:.2f} %"


def share_text(share: float) -> str:
    """A round share, such as a fraction of the gallery.

    >>> share_text(0.05), share_text(1.0)
    ('5 %', '100 %')
    """
    return f"{100 * share:g} %"


def duration(hours: float) -> str:
    """Hours in the unit that reads best.

    >>> duration(0.001), duration(0.05), duration(30)
    ('3.6 s', '3.0 min', '30.0 h')
    """
    seconds = 3600 * hours
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def number(value: object) -> str:
    """Any cell of a table; None is "unavailable"."""
    if value is None:
        return "unavailable"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
