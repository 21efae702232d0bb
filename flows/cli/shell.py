"""What all commands share: the application, common options, errors as one line and an exit code, where output goes."""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graceful.flows.cli.signals import exit_code

FAILED, WRONG_USE, HELD, UNDECIDED, WAITING = 1, 2, 3, 4, 5

app = typer.Typer(
    name="graceful",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Update embedding models without breaking the gallery: train each generation compatible with all its "
    "predecessors, measure what an update would win and break, decide, roll out, roll back.",
    epilog="Start with 'graceful replay examples/digits.toml', or with 'graceful init' in a folder of your own.",
)

RootOption = Annotated[
    str,
    typer.Option("--root", "-r", envvar="GRACEFUL_ROOT", help="Workspace: a folder or an object-store URI."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Move even if items that can be read now could not be.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it stands in the lineage, with your name.")]
ByOption = Annotated[
    str, typer.Option("--by", help="Who decides; by default you, as this machine knows you. It stands in the lineage.")
]
CandidateArgument = Annotated[str, typer.Argument(help="Id of a generation, or its first part: g002.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"graceful {version('graceful')}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@contextmanager
def reported_errors(as_json: bool = False) -> Iterator[None]:
    """Turn what a user can mend into one line and an exit code; a bug keeps its traceback.

    One line: every `GracefulError`, and what the machine refuses (a full disk, a missing permission). GRACEFUL_DEBUG=1
    shows the traceback of these too.
    """
    from graceful.errors import GracefulError, in_one_line, is_disk_full

    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if (interrupted := exit_code()) is not None:
            raise typer.Exit(interrupted) from None  # a library has made an error of the signal
        if os.environ.get("GRACEFUL_DEBUG"):
            raise
        is_full = is_disk_full(error)
        expected = isinstance(error, GracefulError | OSError) or is_full
        line = in_one_line(error, limit=2_000)
        if is_full and "free space" not in line:
            line = f"disk full: free space and run again ({line})"
        elif isinstance(error, OSError) and not isinstance(error, GracefulError):
            line += "; see that it is there and may be read and written, then run this again"
        if as_json:
            print(json.dumps({"error": line, "kind": type(error).__name__, "bug": not expected}))
        if expected:
            print(f"graceful: {line}", file=sys.stderr)
        else:
            traceback.print_exception(error)
            print(
                f"graceful: {type(error).__name__}: {line}; this is a bug: please report it with the lines above, as "
                "CONTRIBUTING.md says",
                file=sys.stderr,
            )
        wrong_use = isinstance(error, GracefulError) and error.exit_code == WRONG_USE
        raise typer.Exit(WRONG_USE if wrong_use else FAILED) from None


@contextmanager
def flow_server_for(place: str, as_json: bool) -> Iterator[None]:
    """Give the block a flow server to report to: one that runs for this workspace, or one for this command alone."""
    import functools
    import importlib

    from graceful.flows.runtime.environment import prepare_environment
    from graceful.flows.runtime.server import flow_server

    prepare_environment(place)
    console_for(as_json).print("Starting (PyTorch, Ray and a flow server take a while to load) ...", style="dim")
    divert_libraries_of(place, as_json)
    if "prefect" in sys.modules:  # who has loaded Prefect has settled which server it talks to
        yield
        return
    loading = functools.partial(importlib.import_module, "graceful.flows.commands.updates")
    with flow_server(place, meanwhile=loading, until_exit=True):
        yield


def divert_libraries_of(place: str, as_json: bool) -> None:
    """Send what Ray and other libraries say of themselves to a log, and say where it is."""
    from graceful.flows.runtime.environment import divert_libraries

    if sys.stderr is sys.__stderr__:  # not where a test or a program has put something else in its place
        line = f"What these libraries say goes to {divert_libraries(place)}"
        console_for(as_json).print(line, style="dim", soft_wrap=True, highlight=False)


@contextmanager
def counting(text: str) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many there are so far; the line goes away at the end."""
    with Console(stderr=True).status(text.format(0)) as line:
        seen = 0

        def advance(number: int) -> None:
            nonlocal seen
            seen += number
            line.update(text.format(seen))

        yield advance


def place(given: str | Path) -> str:
    """An absolute local path, or a URI as it was given, of whose two slashes pathlib has made one."""
    text = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(given))
    return text if "://" in text else os.path.abspath(text)


def console_for(as_json: bool) -> Console:
    """Where progress goes: with --json standard output belongs to the document."""
    return Console(stderr=as_json)


def output(as_json: bool, document: Any, text: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(document, indent=2, default=str))
    else:
        text(Console())


def print_next_commands(console: Console, root: str, report: str) -> None:
    from graceful.flows.commands.suggestions import next_commands
    from graceful.flows.terminal import print_next

    print_next(console, next_commands(root, report))


def exit_code_of(result: Any) -> int:
    """The exit code that says what an update came to."""
    if result.approval == "waiting":
        return WAITING
    return HELD if result.is_held else UNDECIDED if result.outcome == "INCONCLUSIVE" else 0


def print_update(console: Console, result: Any, root: str) -> None:
    """What an update came to, and what can be done next."""
    again = " (decided before; --again judges anew)" if result.repeated else ""
    console.print(f"[bold]{result.candidate}: {result.outcome}[/bold]{again}", highlight=False)
    console.print(result.summary, highlight=False)
    console.print(f"Serving {result.champion}.  Report: {result.report}", highlight=False, soft_wrap=True)
    if result.approval == "waiting":
        console.print(f"Nothing is moved before a person accepts it: it {result.word}.", highlight=False)
    elif result.approval is not None:
        console.print(f"{result.word[:1].upper()}{result.word[1:]}.", highlight=False, markup=False)
    if result.outcome == "INCONCLUSIVE":
        line = "When the evaluation has more queries, 'graceful update' judges again. Or it is your word:"
        console.print(line, highlight=False)
    print_next_commands(console, root, result.report)


def print_counts(console: Console, found: dict[str, Any]) -> None:
    from graceful.flows.terminal import in_words

    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {in_words(value)}", highlight=False, soft_wrap=True)
