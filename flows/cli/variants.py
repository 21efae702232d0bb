"""Variants that only query: made, shown, and their architecture searched."""

from typing import Annotated

import typer

from graceful.flows.cli.shell import (
    HELD,
    JsonOption,
    RootOption,
    app,
    console_for,
    output,
    place,
    reported_errors,
)


@app.command(rich_help_panel="Updates")
def variant(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Variants of \\[variants] to make; by default only those that are there are shown."),
    ] = None,
    root: RootOption = ".",
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Only look for the best network of \\[variants.NAME.search], on evaluation.dev, and say what to write "
            "into the configuration.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a variant of the generation that serves, such as a small model for phones, and judge it; or show them all.

    A variant only queries: it searches the vectors of its generation, and owns none. 'graceful update' makes those of
    the configuration by itself. Exit code 3: it was not approved, and answers no queries.
    """
    with reported_errors(as_json):
        if search:
            _search(place(root), names or [], as_json)
            return
        from graceful.flows.terminal import print_variants

        if names:
            from graceful.flows.commands.check import require_checked
            from graceful.flows.commands.variants import make_named

            require_checked(place(root))
            rows = make_named(place(root), names, console_for(as_json))
        else:
            from graceful.flows.commands.status import list_variants

            rows = list_variants(place(root))
        output(as_json, {"variants": rows}, lambda console: print_variants(console, rows))
        raise typer.Exit(HELD if names and not all(row["approved"] for row in rows) else 0)


def _search(root: str, names: list[str], as_json: bool) -> None:
    from graceful.errors import UsageError
    from graceful.flows.commands.check import require_checked
    from graceful.flows.commands.variants import search_named
    from graceful.flows.terminal import print_architectures

    if not names:
        raise UsageError("searching an architecture: expected the name of a variant, found none; name one")
    require_checked(root)
    found = search_named(root, names, console_for(as_json))
    output(as_json, {"searches": found}, lambda console: print_architectures(console, found))
