"""What `graceful debt` prints."""

from rich.console import Console
from rich.table import Table

from graceful.flows.commands.debt import Debt


def print_debt(console: Console, debt: Debt) -> None:
    """The forecast, and what retiring each predecessor would buy."""
    if debt.taxes:
        told = ", ".join(f"{name} {points:+.1f}" for name, points in debt.taxes)
        console.print(f"Tax so far, in points of self-test below an unconstrained chain: {told}", highlight=False)
    else:
        console.print(
            "No tax was measured: train_paragon = true trains a chain without constraint beside.", highlight=False
        )
    table = Table("next", "images", "predecessors", "step", "training", "their caches", "tax", box=None)
    for row in debt.forecast:
        table.add_row(
            f"g{row.ordinal:03d}",
            f"{row.num_images:,}",
            str(row.num_predecessors),
            "not known" if row.step_ratio is None else f"{row.step_ratio:.2f} x",
            "not known" if row.training_s is None else f"{row.training_s:,.0f} s",
            "not known" if row.cache_bytes is None else _size(row.cache_bytes),
            "not known" if row.tax_points is None else f"{row.tax_points:+.1f}",
        )
    console.print(table, highlight=False)
    if any(row.step_ratio is None for row in debt.forecast):
        console.print(
            "Cost of a step: not known before two generations were trained with different numbers of predecessors.",
            highlight=False,
        )
    table = Table("predecessor", "readable rows", "client", "takes part", "retiring it saves", box=None)
    for one in debt.predecessors:
        saved = "" if one.saves_training_s is None else f"{one.saves_training_s:,.1f} s per training, "
        table.add_row(
            one.generation,
            f"{one.readable_rows:,}",
            "supported" if one.is_supported else "",
            "yes" if one.takes_part else "no",
            f"{saved}{_size(one.cache_bytes)}",
        )
    console.print(table, highlight=False)
    idle = [p.generation for p in debt.predecessors if p.takes_part and not p.readable_rows and not p.is_supported]
    if idle:
        console.print(
            f'{", ".join(idle)}: no row and no client. predecessors = "live" leaves such generations out of the next '
            "training.",
            highlight=False,
        )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
