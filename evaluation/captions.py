"""Numbers as sentences and as Markdown: captions that say what to conclude, the decision and the matrix as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.backfill import area_under_curve
from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import Evidence, StateEvidence
from graceful.evaluation.guards import Reason
from graceful.evaluation.matrix import CompatibilityMatrix, average_compatibility, average_multimodel, criterion
from graceful.evaluation.policy import RolloutPolicy


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


def decision_markdown(decision: Decision) -> str:
    """The decision and the guards that led to it, as Markdown."""
    lines = [
        f"## {decision.outcome}",
        "",
        decision.summary,
        "",
        "| guard | where | limit | measured | bound | n | verdict |",
    ]
    lines.append("|---" * 7 + "|")
    for row in map(reason_row, decision.reasons[: decision.num_decisive]):
        keys = ("guard", "where", "limit", "value", "bound", "n", "verdict")
        lines.append("| " + " | ".join(str(row[key]).replace("|", "/") for key in keys) + " |")
    return "\n".join(lines)


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


def metric_name(evidence: Evidence) -> str:
    """recall@1, recall@5, mAP."""
    return f"recall@{evidence.k}" if evidence.metric == "recall@k" else evidence.metric


def reason_row(reason: Reason) -> dict[str, Any]:
    """A guard as texts, by column."""
    where = reason.scope if reason.state is None or reason.scope == reason.state else f"{reason.scope}, {reason.state}"
    form = {"quality": points, "dip": points, "certificate": points, "cost": number}.get(reason.guard, percent)
    unit = {"quality": " points", "dip": " points", "certificate": " points", "cost": " days"}.get(reason.guard, "")
    numbers = {
        name: "" if value is None else form(value) + unit
        for name, value in (("limit", reason.threshold), ("value", reason.value), ("bound", reason.bound))
    }
    n = "" if reason.n is None else f"{reason.n:,}"
    return {"guard": reason.guard, "where": where, **numbers, "n": n, "verdict": reason.verdict, "text": reason.text}


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


def number(value: object) -> str:
    """Any cell of a table; None is "unavailable"."""
    if value is None:
        return "unavailable"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
