"""Carries decisions out: certificates, wave 0, the move of the serving state, the waves after it; and takes them back.

Every function may be killed anywhere and called again: what it finds committed it does not repeat. The order of writes
is the point: certificates and the plan first, vectors next, the serving state last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.consumers import ThresholdToServe
from graceful.evaluation.decision import CertificateToIssue, Decision, certificates_to_issue, served_with
from graceful.evaluation.evidence import Evidence
from graceful.files import crash_point
from graceful.flows.store.events import PlanCompleted, Promoted
from graceful.flows.store.registry import Plan, ServingMovedError, ServingState
from graceful.flows.store.variants import refuse_variant
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.gate import Comparison, move
from graceful.indexing.gallery import View
from graceful.indexing.leases import Lease
from graceful.indexing.planner import OrderInputs, plan_waves, random_key_of, rank_items
from graceful.indexing.reindex import ReindexReport, carry_out, embed_missing

if TYPE_CHECKING:
    from graceful.flows.settings.config import GalleryConfig

ClassDistance = Callable[[View], NDArray[np.float32]]
"""Cosine distance (N,) of the vectors of a view to the nearest class mean of their generation; NaN where unreadable."""


ACTED_ON = ("BOOTSTRAP", "COMPATIBLE_ROLLOUT", "FULL_BACKFILL")
"""Outcomes that change what is served."""

_NUM_MENDS = 3
"""How often what a move would hide is asked for again before the move is refused."""

_NUM_REASONS = 3


@dataclass(frozen=True)
class Rollout:
    """A verdict in the words of the gallery: what is to be certified, embedded and served.

    `decision` names the evaluation; `ordered`: by the operator, against what was decided. `before_move`: what is
    embedded before the serving state moves, the whole gallery or only what the candidate could not read. `max_hidden`:
    how many items that can be read now the move may make unreadable.
    """

    update_key: str
    generation: str
    decision: str
    fraction: float
    order: str
    before_move: Literal["all", "wave_zero"]
    certificates: tuple[tuple[str, str], ...]
    seed: int = 0
    wave_rows: int = 16_384
    unit_rows: int = 4_096
    thresholds: tuple[tuple[str, str, str, float], ...] = ()
    ordered: bool = False
    max_hidden: int = 0

    @property
    def moved_by(self) -> str:
        """What the serving state names as the reason of its move."""
        return f"{self.decision}, ordered by the operator" if self.ordered else self.decision

    @classmethod
    def of(cls, decision: Decision, *, update_key: str, evaluation: str, gallery: "GalleryConfig") -> "Rollout | None":
        """What a decision asks of the gallery; None where nothing moves. Pure.

        A first generation and a full backfill embed everything before the serving state moves; a compatible rollout
        embeds wave 0 and moves, and its fraction is re-indexed afterwards.
        """
        if decision.outcome not in ACTED_ON:
            return None
        whole = decision.outcome in ("BOOTSTRAP", "FULL_BACKFILL")
        return cls(
            update_key=update_key,
            generation=decision.candidate,
            decision=evaluation,
            fraction=1.0 if whole else float(decision.fraction or 0.0),
            order=("random" if whole else decision.order) or gallery.order,
            before_move="all" if whole else "wave_zero",
            certificates=_pairs(decision.certificates),
            thresholds=_thresholds(decision.thresholds),
            seed=gallery.seed,
            wave_rows=gallery.wave_rows,
            unit_rows=gallery.unit_rows,
            max_hidden=gallery.max_hidden_items,
        )

    @classmethod
    def ordered_by_operator(
        cls,
        evidence: Evidence,
        *,
        update_key: str,
        evaluation: str,
        gallery: "GalleryConfig",
        fraction: float | None = None,
    ) -> "Rollout":
        """What the operator orders although the decision is to hold or to wait. Pure.

        Without a fraction: a full backfill. With one: the candidate serves after wave 0, which holds every row that it
        has no certificate to read.
        """
        return cls(
            update_key=update_key,
            generation=evidence.candidate,
            decision=evaluation,
            fraction=1.0 if fraction is None else fraction,
            order="random" if fraction is None else gallery.order,
            before_move="all" if fraction is None else "wave_zero",
            certificates=_pairs(certificates_to_issue(evidence)),
            thresholds=_thresholds(served_with(evidence)),
            seed=gallery.seed,
            wave_rows=gallery.wave_rows,
            unit_rows=gallery.unit_rows,
            max_hidden=gallery.max_hidden_items,
            ordered=True,
        )


def _pairs(certificates: Sequence[CertificateToIssue]) -> tuple[tuple[str, str], ...]:
    return tuple((certificate.query_generation, certificate.gallery_generation) for certificate in certificates)


def _thresholds(thresholds: Sequence[ThresholdToServe]) -> tuple[tuple[str, str, str, float], ...]:
    return tuple((each.consumer, each.query_generation, each.gallery_generation, each.threshold) for each in thresholds)


def prepare(workspace: Workspace, rollout: Rollout, class_distance: ClassDistance | None = None) -> Plan:
    """Issue the certificates, protect the generation, store the plan; called again, it returns the stored plan.

    From here until the plan has ended or is abandoned, nothing that the generation can read is collected: the serving
    state names it before the gallery is looked at, and a collection under way looks at the serving state again.
    """
    refuse_variant(workspace.registry, f"planning a re-index with {rollout.generation}", rollout.generation)
    plan_id = f"{rollout.update_key}-{rollout.generation}" + ("-ordered" if rollout.ordered else "")
    # Before anything may be read: a hit never has the threshold of another generation.
    workspace.registry.set_thresholds(rollout.thresholds, decision=rollout.decision, generation=rollout.generation)
    workspace.registry.certify(rollout.certificates, reason=rollout.moved_by)
    crash_point("certified")
    _protect(workspace, rollout)
    try:
        return workspace.registry.plan(plan_id)[0]
    except KeyError:
        pass
    with workspace.gallery.lease() as version:
        view = workspace.view(rollout.generation, version)
        first = view.owner < 0
        inputs = OrderInputs(
            random_key_of(view.revisions, rollout.seed),
            view.owner.astype(np.int64),
            class_distance(view) if class_distance is not None else None,
        )
    ranking = rank_items(rollout.order, inputs, first)
    num_first = int(first.sum())
    items = plan_waves(view.revisions, ranking, num_first, rollout.fraction, rollout.wave_rows)
    plan = Plan(
        plan_id=plan_id,
        generation=rollout.generation,
        order=rollout.order,
        seed=rollout.seed,
        fraction=rollout.fraction,
        num_items=items.num_rows,
        num_wave_zero=num_first,
        num_waves=len(items["wave"].unique()),
        before_move=rollout.before_move,
        decision=rollout.decision,
        ordered=rollout.ordered,
    )
    workspace.registry.save_plan(plan, items)
    crash_point("plan-saved")
    return plan


def _protect(workspace: Workspace, rollout: Rollout) -> None:
    """Name the generation in the serving state; a plan of another one that never moved is superseded."""
    registry = workspace.registry

    def change(serving: ServingState) -> dict[str, Any] | None:
        if _has_moved(registry.serving_history(), rollout):
            return None
        changes: dict[str, Any] = {} if serving.prepared == rollout.generation else {"prepared": rollout.generation}
        if serving.active_plan is not None:
            planned = registry.plan_generation(serving.active_plan)
            if planned not in (serving.champion, rollout.generation):
                changes["active_plan"] = None
        return changes or None

    registry.change_serving(change)
    workspace.fence()
    crash_point("protected")


def _has_moved(history: Sequence[ServingState], rollout: Rollout) -> bool:
    return any(state.champion == rollout.generation and state.moved_by == rollout.moved_by for state in history)


def embed_before_move(
    workspace: Workspace, rollout: Rollout, plan: Plan, *, on_rows: Callable[[int], None] | None = None
) -> ReindexReport:
    """Embed what must be there before the serving state moves: wave 0, or the whole gallery in a full backfill."""
    history = workspace.registry.serving_history()
    if _has_moved(history, rollout) or (history and history[-1].champion == rollout.generation):
        return ReindexReport()
    embed = workspace.embed_with(rollout.generation)
    items = workspace.registry.plan(plan.plan_id)[1]
    if plan.before_move == "all":
        # From here on ingest writes the candidate's vectors too: the backfill has no moving end.
        workspace.registry.change_serving(lambda serving: _begin(serving, rollout, plan))
        with workspace.gallery.take_lease() as lease:
            report = carry_out(
                workspace.gallery,
                rollout.generation,
                items,
                embed,
                unit_rows=rollout.unit_rows,
                still_wanted=lambda: _follow(lease),
                on_rows=on_rows,
            )
            # What arrived between the plan and the move of `active_plan` above.
            late = embed_missing(workspace.gallery, rollout.generation, embed, unit_rows=rollout.unit_rows)
        return report.plus(late)
    if not plan.num_wave_zero:
        return ReindexReport()
    with workspace.gallery.take_lease():
        return carry_out(
            workspace.gallery, rollout.generation, items, embed, waves=[0], unit_rows=rollout.unit_rows, on_rows=on_rows
        )


def _follow(lease: Lease) -> bool:
    """Each wave reads the newest version, and it stays readable while the wave goes on."""
    lease.follow()
    return True


def _begin(serving: ServingState, rollout: Rollout, plan: Plan) -> dict[str, Any] | None:
    if serving.champion == rollout.generation or serving.active_plan == plan.plan_id:
        return None
    return {"active_plan": plan.plan_id, "moved_by": rollout.moved_by}


def promote(workspace: Workspace, rollout: Rollout, plan: Plan, *, champion: str | None) -> ServingState:
    """Move the serving state to the rollout's generation; a move made before is found and not repeated.

    What can be read now and could not be any more is embedded first; bookkeeping that moves the serving state at the
    same moment does no harm.

    Raises:
        MoveRefusedError: items that can be read now would become unreadable, whatever was tried; nothing was moved.
        ServingMovedError: the champion is no longer the one that the decision was about.
    """
    registry = workspace.registry
    failures: dict[str, str] = {}

    def change(serving: ServingState) -> dict[str, Any] | None:
        if _has_moved(registry.serving_history(), rollout):
            return None  # Also after a rollback: a promotion taken back is not repeated by resuming its update.
        if serving.champion != champion:
            raise ServingMovedError(
                f"promoting {rollout.generation}: the decision was about champion {champion}, found {serving.champion} "
                "(another update finished first); run 'graceful update' again"
            )
        return {
            "champion": rollout.generation,
            "previous": champion,
            "active_plan": None if plan.before_move == "all" else plan.plan_id,
            "prepared": None,
            "left": None,
            "moved_by": rollout.moved_by,
        }

    def mend(found: Comparison) -> None:
        report = embed_hidden(workspace, rollout, found)
        failures.update(report.failures)

    if change(registry.serving()) is not None:
        # A plan of another generation may have been prepared since: protected again, before anybody looks at the items.
        _protect(workspace, rollout)
    state = move(
        workspace,
        rollout.generation,
        change,
        act=f"promoting {rollout.generation}",
        remedy="make the images readable and run 'graceful update' again, which goes on, or allow the loss with "
        "gallery.max_hidden_items",
        allowed=rollout.max_hidden,
        mend=mend,
        num_mends=_NUM_MENDS,
        reasons=lambda: _first(failures),
    )
    registry.record(Promoted(), update_key=rollout.update_key, generation=rollout.generation)
    return state


def embed_hidden(workspace: Workspace, rollout: Rollout, found: Comparison) -> ReindexReport:
    """Embed what a move would hide, or everything that a first generation cannot read."""
    chosen = found.then.unreadable() if found.serves_nothing else found.hidden
    return embed_missing(
        workspace.gallery,
        rollout.generation,
        workspace.embed_with(rollout.generation),
        revisions=found.then.revisions[chosen],
        unit_rows=rollout.unit_rows,
    )


def _first(failures: dict[str, str]) -> str:
    return "; ".join(f"{item_id}: {reason}" for item_id, reason in sorted(failures.items())[:_NUM_REASONS])


def continue_plan(
    workspace: Workspace, *, unit_rows: int = 4_096, on_rows: Callable[[int], None] | None = None
) -> ReindexReport:
    """Carry out the active plan of the champion to its end; stops before a wave when another plan took its place."""
    serving = workspace.registry.serving()
    if serving.active_plan is None:
        if serving.champion is None:
            return ReindexReport()
        return _embed_unreadable(workspace, serving.champion, unit_rows, on_rows)
    plan, items = workspace.registry.plan(serving.active_plan)
    if plan.generation != serving.champion:
        # A full backfill that has not moved yet belongs to its update.
        return ReindexReport()
    embed = workspace.embed_with(plan.generation)
    # Unreadable items first: what was ingested while the serving state moved and cannot be read by the new champion.
    with workspace.gallery.take_lease() as lease:
        report = _embed_unreadable(workspace, plan.generation, unit_rows, on_rows)
        report = report.plus(
            carry_out(
                workspace.gallery,
                plan.generation,
                items,
                embed,
                unit_rows=unit_rows,
                still_wanted=lambda: _follow(lease) and workspace.registry.serving().active_plan == plan.plan_id,
                on_rows=on_rows,
            )
        )
    if not report.superseded:
        # An image that changed meanwhile has a new revision, which no plan names.
        report = report.plus(_embed_unreadable(workspace, plan.generation, unit_rows, on_rows))
        _end_plan(workspace, plan)
    return report


def _embed_unreadable(
    workspace: Workspace, generation: str, unit_rows: int, on_rows: Callable[[int], None] | None
) -> ReindexReport:
    """Embed what a generation cannot read at all."""
    view = workspace.view(generation)
    unreadable = view.revisions[view.unreadable()]
    if not len(unreadable):
        return ReindexReport()
    embed = workspace.embed_with(generation)
    return embed_missing(
        workspace.gallery, generation, embed, revisions=unreadable, unit_rows=unit_rows, on_rows=on_rows
    )


def _end_plan(workspace: Workspace, plan: Plan) -> None:
    """Say that a plan has ended. Gives way: where another plan or a rollback took its place, there is nothing to do."""
    workspace.registry.change_serving(
        lambda serving: {"active_plan": None} if serving.active_plan == plan.plan_id else None
    )
    workspace.registry.record(PlanCompleted(plan=plan.plan_id), generation=plan.generation)
