"""The order of an update: the only place where its steps stand one after the other. Plain Python.

Everything that updates a workspace calls `update`: the Prefect flow, the command line, a replay, and every test. What
surrounds a step (a task of the flow UI, nothing at all) is handed in as `step`. Each step finds its own earlier output
and goes on, so that an update killed anywhere and called again ends where one ends that was never killed. A decision
to hold is an update that went well.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from graceful.evaluation.decision import Decision
from graceful.files import crash_point, join
from graceful.flows.runtime.session import Session
from graceful.flows.store.claim import claim
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import Decided, Overridden
from graceful.flows.update.conclude import completed, conclude, release_when_due
from graceful.flows.update.freeze import Inputs, freeze
from graceful.flows.update.judge import class_distance, judge, recorded
from graceful.flows.update.publish import publish
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, operator, prepare, promote
from graceful.flows.update.train import embed_evaluation, extend_cache, train_candidate, train_paragon
from graceful.indexing.reindex import ReindexReport

T = TypeVar("T")


class Step(Protocol):
    """How a step is carried out: `act` is called once, and its result is the step's."""

    def __call__(self, name: str, act: Callable[[], T]) -> T:
        """Carry out a step of this name."""


class UpdateResult(BaseModel):
    """What an update came to. `fraction` is the decided one; `repeated`: it had been decided and done before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    update_key: str
    candidate: str
    outcome: str
    summary: str
    champion: str | None
    fraction: float | None
    evaluation: str
    report: str
    num_training_images: int
    num_classes: int
    num_unreadable: int
    num_dropped: int
    rows_reindexed: int
    failures: int
    paragon: str | None = None
    repeated: bool = False


def plain(name: str, act: Callable[[], T]) -> T:  # noqa: ARG001
    """Carry out a step, and nothing around it."""
    return act()


def update(
    session: Session,
    *,
    again: bool = False,
    adopted: str | None = None,
    wait_s: float = 0.0,
    claimed: bool = False,
    serve_anyway: bool = False,
    step: Step = plain,
) -> UpdateResult:
    """Train a candidate, judge it, decide, and carry the decision out.

    The claim of the workspace is held from the first step to the move; the re-index after it excludes nobody.

    Args:
        session: Workspace, configuration, cluster, encoders, progress.
        again: Judge anew even if these very inputs were decided about before.
        adopted: A generation from elsewhere that is judged instead of training one.
        wait_s: How long to wait for another update of this workspace to end.
        claimed: The caller holds the workspace's claim already (a replay).
        serve_anyway: Where the decision serves nothing new, order a full backfill; decision and order both stand in the
            lineage.
        step: What surrounds each step.
    """

    def do(name: str, act: Callable[[], T]) -> T:
        session.progress.say_step(name)
        result = step(name, act)
        crash_point(f"after {name}")
        return result

    with nullcontext() if claimed else claim(session.workspace.root, "an update", wait_s=wait_s):
        release_when_due(session)
        inputs = do("freeze inputs", lambda: freeze(session, again=again, adopted=adopted))
        known = recorded(inputs)
        if known is not None and completed(inputs):
            evaluation = read_evaluation(inputs.workspace.evaluation_uri(known.evaluation))
            return _result(inputs, known, evaluation, ReindexReport(), repeated=True)
        references = [
            do(f"extend cache of {name}", lambda name=name: extend_cache(inputs, name))  # type: ignore[misc]
            for name in inputs.frozen.predecessors
        ]
        candidate = do("train candidate", lambda: train_candidate(inputs, references))
        paragon = None
        if session.config.train_paragon and inputs.frozen.predecessors:  # the first generation is its own paragon
            paragon = do("train paragon", lambda: train_paragon(inputs))
        for name in (*inputs.frozen.generations, candidate, *([paragon] if paragon else [])):
            do(f"embed evaluation set with {name}", lambda name=name: embed_evaluation(inputs, name))  # type: ignore[misc]
        decided, evaluation = do("judge", lambda: judge(inputs, candidate, paragon))
        # Published as soon as it is known: the waves that follow may take hours, or be killed.
        do("publish the decision", lambda: publish(session, decided, evaluation))
        report = ReindexReport()
        rollout = _rollout(inputs, decided, evaluation, serve_anyway)
        if rollout is not None:
            report = do("embed before the move", lambda: _embed_before_move(inputs, rollout))
            do("move serving state", lambda: _move(inputs, rollout))
    report = report.plus(do("re-index", lambda: carry_on(session)))
    do("conclude", lambda: conclude(inputs, evaluation.decision))
    do("publish", lambda: publish(session, decided, evaluation))
    return _result(inputs, decided, evaluation, report)


def carry_on(session: Session) -> ReindexReport:
    """Re-index up to the decided fraction, wave by wave, as long as the plan is the active one."""
    registry = session.workspace.registry
    serving = registry.serving()
    rows = registry.plan(serving.active_plan)[0].num_items if serving.active_plan else 0
    with session.progress.track("re-indexing", rows) as advance:
        return continue_plan(session.workspace, unit_rows=session.config.gallery.unit_rows, on_rows=advance)


def _rollout(inputs: Inputs, decided: Decided, evaluation: Evaluation, serve_anyway: bool) -> Rollout | None:
    frozen, gallery = inputs.frozen, inputs.session.config.gallery
    key, name = frozen.update_key, decided.evaluation
    rollout = Rollout.of(evaluation.decision, update_key=key, evaluation=name, gallery=gallery)
    if rollout is not None or not serve_anyway:
        return rollout
    record_order(inputs.session, evaluation.decision, key, "FULL_BACKFILL", "the history serves every generation")
    return Rollout.ordered_by_operator(evaluation.evidence, update_key=key, evaluation=name, gallery=gallery)


def record_order(session: Session, decision: Decision, update_key: str, ordered: str, reason: str) -> None:
    """Write into the lineage that the operator orders what was not decided."""
    session.workspace.registry.record(
        Overridden(decided=decision.outcome, ordered=ordered, reason=reason, by=operator()),
        update_key=update_key,
        generation=decision.candidate,
    )


def _embed_before_move(inputs: Inputs, rollout: Rollout) -> ReindexReport:
    """Issue certificates, store the plan, and embed what must be there before the serving state moves."""
    distance = (lambda view: class_distance(inputs, view)) if rollout.order == "class_distance" else None
    plan = prepare(inputs.workspace, rollout, distance)
    rows = plan.num_items if plan.before_move == "all" else plan.num_wave_zero
    label = f"embedding with {rollout.generation} before the move"
    with inputs.session.progress.track(label, rows) as advance:
        return embed_before_move(inputs.workspace, rollout, plan, on_rows=advance)


def _move(inputs: Inputs, rollout: Rollout) -> None:
    """Move the serving state: last, by compare-and-swap, naming the decision."""
    promote(inputs.workspace, rollout, prepare(inputs.workspace, rollout), champion=inputs.frozen.champion)


def _result(
    inputs: Inputs, decided: Decided, evaluation: Evaluation, report: ReindexReport, *, repeated: bool = False
) -> UpdateResult:
    location = inputs.workspace.evaluation_uri(decided.evaluation)
    decision, frozen = evaluation.decision, inputs.frozen
    return UpdateResult(
        update_key=frozen.update_key,
        candidate=decision.candidate,
        outcome=decision.outcome,
        summary=decision.summary,
        champion=inputs.registry.serving().champion,
        fraction=decision.fraction,
        evaluation=location,
        report=join(location, "report.html"),
        num_training_images=frozen.num_training_images,
        num_classes=frozen.num_classes,
        num_unreadable=frozen.num_unreadable,
        num_dropped=frozen.num_dropped,
        rows_reindexed=report.embedded,
        failures=len(report.failures),
        paragon=decided.paragon,
        repeated=repeated,
    )
