"""Commands about a candidate that is watched: `graceful canary start | status | stop`."""

from typing import Annotated

import typer

from graceful.flows.cli.shell import (
    CandidateArgument,
    JsonOption,
    ReasonOption,
    RootOption,
    app,
    output,
    place,
    reported_errors,
)

canary = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Watch a generation beside what serves: compare answers without labels, end it where too many change.",
)
app.add_typer(canary, name="canary", rich_help_panel="Serving")


def _share(text: str) -> float:
    """A share from '5%' or '0.05'."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"expected a share such as 5% or 0.05, found {text!r}") from None
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"expected a share of 0 to 100 %, found {text!r}; write 5% or 0.05")
    return value


@canary.command()
def start(
    generation: CandidateArgument,
    root: RootOption = ".",
    share: Annotated[
        float | None, typer.Option(parser=_share, help="Share of the image queries that take part, such as 5%.")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only ask it beside: every answer is that of the generation that serves.")
    ] = False,
    hours: Annotated[float | None, typer.Option(min=0.001, help="Hours of service after which it ends.")] = None,
    max_changed: Annotated[
        float | None, typer.Option(parser=_share, help="Share of first answers that may change, such as 10%.")
    ] = None,
    max_nfr: Annotated[
        float | None,
        typer.Option(parser=_share, help="Share of labelled pictures that may be right before and wrong now."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a candidate answer a share of the queries, or only be asked beside; endpoints begin within a second.

    Options that are not given are those of \\[canary] in the configuration. The limit of changed answers is what the
    evaluation measured on the query log and a margin, unless it is given. Of the generation that serves, its answers
    are compared with those of the previous one, and it is rolled back where too many change.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.canary import Wanted, start_canary
        from graceful.flows.terminal_canary import print_canary

        found = start_canary(place(root), generation, Wanted(shadow, share or None, hours, max_changed, max_nfr))
        output(as_json, found, lambda console: print_canary(console, found))


@canary.command()
def status(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """Show how the newest canary stands: what changed, the bound that holds at every moment, and the limits."""
    with reported_errors(as_json):
        from graceful.flows.commands.canary import canary_status
        from graceful.flows.terminal_canary import print_canary

        found = canary_status(place(root))
        output(as_json, found, lambda console: print_canary(console, found))


@canary.command()
def stop(reason: ReasonOption, root: RootOption = ".", as_json: JsonOption = False) -> None:
    """End the canary that is under way, and print what was seen. What serves stays as it is."""
    with reported_errors(as_json):
        from graceful.flows.commands.canary import stop_canary
        from graceful.flows.terminal_canary import print_canary

        found = stop_canary(place(root), reason)
        output(as_json, found, lambda console: print_canary(console, found))
