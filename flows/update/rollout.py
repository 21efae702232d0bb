"""Carries decisions out: certificates, wave 0, the move of the serving state, the waves after it; and takes them back.

Every function may be killed anywhere and called again: what it finds committed it does not repeat. The order of writes
is the point: certificates and the plan first, vectors next, the serving state last.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import crash_point
from graceful.flows.store.registry import Plan, ServingMovedError, ServingState
from graceful.flows.store.workspace import Workspace
from graceful.indexing.gallery import IngestResult, View
from graceful.indexing.planner import OrderInputs, plan_waves, rank_items
from graceful.indexing.reindex import ReindexReport, carry_out, embed_missing

ClassDistance = Callable[[View], NDArray[np.float32]]
"""Cosine distance (N,) of the vectors of a view to the nearest class mean of their generation; NaN where unreadable."""


class NothingToRollBackError(GracefulError):
    """There is no previous generation to return to."""


@dataclass(frozen=True)
class Rollout:
    """A verdict in the words of the gallery: what is to be certified, embedded and served."""

    update_key: str
    generation: str
    decision: str
    fraction: float
    order: str
    before_move: str
    certificates: tuple[tuple[str, str], ...]
    seed: int = 0
    wave_rows: int = 16_384
    unit_rows: int = 4_096


def prepare(workspace: Workspace, rollout: Rollout, class_distance: ClassDistance | None = None) -> Plan:
    """Issue the certificates and store the plan; called again, it returns the plan stored before."""
    plan_id = f"{rollout.update_key}-{rollout.generation}"
    workspace.registry.certify(rollout.certificates, reason=rollout.decision)
    crash_point("certified")
    try:
        return workspace.registry.plan(plan_id)[0]
    except KeyError:
        pass
    view = workspace.view(rollout.generation)
    first = view.owner < 0
    inputs = OrderInputs(
        view.item_ids,
        view.owner.astype(np.int64),
        class_distance(view) if class_distance is not None else None,
        rollout.seed,
    )
    ranking = rank_items(rollout.order, inputs, first)
    num_first = int(first.sum())
    items = plan_waves(view.item_ids, ranking, num_first, rollout.fraction, rollout.wave_rows)
    plan = Plan(
        plan_id=plan_id,
        generation=rollout.generation,
        order=rollout.order,
        seed=rollout.seed,
        fraction=rollout.fraction,
        num_items=items.num_rows,
        num_wave_zero=num_first,
        num_waves=len(items["wave"].unique()),
        before_move="all" if rollout.before_move == "all" else "wave_zero",
        decision=rollout.decision,
    )
    workspace.registry.save_plan(plan, items)
    crash_point("plan-saved")
    return plan


def embed_before_move(
    workspace: Workspace, rollout: Rollout, plan: Plan, *, on_rows: Callable[[int], None] | None = None
) -> ReindexReport:
    """Embed what must be there before the serving state moves: wave 0, or the whole gallery in a full backfill."""
    serving = workspace.registry.serving()
    if serving.champion == rollout.generation:
        return ReindexReport()
    embed = workspace.embed_with(rollout.generation)
    items = workspace.registry.plan(plan.plan_id)[1]
    if plan.before_move == "all":
        if serving.active_plan != plan.plan_id:
            # From here on ingest writes the candidate's vectors too: the backfill has no moving end.
            workspace.registry.move_serving(serving, active_plan=plan.plan_id, moved_by=rollout.decision)
        report = carry_out(
            workspace.gallery, rollout.generation, items, embed, unit_rows=rollout.unit_rows, on_rows=on_rows
        )
        # What arrived between the plan and the move of `active_plan` above.
        late = embed_missing(workspace.gallery, rollout.generation, embed, unit_rows=rollout.unit_rows)
        return report.plus(late)
    if not plan.num_wave_zero:
        return ReindexReport()
    return carry_out(
        workspace.gallery, rollout.generation, items, embed, waves=[0], unit_rows=rollout.unit_rows, on_rows=on_rows
    )


def promote(workspace: Workspace, rollout: Rollout, plan: Plan, *, champion: str | None) -> ServingState:
    """Move the serving state to the rollout's generation; a move made before is found and not repeated.

    Raises:
        ServingMovedError: the champion is no longer the one that the decision was about.
    """
    history = workspace.registry.serving_history()
    serving = history[-1] if history else ServingState()
    if any(state.champion == rollout.generation and state.moved_by == rollout.decision for state in history):
        # Also after a rollback: a promotion taken back is not repeated by resuming its update.
        workspace.registry.record("promoted", update_key=rollout.update_key, generation=rollout.generation)
        return serving
    if serving.champion != champion:
        raise ServingMovedError(
            f"promoting {rollout.generation}: the decision was about champion {champion}, found {serving.champion} "
            "(another update finished first); run 'graceful update' again"
        )
    after = None if plan.before_move == "all" else plan.plan_id
    state = workspace.registry.move_serving(
        serving, champion=rollout.generation, previous=champion, active_plan=after, moved_by=rollout.decision
    )
    workspace.registry.record("promoted", update_key=rollout.update_key, generation=rollout.generation)
    return state


def continue_plan(
    workspace: Workspace, *, unit_rows: int = 4_096, on_rows: Callable[[int], None] | None = None
) -> ReindexReport:
    """Carry out the active plan of the champion to its end; stops before a wave when another plan took its place."""
    serving = workspace.registry.serving()
    if serving.active_plan is None:
        return ReindexReport()
    plan, items = workspace.registry.plan(serving.active_plan)
    if plan.generation != serving.champion:
        # A full backfill that has not moved yet belongs to its update.
        return ReindexReport()
    embed = workspace.embed_with(plan.generation)
    # Unreadable items first: what was ingested while the serving state moved and cannot be read by the new champion.
    view = workspace.view(plan.generation)
    unreadable = pa.array(view.item_ids[view.unreadable()], pa.string())
    report = ReindexReport()
    if len(unreadable):
        report = embed_missing(
            workspace.gallery, plan.generation, embed, item_ids=unreadable, unit_rows=unit_rows, on_rows=on_rows
        )
    report = report.plus(
        carry_out(
            workspace.gallery,
            plan.generation,
            items,
            embed,
            unit_rows=unit_rows,
            still_wanted=lambda: workspace.registry.serving().active_plan == plan.plan_id,
            on_rows=on_rows,
        )
    )
    if not report.superseded:
        _end_plan(workspace, plan)
    return report


def rollback(workspace: Workspace, *, reason: str = "rollback") -> ServingState:
    """Return to the previous generation: one pointer move, no data touched.

    Raises:
        NothingToRollBackError: no generation served before, or it has been released.
    """
    serving = workspace.registry.serving()
    if serving.previous is None:
        raise NothingToRollBackError(
            f"rolling back: expected a previous generation, found none (champion {serving.champion}); "
            "it was released, or there has been no promotion since the last rollback"
        )
    state = workspace.registry.move_serving(
        serving, champion=serving.previous, previous=None, active_plan=None, moved_by=reason
    )
    workspace.registry.record(
        "rolled_back", generation=serving.champion or "", payload={"to": serving.previous, "reason": reason}
    )
    return state


def release_previous(workspace: Workspace) -> ServingState:
    """End the probation: ingest writes the champion's vectors only, and a rollback is no longer possible."""
    serving = workspace.registry.serving()
    if serving.previous is None:
        return serving
    state = workspace.registry.move_serving(serving, previous=None, moved_by="previous released")
    workspace.registry.record("previous_released", generation=serving.previous)
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
    unit: str,
    supported: Sequence[str] = (),
    unit_rows: int = 4_096,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[IngestResult, dict[str, ReindexReport]]:
    """Add or change items, and write their vectors for every generation that must find them.

    `on_rows` counts rows of the champion's vectors only.
    """
    result = workspace.gallery.ingest(items, unit=unit)
    crash_point("items-ingested")
    item_ids = items["item_id"].combine_chunks()
    reports = {}
    for place, generation in enumerate(generations_to_write(workspace, supported)):
        embed = workspace.embed_with(generation)
        reports[generation] = embed_missing(
            workspace.gallery,
            generation,
            embed,
            item_ids=item_ids,
            unit_rows=unit_rows,
            on_rows=on_rows if place == 0 else None,
        )
    return result, reports


def delete(workspace: Workspace, item_ids: Sequence[str]) -> int:
    """Write tombstones for items; returns how many were there."""
    return workspace.gallery.delete(item_ids, unit=f"{time.time_ns()}")


def _end_plan(workspace: Workspace, plan: Plan) -> None:
    serving = workspace.registry.serving()
    if serving.active_plan == plan.plan_id:
        workspace.registry.move_serving(serving, active_plan=None)
    workspace.registry.record("plan_completed", generation=plan.generation, payload={"plan": plan.plan_id})
