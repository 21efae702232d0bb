"""Ends an update: what happens to the lineage when everything else is done, and what time itself brings to an end."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graceful.evaluation.decision import Decision
from graceful.files import join, remove
from graceful.flows.store.events import Forwarded, Held, Pending, Promoted, Retired, RolledBack, UpdateCompleted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.serving import release_previous

if TYPE_CHECKING:
    from graceful.flows.runtime.session import Session
    from graceful.flows.store.registry import Registry
    from graceful.flows.update.freeze import Inputs


def conclude(
    workspace: Workspace,
    update_key: str,
    decision: Decision,
    compute_s: float = 0.0,
    supported: Sequence[str] = (),
) -> None:
    """Write the last lines of the update into the lineage, and retire predecessors that serve nobody.

    Those that own no row that anyone can read, and whose clients are not `supported`.
    The predecessors' vectors beside the manifest have served: they are copies from the caches.
    """
    registry = workspace.registry
    remove(join(workspace.update_uri(update_key), "predecessors"))
    ending = {"HOLD": Held(), "INCONCLUSIVE": Pending()}.get(decision.outcome)
    if ending is not None:
        registry.record(ending, update_key=update_key, generation=decision.candidate)
    owners: set[str | None] = {registry.serving().champion, *supported}
    for readable in workspace.protected(supported):
        rows = workspace.gallery.view(readable).rows_by_generation()
        owners |= {name for name, count in rows.items() if count}
    retired = _retired(registry)
    for name in registry.served_generations():
        if name not in owners and name not in retired:
            registry.record(Retired(), update_key=update_key, generation=name)
    completed = UpdateCompleted(compute_s=round(compute_s, 3))
    registry.record(completed, update_key=update_key, generation=decision.candidate)


def _retired(registry: "Registry") -> set[str]:
    """Generations of which the lineage says so already, and which have not served since."""
    found: set[str] = set()
    for event in registry.history():
        if isinstance(event.payload, Promoted | Forwarded):
            found.discard(event.generation)
        elif isinstance(event.payload, RolledBack):
            found.discard(event.payload.to)
        elif isinstance(event.payload, Retired):
            found.add(event.generation)
    return found


def completed(inputs: "Inputs") -> bool:
    """Whether an update has nothing left to do."""
    return bool(inputs.registry.events(UpdateCompleted, inputs.frozen.update_key))


def release_when_due(session: "Session") -> bool:
    """End the probation of the previous generation, or of the one that a rollback left, when its time has passed."""
    registry = session.workspace.registry
    moves = [event for kind in (Promoted, Forwarded, RolledBack) for event in registry.events(kind)]
    serving = registry.serving()
    if (serving.previous is None and serving.left is None) or not moves:
        return False
    newest = max(moves, key=lambda event: event.sequence)
    if time.time() - newest.at < session.config.gallery.probation_hours * 3600:
        return False
    release_previous(session.workspace)
    return True
