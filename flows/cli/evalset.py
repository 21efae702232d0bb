"""Commands about evaluation sets: `graceful evalset create | grow | show | label`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graceful.errors import UsageError
from graceful.flows.cli.shell import JsonOption, RootOption, app, output, place, print_counts, reported_errors

evalset = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Make evaluation sets that grow, and label only the answers that an update changes.",
)
app.add_typer(evalset, name="evalset", rich_help_panel="Updates")

_LEFT_OUT = {"left_out_trained_on": "trained on", "unreadable": "unreadable", "left_out_of_log": "in the set already"}

NameArgument = Annotated[str, typer.Argument(help="Name of the set; its folder is evalsets/<name> of the workspace.")]
LogOption = Annotated[
    list[Path] | None,
    typer.Option("--log", help="Pictures that people searched with: a folder, Parquet or CSV file; may be repeated."),
]
IdentitiesOption = Annotated[
    int | None, typer.Option(min=0, help="How many labels of the gallery become identities; by default all.")
]
QueriesOption = Annotated[int, typer.Option(min=1, help="Queries drawn of each identity; one image at least stays.")]
DistractorsOption = Annotated[
    int | None,
    typer.Option(min=0, help="Other items that are searched and right for no query; by default all that are left."),
]


@evalset.command()
def create(
    name: NameArgument,
    root: RootOption = ".",
    log: LogOption = None,
    identities: IdentitiesOption = None,
    queries_per_identity: QueriesOption = 3,
    distractors: DistractorsOption = None,
    dev_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the identities set aside to choose by (part = 'dev').")
    ] = 0.3,
    slices: Annotated[
        list[str] | None, typer.Option("--slice", help="Column or attribute to report by; may be repeated.")
    ] = None,
    parent: Annotated[str | None, typer.Option("--from", help="Set to begin with.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an evaluation set from the labelled items of the gallery and from query logs.

    Images are named, not copied; what a generation was trained on is left out. Name it in the configuration as
    \\[evaluation] set = "evalsets/NAME".
    """
    with reported_errors(as_json):
        from graceful.flows.commands.evalset import Draw, create_set

        found = create_set(
            place(root),
            name,
            Draw(identities, queries_per_identity, distractors),
            logs=[place(one) for one in log or ()],
            slices=slices or (),
            dev_share=dev_share,
            parent=parent,
        )
        output(as_json, found, lambda console: _print_grown(console, found))


@evalset.command()
def grow(
    name: NameArgument,
    root: RootOption = ".",
    log: LogOption = None,
    identities: IdentitiesOption = None,
    queries_per_identity: QueriesOption = 3,
    distractors: DistractorsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Add to a set: further identities of the gallery, distractors, logged queries. Nothing in it changes or goes."""
    with reported_errors(as_json):
        from graceful.flows.commands.evalset import Draw, grow_set

        found = grow_set(
            place(root),
            name,
            Draw(identities, queries_per_identity, distractors),
            logs=[place(one) for one in log or ()],
        )
        output(as_json, found, lambda console: _print_grown(console, found))


@evalset.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Name of a set; by default all of them.")] = None,
    root: RootOption = ".",
    as_json: JsonOption = False,
) -> None:
    """Show what sets hold, what came when, and how far the labels of the query log go."""
    with reported_errors(as_json):
        from graceful.flows.commands.evalset import show_sets

        found = show_sets(place(root), name)

        def text(console: Console) -> None:
            for one in found["sets"]:
                _print_set(console, one)
            if found["log"] is None:
                console.print(found["no_log"], highlight=False, soft_wrap=True, markup=False)
            else:
                _print_standing(console, found["log"])

        output(as_json, found, text)


@evalset.command()
def label(
    file: Annotated[Path | None, typer.Argument(help="CSV file with labels, as --next writes it.")] = None,
    root: RootOption = ".",
    wanted: Annotated[bool, typer.Option("--next", help="Write what to label next, as a CSV file and a page.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="With --next: how many questions at most.")] = 200,
    into: Annotated[
        Path | None, typer.Option(help="With --next: folder to write to; by default that of the evaluation.")
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="Let these labels take the place of contradictory earlier ones.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Label the answers that an update changes: write the list with --next, take it back as FILE.

    A label is one of both, before, after, neither, unclear. The next 'graceful update --again' judges with them.
    """
    with reported_errors(as_json):
        if wanted == (file is not None):
            raise UsageError("labelling: expected either --next or a file with labels, found both or neither")
        from graceful.flows.commands.evalset import label_file, label_next

        if file is not None:
            found = label_file(place(root), place(file), correct=correct)
        else:
            found = label_next(place(root), limit, None if into is None else place(into))

        def text(console: Console) -> None:
            if file is not None:
                counts = {name: found[name] for name in ("labels", "new", "corrected", "rows_without_label")}
                print_counts(console, counts)
            else:
                console.print(f"{found['to_label']:,} answers to {found['queries']:,} queries to label:")
                for name in ("page", "csv"):
                    console.print(f"  {found[name]}", highlight=False, soft_wrap=True, markup=False)
            _print_standing(console, found)
            if file is not None:
                console.print("Next: 'graceful update --again' judges with them.", highlight=False)

        output(as_json, found, text)


def _print_grown(console: Console, found: dict[str, Any]) -> None:
    _print_set(console, found)
    console.print(f'Use it with:\n\n[evaluation]\nset = "evalsets/{found["name"]}"\n', highlight=False, markup=False)


def _print_set(console: Console, found: dict[str, Any]) -> None:
    begun = f", begun with {found['parent']}" if found["parent"] else ""
    console.print(f"[bold]{found['name']}[/bold]{begun}: {found['folder']}", highlight=False, soft_wrap=True)
    for part in ("test", "dev"):
        line = f"  {part}: {found['queries'][part]:,} queries of {found['identities'][part]:,} identities"
        console.print(line, highlight=False)
    line = f"  gallery: {found['gallery']:,} images, {found['distractors']:,} of them distractors"
    console.print(line, highlight=False)
    console.print(f"  log: {found['log']:,} queries without labels", highlight=False)
    for version in found["versions"]:
        line = f"  version {version['number']}, {version['at']}, {version['by']}: " + ", ".join(
            f"{version[f'added_{part}']:,} {part}" for part in ("identities", "queries", "gallery", "log")
        )
        out = ", ".join(f"{version[key]:,} {why}" for key, why in _LEFT_OUT.items() if version.get(key))
        console.print(line + (f"; left out: {out}" if out else ""), highlight=False, soft_wrap=True, markup=False)


def _print_standing(console: Console, found: dict[str, Any]) -> None:
    share = 100 * found["num_changed"] / max(found["num_queries"], 1)
    console.print(
        f"Of {found['num_queries']:,} logged queries {found['num_changed']:,} ({share:.1f} %) get another answer on "
        f"the way that was judged (of all such queries at most {100 * found['changed_at_most']:.1f} %). "
        f"{found['num_labelled']:,} of them are labelled, and {found['num_settled']:,} queries count: all that stand "
        "before the first changed one without a label.",
        highlight=False,
        soft_wrap=True,
    )
