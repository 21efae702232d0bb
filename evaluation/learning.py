"""How a training went, from its lines: one per epoch, losses and speed. A figure, and the same in words.

A line holds `epoch` (from 0), `epochs`, the mean `loss` of the epoch, its terms by name, `seconds`, `images_per_s`,
`workers`, and what a validation adds; every number that is none of these is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graceful.evaluation.plots import STYLE, WIDTH, deferred, finish

_NOT_DRAWN = (
    "epoch", "epochs", "step", "steps", "seconds", "images_per_s", "eta_s", "workers", "workers_before", "loss",
    "format_version",
)  # fmt: skip
DEV = "dev"  # recall@1 on the dev part; "dev on g001-..." against a predecessor's vectors
WEIGHT = "weight of "  # a predecessor's weight in the loss, by its name
Lines = Sequence[Mapping[str, Any]]


@deferred
def learning_figure(lines: Lines) -> Figure:
    """Draw the loss and its terms against the epochs; the loss is the sum of its terms."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for place, name in enumerate(["loss", *term_names(lines)]):
            shown = [(line["epoch"] + 1, line[name]) for line in lines if name in line]
            look: dict[str, Any] = {"linewidth": 2} if name == "loss" else {"linewidth": 1.3, "linestyle": (0, (4, 2))}
            axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, color=f"C{place}", label=name, **look)
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean over the epoch")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        finish(axes)
        if any(DEV in line for line in lines):
            _draw_dev(axes, lines)
    return figure


def _draw_dev(axes: Axes, lines: Lines) -> None:
    """Draw recall@1 on the dev part on an axis of its own: against its own vectors, and against predecessors'."""
    beside = axes.twinx()
    names = dict.fromkeys(name for line in lines for name in line if _is_dev(name))
    for name in names:
        shown = [(line["epoch"] + 1, 100 * line[name]) for line in lines if name in line]
        look: dict[str, Any] = {"color": "0.2", "linewidth": 2} if name == DEV else {"color": "0.6", "linewidth": 1}
        beside.plot(*zip(*shown, strict=True), marker="s", markersize=3, label=name, **look)
    beside.set_ylabel("recall@1 on dev (%)")
    beside.set_ylim(0, 100)


def learning_caption(lines: Lines) -> str:
    """Say what the curves came to, how fast it went, and where the number of workers changed."""
    first, last = lines[0], lines[-1]
    parts = [f"The loss went from {first['loss']:.3g} to {last['loss']:.3g} in {len(lines)} of {last['epochs']} epochs"]
    terms = [f"{name} {last[name]:.3g}" for name in term_names(lines) if name in last]
    if terms:
        parts.append(f"at the end {', '.join(terms)}")
    if DEV in last:
        parts.append(f"recall@1 on the dev part went from {100 * first[DEV]:.1f} to {100 * last[DEV]:.1f} %")
    parts.append(f"{last['images_per_s']:,.0f} images per second")
    changes = [f"{line['workers_before']} to {line['workers']}" for line in lines if "workers_before" in line]
    if changes:
        parts.append(f"workers changed from {', '.join(changes)}")
    return "; ".join(parts) + "."


def term_names(lines: Lines) -> list[str]:
    """Return the names of the loss's terms, in the order of their first appearance."""
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    return [name for name in names if name not in _NOT_DRAWN and not _is_dev(name) and not name.startswith(WEIGHT)]


def _is_dev(name: str) -> bool:
    return name == DEV or name.startswith(f"{DEV} on ")
