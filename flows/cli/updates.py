"""Commands that train, judge and decide."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from graceful.flows.cli.shell import (
    FAILED,
    HELD,
    UNDECIDED,
    WRONG_USE,
    JsonOption,
    RootOption,
    app,
    console_for,
    counting,
    divert_libraries_of,
    exit_code_of,
    flow_server_for,
    output,
    place,
    print_next_commands,
    print_update,
    reported_errors,
)

command = functools.partial(app.command, rich_help_panel="Updates")

ParagonOption = Annotated[
    bool | None,
    typer.Option(
        "--paragon/--no-paragon",
        help="Also train without constraints, to measure the tax; by default what the configuration says. It counts as "
        "another configuration: what was decided without is judged anew.",
    ),
]


@command()
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

        with counting("Looking at the pictures: {:,} read") as advance:
            made = create_workspace(place(root), config, place(pictures) if pictures else None, label, advance)
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


@command()
def check(
    root: RootOption = ".",
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Also join the cluster at cluster.address and prove every node: that it runs this code, reads and "
            "writes the workspace, and has the GPUs that it claims. Takes a minute or two.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for what would make an update fail: configuration, data, evaluation, network, cluster, disk.

    Takes seconds, starts nothing, changes nothing; 'graceful update' does it first. Exit code 2: there are errors.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.check import check_workspace

        found = check_workspace(place(root))
        if cluster:
            from graceful.flows.commands.check_cluster import check_nodes

            divert_libraries_of(place(root), as_json)
            found += check_nodes(place(root))
        num_errors = sum(finding.level == "error" for finding in found)
        document = {"errors": num_errors, "findings": [asdict(finding) for finding in found]}
        output(as_json, document, lambda console: _print_findings(console, found))
        raise typer.Exit(WRONG_USE if num_errors else 0)


@command()
def plan(
    root: RootOption = ".",
    gain: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Points that the next generation is trained to win; by default the policy's."
        ),
    ] = None,
    min_power: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least chance that it is decided; by default the policy's. 0: never refuse."),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Most that carrying it out may cost, in the currency of \\[prices].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be measured and simulated.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look ahead before a training: could an update be decided with these queries, and what would each option take?

    Measures samples of this gallery and this encoder, changes nothing. Exit code 2: the chance that an update is
    decided is below the policy's min_power, or nothing is known to cost at most --max-cost.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.plan import plan_update
        from graceful.flows.terminal_plan import print_plan

        console = console_for(as_json)
        found = plan_update(
            place(root),
            gain_points=gain,
            min_power=min_power,
            max_cost=max_cost,
            dry_run=dry_run,
            say=lambda text: console.print(f"[dim]{text}[/dim]", highlight=False),
        )
        output(as_json, found.model_dump(mode="json"), lambda console: print_plan(console, found))
        raise typer.Exit(WRONG_USE if found.refused else 0)


@command()
def update(
    root: RootOption = ".",
    again: Annotated[bool, typer.Option(help="Judge anew what was decided about before.")] = False,
    paragon: ParagonOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only take a few training steps on a sample of the images and say what a training would take: time, "
            "memory, steps, and what the predecessors add. Changes nothing.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a candidate, judge it against what is served, decide, and carry the decision out.

    Run again, it goes on where it was killed; decided before, it does nothing. Exit code 3: hold, 4: inconclusive, 5:
    decided, and waiting for 'graceful accept' or 'graceful reject' (\\[rollout] approval).
    """
    if dry_run:
        _dry_run(place(root), as_json)
        return
    with reported_errors(as_json):
        from graceful.flows.commands.check import require_checked

        require_checked(place(root))
    with reported_errors(as_json), flow_server_for(place(root), as_json):
        from graceful.flows.commands.updates import update_workspace

        result = update_workspace(place(root), console_for(as_json), again=again, paragon=paragon)
        output(as_json, result.model_dump(mode="json"), lambda console: print_update(console, result, place(root)))
        raise typer.Exit(exit_code_of(result))


@command()
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
    with reported_errors(as_json), flow_server_for(place(root or "workspaces"), as_json):
        from graceful.flows.commands.updates import replay_history
        from graceful.flows.terminal import print_replay

        result = replay_history(config, root, console_for(as_json), paragon=paragon, controls=controls)

        def text(console: Console) -> None:
            print_replay(console, result)
            print_next_commands(console, result.root, result.report)

        output(as_json, result.model_dump(mode="json"), text)


@command()
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

        decision, agrees = decide_again(place(evaluation), policy)
        document = {"agrees_with_recorded": agrees, "decision": decision.model_dump(mode="json")}

        def text(console: Console) -> None:
            print_decision(console, decision)
            if policy is None:
                console.print("The recorded decision is the same." if agrees else "The recorded decision DIFFERS.")

        output(as_json, document, text)
        if policy is None and not agrees:
            raise typer.Exit(FAILED)
        raise typer.Exit({"HOLD": HELD, "INCONCLUSIVE": UNDECIDED}.get(decision.outcome, 0))


@command()
def report(
    root: RootOption = ".",
    evaluation: Annotated[str | None, typer.Argument(help="Id of an evaluation; by default the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the newest decision with its reasons, and where its report lies."""
    with reported_errors(as_json):
        from graceful.flows.commands.evaluations import read_report
        from graceful.flows.terminal import print_decision

        location, decision = read_report(place(root), evaluation)
        document = {"report": location, "decision": decision.model_dump(mode="json")}

        def text(console: Console) -> None:
            print_decision(console, decision)
            console.print(f"Report: {location}", highlight=False, soft_wrap=True)

        output(as_json, document, text)


@command()
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

        result = run_demo(None if root is None else place(root), console_for(as_json))
        if as_json:
            print(json.dumps(asdict(result), indent=2))


def _dry_run(root: str, as_json: bool) -> None:
    with reported_errors(as_json):
        from graceful.flows.commands.check import require_checked

        require_checked(root)
    with reported_errors(as_json):
        from graceful.flows.commands.rehearsal import dry_run

        console = console_for(as_json)
        found = dry_run(root, lambda text: console.print(f"[dim]{text}[/dim]", highlight=False))
        output(as_json, found.model_dump(mode="json"), lambda console: _print_dry_run(console, found))


def _print_dry_run(console: Console, found: Any) -> None:
    share = found.predecessors_step_share
    added = "" if share is None else f", which add {share:.0%} to a step"
    decoding = "no decoding, which goes on while it trains"
    first = decoding if found.streamed else f"{_duration(found.load_s)} of decoding"
    if found.embed_s is not None:
        first += f", {_duration(found.embed_s)} of embedding {found.images_to_embed:,} images with predecessors"
    lines = [
        f"Training on {found.images:,} images of {found.classes:,} classes: {found.steps:,} steps.",
        f"A step: {found.step_s:.3g} s, {found.images_per_s:,.0f} images per second on {found.device} in "
        f"{found.precision}, {found.batch_images:,} images for each of {found.workers} worker(s).",
        f"Memory of a worker: {found.memory_mib:,} MiB at its peak; all images decoded: {found.pixels_mib:,} MiB.",
        f"Predecessors: {found.predecessors}{added}.",
        f"Before the first step: {first}.",
        f"All together about {_duration(found.total_s)}, the judgement not counted.",
        f"Measured on {found.sampled_images:,} images of {found.sampled_classes:,} classes.",
        *([f"Note: {found.note}."] if found.note else []),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print_findings(console: Console, found: list[Any]) -> None:
    styles = {"error": "bold red", "warning": "yellow", "ok": "green"}
    for finding in found:
        console.print(f"{finding.level:8}", style=styles[finding.level], end="")
        console.print(finding.line, highlight=False, soft_wrap=True, markup=False)
    counts = {level: sum(finding.level == level for finding in found) for level in styles}
    said = "An update can start." if not counts["error"] else "An update would fail."
    console.print(f"{counts['error']} errors, {counts['warning']} warnings. {said}", highlight=False)
