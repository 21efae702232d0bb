"""One self-contained HTML page about one decision, its plots, and short Markdown for a flow's UI.

The page needs no script and no network: styles and plots (SVG) are inside it. Decision and reasons come first. Every
plot has a caption that says what to conclude, made from the numbers. Only this module imports matplotlib and jinja2,
and it draws without pyplot, so that importing it changes no global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import NDArray

from graceful.evaluation.captions import (
    curve_caption,
    matrix_caption,
    metric_name,
    nfr_caption,
    number,
    percent,
    points,
    reason_row,
    share_text,
)
from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import OVERALL, Evidence, StateEvidence
from graceful.evaluation.flips import flips_by_slice
from graceful.evaluation.matrix import CompatibilityMatrix, criterion
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state
from graceful.evaluation.policy import RolloutPolicy

TEMPLATE = "report.html.j2"
INK, MUTED, RULE = "#1b2733", "#5b6875", "#d8dee4"
ACCENT, GOOD, BAD, MISSING = "#1f5fbf", "#1a7f4b", "#b3261e", "#eef1f4"
MET, NOT_MET = "\u2713", "\u2717"  # check mark, cross: the criterion must not be told by colour alone
STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "evaluation-report",  # the same numbers give the same bytes
}


class _Curve(NamedTuple):
    fractions: NDArray[np.float64]
    values: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    served: float


def render_report(
    evidence: Evidence,
    decision: Decision,
    policy: RolloutPolicy,
    *,
    matrix: CompatibilityMatrix,
    nfr: NDArray[np.float64] | None = None,
    outcomes: Outcomes | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    extras: Mapping[str, str | Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """Render the page.

    `nfr` (G, G) is the NFR between the matrix' generations, row = before. `outcomes` gives the per-slice table.
    `lineage` rows become a table, as do lists in `extras`; texts in `extras` become paragraphs under their title.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"points": points, "percent": percent, "number": number, "duration": duration}
    metric = metric_name(evidence)
    shown = shown_state(evidence, decision)
    plots = []
    overall = [state for state in evidence.states if state.scope == OVERALL]
    if overall:
        curve = _curve_figure(_curve_of(overall), decision.fraction, metric)
        title = f"{metric} of the served view while the gallery is re-embedded"
        plots.append({"title": title, "svg": _svg(curve), "caption": curve_caption(overall, decision, policy)})
    title = f"Quality matrix: {metric} in per cent"
    plots.append({"title": title, "svg": _svg(_matrix_figure(matrix)), "caption": matrix_caption(matrix)})
    if nfr is not None and len(matrix.generations) > 1:
        names = matrix.generations
        flips = _heatmap(nfr, names, names, "wrong with", "right with", "Reds")
        title = "Negative flips between generations, in per cent of queries"
        plots.append({"title": title, "svg": _svg(flips), "caption": nfr_caption(nfr, names)})
    reasons = [reason_row(reason) for reason in decision.reasons]
    return environment.get_template(TEMPLATE).render(
        evidence=evidence,
        decision=decision,
        policy=policy.model_dump(mode="json"),
        metric=metric,
        shown=shown,
        decisive=reasons[: decision.num_decisive],
        other_reasons=reasons[decision.num_decisive :],
        plots=plots,
        slices=_slice_rows(outcomes, shown, policy),
        lineage=_table(lineage),
        extras={title: value if isinstance(value, str) else _table(value) for title, value in (extras or {}).items()},
    )


def matrix_png(matrix: CompatibilityMatrix, *, dpi: int = 160) -> bytes:
    """Heat map of a compatibility matrix in per cent, the criterion marked; NaN is left blank."""
    return _png(_matrix_figure(matrix), dpi)


def evidence_curve_png(evidence: Evidence, decision: Decision, *, dpi: int = 160) -> bytes:
    """Backfill curve of all queries, its simultaneous band, what is served now, and the chosen fraction."""
    overall = [state for state in evidence.states if state.scope == OVERALL]
    return _png(_curve_figure(_curve_of(overall), decision.fraction, metric_name(evidence)), dpi)


def duration(hours: float) -> str:
    """Hours in the unit that reads best.

    >>> duration(0.001), duration(0.05), duration(30)
    ('3.6 s', '3.0 min', '30.0 h')
    """
    seconds = 3600 * hours
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def shown_state(evidence: Evidence, decision: Decision) -> StateEvidence | None:
    """The state that the headline numbers are about: the chosen one, otherwise full backfill."""
    fraction = 1.0 if decision.fraction is None else decision.fraction
    found = [s for s in evidence.states if s.scope == OVERALL and s.fraction == fraction]
    return found[0] if found else None


def _matrix_figure(matrix: CompatibilityMatrix) -> Figure:
    names = matrix.generations
    return _heatmap(matrix.values, names, names, "gallery of", "queries by", "Blues", criterion(matrix))


def _heatmap(
    values: NDArray[np.float64],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    column_title: str,
    row_title: str,
    colours: str,
    marks: NDArray[np.float64] | None = None,
) -> Figure:
    num_rows, num_columns = values.shape
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.7 + 0.78 * num_columns, 1.3 + 0.6 * num_rows), layout="constrained")
        axes = figure.add_subplot()
        colour_map = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
        known = values[~np.isnan(values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        spread = max(high - low, 1e-9)
        edges = (np.arange(num_columns + 1) - 0.5, np.arange(num_rows + 1) - 0.5)
        limits: Any = {"vmin": low - 0.15 * spread, "vmax": high + 0.25 * spread}
        cells = np.ma.masked_invalid(values)
        axes.pcolormesh(*edges, cells, cmap=colour_map, edgecolors="white", linewidth=2, **limits)
        axes.invert_yaxis()
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            if np.isnan(value):
                continue
            dark = (value - low) / spread > 0.72
            mark = "" if marks is None or np.isnan(marks[row, column]) else (NOT_MET, MET)[int(marks[row, column])]
            ink = "white" if dark else INK
            axes.text(column, row - (0.12 if mark else 0), f"{100 * value:.1f}", ha="center", va="center", color=ink)
            if mark:
                colour = BAD if mark == NOT_MET and not dark else ink
                axes.text(column, row + 0.25, mark, ha="center", va="center", color=colour, fontweight="bold")
        axes.set_xticks(range(num_columns), column_labels, rotation=30, ha="right")
        axes.set_yticks(range(num_rows), row_labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(column_title)
        axes.set_ylabel(row_title)
    return figure


def _curve_figure(curve: _Curve, chosen: float | None, metric: str) -> Figure:
    x, y = 100 * curve.fractions, 100 * curve.values
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(100 * curve.served, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="served now")
        band = (100 * curve.lower, 100 * curve.upper)
        axes.fill_between(x, *band, color=ACCENT, alpha=0.15, linewidth=0, label="simultaneous band")
        axes.plot(x, y, color=ACCENT, linewidth=2, marker="o", markersize=4.5, label="the candidate's view")
        if chosen is not None:
            place = ([100 * chosen], [float(np.interp(chosen, curve.fractions, y))])
            ring: Any = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": GOOD, "markeredgewidth": 2}
            axes.plot(*place, marker="o", linestyle="none", label=f"chosen: {share_text(chosen)}", **ring)
        axes.set_xlabel("per cent of the gallery re-embedded")
        axes.set_ylabel(f"{metric}, per cent")
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return figure


def _curve_of(states: Sequence[StateEvidence]) -> _Curve:
    """The metric with its band; what is served now is taken as fixed, since the band is about the difference."""
    baseline = _array([state.baseline for state in states])
    return _Curve(
        fractions=_array([state.fraction for state in states]),
        values=_array([state.value for state in states]),
        lower=baseline + _array([state.difference_lower for state in states]),
        upper=baseline + _array([state.difference_upper for state in states]),
        served=float(baseline[0]),
    )


def _array(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _svg(figure: Figure) -> str:
    """Markup made here from numbers, with labels drawn as paths: safe to insert as it is."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _slice_rows(outcomes: Outcomes | None, shown: StateEvidence | None, policy: RolloutPolicy) -> list[dict[str, Any]]:
    state = None if shown is None else fraction_state(shown.fraction)
    if outcomes is None or state is None or not {SERVED, state} <= set(outcomes.states):
        return []
    rows = []
    for name in sorted(outcomes.slices):
        for value, rates in flips_by_slice(outcomes, SERVED, state, name, k=policy.k).items():
            guarded = name in policy.required_slices or f"{name}={value}" in policy.required_slices
            rows.append({"slice": f"{name}={value}", "guarded": guarded, "rates": rates})
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {"columns": columns, "rows": [[number(row.get(column)) for column in columns] for row in rows]}
