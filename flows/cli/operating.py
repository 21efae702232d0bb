"""Commands of who serves: look, move, serve."""

import functools
import os
from typing import Annotated, Any

import typer
from rich.console import Console

from graceful.flows.cli.shell import (
    ByOption,
    CandidateArgument,
    JsonOption,
    ReasonOption,
    RootOption,
    YesOption,
    app,
    console_for,
    output,
    place,
    reported_errors,
)

command = functools.partial(app.command, rich_help_panel="Serving")


@command()
def status(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """Show who serves, who owns the gallery's rows, what is unreadable, and what is under way."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import workspace_status
        from graceful.flows.terminal import print_status

        found = workspace_status(place(root))
        output(as_json, found, lambda console: print_status(console, found))
        if not as_json:
            _print_what_settles(found["pending"], found["awaiting_approval"], place(root))
            _say_what_the_template_needs(place(root))


@command()
def history(root: RootOption = ".", as_json: JsonOption = False) -> None:
    """List the generations with what was decided about them and who decided, and every move of what serves."""
    with reported_errors(as_json):
        from graceful.flows.commands.history import lineage_history
        from graceful.flows.terminal import print_history

        found = lineage_history(place(root))
        output(as_json, found, lambda console: print_history(console, found))


@command()
def debt(
    root: RootOption = ".",
    generations: Annotated[int, typer.Option(min=1, max=100, help="How many generations to forecast.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Forecast what staying compatible will cost: step, caches and tax of the next generations, by what was measured.

    Says for every predecessor what retiring it would save.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.debt import compatibility_debt
        from graceful.flows.terminal_debt import print_debt

        found = compatibility_debt(place(root), generations)
        output(as_json, found.model_dump(mode="json"), lambda console: print_debt(console, found))


@command()
def flips(
    generation: Annotated[str | None, typer.Argument(help="Candidate; by default that of the newest decision.")] = None,
    root: RootOption = ".",
    limit: Annotated[int, typer.Option(min=1, help="How many to list.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the queries that are right today and would be wrong with a candidate, the worst first.

    In the worst state that users would live through, with the wrong answer that takes the place of the right one.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.flips import flips_of
        from graceful.flows.terminal import print_flips

        found = flips_of(place(root), generation, limit)
        output(as_json, found, lambda console: print_flips(console, found))


@command()
def blame(
    item: Annotated[str, typer.Argument(help="Id of an item of the gallery, or source of an evaluation image.")],
    generation: Annotated[str | None, typer.Argument(help="Candidate; by default that of the newest decision.")] = None,
    training: Annotated[
        int,
        typer.Option(min=0, help="Name so many training images that each of the first 5 lost queries hangs on."),
    ] = 0,
    root: RootOption = ".",
    as_json: JsonOption = False,
) -> None:
    """List the lost queries that one item has to do with: as the wrong answer, or as the right one that is lost.

    Says whose vector answers, and whether the model or the mix of old and new vectors is to blame. With --training also
    which training images the wrong answer hangs on, through the last layer of the network: a wrong label, a duplicate.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.flips import blame as blame_item
        from graceful.flows.terminal import print_blame

        found = blame_item(place(root), item, generation)
        if training:
            from graceful.flows.commands.influence import add_training_images

            found = add_training_images(place(root), found, training)
        output(as_json, found, lambda console: print_blame(console, found))


@command()
def accept(
    generation: CandidateArgument,
    reason: ReasonOption,
    root: RootOption = ".",
    fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Serve after wave 0 and re-embed so much; by default everything, first."),
    ] = None,
    by: ByOption = "",
    as_json: JsonOption = False,
) -> None:
    """Serve a candidate that the gate held or left open, or with which it waits for you. Nothing is trained.

    Your word stands beside the decision. What waits (\\[rollout] approval) is carried out as it was decided. Look at
    [bold]graceful flips[/bold] first: what is listed there will be wrong from now on.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.accept import accept_candidate

        found = accept_candidate(place(root), console_for(as_json), generation, reason=reason, fraction=fraction, by=by)
        how = "as" if found["awaited"] else "although"
        line = f"Serving {found['serving']}: accepted {how} the gate said {found['decided']}."
        output(as_json, found, lambda console: console.print(line, highlight=False))


@command()
def reject(
    generation: CandidateArgument,
    reason: ReasonOption,
    root: RootOption = ".",
    by: ByOption = "",
    as_json: JsonOption = False,
) -> None:
    """Turn a candidate down: it no longer waits. What serves stays as it is."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import reject_candidate

        found = reject_candidate(place(root), generation, reason, by)
        line = f"{found['rejected']} is rejected; serving {found['serving']}."
        output(as_json, found, lambda console: console.print(line, highlight=False))


@command()
def rollback(
    root: RootOption = ".",
    reason: Annotated[str, typer.Option(help="Why; it stands in the lineage.")] = "rollback",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Return to the previous generation: one move of a pointer, no data touched."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import roll_back

        state = roll_back(place(root), reason, yes=yes)
        output(as_json, state, lambda console: console.print(f"Serving {state['champion']} again.", highlight=False))


@command()
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

        state = promote_again(place(root), generation, reason, yes=yes)
        output(as_json, state, lambda console: console.print(f"Serving {state['champion']} again.", highlight=False))


@command()
def retire(
    generation: CandidateArgument, reason: ReasonOption, root: RootOption = ".", as_json: JsonOption = False
) -> None:
    """Take a generation out of every later comparison and constraint. Its vectors stay until they are collected."""
    with reported_errors(as_json):
        from graceful.flows.commands.status import retire_generation

        found = retire_generation(place(root), generation, reason)
        output(as_json, found, lambda console: console.print(f"{found['retired']} is retired.", highlight=False))


@command()
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

        found = revoke_certificate(place(root), query, gallery, reason, yes=yes)
        line = f"{found['revoked'][0]} may not read {found['revoked'][1]} any more; items hidden: {found['hidden']}."
        output(as_json, found, lambda console: console.print(line, highlight=False))


@command()
def serve(
    root: RootOption = ".",
    http: Annotated[bool, typer.Option(help="Answer searches over HTTP instead of scheduling updates.")] = False,
    host: Annotated[str, typer.Option(help="Address that the HTTP endpoint listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP endpoint.")] = 8080,
    shards: Annotated[
        int, typer.Option(min=0, max=256, help="Spread the index over so many processes of a Ray cluster; 0: here.")
    ] = 0,
    replicas: Annotated[
        int,
        typer.Option(min=0, help="Run so many copies on Ray Serve, which graceful[serve] brings; 0: one, here."),
    ] = 0,
    ray_address: Annotated[
        str, typer.Option(help="Cluster of shards or replicas: local (this machine alone), auto, or host:port.")
    ] = "local",
    token_file: Annotated[
        str | None,
        typer.Option(help="File with the bearer token that a search must carry; by default $GRACEFUL_SEARCH_TOKEN."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Answer whoever connects; without it other hosts need a token.")
    ] = False,
    ui_host: Annotated[str, typer.Option(help="Address that the flow UI listens on.")] = "127.0.0.1",
    ui_port: Annotated[int, typer.Option(help="Port of the flow UI.")] = 4200,
) -> None:
    """Run updates on the schedule of the configuration, shown in the flow UI; or, with --http, answer searches."""
    with reported_errors():
        if http:
            # Read when the libraries are loaded. Threads of a product that spin while they wait for one another take
            # the processors from the event loop, and on a busy machine from the product itself.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            from graceful.errors import UsageError
            from graceful.flows.search.guarding import read_token
            from graceful.flows.search.serving import serve_searches

            token = read_token(token_file, host, refused=no_token)
            if replicas:
                from graceful.flows.search.replicas import serve_replicas

                if shards:
                    raise UsageError("answering searches: expected --shards or --replicas, found both; leave one out")
                serve_replicas(place(root), host, port, replicas, ray_address, token)
                return
            serve_searches(place(root), host, port, shards, ray_address, token)
        else:
            from graceful.flows.schedule import serve_updates

            serve_updates(place(root), ui_host, ui_port)


@command()
def deploy(
    pool: Annotated[str, typer.Option("--pool", help="Work pool whose workers carry the updates out.")],
    root: RootOption = ".",
    name: Annotated[
        str | None, typer.Option(help="Name of the deployment; by default the pipeline's. Unique on the server.")
    ] = None,
    schedule: Annotated[bool, typer.Option(help="Whether the schedule of the configuration starts runs.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Register a workspace's updates, backfills and reports with a Prefect server of your own ($PREFECT_API_URL).

    Its workers run them. They need this program installed, and reach the workspace under the same name. Run again, it
    changes what is there.
    """
    with reported_errors(as_json):
        from graceful.flows.runtime.environment import prepare_environment

        prepare_environment(place(root))
        from graceful.flows.deploying import deploy_updates

        found = deploy_updates(place(root), pool, name=name, scheduled=schedule)
        often = found["schedule"] or "no schedule"
        lines = [f"{found['deployment']} in pool {pool}: {often}", *found["beside"], f"Page: {found['page']}"]
        output(as_json, found, lambda console: console.print("\n".join(lines), highlight=False, soft_wrap=True))


def _print_what_settles(pending: str | None, asked: dict[str, Any] | None, root: str) -> None:
    from graceful.flows.commands.suggestions import settling_commands
    from graceful.flows.terminal import print_next

    line = None
    if asked is not None:
        decision = f"{asked['outcome']} of {asked['generation']}"
        line = f"AWAITING APPROVAL: {decision} waits for your word until {asked['until']}."
        line = line if asked["stale"] is None else f"{decision}: {asked['stale']}."
    elif pending is not None:
        line = f"{pending} waits: for more queries and another 'graceful update', or for your word."
    if line is not None:
        Console().print(line, highlight=False, soft_wrap=True)
        print_next(Console(), settling_commands(root))


def _say_what_the_template_needs(root: str) -> None:
    from graceful.flows.settings.config import is_unedited

    if is_unedited(root):
        line = f"The configuration is the unedited template: run 'graceful init {root} --from <pictures>', or edit it."
        Console().print(line, highlight=False, soft_wrap=True, markup=False)
