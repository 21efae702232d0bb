"""The command line `graceful`: parse, call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 the decision is to hold, 4 it is inconclusive, 130 interrupted, 143 ended.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

FAILED, WRONG_USE, HELD, UNDECIDED, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143
_SECONDS_TO_END = 6.0

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
ParagonOption = Annotated[
    bool | None,
    typer.Option(
        "--paragon/--no-paragon",
        help="Also train without constraints, to measure the tax; by default what the configuration says. It counts as "
        "another configuration: what was decided without is judged anew.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Move even if items that can be read now could not be.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it stands in the lineage, with your name.")]
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


@app.command()
def init(
    root: Annotated[str, typer.Argument(help="Folder or object-store URI of the new workspace.")] = ".",
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Pictures to look at: a folder with a sub-folder per label, a flat one with a CSV file (file,label), "
            "a Parquet file, or a Hugging Face data set on disk. Writes a configuration that fits them.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="With --from: column of the labels in a CSV or Parquet file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration to start from; by default a template.")] = None,
) -> None:
    """Create a workspace: the folder, its empty tables and a [bold]graceful.toml[/bold].

    With --from nothing in it has to be edited before the first update; otherwise it is a template to edit.
    """
    with reported_errors():
        from graceful.flows.commands.setup import create_workspace

        with _counting("Looking at the pictures: {:,} read") as advance:
            made = create_workspace(_place(root), config, _place(pictures) if pictures else None, label, advance)
        console = Console(highlight=False, soft_wrap=True)
        for line in made.lines:
            console.print(line, markup=False)
        if made.lines:
            said = f"Wrote {made.config}. Next: 'graceful check', 'graceful ingest' and 'graceful update'."
        elif made.written:
            said = f"Created {made.config}. Edit it, then run 'graceful ingest' and 'graceful update'."
        else:
            said = f"The workspace is there already; {made.config} was left alone."
        console.print(said, markup=False)


@app.command()
def update(
    root: RootOption = ".",
    again: Annotated[bool, typer.Option(help="Judge anew what was decided about before.")] = False,
    paragon: ParagonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a candidate, judge it against what is served, decide, and carry the decision out.

    Run again, it goes on where it was killed; decided before, it does nothing. Exit code 3: hold, 4: inconclusive.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.check import require_checked

        require_checked(_place(root))
    with reported_errors(as_json), _flow_server(_place(root), as_json):
        from graceful.flows.commands.updates import update_workspace

        result = update_workspace(_place(root), _console(as_json), again=again, paragon=paragon)
        _print(as_json, result.model_dump(mode="json"), lambda console: _print_update(console, result, _place(root)))
        raise typer.Exit({"HOLD": HELD, "INCONCLUSIVE": UNDECIDED}.get(result.outcome, 0))


@app.command()
def check(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """Look for what would make an update fail: configuration, data, evaluation, network, cluster, disk.

    Takes seconds, starts nothing, changes nothing; 'graceful update' does it first. Exit code 2: there are errors.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.check import check_workspace

        found = check_workspace(_place(root))
        num_errors = sum(finding.level == "error" for finding in found)
        document = {"errors": num_errors, "findings": [asdict(finding) for finding in found]}
        _print(as_json, document, lambda console: _print_findings(console, found))
        raise typer.Exit(WRONG_USE if num_errors else 0)


@app.command()
def replay(
    config: Annotated[
        Path, typer.Argument(help="Configuration with a \\[replay] table, such as examples/digits.toml.")
    ],
    root: Annotated[str | None, typer.Option("--root", "-r", help="Workspace; by default workspaces/<name>.")] = None,
    paragon: ParagonOption = None,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also train the chains that others have: from scratch, fine-tuned, and so on."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Replay a whole history of generations on growing data, each trained, judged and rolled out.

    Run again, it goes on where it stopped; with --controls it adds them to a history that is there. Exit code 0
    whatever was decided, as long as the history completed.
    """
    with reported_errors(as_json), _flow_server(_place(root or "workspaces"), as_json):
        from graceful.flows.commands.updates import replay_history
        from graceful.flows.terminal import print_replay

        result = replay_history(config, root, _console(as_json), paragon=paragon, controls=controls)

        def text(console: Console) -> None:
            print_replay(console, result)
            _print_next(console, result.root, result.report)

        _print(as_json, result.model_dump(mode="json"), text)


@app.command()
def status(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """Show who serves, who owns the gallery's rows, what is unreadable, and what is under way."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import workspace_status
        from graceful.flows.terminal import print_status

        found = workspace_status(_place(root))
        _print(as_json, found, lambda console: print_status(console, found))
        if not as_json:
            _print_what_settles(found["pending"], _place(root))
            _say_what_the_template_needs(_place(root))


@app.command()
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

        places = [_place(place) for place in images]
        found = ingest_images(_place(root), places, label, _console(as_json), prefix=prefix, may_replace=replace)
        _print(as_json, found, lambda console: _print_ingested(console, found))


@app.command()
def delete(
    item_ids: Annotated[list[str], typer.Argument(help="Ids of the items.")],
    root: RootOption = ".",
    forget: Annotated[bool, typer.Option(help="Also remove them physically, with their history.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete items from every view, after a rollback too. With --forget nothing of them stays."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import delete_items

        found = delete_items(_place(root), item_ids, forget=forget)
        _print(as_json, found, lambda console: _print_counts(console, found))


@app.command()
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

        found = collect_garbage(_place(root), dry_run=dry_run)
        _print(as_json, found, lambda console: _print_counts(console, found))


@app.command()
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

        found = examine_workspace(_place(root), deep=deep)
        done: list[str] = []
        if repair:
            done = repair_workspace(_place(root), found, yes=yes)
            found = examine_workspace(_place(root), deep=deep)
        num_errors = sum(finding.severity == "error" for finding in found)
        document = {"errors": num_errors, "findings": [asdict(finding) for finding in found], "repaired": done}
        _print(as_json, document, lambda console: _print_examined(console, found, done))
        raise typer.Exit(FAILED if num_errors else 0)


@app.command()
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

        found = try_storage(_place(root), rounds=rounds)
        _print(as_json, found, lambda console: _print_trials(console, found))
        raise typer.Exit(0 if found["passed"] else FAILED)


@app.command()
def search(
    image: Annotated[Path, typer.Argument(help="Image to search with.")],
    root: RootOption = ".",
    k: Annotated[int, typer.Option("-k", min=1, help="How many items to return.")] = 10,
    generation: Annotated[str | None, typer.Option(help="Query as this generation instead of the champion.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Search the gallery with an image, as production would."""
    with reported_errors(as_json):
        from graceful.flows.commands.images import search_image

        found = search_image(_place(root), _place(image), k, generation)
        _print(as_json, found, lambda console: _print_hits(console, found))


@app.command()
def decide(
    evaluation: Annotated[Path, typer.Option("--from", help="Folder of an evaluation (evaluations/<id>).")],
    policy: Annotated[
        Path | None, typer.Option(help="Judge under the \\[policy] of this TOML file instead of the stored one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the stored per-query outcomes of an evaluation again, and compare with the decision that was recorded.

    Changes nothing. Exit code 1 if the same policy does not give the recorded decision.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.evaluations import decide_again
        from graceful.flows.terminal import print_decision

        decision, agrees = decide_again(_place(evaluation), policy)
        document = {"agrees_with_recorded": agrees, "decision": decision.model_dump(mode="json")}

        def text(console: Console) -> None:
            print_decision(console, decision)
            if policy is None:
                console.print("The recorded decision is the same." if agrees else "The recorded decision DIFFERS.")

        _print(as_json, document, text)
        if policy is None and not agrees:
            raise typer.Exit(FAILED)
        raise typer.Exit({"HOLD": HELD, "INCONCLUSIVE": UNDECIDED}.get(decision.outcome, 0))


@app.command()
def rollback(
    root: RootOption = ".",
    reason: Annotated[str, typer.Option(help="Why; it stands in the lineage.")] = "rollback",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Return to the previous generation: one move of a pointer, no data touched."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import roll_back

        state = roll_back(_place(root), reason, yes=yes)
        _print(as_json, state, lambda console: console.print(f"Serving {state['champion']} again.", highlight=False))


@app.command()
def report(
    root: RootOption = ".",
    evaluation: Annotated[str | None, typer.Argument(help="Id of an evaluation; by default the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the newest decision with its reasons, and where its report lies."""
    with reported_errors(as_json):
        from graceful.flows.commands.evaluations import read_report
        from graceful.flows.terminal import print_decision

        location, decision = read_report(_place(root), evaluation)
        document = {"report": location, "decision": decision.model_dump(mode="json")}

        def text(console: Console) -> None:
            print_decision(console, decision)
            console.print(f"Report: {location}", highlight=False, soft_wrap=True)

        _print(as_json, document, text)


@app.command()
def serve(
    root: RootOption = ".",
    http: Annotated[bool, typer.Option(help="Answer searches over HTTP instead of scheduling updates.")] = False,
    host: Annotated[str, typer.Option(help="Address that the HTTP endpoint listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP endpoint.")] = 8080,
    shards: Annotated[
        int, typer.Option(min=0, max=256, help="Spread the index over so many processes of a Ray cluster; 0: here.")
    ] = 0,
    ray_address: Annotated[
        str, typer.Option(help="Cluster of the shards: local (this machine alone), auto, or host:port.")
    ] = "local",
    ui_host: Annotated[str, typer.Option(help="Address that the flow UI listens on.")] = "127.0.0.1",
    ui_port: Annotated[int, typer.Option(help="Port of the flow UI.")] = 4200,
) -> None:
    """Run updates on the schedule of the configuration, shown in the flow UI; or, with --http, answer searches."""
    with reported_errors():
        if http:
            from graceful.flows.search.http import serve_searches

            serve_searches(_place(root), host, port, shards, ray_address)
        else:
            from graceful.flows.runtime.environment import prepare_environment

            prepare_environment(_place(root), logs_to_terminal=True)
            from graceful.flows.schedule import serve_updates

            serve_updates(_place(root), ui_host, ui_port)


@app.command()
def demo(
    root: Annotated[
        str | None, typer.Option("--root", "-r", help="New folder for the demo; by default a temporary one that stays.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Walk through every outcome in seconds, without training: synthetic encoders; real gallery, gate and rollback."""
    with reported_errors(as_json):
        from dataclasses import asdict

        from graceful.flows.commands.demo import run_demo

        result = run_demo(None if root is None else _place(root), _console(as_json))
        if as_json:
            print(json.dumps(asdict(result), indent=2))


@app.command()
def accept(
    generation: CandidateArgument,
    reason: ReasonOption,
    root: RootOption = ".",
    fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Serve after wave 0 and re-embed so much; by default everything, first."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a candidate that the gate held or left open. Your word stands beside the decision; nothing is trained.

    Look at [bold]graceful flips[/bold] first: what is listed there will be wrong from now on.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.accept import accept_candidate

        found = accept_candidate(_place(root), _console(as_json), generation, reason=reason, fraction=fraction)
        line = f"Serving {found['serving']}: accepted although the gate said {found['decided']}."
        _print(as_json, found, lambda console: console.print(line, highlight=False))


@app.command()
def reject(
    generation: CandidateArgument, reason: ReasonOption, root: RootOption = ".", as_json: JsonOption = False
) -> None:
    """Turn a candidate down: it no longer waits. What serves stays as it is."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import reject_candidate

        found = reject_candidate(_place(root), generation, reason)
        line = f"{found['rejected']} is rejected; serving {found['serving']}."
        _print(as_json, found, lambda console: console.print(line, highlight=False))


@app.command()
def promote(
    generation: CandidateArgument,
    reason: ReasonOption,
    root: RootOption = ".",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go forward again, after a rollback, to a generation that has served before: one move of a pointer."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import promote_again

        state = promote_again(_place(root), generation, reason, yes=yes)
        _print(as_json, state, lambda console: console.print(f"Serving {state['champion']} again.", highlight=False))


@app.command()
def retire(
    generation: CandidateArgument, reason: ReasonOption, root: RootOption = ".", as_json: JsonOption = False
) -> None:
    """Take a generation out of every later comparison and constraint. Its vectors stay until they are collected."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import retire_generation

        found = retire_generation(_place(root), generation, reason)
        _print(as_json, found, lambda console: console.print(f"{found['retired']} is retired.", highlight=False))


@app.command()
def revoke(
    query: CandidateArgument,
    gallery: Annotated[str, typer.Argument(help="Generation whose rows it may not be scored against any more.")],
    reason: ReasonOption,
    root: RootOption = ".",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Revoke the certificate of one generation for the rows of another. What only it lets queries read is hidden."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import revoke_certificate

        found = revoke_certificate(_place(root), query, gallery, reason, yes=yes)
        line = f"{found['revoked'][0]} may not read {found['revoked'][1]} any more; items hidden: {found['hidden']}."
        _print(as_json, found, lambda console: console.print(line, highlight=False))


@app.command()
def history(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """List the generations with what was decided about them and who decided, and every move of what serves."""
    with reported_errors(as_json):
        from graceful.flows.commands.history import lineage_history
        from graceful.flows.terminal import print_history

        found = lineage_history(_place(root))
        _print(as_json, found, lambda console: print_history(console, found))


@app.command()
def flips(
    generation: Annotated[str | None, typer.Argument(help="Candidate; by default that of the newest decision.")] = None,
    root: RootOption = ".",
    limit: Annotated[int, typer.Option(min=1, help="How many to list.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the queries that are right today and would be wrong with a candidate, the worst first."""
    with reported_errors(as_json):
        from graceful.flows.commands.history import flips_of
        from graceful.flows.terminal import print_flips

        found = flips_of(_place(root), generation, limit)
        _print(as_json, found, lambda console: print_flips(console, found))


@app.command()
def adopt(
    name: Annotated[str, typer.Argument(help="What to call the encoder; it stands in the lineage.")],
    factory: Annotated[
        str, typer.Option(help="'package.module:function' that returns a torch module (n, c, h, w) -> (n, d).")
    ],
    root: RootOption = ".",
    weights: Annotated[Path | None, typer.Option(help="File of weights to load into it.")] = None,
    kwargs: Annotated[str, typer.Option(help="Arguments of the factory, as JSON.")] = "{}",
    image_size: Annotated[int | None, typer.Option(help="Pixels it takes; by default the configuration's.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB.")] = None,
    mean: Annotated[list[float] | None, typer.Option(help="Mean per channel, 0 to 1; once for each.")] = None,
    std: Annotated[list[float] | None, typer.Option(help="Standard deviation per channel; once for each.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge an encoder that was trained elsewhere, and roll it out if the gate says so.

    It is tried on a few images before anything is recorded. Any width will do: what it cannot be compared with, it has
    to re-embed. Exit code 3: hold, 4: inconclusive.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.check import require_checked

        require_checked(_place(root), factory)
    with reported_errors(as_json), _flow_server(_place(root), as_json):
        from graceful.flows.commands.updates import adopt_encoder, update_workspace

        given = {"image_size": image_size, "channels": channels, "mean": mean, "std": std}
        stated = {key: value for key, value in given.items() if value not in (None, [])}
        adopted = adopt_encoder(_place(root), name, factory, weights, kwargs, stated)
        result = update_workspace(_place(root), _console(as_json), adopted=adopted)
        _print(as_json, result.model_dump(mode="json"), lambda console: _print_update(console, result, _place(root)))
        raise typer.Exit({"HOLD": HELD, "INCONCLUSIVE": UNDECIDED}.get(result.outcome, 0))


@app.command()
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
            found = rename_people(_place(root), parse_names(name))
        elif compare is not None:
            found = compare_clusters(_place(root), *compare, threshold=threshold, min_photos=min_photos)
        else:
            found = cluster_workspace(_place(root), generation=generation, threshold=threshold, min_photos=min_photos)
        _print(as_json, found, lambda console: print_clustering(console, found))


class Terminated(KeyboardInterrupt):
    """SIGTERM: the command ends as after Ctrl-C."""


def main() -> None:
    """Entry point of the console script."""
    _look_for_modules_here()

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            _end_soon(end.code)
        raise


def _end_soon(code: int) -> None:
    """End this process within seconds, whatever still waits: a library's thread may wait for a server that is gone."""

    def end() -> None:
        time.sleep(_SECONDS_TO_END)
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end").start()


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
    except KeyboardInterrupt as interruption:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED
        raise typer.Exit(code) from None
    except Exception as error:
        if os.environ.get("GRACEFUL_DEBUG"):
            raise
        is_full = is_disk_full(error)
        expected = isinstance(error, GracefulError | OSError) or is_full
        line = in_one_line(error, limit=2_000)
        if is_full and "free space" not in line:
            line = f"disk full: free space and run again ({line})"
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
def _flow_server(place: str, as_json: bool) -> Iterator[None]:
    """Give the block a flow server to report to: one that runs for this workspace, or one for this command alone."""
    import functools
    import importlib

    from graceful.flows.runtime.environment import prepare_environment
    from graceful.flows.runtime.server import flow_server

    _console(as_json).print("Starting (PyTorch, Ray and a flow server take a while to load) ...", style="dim")
    prepare_environment(place)
    if "prefect" in sys.modules:  # who has loaded Prefect has settled which server it talks to
        yield
        return
    loading = functools.partial(importlib.import_module, "graceful.flows.commands.updates")
    with flow_server(place, meanwhile=loading, until_exit=True):
        yield


@contextmanager
def _counting(text: str) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many there are so far; the line goes away at the end."""
    with Console(stderr=True).status(text.format(0)) as line:
        seen = 0

        def advance(number: int) -> None:
            nonlocal seen
            seen += number
            line.update(text.format(seen))

        yield advance


def _look_for_modules_here() -> None:
    """Find a user's own package.module:factory in this folder, as 'python -m' would; nothing installed is hidden."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _say_what_the_template_needs(root: str) -> None:
    from graceful.flows.settings.config import is_unedited

    if is_unedited(root):
        line = f"The configuration is the unedited template: run 'graceful init {root} --from <pictures>', or edit it."
        Console().print(line, highlight=False, soft_wrap=True, markup=False)


def _place(given: str | Path) -> str:
    """An absolute local path, or a URI as it was given, of whose two slashes pathlib has made one."""
    text = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(given))
    return text if "://" in text else os.path.abspath(text)


def _console(as_json: bool) -> Console:
    """Where progress goes: with --json standard output belongs to the document."""
    return Console(stderr=as_json)


def _print(as_json: bool, document: Any, text: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(document, indent=2, default=str))
    else:
        text(Console())


def _print_next(console: Console, root: str, report: str) -> None:
    from graceful.flows.commands.suggestions import next_commands
    from graceful.flows.terminal import print_next

    print_next(console, next_commands(root, report))


def _print_what_settles(pending: str | None, root: str) -> None:
    from graceful.flows.commands.suggestions import settling_commands
    from graceful.flows.terminal import print_next

    if pending is not None:
        line = f"{pending} waits: for more queries and another 'graceful update', or for your word."
        Console().print(line, highlight=False)
        print_next(Console(), settling_commands(root))


def _print_update(console: Console, result: Any, root: str) -> None:
    again = " (decided before; --again judges anew)" if result.repeated else ""
    console.print(f"[bold]{result.candidate}: {result.outcome}[/bold]{again}", highlight=False)
    console.print(result.summary, highlight=False)
    console.print(f"Serving {result.champion}.  Report: {result.report}", highlight=False, soft_wrap=True)
    if result.outcome == "INCONCLUSIVE":
        line = "When the evaluation has more queries, 'graceful update' judges again. Or it is your word:"
        console.print(line, highlight=False)
    _print_next(console, root, result.report)


def _print_counts(console: Console, found: dict[str, Any]) -> None:
    from graceful.flows.terminal import in_words

    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {in_words(value)}", highlight=False, soft_wrap=True)


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


def _print_findings(console: Console, found: list[Any]) -> None:
    styles = {"error": "bold red", "warning": "yellow", "ok": "green"}
    for finding in found:
        console.print(f"{finding.level:8}", style=styles[finding.level], end="")
        console.print(finding.line, highlight=False, soft_wrap=True, markup=False)
    counts = {level: sum(finding.level == level for finding in found) for level in styles}
    said = "An update can start." if not counts["error"] else "An update would fail."
    console.print(f"{counts['error']} errors, {counts['warning']} warnings. {said}", highlight=False)


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


def _print_hits(console: Console, found: dict[str, Any]) -> None:
    for place, hit in enumerate(found["hits"], 1):
        label = f"  {hit['label']}" if hit["label"] else ""
        console.print(f"{place:3}  {hit['score']:.4f}  {hit['item_id']}{label}  ({hit['generation']})", highlight=False)


if __name__ == "__main__":
    main()
