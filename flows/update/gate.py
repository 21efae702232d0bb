"""The move gate: no move of the serving state makes items unreadable that can be read now. Loads no network.

Every compare-and-swap that changes the champion goes through `move`: promotion of any kind, bootstrap, an order of the
operator, rollback, going forward. It compares what the champion reads with what the next one would read, at one
pinned version of the gallery, and swaps only where too much would not be lost and nothing has been written meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.flows.store.registry import ServingMovedError, ServingState
from graceful.flows.store.variants import refuse_variant
from graceful.flows.store.workspace import Workspace
from graceful.indexing.gallery import GalleryVersion, View

_ATTEMPTS = 20
_QUIET_ATTEMPTS = 5


class MoveRefusedError(GracefulError):
    """The serving state may not move so; nothing was changed."""


@dataclass(frozen=True)
class Comparison:
    """What a move would do to the items of one gallery version.

    `hidden`: positions in `then` of items that can be read now and could not be any more.
    """

    then: View
    num_readable_then: int
    hidden: NDArray[np.int64]

    @property
    def serves_nothing(self) -> bool:
        """Whether there are items and not one of them could be read."""
        return self.then.num_items > 0 and self.num_readable_then == 0


Mend = Callable[[Comparison], object]
"""Tries to make hidden items readable, before the comparison is made again."""


def compare(
    workspace: Workspace, generation: str, champion: str | None, version: GalleryVersion | None = None
) -> Comparison:
    """Compare what the champion reads with what another generation would read at one version (by default the newest).

    Without a champion nothing can be read now.
    """
    pinned = version or workspace.gallery.version()
    then = workspace.view(generation, pinned)
    if champion is None:
        readable_now = np.zeros(then.num_items, bool)
    else:
        # Views of one version have the same items in the same order; only what can be read differs.
        readable_now = workspace.view(champion, pinned).owner >= 0
    hidden = np.flatnonzero(readable_now & (then.owner < 0))
    return Comparison(then, int((then.owner >= 0).sum()), hidden)


def move(
    workspace: Workspace,
    generation: str,
    change: Callable[[ServingState], dict[str, Any] | None],
    *,
    act: str,
    remedy: str,
    allowed: int | None = 0,
    mend: Mend | None = None,
    num_mends: int = 0,
    reasons: Callable[[], str] = lambda: "",
) -> ServingState:
    """Move the serving state to a generation, unless that would hide more items than are allowed.

    Args:
        workspace: What is moved.
        generation: Who is to serve.
        change: Looks at the serving state and gives the fields to set, None where there is nothing to move any more;
            raises where the move no longer holds. Asked again after every other move that came first.
        act: What is being done, for the error.
        remedy: What to do about a refusal, for the error.
        allowed: How many items that can be read now may become unreadable; None: any number, the operator insists.
        mend: Called with what would be hidden, at most `num_mends` times, before the move is refused.
        num_mends: See `mend`.
        reasons: Why items could not be mended, for the error.

    Raises:
        MoveRefusedError: more items would be hidden, or a first generation could read nothing; nothing was moved.
        QueryOnlyError: a variant, which never serves itself.
        ServingMovedError: others moved the serving state first again and again.
    """
    registry, mends_left, moved_first = workspace.registry, num_mends, None
    refuse_variant(registry, act, generation)
    for attempt in range(_ATTEMPTS + num_mends):
        serving = registry.serving()
        changes = change(serving)
        if changes is None:
            return serving
        if allowed is not None:
            with workspace.gallery.lease() as version:
                found = compare(workspace, generation, serving.champion, version)
            refused = len(found.hidden) > allowed or (serving.champion is None and found.serves_nothing)
            if refused and mend is not None and mends_left:
                mends_left -= 1
                mend(found)
                continue
            if refused:
                raise MoveRefusedError(_refusal(act, generation, found, serving.champion, allowed, reasons(), remedy))
            # What was written while the two views were read may hide something: look again. A gallery that is written
            # to all the time is not waited for: whoever writes looks afterwards who has to find it (`serving.ingest`).
            if attempt < _QUIET_ATTEMPTS and workspace.gallery.version() != version:
                continue
        try:
            return registry.move_serving(serving, **changes)
        except ServingMovedError as error:
            moved_first = error
    raise moved_first or ServingMovedError(f"{act}: the gallery never stood still; try again")


def _refusal(
    act: str, generation: str, found: Comparison, champion: str | None, allowed: int, reasons: str, remedy: str
) -> str:
    why = f" ({reasons})" if reasons else ""
    if champion is None:
        return (
            f"{act}: expected items that {generation} can read, found none of {found.then.num_items}{why}; nothing was "
            f"moved; {remedy}"
        )
    expected = "every item" if not allowed else f"all but {allowed} items"
    return (
        f"{act}: expected {expected} that can be read now to be readable for {generation}, found {len(found.hidden)} "
        f"that would not be{why}; nothing was moved; {remedy}"
    )
