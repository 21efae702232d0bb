"""Ends an update: what happens to the lineage when everything else is done, and what time itself brings to an end."""

import time

from graceful.evaluation.decision import Decision
from graceful.files import join, remove
from graceful.flows.runtime.session import Session
from graceful.flows.store.events import Held, Pending, Promoted, Retired, UpdateCompleted
from graceful.flows.update.freeze import Inputs
from graceful.flows.update.rollout import release_previous


def conclude(inputs: Inputs, decision: Decision) -> None:
    """Write the last lines of the update into the lineage, and retire predecessors that own no readable row.

    The predecessors' vectors beside the manifest have served: they are copies from the caches.
    """
    registry, frozen = inputs.registry, inputs.frozen
    remove(join(inputs.workspace.update_uri(frozen.update_key), "predecessors"))
    ending = {"HOLD": Held(), "INCONCLUSIVE": Pending()}.get(decision.outcome)
    if ending is not None:
        registry.record(ending, update_key=frozen.update_key, generation=decision.candidate)
    owners: set[str | None] = {registry.serving().champion}
    for readable in inputs.workspace.protected():
        rows = inputs.workspace.gallery.view(readable).rows_by_generation()
        owners |= {name for name, count in rows.items() if count}
    for name in registry.served_generations():
        if name not in owners:
            registry.record(Retired(), update_key=frozen.update_key, generation=name)
    compute_s = inputs.session.compute_s + inputs.session.encoders.busy_s - inputs.busy_before_s
    registry.record(
        UpdateCompleted(compute_s=round(compute_s, 3)), update_key=frozen.update_key, generation=decision.candidate
    )


def completed(inputs: Inputs) -> bool:
    """Whether an update has nothing left to do."""
    return bool(inputs.registry.events(UpdateCompleted, inputs.frozen.update_key))


def release_when_due(session: Session) -> bool:
    """End the previous generation's probation when its time has passed."""
    registry = session.workspace.registry
    promotions = registry.events(Promoted)
    serving = registry.serving()
    if serving.previous is None or not promotions:
        return False
    if time.time() - promotions[-1].at < session.config.gallery.probation_hours * 3600:
        return False
    release_previous(session.workspace)
    return True
