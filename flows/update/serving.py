"""Moves of the serving state that no decision makes, and what every writer must know of it. Loads no network.

Rollback, going forward again, and the end of a probation are each one move of a pointer; no vector is touched. A move
that would hide items which can be read now is refused unless the operator insists.
"""

import getpass
import socket
from collections.abc import Callable, Sequence

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import crash_point
from graceful.flows.store.events import Forwarded, PreviousReleased, Rejected, Retired, RolledBack
from graceful.flows.store.registry import ServingState
from graceful.flows.store.workspace import Workspace
from graceful.indexing.gallery import IngestResult
from graceful.indexing.reindex import ReindexReport, embed_missing


class NothingToRollBackError(GracefulError):
    """There is no previous generation to return to."""


class MoveRefusedError(GracefulError):
    """The serving state may not move so."""


def num_hidden(workspace: Workspace, generation: str) -> int:
    """How many items the champion can read and this query generation could not."""
    champion = workspace.registry.serving().champion
    if champion is None:
        return 0
    version = workspace.gallery.version()
    now, then = workspace.view(champion, version), workspace.view(generation, version)
    return int(((now.owner >= 0) & (then.owner < 0)).sum())


def _refuse_to_hide(workspace: Workspace, act: str, generation: str, yes: bool) -> None:
    hidden = 0 if yes else num_hidden(workspace, generation)
    if hidden:
        raise MoveRefusedError(
            f"{act}: expected every item that can be read now to be readable for {generation}, found {hidden} that "
            "would not be; give --yes to move all the same"
        )


def rollback(workspace: Workspace, *, reason: str = "rollback", yes: bool = False) -> ServingState:
    """Return to the previous generation: one pointer move, no data touched.

    Raises:
        NothingToRollBackError: no generation served before, or it has been released.
        MoveRefusedError: items that can be read now could not be read any more, and `yes` does not insist.
    """
    serving = workspace.registry.serving()
    if serving.previous is None:
        raise NothingToRollBackError(
            f"rolling back: expected a previous generation, found none (champion {serving.champion}); "
            "it was released, or there has been no promotion since the last rollback"
        )
    _refuse_to_hide(workspace, "rolling back", serving.previous, yes)
    state = workspace.registry.move_serving(
        serving, champion=serving.previous, previous=None, active_plan=None, moved_by=reason
    )
    back = RolledBack(to=serving.previous, reason=reason, by=operator())
    workspace.registry.record(back, generation=serving.champion or "")
    return state


def go_forward(workspace: Workspace, generation: str, *, reason: str, yes: bool = False) -> ServingState:
    """Serve a generation again that has served before, after a rollback: one pointer move, nothing is embedded.

    Raises:
        MoveRefusedError: it has never served, serves already, was retired, or items that can be read now could not be.
        UncertifiedGenerationError: it may not read its own rows.
    """
    registry = workspace.registry
    serving = registry.serving()
    if serving.champion == generation:
        raise MoveRefusedError(f"promoting {generation}: expected another generation to serve, found it serving")
    if generation not in registry.served_generations():
        raise MoveRefusedError(
            f"promoting {generation}: expected a generation that has served before, found one of which nobody has "
            f"decided so; run 'graceful update', or 'graceful accept {generation} --reason ...'"
        )
    refuse_retired(workspace, f"promoting {generation}", generation)
    registry.readable(generation)
    _refuse_to_hide(workspace, f"promoting {generation}", generation, yes)
    state = registry.move_serving(
        serving, champion=generation, previous=serving.champion, active_plan=None, moved_by=f"forward: {reason}"
    )
    registry.record(Forwarded(reason=reason, by=operator()), generation=generation)
    return state


def reject(workspace: Workspace, generation: str, *, reason: str) -> None:
    """Turn a candidate down: it no longer waits for anything. Raises MoveRefusedError for one that is in use."""
    _refuse_in_use(workspace, f"rejecting {generation}", generation)
    workspace.registry.record(Rejected(reason=reason, by=operator()), generation=generation)


def retire(workspace: Workspace, generation: str, *, reason: str) -> None:
    """Take a generation out of every later comparison and constraint. Raises MoveRefusedError for one in use."""
    if not reason.strip():
        raise MoveRefusedError(f"retiring {generation}: expected a reason, found none; say why")
    _refuse_in_use(workspace, f"retiring {generation}", generation)
    workspace.registry.record(Retired(reason=reason, by=operator()), generation=generation)


def refuse_retired(workspace: Workspace, act: str, generation: str) -> None:
    """Raise MoveRefusedError for a generation that the operator has retired: nothing is compared with it any more."""
    reason = workspace.registry.retired().get(generation)
    if reason is not None:
        raise MoveRefusedError(
            f"{act}: expected a generation that takes part, found it retired ({reason}); train or adopt another one"
        )


def _refuse_in_use(workspace: Workspace, act: str, generation: str) -> None:
    serving = workspace.registry.serving()
    plan = workspace.registry.plan(serving.active_plan)[0].generation if serving.active_plan else None
    roles = {plan: "it is being embedded", serving.previous: "a rollback returns to it", serving.champion: "it serves"}
    if generation in roles:
        remedy = "run 'graceful rollback' first" if generation == serving.champion else "it stays as long as that holds"
        raise MoveRefusedError(
            f"{act}: expected a generation that is not in use, found that {roles[generation]}; {remedy}"
        )


def release_previous(workspace: Workspace) -> ServingState:
    """End the probation: ingest writes the champion's vectors only, and a rollback is no longer possible."""
    serving = workspace.registry.serving()
    if serving.previous is None:
        return serving
    state = workspace.registry.move_serving(serving, previous=None, moved_by="previous released")
    workspace.registry.record(PreviousReleased(), generation=serving.previous)
    return state


def generations_to_write(workspace: Workspace, supported: Sequence[str] = ()) -> list[str]:
    """Generations whose vectors an ingest writes, the champion first.

    The previous one until it is released, so that a rollback finds every item; the one of a full backfill from its
    start; and every supported client's, unless a certificate lets it read the champion's.
    """
    serving = workspace.registry.serving()
    if serving.champion is None:
        return [workspace.registry.plan(serving.active_plan)[0].generation] if serving.active_plan else []
    names = [serving.champion]
    if serving.previous is not None:
        names.append(serving.previous)
    if serving.active_plan is not None:
        names.append(workspace.registry.plan(serving.active_plan)[0].generation)
    certificates = workspace.registry.certificates()
    names += [name for name in supported if (name, serving.champion) not in certificates]
    return list(dict.fromkeys(names))


def ingest(
    workspace: Workspace,
    items: pa.Table,
    *,
    supported: Sequence[str] = (),
    unit_rows: int = 4_096,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[IngestResult, dict[str, ReindexReport]]:
    """Add or change items, and write their vectors for every generation that must find them.

    `on_rows` counts rows of the champion's vectors only.
    """
    result = workspace.gallery.ingest(items)
    crash_point("items-ingested")
    reports = {}
    for place, generation in enumerate(generations_to_write(workspace, supported)):
        embed = workspace.embed_with(generation)
        reports[generation] = embed_missing(
            workspace.gallery,
            generation,
            embed,
            revisions=result.revisions,
            unit_rows=unit_rows,
            on_rows=on_rows if place == 0 else None,
        )
    return result, reports


def delete(workspace: Workspace, item_ids: Sequence[str]) -> int:
    """Write tombstones for items; returns how many were there."""
    return workspace.gallery.delete(item_ids)


def operator() -> str:
    """Who gave an order, as the machine knows them."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # no name for this user id
        return socket.gethostname()
