"""From the verdict to what is served: the second half of every update, whatever made the candidate. Plain Python.

`decide_and_act` is called by `order.update`, which trains; by the demo, whose encoders are synthetic; and by tests.
The decision is recorded before it is published, and published before anything acts on it; certificates and the plan
come before vectors, and the serving state moves last. Each step finds its own earlier output and goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from graceful.evaluation.decision import Decision
from graceful.flows.runtime.progress import Progress, SilentProgress
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.settings.rollout import RolloutConfig
from graceful.flows.store.approvals import Approval, answer, approval_of, ask
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.store.events import Decided, Overridden, Promoted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import (
    ClassDistance,
    Rollout,
    continue_plan,
    embed_before_move,
    prepare,
    promote,
)
from graceful.flows.update.serving import abandon, operator
from graceful.indexing.maintenance import Collection, collect
from graceful.indexing.reindex import ReindexReport

T = TypeVar("T")


class Step(Protocol):
    """How a step is carried out: `act` is called once, and its result is the step's."""

    def __call__(self, name: str, act: Callable[[], T]) -> T:
        """Carry out a step of this name."""


def plain(name: str, act: Callable[[], T]) -> T:  # noqa: ARG001
    """Carry out a step, and nothing around it."""
    return act()


@dataclass(frozen=True)
class Order:
    """What the operator wants carried out where the decision serves nothing new.

    `fraction` None: a full backfill; else the candidate serves after wave 0, and so much is re-indexed afterwards.
    """

    reason: str
    fraction: float | None = None

    @property
    def ordered(self) -> str:
        """What is ordered, as the lineage names it."""
        return "FULL_BACKFILL" if self.fraction is None else f"COMPATIBLE_ROLLOUT {self.fraction:.0%}"


@dataclass(frozen=True)
class Case:
    """A candidate before the gate, and what only the caller knows about it.

    `champion`: who served when the case was opened; the move is refused if it is another by then. `judge` decides and
    records the decision, or finds the recorded one. `publish` is called as soon as a decision is recorded and once more
    at the end; `conclude` writes the last lines of the lineage. `approval`: which decisions wait for a person.
    """

    workspace: Workspace
    update_key: str
    champion: str | None
    gallery: GalleryConfig
    judge: Callable[[], tuple[Decided, Evaluation]]
    publish: Callable[[Decided, Evaluation], object]
    conclude: Callable[[Decision], object]
    progress: Progress = field(default_factory=SilentProgress)
    class_distance: ClassDistance | None = None
    approval: RolloutConfig = field(default_factory=RolloutConfig)


def decide_and_act(
    case: Case,
    *,
    do: Step = plain,
    order: Order | None = None,
    settled: Callable[[], object] = lambda: None,
) -> tuple[Decided, Evaluation, ReindexReport]:
    """Judge a candidate and carry the decision out; a decision to hold is carried out by moving nothing.

    A decision that waits for a person moves nothing either, and nothing is concluded: called again after an answer, it
    is carried out or, rejected or not answered in time, held.

    Args:
        case: What is decided about.
        do: What surrounds each step.
        order: The operator's, where the decision serves nothing new; decision and order both stand in the lineage.
        settled: Called when the serving state has moved, or will not: the re-index after it excludes nobody.
    """
    decided, evaluation = do("judge", case.judge)
    # Published as soon as it is known: the waves that follow may take hours, or be killed.
    do("publish the decision", lambda: case.publish(decided, evaluation))
    report = ReindexReport()
    rollout = _rollout(case, decided, evaluation, order)
    approval = None if rollout is None or rollout.ordered else _approval(case, decided, evaluation.decision)
    if approval is not None and approval.word is None:
        settled()
        return decided, evaluation, report
    if rollout is not None and (approval is None or approval.word == "accepted"):
        report = do("embed before the move", lambda: _embed_before_move(case, rollout))
        do("move serving state", lambda: _move(case, rollout))
    else:
        abandon(case.workspace)  # what was prepared before and never moved: this decision takes its place
    settled()
    report = report.plus(do("re-index", lambda: carry_on(case.workspace, case.gallery, case.progress)))
    do("conclude", lambda: case.conclude(evaluation.decision))
    do("publish", lambda: case.publish(decided, evaluation))
    # A first generation that is held leaves nobody whose items are kept, and nothing to collect.
    if case.gallery.collect_after_update and case.workspace.kept(case.gallery.supported_query_generations):
        do("collect", lambda: _collect(case))
    return decided, evaluation, report


def carry_on(workspace: Workspace, gallery: GalleryConfig, progress: Progress) -> ReindexReport:
    """Re-index up to the decided fraction, wave by wave, as long as the plan is the active one."""
    registry = workspace.registry
    serving = registry.serving()
    rows = registry.plan(serving.active_plan)[0].num_items if serving.active_plan else 0
    with progress.track("re-indexing", rows) as advance:
        return continue_plan(workspace, unit_rows=gallery.unit_rows, on_rows=advance)


def record_order(workspace: Workspace, decision: Decision, update_key: str, ordered: str, reason: str) -> None:
    """Write into the lineage that the operator orders what was not decided."""
    workspace.registry.record(
        Overridden(decided=decision.outcome, ordered=ordered, reason=reason, by=operator()),
        update_key=update_key,
        generation=decision.candidate,
    )


def _rollout(case: Case, decided: Decided, evaluation: Evaluation, order: Order | None) -> Rollout | None:
    key, name, gallery = case.update_key, decided.evaluation, case.gallery
    rollout = Rollout.of(evaluation.decision, update_key=key, evaluation=name, gallery=gallery)
    if rollout is not None or order is None:
        return rollout
    record_order(case.workspace, evaluation.decision, key, order.ordered, order.reason)
    return Rollout.ordered_by_operator(
        evaluation.evidence, update_key=key, evaluation=name, gallery=gallery, fraction=order.fraction
    )


def _approval(case: Case, decided: Decided, decision: Decision) -> Approval | None:
    """What a person says to a decision that would move something; None where nobody is asked."""
    registry, key = case.workspace.registry, case.update_key
    known = approval_of(registry, decided.evaluation)
    if any(event.generation == decision.candidate for event in registry.events(Promoted, key)):
        return None  # it serves: what is left is to carry its plan to its end
    if known is not None and known.is_late:
        return answer(registry, known, "expired", by="", reason="not accepted in time")
    if not case.approval.asks_for(decided.outcome):
        if known is None or known.word is not None:
            return known
        return answer(registry, known, "accepted", by=operator(), reason="rollout.approval asks nobody any more")
    return known or ask(
        registry,
        decided,
        update_key=key,
        generation=decision.candidate,
        champion=decision.champion,
        hours=case.approval.approval_hours,
    )


def _embed_before_move(case: Case, rollout: Rollout) -> ReindexReport:
    """Issue certificates, store the plan, and embed what must be there before the serving state moves."""
    plan = prepare(case.workspace, rollout, case.class_distance if rollout.order == "class_distance" else None)
    rows = plan.num_items if plan.before_move == "all" else plan.num_wave_zero
    with case.progress.track(f"embedding with {rollout.generation} before the move", rows) as advance:
        return embed_before_move(case.workspace, rollout, plan, on_rows=advance)


def _collect(case: Case) -> Collection:
    """Drop what nobody can read. The newest generation keeps its own, whatever was decided: it may wait for a word."""
    workspace, supported = case.workspace, case.gallery.supported_query_generations
    return collect(workspace.gallery, lambda: workspace.protected(supported))


def _move(case: Case, rollout: Rollout) -> None:
    """Move the serving state: last, by compare-and-swap, naming the decision."""
    promote(case.workspace, rollout, prepare(case.workspace, rollout), champion=case.champion)
