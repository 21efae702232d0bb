"""Figures of a report, drawn without pyplot, so that importing this changes no global state.

Narrow enough to be read on a phone; the same numbers give the same bytes. Shares come in [0, 1] and are drawn in per
cent; no curve and no band leaves 0 to 100 %.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from graceful.evaluation.captions import share_text
from graceful.evaluation.cost import OptionCost
from graceful.evaluation.matrix import CompatibilityMatrix, criterion
from graceful.evaluation.policy import Verdict
from graceful.evaluation.ways import Curve

INK, MUTED, RULE = "#1b2733", "#5b6875", "#d8dee4"
ACCENT, GOOD, BAD, OPEN, MISSING = "#1f5fbf", "#1a7f4b", "#b3261e", "#8a5a00", "#eef1f4"
COLOUR_OF: dict[str, str] = {"PASS": GOOD, "FAIL": BAD, "UNKNOWN": OPEN, "": ACCENT}
MARK_OF: dict[str, str] = {"PASS": "o", "FAIL": "X", "UNKNOWN": "D", "": "o"}  # a verdict is not told by colour alone
MET, NOT_MET = "\u2713", "\u2717"
WIDTH = 4.6  # inches; at 9 points this is legible on a screen of 360 pixels
MAX_LABEL = 26  # letters of a line beside a row
STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "evaluation-report",  # the same numbers give the same bytes
}


P = ParamSpec("P")
T = TypeVar("T", str, bytes)


@dataclass(frozen=True)
class Plot:
    """A figure that is not drawn yet; `key` holds everything that it is drawn from."""

    draw: Callable[[], Figure]
    key: bytes


def deferred(draw: Callable[P, Figure]) -> Callable[P, Plot]:
    """Let a function that draws return what will draw: a page is rendered twice in an update, and its figures once."""

    @functools.wraps(draw)
    def plot(*values: P.args, **named: P.kwargs) -> Plot:
        return Plot(functools.partial(draw, *values, **named), pickle.dumps((draw.__name__, values, named)))

    return plot


class ForestRow(NamedTuple):
    """One interval of a forest plot, in shares; a bound of None reaches the edge. A verdict of "" is not judged."""

    label: str
    value: float
    lower: float | None
    upper: float | None
    verdict: Verdict | str = ""


def matrix_figure(matrix: CompatibilityMatrix) -> Plot:
    """Heat map of a compatibility matrix in per cent, the criterion marked."""
    names = matrix.generations
    return heatmap(matrix.values, names, names, "gallery of", "queries by", "Blues", criterion(matrix))


@deferred
def curve_figure(
    curves: Sequence[Curve], served: float, chosen: float | None, end: float | None, metric: str
) -> Figure:
    """The metric against the share re-embedded, the bands, what is served now, the chosen fraction, and the end."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.5)
        axes.axhline(100 * served, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="served now")
        for curve, style in zip(curves, _LINES, strict=False):
            points = [point for point in curve.points if point.value is not None]
            x = [100 * point.fraction for point in points]
            banded = [p for p in points if p.lower is not None and p.upper is not None]
            if banded:
                low = [100 * (point.lower or 0.0) for point in banded]
                high = [100 * (point.upper or 0.0) for point in banded]
                across = [100 * point.fraction for point in banded]
                axes.fill_between(across, low, high, color=style["color"], alpha=0.14, linewidth=0)
            axes.plot(x, [100 * (point.value or 0.0) for point in points], label=curve.title, **style)
        if end is not None and (not curves or chosen is None):
            axes.plot(
                [100],
                [100 * end],
                marker="s",
                linestyle="none",
                color=GOOD,
                markersize=6,
                label="everything re-embedded",
            )
        _ring(axes, curves, chosen, "value")
        axes.set_xlabel("per cent of the gallery re-embedded")
        axes.set_ylabel(f"{metric}, per cent")
        axes.set_xlim(-4, 104)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1.0), min(top, 101.0))
        finish(axes)
    return figure


@deferred
def flips_figure(curves: Sequence[Curve], limit: float | None, chosen: float | None) -> Figure:
    """Negative flips against the share re-embedded with their bounds, the limit, and the repaired searches."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.5)
        highest = 100 * (limit or 0.0)
        for curve, style in zip(curves, _LINES, strict=False):
            points = [point for point in curve.points if point.nfr is not None]
            x = [100 * point.fraction for point in points]
            values = np.array([100 * (point.nfr or 0.0) for point in points])
            lower = np.array([100 * (point.nfr_lower or 0.0) for point in points])
            upper = np.array([100 * (1.0 if point.nfr_upper is None else point.nfr_upper) for point in points])
            look = {**style, "color": BAD if style is _LINES[0] else OPEN}
            axes.errorbar(
                x,
                values,
                (values - lower, upper - values),
                capsize=3,
                elinewidth=1,
                label=f"lost: {curve.title}",
                **look,
            )
            highest = max([highest, *upper.tolist()])
            if style is _LINES[0]:
                won = [100 * (point.pfr or 0.0) for point in points]
                axes.plot(x, won, color=GOOD, linewidth=1.4, marker="^", markersize=4, label="won")
                highest = max([highest, *won])
        if limit is not None:
            axes.axhline(100 * limit, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)), label="limit of the losses")
        _ring(axes, curves, chosen, "nfr")
        axes.set_xlabel("per cent of the gallery re-embedded")
        axes.set_ylabel("per cent of the searches")
        axes.set_xlim(-4, 104)
        axes.set_ylim(0, min(100.0, 1.08 * highest) if highest else 1.0)
        finish(axes)
    return figure


@deferred
def forest_figure(rows: Sequence[ForestRow], limit: float | None, unit: str, *, good_side: str) -> Figure:
    """Intervals below each other against one limit; the far side of it is shaded. `good_side`: left or right."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(0.75 + 0.3 * max(len(rows), 2))
        bounds = [bound for row in rows for bound in (row.value, row.lower, row.upper, limit) if bound is not None]
        low, high = 100 * min([*bounds, 0.0]), 100 * max([*bounds, 0.0])
        margin = max(0.06 * (high - low), 0.05)
        edges = (low - margin if low < 0 else 0.0, high + margin)
        for place, row in enumerate(rows):
            colour = COLOUR_OF[row.verdict]
            start = edges[0] if row.lower is None else 100 * row.lower
            stop = edges[1] if row.upper is None else 100 * row.upper
            axes.plot([start, stop], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([100 * row.value], [place], marker=MARK_OF[row.verdict], color=colour, markersize=6)
        if limit is not None:
            axes.axvline(100 * limit, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)))
            beyond = (100 * limit, edges[1]) if good_side == "left" else (edges[0], 100 * limit)
            axes.axvspan(*beyond, color=BAD, alpha=0.06, linewidth=0)
        axes.set_xlim(*edges)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axes.set_xlabel(unit)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
    return figure


@deferred
def cost_figure(costs: Sequence[OptionCost], curve: Curve, chosen: float | None, metric: str) -> Figure:
    """Quality against what each fraction costs: its price where that is known, else its hours."""
    priced = all(cost.total_price is not None for cost in costs)
    value_of = {point.fraction: point.value for point in curve.points}
    shown = [cost for cost in costs if value_of.get(cost.fraction) is not None]
    x = [float(cost.total_price or 0.0) if priced else cost.hours for cost in shown]
    y = [100 * (value_of[cost.fraction] or 0.0) for cost in shown]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(3.0)
        axes.plot(x, y, color=ACCENT, linewidth=1.6, marker="o", markersize=4.5)
        for cost, at, value in zip(shown, x, y, strict=True):
            offset = (6, -10) if cost.fraction < 1 else (-6, -10)
            side = "left" if cost.fraction < 1 else "right"
            axes.annotate(
                share_text(cost.fraction),
                (at, value),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                color=MUTED,
                fontsize=8,
            )
        for cost, at, value in zip(shown, x, y, strict=True):
            if cost.fraction == chosen:
                axes.plot([at], [value], linestyle="none", **_RING)
        axes.margins(x=0.06, y=0.15)
        axes.set_xlabel("price of the fraction" if priced else "hours of embedding")
        axes.set_ylabel(f"{metric}, per cent")
        finish(axes, legend=False)
    return figure


@deferred
def heatmap(
    values: NDArray[np.float64],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    column_title: str,
    row_title: str,
    colours: str,
    marks: NDArray[np.float64] | None = None,
) -> Figure:
    """Values of rows and columns in per cent, written into their cells; NaN is left blank."""
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


def svg(plot: Plot, label: str) -> str:
    """Markup made here from numbers, with its letters drawn as paths: safe to insert as it is."""

    def made() -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            plot.draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        text = buffer.getvalue()
        safe = "".join(letter if letter not in '<>&"' else " " for letter in label)
        return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{safe}" ', 1)

    return _once((plot.key, "svg", label), made)


def png(plot: Plot, dpi: int) -> bytes:
    """The figure as a picture."""

    def made() -> bytes:
        buffer = io.BytesIO()
        plot.draw().savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()

    return _once((plot.key, "png", str(dpi)), made)


_DRAWN: OrderedDict[tuple[bytes, str, str], Any] = OrderedDict()
_KEPT = 64  # figures of about three updates


def _once(key: tuple[bytes, str, str], make: Callable[[], T]) -> T:
    if key not in _DRAWN:
        _DRAWN[key] = make()
        if len(_DRAWN) > _KEPT:
            _DRAWN.popitem(last=False)
    found: T = _DRAWN[key]
    return found


def finish(axes: Axes, *, legend: bool = True) -> None:
    """Give axes the look of a report's figures."""
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    if legend:
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


_LINES: Sequence[dict[str, Any]] = (
    {"color": ACCENT, "linewidth": 2, "marker": "o", "markersize": 4.5},
    {"color": OPEN, "linewidth": 1.6, "marker": "s", "markersize": 4, "linestyle": (0, (5, 2))},
)
_RING: dict[str, Any] = {
    "marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": GOOD, "markeredgewidth": 2,
}  # fmt: skip


def _short(label: str) -> str:
    """A label that leaves room for the figure; the table below it has the whole name."""
    lines = [line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 3]}..." for line in label.split("\n")]
    return "\n".join(lines)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _ring(axes: Axes, curves: Sequence[Curve], chosen: float | None, name: str) -> None:
    """Mark the chosen fraction on the first curve."""
    if chosen is None or not curves:
        return
    found = [getattr(point, name) for point in curves[0].points if point.fraction == chosen]
    if found and found[0] is not None:
        axes.plot([100 * chosen], [100 * found[0]], linestyle="none", label=f"chosen: {share_text(chosen)}", **_RING)
