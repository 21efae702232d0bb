"""Results as a person reads them in a terminal: matrices, decisions, status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # what is printed; a command that prints a status must not load what made it
    from graceful.evaluation.decision import Decision
    from graceful.evaluation.guards import Reason
    from graceful.flows.update.replay import ControlResult, ReplayResult

OVERALL = "overall"
"""Scope of a guard that is about all queries: it needs no words."""


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


def print_decision(console: Console, decision: Decision) -> None:
    """The outcome, the guards that led to it, and of the others those that do not pass; the rest is counted.

    Every guard has its limit, the measured value, its bound, n and verdict. Rows that read the same are printed once.
    """
    console.print(f"[bold]{decision.outcome}[/bold]", highlight=False)
    console.print(decision.summary, highlight=False, markup=False)
    decisive, others = decision.reasons[: decision.num_decisive], decision.reasons[decision.num_decisive :]
    shown = [("*", reason) for reason in decisive] + [("", reason) for reason in others if reason.verdict != "PASS"]
    table = Table("", "guard", "where", box=None, padding=(0, 1, 0, 0))
    for name in ("limit", "value", "bound", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    folded = Counter((mark, *_cells(reason)) for mark, reason in shown)
    for (mark, guard, where, *numbers, verdict), times in folded.items():
        table.add_row(mark, guard, where + (f" ({times} times)" if times > 1 else ""), *numbers, verdict)
    if folded:
        console.print(table, highlight=False)
    passed = sum(reason.verdict == "PASS" for reason in decision.reasons)
    left_out = len(decision.reasons) - len(shown)
    notes = ["* led to the decision."] if decisive else []
    notes.append(f"{passed} of {len(decision.reasons)} guards pass" + (f", {left_out} not shown." if left_out else "."))
    console.print(" ".join(notes), highlight=False)


def print_status(console: Console, status: dict[str, Any]) -> None:
    """What serves, what is readable, what is under way."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in status.items():
        if name == "last_updates":
            lines = [f"{found['when']}  {found['generation']}  {found['summary']}" for found in value]
            table.add_row("last updates", Text("\n".join(lines) or "none"))
        elif name == "variants":
            table.add_row("variants", Text("\n".join(map(_variant_line, value)) or "none"))
        else:
            table.add_row(name.replace("_", " "), Text(in_words(value)))
    console.print(table)


def print_variants(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row of the compatibility matrix for each variant, and what was found about it."""
    galleries = list(
        dict.fromkeys(gallery for row in rows for gallery in row["metric_on"] if gallery != row["variant"])
    )
    table = Table("queries", *(name.split("-")[0] for name in galleries), "its own", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        values = [_share(row["metric_on"].get(gallery)) for gallery in (*galleries, row["variant"])]
        table.add_row(row["variant"], *values)
    if rows:
        console.print("Queries by row, gallery of column (%)", table, sep="\n", highlight=False)
    for row in rows:
        console.print(_variant_line(row), highlight=False, soft_wrap=True, markup=False)


def print_architectures(console: Console, searches: Sequence[Mapping[str, Any]], num_shown: int = 5) -> None:
    """The best networks of each search, and the lines that make the first of them the variant's."""
    for search in searches:
        ranked = sorted(search["candidates"], key=lambda candidate: -candidate["reward"])
        headings = ("reward", "its own", search["of"].split("-")[0], "multiply-adds", "parameters", "ms", "network")
        table = Table(*headings, box=None, padding=(0, 2, 0, 0))
        for candidate in ranked[:num_shown]:
            cost, latency = candidate["cost"], candidate["cost"]["latency_ms"]
            table.add_row(
                f"{candidate['reward']:.4f}",
                *(_share(candidate[name]) for name in ("self_test", "cross_test")),
                *(f"{cost[name]:,}" for name in ("multiply_adds", "num_parameters")),
                "" if latency is None else f"{latency:g}",
                network_text(candidate["architecture"]),
            )
        title = f"{search['name']}: the best of {len(ranked)} on the dev part (width/depth/kernel of each block)"
        console.print(title, table, sep="\n", highlight=False)
        kwargs = ", ".join(f"{key} = {value}" for key, value in search["backbone"]["kwargs"].items())
        lines = (
            f"Write this into graceful.toml, then run 'graceful variant {search['name']}':",
            f"[variants.{search['name']}]",
            f'backbone = {{ name = "{search["backbone"]["name"]}", kwargs = {{ {kwargs} }} }}',
            f"image_size = {search['image_size']}",
        )
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def network_text(architecture: Mapping[str, Any]) -> str:
    """A searched network: width/depth/kernel of each block, and the size of its input."""
    blocks = zip(*(architecture[name] for name in ("block_widths", "depths", "kernels")), strict=True)
    return f"{' '.join('/'.join(map(str, block)) for block in blocks)} at {architecture['image_size']} px"


def _variant_line(row: Mapping[str, Any]) -> str:
    if row["answers"]:
        said = f"answers for {row['name']}"
    else:
        said = "may query by its id" if row["may_query"] else "does not query"
    hidden = f", cannot read {row['unreadable']:,} items" if row["unreadable"] else ""
    return f"{row['variant']} {said}{hidden}: {row['reason']}"


def print_next(console: Console, commands: Sequence[str]) -> None:
    """Commands to try next, each on a line of its own, to be copied whole."""
    if commands:
        console.print("Next:", highlight=False)
    for command in commands:
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def print_history(console: Console, history: dict[str, Any]) -> None:
    """Generations, what was decided about them and by whom; then everything that happened. Times are UTC."""
    for found in history["generations"]:
        marks = ["serves"] if found["serves"] else []
        marks += ["retired"] if found["retired"] else []
        head = Text(found["generation"], style="bold")
        console.print(head.append("  " + ", ".join(marks) if marks else "", style="not bold"), highlight=False)
        for line in _lines_about(found):
            console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False), highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for event in history["events"]:
        table.add_row(event["when"], Text(_happened(event)))
    if history["events"]:
        console.print("What happened (UTC):", highlight=False)
        console.print(table, highlight=False)
    else:
        console.print("Nothing has happened yet; run 'graceful update'.", highlight=False)


def print_flips(console: Console, found: dict[str, Any]) -> None:
    """Queries that would go from right to wrong."""
    if found["against"] is None:
        console.print(f"{found['generation']}: nothing served before it, so nothing can flip.", highlight=False)
        return
    console.print(
        f"{found['generation']} against {found['against']}, {_state(found['state'])}: {found['num_flips']:,} of "
        f"{found['num_queries']:,} queries go from right to wrong, {found['num_repaired']:,} from wrong to right.",
        highlight=False,
    )
    for flip in found["flips"]:
        after = f"{flip['rank_after']:,}" if flip["rank_after"] else "not found"
        slices = "".join(f"  {name}={value}" for name, value in flip["slices"].items())
        taken = f" for {flip['wrong_identity']}" if flip["wrong_identity"] else ""
        why = f" ({flip['cause']})" if flip["cause"] else ""
        line = f"  {flip['identity']}  rank {flip['rank_before']:,} -> {after}{taken}{why}{slices}  {flip['query']}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found["num_flips"] > len(found["flips"]):
        console.print(f"  ... and {found['num_flips'] - len(found['flips']):,} more (--limit)", highlight=False)


def print_blame(console: Console, found: dict[str, Any]) -> None:
    """What one item has to do with the lost searches of a candidate."""
    if found["against"] is None:
        console.print(f"{found['generation']}: nothing served before it, so nothing can flip.", highlight=False)
        return
    owner = f"its vector that serves now is of {found['owner_now']}" if found["owner_now"] else "no vector serves now"
    console.print(f"{found['item']} with {found['generation']} against {found['against']}; {owner}.", highlight=False)
    parts = (
        ("wrong_answer_to", "comes first, wrongly, in {} lost search(es):"),
        ("right_answer_lost", "was the right first answer of {} lost search(es):"),
        ("own_search_lost", "is itself the lost search:"),
    )
    for name, words in parts:
        if found[name]:
            console.print(words.format(f"{len(found[name]):,}"), highlight=False)
        for flip in found[name]:
            after = f"{flip['rank_after']:,}" if flip["rank_after"] else "not found"
            line = f"  {flip['identity']}  rank {flip['rank_before']:,} -> {after}  {flip['cause']}"
            line += f"  vector of {flip['wrong_owner']}" if flip["wrong_owner"] else ""
            line += f"  {', '.join(map(_state, flip['states']))}  {flip['query']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not any(found[name] for name, _ in parts):
        console.print("It has nothing to do with any lost search.", highlight=False)
    if "training" in found:
        _print_training_images(console, found["training"])


def _print_training_images(console: Console, found: dict[str, Any]) -> None:
    of = "all" if found["num_taken"] == found["num_images"] else f"{found['num_taken']:,} of"
    console.print(
        f"Training images, of {of} {found['num_images']:,}, by their part in the last layer:", highlight=False
    )
    for query, search in found["searches"].items():
        lead = f"{search['margin']:+.3f}, {search['margin_without']:+.3f} without those against it"
        console.print(f"  {query}: lead of the right answer {lead}", highlight=False, markup=False, soft_wrap=True)
        for side in ("against", "for"):
            for image in search[side]:
                line = f"    {side:<7}  {image['effect']:+.4f}  {image['label']}  {image['source']}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_traces(console: Console, found: dict[str, Any]) -> None:
    """What is left of forgotten training images."""
    if not found:
        return
    share = {name: f"{100 * found['traces'][name]:.0f} %" for name in ("before", "after", "kept")}
    lines = (
        f"{found['forgotten']:,} training images are left out. Of pairs with an image that was never seen, the",
        f"forgotten one is nearer to a class in {share['after']} (before {share['before']}; images that stay: ",
        f"{share['kept']}); at 50 % nothing can be told. The layers below the last one have seen them; a chain that",
        "starts anew has not.",
        f"The vectors of all other training images have moved to a cosine of {found['traces']['cosine']:.4f}.",
    )
    console.print("\n".join(lines), highlight=False)


def _lines_about(found: dict[str, Any]) -> Iterator[str]:
    """What a history says of one generation."""
    test = "" if found["self_test"] is None else f", self-test {100 * found['self_test']:.1f} %"
    origin = f"adopted as {found['name']} from {found['factory']}" if found["name"] else found["origin"]
    yield f"{origin}, {found['made']}{test}"
    yield found["why"] or found["decision"] or "not judged yet"
    if found["reason"] is not None:
        answers = {"rejected": "rejected", "accepted": "accepted", "expired": "held"}
        said = answers.get(found["ordered"], f"ordered {found['ordered']}")
        yield f"{said} by {found['decided_by']}: {found['reason']}"
    if found["retired_because"] is not None:
        yield f"retired: {found['retired_because']}"
    for period in found["serving_periods"]:
        yield f"served {period['since']} to {period['until']}" if period["until"] else f"serves since {period['since']}"


def _happened(event: dict[str, Any]) -> str:
    """An event as a person says it, with the reason and who gave it."""
    name = event["generation"]
    said = {
        "trained": f"{name} trained",
        "adopted": f"{name} adopted as {event.get('name')} from {event.get('factory')}",
        "decided": f"{name} judged: {event.get('outcome')}",
        "approval_asked": f"{name} waits for a person to accept {event.get('outcome')}",
        "approval_answered": f"decision about {name} {event.get('answer')}",
        "overridden": f"operator ordered {event.get('ordered')} of {name}",
        "rejected": f"operator rejected {name}",
        "promoted": f"{name} serves",
        "rolled_back": f"rolled back from {name} to {event.get('to')}",
        "forwarded": f"went forward to {name}",
        "canary_started": f"{name} is watched beside {event.get('reference')}",
        "canary_ended": f"{name} is watched no longer ({event.get('outcome')})",
        "certificate_revoked": f"operator revoked the certificate of {name} for {event.get('gallery_generation')}",
        "previous_released": f"{name} released: its items are not kept for it any more",
        "variant_trained": f"{name} made with {event['factory']}, a text tower that only queries"
        if event.get("factory")
        else f"{name} trained, a variant that only queries",
        "variant_judged": f"{name} judged",
        "retired": f"{name} retired" + ("" if event.get("reason") else ": it owns no readable row"),
    }[event["what"]]
    reason = "".join(f": {event[name]}" for name in ("reason", "move") if event.get(name))
    return said + reason + (f" ({event['by']})" if event.get("by") else "")


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
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    # Two spaces around each cell, the widest of which is "100.0+"; a long lineage goes on below.
    per_table = max(1, (console.width - max(map(len, names), default=0) - 2) // 8)
    for first in range(0, len(names), per_table):
        columns = range(first, min(first + per_table, len(names)))
        table = Table("", box=None)
        for column in columns:
            table.add_column(names[column], justify="right", no_wrap=True)
        for row, name in enumerate(names):
            table.add_row(name, *(_cell(values, row, column, criterion) for column in columns))
        console.print(table)


def _cell(values: Sequence[Sequence[float | None]], row: int, column: int, criterion: bool) -> str:
    value, reference = values[row][column], values[column][column]
    mark = ""
    if criterion and row > column and value is not None and reference is not None:
        mark = "+" if value > reference else "-"
    return "." if value is None else f"{100 * value:.1f}{mark}"


def _cells(reason: Reason) -> tuple[str, ...]:
    """A guard as it is printed: guard, where, limit, value, bound, n, verdict."""
    scope = "" if reason.scope == OVERALL else reason.scope
    if reason.guard in ("certificate", "wave zero"):
        scope = f"rows of {reason.scope}" if reason.guard == "certificate" else "rows it cannot read"
    where = ", ".join(part for part in (scope, _state(reason.state)) if part)
    show = {"quality": _points, "dip": _points, "certificate": _points, "cost": _days}.get(reason.guard, _share)
    numbers = (show(value) for value in (reason.threshold, reason.value, reason.bound))
    return (reason.guard, where, *numbers, "" if reason.n is None else f"{reason.n:,}", reason.verdict)


def _state(name: str | None) -> str:
    """A state in words."""
    if name is None:
        return ""
    kind, _, rest = name.partition("/")
    query, _, gallery = rest.partition("/")
    if kind == "fraction":
        fraction, _, before = rest.partition("/after/")
        waiting = "" if not before else " after nothing else" if before == "nothing" else f" after {before}"
        return f"{100 * float(fraction):g} % re-embedded{waiting}"
    if kind == "pair":
        return f"{query} on its own gallery" if query == gallery else f"{query} on the gallery of {gallery}"
    return {
        "live": f"{query} on served rows of {gallery}",
        "served": "as served now",
        "classify": f"classes of {rest}",
    }.get(kind, name)


def in_words(value: object) -> str:
    """A value as a person says it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {in_words(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None or value == "" else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f} pt"


def _days(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f} d"


def print_clustering(console: Console, found: dict[str, Any]) -> None:
    """Print a clustering, a comparison of two, or new names."""
    if "renamed" in found:
        for old, new in found["renamed"].items():
            console.print(f"{old} is {new} from now on.", highlight=False, markup=False)
        return
    if "pairwise_f" in found:
        people = " and ".join(f"{count:,}" for count in found["people"])
        console.print(f"{found['before']} and {found['after']}: {people} people on {found['photos']:,} photos")
        numbers = f"pairwise F {_agreement(found['pairwise_f'])}, B-cubed F {_agreement(found['b_cubed_f'])}"
        console.print(f"Agreement: {numbers}, distance {found['variation_of_information']:.3f} nats", highlight=False)
    else:
        preview = ", a preview" if found["preview"] else ""
        console.print(f"{found['people']:,} people on {found['photos']:,} photos ({found['generation']}{preview})")
        console.print(f"Photos of nobody: {found['of_nobody']:,}, of these unreadable: {found['unreadable']:,}")
    for one, other in found["not_comparable"]:
        console.print(f"{one} and {other} cannot be compared: their photos are never together.", style="yellow")
    seen = found["churn"]
    if seen is not None:
        share = f" ({100 * seen['share']:.2f} %)" if seen["share"] is not None else ""
        console.print(f"Photos that change person: {seen['num_changed']:,} of {seen['num_items']:,}{share}")
        for key in ("split", "merged", "gone", "new"):
            names = ", ".join(seen[key])
            more = " ..." if seen[f"num_{key}"] > len(seen[key]) else ""
            said = f": {names}{more}" if names else ""
            console.print(f"People {key}: {seen[f'num_{key}']:,}{said}", highlight=False, markup=False)
    if "file" in found:
        console.print(f"Written to {found['file']}", highlight=False, soft_wrap=True)


def _agreement(value: float) -> str:
    return "not measured" if value != value else f"{value:.4f}"
