"""Results as a person reads them in a terminal: matrices, decisions, status."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from graceful.evaluation.decision import Decision
from graceful.flows.update.replay import ControlResult, ReplayResult


def print_replay(console: Console, result: ReplayResult) -> None:
    """Matrix, flips, controls, and where the report lies."""
    names = [name.split("-")[0] for name in result.generations]
    _print_matrix(console, "Compatibility: queries by row, gallery of column (recall, %)", names, result.matrix)
    served = "" if result.ac is None else f"AC {result.ac:.2f} over constrained pairs, "
    console.print(f"  {served}AM {100 * result.am:.1f} %   + criterion met, - not met")
    title = "Negative flips: right with row, wrong with column (% of queries)"
    _print_matrix(console, title, names, result.nfr, False)
    if result.classification_nfr is not None:
        title = "Negative flips in classification (% of queries)"
        _print_matrix(console, title, names, result.classification_nfr, False)
    for control in result.controls:
        _print_control(console, control)
    console.print(f"\nServing {result.champion}.  Report: {result.report}", highlight=False, soft_wrap=True)


def print_decision(console: Console, decision: Decision, limit: int | None = None) -> None:
    """The outcome, then every guard with threshold, value, bound and n."""
    console.print(f"[bold]{decision.outcome}[/bold]", highlight=False)
    console.print(decision.summary, highlight=False)
    table = Table("guard", "scope", "state", box=None)
    for name in ("limit", "value", "bound", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for reason in decision.reasons[:limit]:
        table.add_row(
            reason.guard, reason.scope, _state(reason.state), _share(reason.threshold), _share(reason.value),
            _share(reason.bound), "" if reason.n is None else f"{reason.n:,}", reason.verdict,
        )  # fmt: skip
    console.print(table)


def print_status(console: Console, status: dict[str, Any]) -> None:
    """What serves, what is readable, what is under way."""
    table = Table(show_header=False, box=None)
    for name, value in status.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {inner:,}" if isinstance(inner, int) else f"{key}: {inner}"
                              for key, inner in value.items()) or "none"  # fmt: skip
        table.add_row(name.replace("_", " "), "none" if value is None else str(value))
    console.print(table)


def _print_control(console: Console, control: ControlResult) -> None:
    names = [f"g{place + 1:03d}" for place in range(len(control.matrix))]
    _print_matrix(console, f"Control without constraints: {control.name.replace('_', ' ')}", names, control.matrix)
    flips = " ".join(f"{100 * value:.1f}" for value in control.nfr_between_neighbours)
    ac = "-" if control.ac is None else f"{control.ac:.2f}"
    console.print(f"  AC {ac}, AM {100 * control.am:.1f} %, NFR between neighbours {flips} %")


def _print_matrix(
    console: Console,
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    criterion: bool = True,
) -> None:
    table = Table(box=None)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row, name in enumerate(names):
        cells = []
        for column in range(len(names)):
            value, reference = values[row][column], values[column][column]
            mark = ""
            if criterion and row > column and value is not None and reference is not None:
                mark = "+" if value > reference else "-"
            cells.append("." if value is None else f"{100 * value:.1f}{mark}")
        table.add_row(name, *cells)
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    console.print(table)


def _state(name: str | None) -> str:
    """A state in few letters: fractions as per cent re-embedded."""
    if name is None:
        return ""
    kind, _, rest = name.partition("/")
    return f"{100 * float(rest):g} % re-embedded" if kind == "fraction" else name


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
