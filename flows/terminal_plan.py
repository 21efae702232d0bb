"""Prints a plan for a person: first whether to train at all, then what every option would take."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from graceful.flows.commands.plan import Plan, PlannedOption

UNAVAILABLE = "unavailable"


def print_plan(console: Console, plan: "Plan") -> None:
    """All that is known, in the order in which one asks."""
    if plan.dry_run:
        console.print("Would measure, and change nothing:")
        for step in plan.steps:
            console.print(f"  {step}", highlight=False, soft_wrap=True)
        return
    for sentence in plan.sentences:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    _print_powers(console, plan)
    _print_ceilings(console, plan)
    _print_options(console, plan)
    for why in plan.refused:
        console.print(f"Not worth a training: {why}.", style="bold red", highlight=False, soft_wrap=True, markup=False)
    if not plan.refused:
        console.print("Next: 'graceful update'.", highlight=False)


def _print_powers(console: Console, plan: "Plan") -> None:
    assert plan.detectable is not None
    table = Table("if an update is truly", "it is decided", "quality", "NFR", "dip", title="Chance, simulated")
    for power in plan.powers:
        guards = [f"{power.guards[guard]:.0%}" for guard in ("quality", "NFR", "dip")]
        table.add_row(power.truth.name, f"{power.joint:.0%}", *guards)
    console.print(table)
    if plan.powers:
        draws = plan.powers[0].num_draws
        console.print(
            f"{draws} draws each (standard error at most {0.5 / draws**0.5:.0%}); queries of one identity alike by "
            f"{plan.powers[0].icc:.2f}. At best these queries show an NFR of {100 * plan.detectable.smallest_nfr:.2f} "
            f"%; a loss of {plan.detectable.smallest_loss_points:.2f} points is not excluded where nothing changes.",
            highlight=False,
            soft_wrap=True,
        )


def _print_ceilings(console: Console, plan: "Plan") -> None:
    if not plan.ceilings:
        return
    table = Table("old gallery", "today", "ceiling", title="What any query-side method could win there")
    for ceiling in plan.ceilings:
        table.add_row(ceiling.generation, _percent(ceiling.now), _percent(ceiling.ceiling))
    console.print(table)
    single = plan.ceilings[0].single
    if single > 0:
        console.print(
            f"{single:.0%} of the queries have one relevant row: it is its own mean, and their ceiling is trivially "
            "100 %.",
            highlight=False,
            soft_wrap=True,
        )


def _print_options(console: Console, plan: "Plan") -> None:
    if not plan.options or plan.probe is None:
        return
    table = Table(
        "option", "rows", "embedding", "second vectors", "index", "price", "gain", "paid after", title="Options"
    )
    for option in plan.options:
        table.add_row(*_cells(option))
    console.print(table)
    probe, best = plan.probe, plan.best
    console.print(
        f"Measured on {probe.sampled_images:,} images and {probe.sampled_vectors:,} vectors: "
        f"{_number(probe.rows_per_s)} images/s of one worker, {_number(probe.bytes_per_row)} bytes a vector, index "
        f"{_hours(probe.index_hours)}. Next generation: {_days(plan.days_until_next)} ({plan.days_from}).",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if best is None:
        console.print(
            "Best fraction: unavailable; it needs prices and an update that was judged.",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"Best fraction at the last judged update: {best.fraction:.0%}, between {best.lowest:.0%} and "
            f"{best.highest:.0%}.",
            highlight=False,
        )


def _cells(option: "PlannedOption") -> list[str]:
    name = (
        option.name
        if option.fraction is None or option.name != "rollout at the best fraction"
        else (f"{option.name} ({option.fraction:.0%})")
    )
    price = _number(option.price)
    if option.unavailable:
        price = f"{UNAVAILABLE} ({', '.join(term.removesuffix('_price') for term in option.unavailable)})"
    if option.over_budget:
        price += ", over budget"
    gain = UNAVAILABLE if option.gain_points is None else f"{option.gain_points:+.2f}"
    if option.gain_lower_points is not None and option.name != "hold":
        gain += f" (at least {option.gain_lower_points:+.2f})"
    paid = "" if option.name == "hold" else _days(option.break_even_days)
    if option.pays_in_time is not None:
        paid = "never" if option.break_even_days is None else paid if option.pays_in_time else f"{paid}: too late"
    rows = UNAVAILABLE if option.rows is None else f"{option.rows:,}"
    return [name, rows, _hours(option.hours), _bytes(option.extra_bytes), _hours(option.index_hours), price, gain, paid]


def _percent(share: float | None) -> str:
    return UNAVAILABLE if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return UNAVAILABLE if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return UNAVAILABLE
    return f"{3600 * hours:.3g} s" if hours < 0.1 else f"{hours:,.3g} h"


def _days(days: float | None) -> str:
    if days is None:
        return UNAVAILABLE
    return f"{days:,.3g} days"


def _bytes(size: int | None) -> str:
    return UNAVAILABLE if size is None else f"{size / 2**20:,.3g} MiB" if size < 2**30 else f"{size / 2**30:,.3g} GiB"
