"""Moves of the serving state that no decision makes, and what every writer must know of it. Loads no network.

Rollback, going forward again, and the end of a probation are each one move of a pointer; no vector is touched. A move
that would hide items which can be read now is refused unless the operator insists.
"""

import getpass
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import crash_point
from graceful.flows.store.claim import claim
from graceful.flows.store.events import (
    CertificateRevoked,
    Forwarded,
    PreviousReleased,
    Rejected,
    Retired,
    RolledBack,
)
from graceful.flows.store.registry import ServingMovedError, ServingState
from graceful.flows.store.variants import generation_behind, refuse_variant
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.gate import MoveRefusedError, move
from graceful.indexing.gallery import IngestResult
from graceful.indexing.reindex import ReindexReport, embed_missing


class NothingToRollBackError(GracefulError):
    """There is no previous generation to return to."""


_INSIST = "give --yes to move all the same"


def rollback(
    workspace: Workspace, *, reason: str = "rollback", yes: bool = False, leaving: str | None = None
) -> ServingState:
    """Return to the previous generation: one pointer move, no data touched.

    Bookkeeping that moves the serving state at the same moment gives way. The generation that is left stays complete,
    so that `go_forward` can return to it, until the next one is promoted or the probation ends. `leaving`: only while
    this generation serves.

    Raises:
        NothingToRollBackError: no generation served before, or it has been released.
        MoveRefusedError: items that can be read now could not be read any more, and `yes` does not insist.
        ServingMovedError: another generation was promoted meanwhile: what is to be left is not what was looked at.
    """
    seen = workspace.registry.serving()
    leaving = leaving or seen.champion
    back_to = _back_to(seen)

    def change(serving: ServingState) -> dict[str, Any]:
        if serving.champion != leaving:
            raise ServingMovedError(
                f"rolling back: expected champion {leaving}, found {serving.champion} (another move finished "
                "first); look again with 'graceful status'"
            )
        left = serving.champion
        return {
            "champion": _back_to(serving), "previous": None, "active_plan": None, "left": left, "moved_by": reason,
        }  # fmt: skip

    state = move(workspace, back_to, change, act="rolling back", remedy=_INSIST, allowed=None if yes else 0)
    back = RolledBack(to=back_to, reason=reason, by=operator())
    workspace.registry.record(back, generation=seen.champion or "")
    return state


def _back_to(serving: ServingState) -> str:
    if serving.previous is None:
        raise NothingToRollBackError(
            f"rolling back: expected a previous generation, found none (champion {serving.champion}); "
            "it was released, or there has been no promotion since the last rollback"
        )
    return serving.previous


def go_forward(workspace: Workspace, generation: str, *, reason: str, yes: bool = False) -> ServingState:
    """Serve a generation again that has served before, after a rollback: one pointer move, nothing is embedded.

    Raises:
        MoveRefusedError: it has never served, serves already, was retired, or items that can be read now could not be.
        QueryOnlyError: it is a variant.
        UncertifiedGenerationError: it may not read its own rows.
    """
    registry = workspace.registry
    act = f"promoting {generation}"
    refuse_variant(registry, act, generation)
    seen = registry.serving()
    if seen.champion == generation:
        raise MoveRefusedError(f"promoting {generation}: expected another generation to serve, found it serving")
    if generation not in registry.served_generations():
        raise MoveRefusedError(
            f"promoting {generation}: expected a generation that has served before, found one of which nobody has "
            f"decided so; run 'graceful update', or 'graceful accept {generation} --reason ...'"
        )
    refuse_retired(workspace, f"promoting {generation}", generation)
    registry.readable(generation)

    def change(serving: ServingState) -> dict[str, Any]:
        if serving.champion != seen.champion:
            raise ServingMovedError(
                f"promoting {generation}: expected champion {seen.champion}, found {serving.champion} (another move "
                "finished first); look again with 'graceful status'"
            )
        return {
            "champion": generation, "previous": serving.champion, "active_plan": None, "left": None,
            "moved_by": f"forward: {reason}",
        }  # fmt: skip

    # Kept from here on, as after a rollback: nothing of it is collected between the look at its items and the move.
    registry.change_serving(lambda serving: None if serving.left == generation else {"left": generation})
    workspace.fence()
    try:
        state = move(workspace, generation, change, act=act, remedy=_INSIST, allowed=None if yes else 0)
    except GracefulError:
        registry.change_serving(lambda serving: {"left": seen.left} if serving.left != seen.left else None)
        raise
    registry.record(Forwarded(reason=reason, by=operator()), generation=generation)
    return state


def revoke(
    workspace: Workspace, query_generation: str, gallery_generation: str, *, reason: str, yes: bool = False
) -> int:
    """Revoke a certificate: what was read through it cannot be read any more. Returns how many items that hides.

    Raises:
        MoveRefusedError: it is not in force, or it is what lets a generation in use query at all, or items that the
            champion can read now could not be read any more and `yes` does not insist.
        UpdateInProgressError: an update is running, which may be about to serve by this certificate.
    """
    registry = workspace.registry
    act = f"revoking the certificate of {query_generation} for {gallery_generation}"
    with claim(workspace.root, act):
        hidden = _hidden_without(workspace, query_generation, gallery_generation, act)
        if hidden and query_generation == registry.serving().champion and not yes:
            raise MoveRefusedError(
                f"{act}: expected every item that can be read now to stay readable, found {hidden} that would not be; "
                "embed them first ('graceful update'), or give --yes to revoke all the same"
            )
        registry.revoke([(query_generation, gallery_generation)], reason=reason)
    revoked = CertificateRevoked(gallery_generation=gallery_generation, reason=reason, by=operator())
    registry.record(revoked, generation=query_generation)
    return hidden


def _hidden_without(workspace: Workspace, query: str, gallery: str, act: str) -> int:
    pairs = workspace.registry.certificates()
    if (query, gallery) not in pairs:
        held = ", ".join(sorted(held for holder, held in pairs if holder == query))
        raise MoveRefusedError(
            f"{act}: expected a certificate in force, found none; {query} may read {held or 'nothing'}"
        )
    serving = workspace.registry.serving()
    if query == gallery:
        if query in (serving.champion, serving.previous):
            raise MoveRefusedError(
                f"{act}: expected a generation that does not serve, found one that serves or to which a rollback "
                "returns; roll back or release it first"
            )
        return 0
    with workspace.gallery.lease() as version:
        now = workspace.view(query, version)
        then = workspace.gallery.view([name for name in now.readable if name != gallery], version)
        return len(then.unreadable()) - len(now.unreadable())


def reject(workspace: Workspace, generation: str, *, reason: str, by: str = "") -> None:
    """Turn a candidate down: it no longer waits for anything. Raises MoveRefusedError for one that is in use.

    Raises also UpdateInProgressError, where an update is carrying a plan of it out.
    """
    refuse_variant(workspace.registry, f"rejecting {generation}", generation)
    with _out_of_use(workspace, "rejecting", generation):
        workspace.registry.record(Rejected(reason=reason, by=by or operator()), generation=generation)


def retire(workspace: Workspace, generation: str, *, reason: str) -> None:
    """Take a generation out of every later comparison and constraint. Raises as `reject`."""
    if not reason.strip():
        raise MoveRefusedError(f"retiring {generation}: expected a reason, found none; say why")
    with _out_of_use(workspace, "retiring", generation):
        workspace.registry.record(Retired(reason=reason, by=operator()), generation=generation)


@contextmanager
def _out_of_use(workspace: Workspace, act: str, generation: str) -> Iterator[None]:
    """Take a generation out of use, then let the block record so; its vectors are kept no longer afterwards."""
    registry = workspace.registry
    _refuse_in_use(workspace, f"{act} {generation}", generation)
    serving = registry.serving()
    planned = registry.plan_generation(serving.active_plan) if serving.active_plan else None
    with ExitStack() as held:
        if generation in (serving.prepared, planned):
            # A plan that ended in an error is abandoned; one that is being carried out belongs to its update.
            held.enter_context(claim(workspace.root, f"{act} {generation}"))
        yield
        abandon(workspace, generation)


def abandon(workspace: Workspace, generation: str | None = None) -> ServingState:
    """Keep no longer what a plan of this generation (by default: any) has prepared and never moved; or what was left.

    A plan of the champion is under way and is not abandoned.
    """
    registry = workspace.registry

    def change(serving: ServingState) -> dict[str, Any] | None:
        changes: dict[str, Any] = {}
        if serving.prepared is not None and generation in (None, serving.prepared):
            changes["prepared"] = None
        if generation is not None and serving.left == generation:
            changes["left"] = None
        if serving.active_plan is not None:
            planned = registry.plan_generation(serving.active_plan)
            if planned != serving.champion and generation in (None, planned):
                changes["active_plan"] = None
        return changes or None

    return registry.change_serving(change)


def refuse_retired(workspace: Workspace, act: str, generation: str) -> None:
    """Raise MoveRefusedError for a generation that the operator has retired: nothing is compared with it any more."""
    reason = workspace.registry.retired().get(generation)
    if reason is not None:
        raise MoveRefusedError(
            f"{act}: expected a generation that takes part, found it retired ({reason}); train or adopt another one"
        )


def _refuse_in_use(workspace: Workspace, act: str, generation: str) -> None:
    serving = workspace.registry.serving()
    roles = {serving.previous: "a rollback returns to it", serving.champion: "it serves"}
    if generation in roles:
        remedy = "run 'graceful rollback' first" if generation == serving.champion else "it stays as long as that holds"
        raise MoveRefusedError(
            f"{act}: expected a generation that is not in use, found that {roles[generation]}; {remedy}"
        )


def release_previous(workspace: Workspace) -> ServingState:
    """End the probation: ingest writes the champion's vectors only, and a rollback is no longer possible.

    A generation that a rollback left is released too. Gives way to a promotion or a rollback at the same moment.
    """
    seen = workspace.registry.serving()
    released = [name for name in (seen.previous, seen.left) if name is not None]
    if not released:
        return seen

    def change(serving: ServingState) -> dict[str, Any] | None:
        if (serving.champion, serving.previous, serving.left) != (seen.champion, seen.previous, seen.left):
            return None
        return {"previous": None, "left": None, "moved_by": "previous released"}

    state = workspace.registry.change_serving(change)
    if state.previous is None and state.champion == seen.champion:
        for name in released:
            workspace.registry.record(PreviousReleased(), generation=name)
    return state


def generations_to_write(workspace: Workspace, supported: Sequence[str] = ()) -> list[str]:
    """Generations whose vectors an ingest writes, the champion first.

    The previous one until it is released, so that a rollback finds every item; the one of a full backfill from its
    start; and unless a certificate lets it read the champion's: every supported client's, the one whose plan is
    prepared, so that the move hides nothing, and the one that a rollback left, so that it is possible to go forward.
    A variant has no vectors: those of its generation are written for its clients.
    """
    registry = workspace.registry
    serving = registry.serving()
    planned = registry.plan_generation(serving.active_plan) if serving.active_plan else None
    if serving.champion is None:
        return [name for name in dict.fromkeys((planned, serving.prepared)) if name is not None]
    certificates = registry.certificates()
    readers = [name for name in (serving.prepared, serving.left, *supported) if name is not None]
    names = [serving.champion, serving.previous, planned]
    waiting = [name for name in readers if (name, serving.champion) not in certificates]
    names += [generation_behind(registry, name) for name in waiting]
    return list(dict.fromkeys(name for name in names if name is not None))


def ingest(
    workspace: Workspace,
    items: pa.Table,
    *,
    supported: Sequence[str] = (),
    unit_rows: int = 4_096,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[IngestResult, dict[str, ReindexReport]]:
    """Add or change items, and write their vectors for every generation that must find them.

    Asked again until nobody is left: a generation that came to serve, or whose plan was prepared, while the vectors of
    another were written must find the items too. `on_rows` counts rows of the champion's vectors only.
    """
    result = workspace.gallery.ingest(items)
    crash_point("items-ingested")
    reports: dict[str, ReindexReport] = {}
    while waiting := [name for name in generations_to_write(workspace, supported) if name not in reports]:
        generation = waiting[0]
        embed = workspace.embed_with(generation)
        reports[generation] = embed_missing(
            workspace.gallery,
            generation,
            embed,
            revisions=result.revisions,
            unit_rows=unit_rows,
            on_rows=on_rows if not reports else None,
        )
        crash_point("generation-ingested")
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
