"""Commands about what is stored and found."""

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graceful.flows.cli.shell import (
    FAILED,
    JsonOption,
    RootOption,
    app,
    console_for,
    output,
    place,
    print_counts,
    reported_errors,
)

command = functools.partial(app.command, rich_help_panel="Gallery")


@command()
def ingest(
    images: Annotated[
        list[Path], typer.Argument(help="Images, folders of images, or Parquet files with an image column.")
    ],
    root: RootOption = ".",
    label: Annotated[str | None, typer.Option(help="Parquet or CSV column with labels, if there is one.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="First part of the items' ids; by default the name of the folder or file.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let these images replace items of the same id from another place.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add images to the gallery, or new revisions of changed ones, with vectors for whoever must find them.

    An item's id names its collection: photos/2024/cat.jpg, train#17. An id that belongs to another image is refused.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.images import ingest_images

        places = [place(image) for image in images]
        found = ingest_images(place(root), places, label, console_for(as_json), prefix=prefix, may_replace=replace)
        output(as_json, found, lambda console: _print_ingested(console, found))


@command()
def delete(
    item_ids: Annotated[list[str], typer.Argument(help="Ids of the items.")],
    root: RootOption = ".",
    forget: Annotated[bool, typer.Option(help="Also remove them physically, with their history.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete items from every view, after a rollback too. With --forget nothing of them stays."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import delete_items

        found = delete_items(place(root), item_ids, forget=forget)
        output(as_json, found, lambda console: print_counts(console, found))


@command()
def collect(
    root: RootOption = ".",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop vectors that nobody can read any more: not the champion, its predecessor, a supported client or a reader.

    Row by row: of replaced and deleted images too. Small files are merged, and what killed writers left is removed.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.status import collect_garbage

        found = collect_garbage(place(root), dry_run=dry_run)
        output(as_json, found, lambda console: print_counts(console, found))


@command()
def doctor(
    root: RootOption = ".",
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte of every file and look at every vector.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is derived, and remove what killed writers left.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --repair: also where all vectors must be embedded again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for what is damaged, missing, doubled, dead or unfinished in a workspace, and say what to do.

    Changes nothing without --repair. Exit code 1: something loses data or answers.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.doctor import examine_workspace, repair_workspace

        found = examine_workspace(place(root), deep=deep)
        done: list[str] = []
        if repair:
            done = repair_workspace(place(root), found, yes=yes)
            found = examine_workspace(place(root), deep=deep)
        num_errors = sum(finding.severity == "error" for finding in found)
        document = {"errors": num_errors, "findings": [asdict(finding) for finding in found], "repaired": done}
        output(as_json, document, lambda console: _print_examined(console, found, done))
        raise typer.Exit(FAILED if num_errors else 0)


@command()
def selftest(
    root: RootOption = ".",
    rounds: Annotated[int, typer.Option(min=0, help="Histories whose writers are killed at random moments.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Try the storage below a root out: kill writers, clash, tear files, and compare with what must be there.

    Works in a folder of its own, <root>/selftest-<id>, which is removed unless something failed. Touches nothing else.
    Exit code 1: the storage, or this program on it, does not keep what it must.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.selftest import try_storage

        found = try_storage(place(root), rounds=rounds)
        output(as_json, found, lambda console: _print_trials(console, found))
        raise typer.Exit(0 if found["passed"] else FAILED)


@command()
def search(
    query: Annotated[str, typer.Argument(help="Image to search with; for a text tower, words.")],
    root: RootOption = ".",
    k: Annotated[int, typer.Option("-k", min=1, help="How many items to return.")] = 10,
    generation: Annotated[
        str | None,
        typer.Option(
            "--as",
            "--generation",
            help="Query as another than the champion: a variant by its name (edge), or a generation (g002).",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search the gallery with an image, as production would; with --as edge, as a phone would.

    With a text tower, --as words, it is searched with a text. A variant reads the vectors that it is certified for;
    items without one cannot be found by it, and are counted.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.images import search_gallery

        found = search_gallery(place(root), query, k, generation)
        output(as_json, found, lambda console: _print_hits(console, found))


@command()
def export(
    name: Annotated[str, typer.Argument(help="A variant's name (edge), or the id of a generation or variant (g002).")],
    out: Annotated[Path, typer.Option("--out", help="File to write; what was measured is written to FILE.json.")],
    root: RootOption = ".",
    output_format: Annotated[
        str,
        typer.Option(
            "--format", help="torch (torch.export), onnx, or onnx-int8 with weights of 8 bits (need graceful\\[onnx])."
        ),
    ] = "torch",
    as_json: JsonOption = False,
) -> None:
    """Write an encoder for another runtime, such as a phone's: decoded pixels in, vectors of length 1 out.

    Says its size, its multiply-adds, how long one image takes here, and what must be done to an image before. Kept only
    where its vectors agree with the encoder's own; with onnx-int8 how far they do is said.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.export import export_generation

        found = export_generation(place(root), name, output_format, place(out))
        output(as_json, found, lambda console: _print_exported(console, found))


@command()
def cluster(
    root: RootOption = ".",
    generation: Annotated[
        str | None, typer.Option(help="Cluster what this generation sees, as a preview, instead of the champion.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Cluster what two generations see and say how far they agree; nothing is stored."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Give a person another name, as 'person 3=Ann'; once for each. Clusters nothing."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Lowest score of the same person; by default the configuration's."),
    ] = None,
    min_photos: Annotated[
        int | None, typer.Option(min=2, help="Fewest photos of a person; by default the configuration's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put the photos of the gallery together into people, who keep their names from one clustering to the next.

    Says what a person would see change: photos that change person, people that split or merge. Exact: its time grows
    with the square of the photos.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.clusters import cluster_workspace, compare_clusters, parse_names, rename_people
        from graceful.flows.terminal import print_clustering

        if name:
            found = rename_people(place(root), parse_names(name))
        elif compare is not None:
            found = compare_clusters(place(root), *compare, threshold=threshold, min_photos=min_photos)
        else:
            found = cluster_workspace(place(root), generation=generation, threshold=threshold, min_photos=min_photos)
        output(as_json, found, lambda console: print_clustering(console, found))


def _print_ingested(console: Console, found: dict[str, Any]) -> None:
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("added", "changed", "unchanged"))
    console.print(f"Items: {counts}.", highlight=False)
    for generation, count in found["vectors"].items():
        console.print(f"Vectors of {generation}: {count:,} written.", highlight=False)
    for generation, count in found["failures"].items():
        console.print(f"Images that {generation} could not embed: {count:,}; see 'graceful status'.", highlight=False)
    if not found["vectors"]:
        console.print("No generation serves yet: the first 'graceful update' embeds them.", highlight=False)
    if found["unreadable"]:
        console.print(f"Not ingested, since they cannot be decoded: {len(found['unreadable']):,}", highlight=False)
    for entry in found["unreadable"][:20]:
        console.print(f"  {entry['source']}: {entry['reason']}", highlight=False, soft_wrap=True, markup=False)
    if len(found["unreadable"]) > 20:
        console.print("  and so on; --json lists all of them", highlight=False)


def _print_examined(console: Console, found: list[Any], done: list[str]) -> None:
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for line in done:
        console.print(f"repaired {line}", highlight=False, soft_wrap=True, markup=False)
    for finding in found:
        console.print(f"{finding.severity:8}", style=styles[finding.severity], end="")
        console.print(f"{finding.what}; {finding.remedy}", highlight=False, soft_wrap=True, markup=False)
        for example in finding.examples:
            console.print(f"          {example}", highlight=False, soft_wrap=True, markup=False)
    counts = {severity: sum(finding.severity == severity for finding in found) for severity in styles}
    healthy = "Something loses data or answers." if counts["error"] else "Nothing is lost."
    console.print(f"{counts['error']} errors, {counts['warning']} warnings. {healthy}", highlight=False)


def _print_trials(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("tried", "times", "seen", "", box=None, padding=(0, 2, 0, 0))
    for trial in found["trials"]:
        table.add_row(trial["name"], f"{trial['times']:,}", trial["seen"], "FAILED" if trial["failures"] else "ok")
    console.print(table, highlight=False)
    for trial in found["trials"]:
        for failure in trial["failures"][:5]:
            console.print(f"{trial['name']}: {failure}", highlight=False, soft_wrap=True, markup=False)
    kept = "" if found["passed"] else f" What was written is kept in {found['kept']}."
    console.print(f"{found['storage']}, {found['seconds']:.0f} s.{kept}", highlight=False, soft_wrap=True)


def _print_exported(console: Console, found: dict[str, Any]) -> None:
    lines = [
        f"{found['generation']} as {found['format']}: {found['file']}, {found['size_bytes']:,} bytes.",
        f"{found['num_parameters']:,} weights, {found['multiply_adds']:,} multiply-adds for an image, "
        f"{found['latency_ms']:.2f} ms here ({found['threads']} threads, {found['machine']}).",
        f"Takes {found['input']}; gives {found['output']}. Cosine with the encoder: {found['min_cosine']:.6f} or more.",
        "Before it, outside the graph:",
        *(f"  {number}. {step}" for number, step in enumerate(found["steps_outside"], 1)),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _print_hits(console: Console, found: dict[str, Any]) -> None:
    unreadable = f"; it cannot read {found['unreadable']:,} items" if found["unreadable"] else ""
    console.print(f"Asked by {found['query_generation']}{unreadable}.", highlight=False)
    for number, hit in enumerate(found["hits"], 1):
        label = f"  {hit['label']}" if hit["label"] else ""
        above = [f"{'above' if yes else 'below'} {name}" for name, yes in hit["above"].items()]
        said = ", ".join([hit["generation"], *above])
        console.print(f"{number:3}  {hit['score']:.4f}  {hit['item_id']}{label}  ({said})", highlight=False)
