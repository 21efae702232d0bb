"""The update flow: train a candidate, judge it against what is served, decide, and carry the decision out.

Each task is one step of `steps` without a branch; the flow's body reads as the order of events. A decision to
hold is a completed run. The claim of the workspace is held from training to decision and move; the re-index that
follows excludes nobody.
"""

from contextlib import nullcontext

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from graceful.files import join
from graceful.flows.runtime.flow_ui import FlowProgress
from graceful.flows.runtime.session import Session, open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.claim import claim
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.update.publish import publish
from graceful.flows.update.rollout import Rollout
from graceful.flows.update.steps import UpdateRun, release_when_due
from graceful.indexing.reindex import ReindexReport


class UpdateResult(BaseModel):
    """What an update came to. `exit_code` is the command line's."""

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


def step(name: str, run_name: str | None = None):  # type: ignore[no-untyped-def]
    """Make a function a task that is neither cached nor retried: the steps themselves know what is done."""
    return task(name=name, task_run_name=run_name or name, cache_policy=NO_CACHE, persist_result=False)


@step("freeze inputs")
def freeze_inputs(session: Session, again: bool, adopted: str | None) -> UpdateRun:
    """Read the data, fix champion, predecessors and evaluation set."""
    return UpdateRun(session, again=again, adopted=adopted)


@step("extend cache", "extend cache of {predecessor}")
def extend_cache(run: UpdateRun, predecessor: str) -> None:
    """Embed new training images with one predecessor."""
    run.extend_cache(predecessor)


@step("train candidate")
def train_candidate(run: UpdateRun) -> str:
    """Train the candidate under one constraint per predecessor."""
    return run.train()


@step("train paragon")
def train_paragon(run: UpdateRun) -> str:
    """Train the unconstrained reference."""
    return run.train_paragon()


@step("embed evaluation set", "embed evaluation set with {generation}")
def embed_evaluation(run: UpdateRun, generation: str) -> int:
    """Embed the evaluation set once with one generation."""
    return run.embed_evaluation(generation)


@step("judge")
def judge(run: UpdateRun, candidate: str, paragon: str | None) -> Evaluation:
    """Measure the states that would be served, and decide."""
    return run.judge(candidate, paragon)


@step("embed before the move")
def embed_before_move(run: UpdateRun, rollout: Rollout) -> ReindexReport:
    """Embed wave 0, or the whole gallery."""
    return run.embed_before_move(rollout)


@step("move serving state")
def move_serving_state(run: UpdateRun, rollout: Rollout) -> None:
    """Compare-and-swap to the candidate."""
    run.move(rollout)


@step("re-index in the background")
def reindex(run: UpdateRun) -> ReindexReport:
    """Carry the plan out, wave by wave."""
    return run.carry_on()


@step("publish")
def publish_evaluation(run: UpdateRun, evaluation: Evaluation) -> str:
    """Write the report and the artifacts."""
    return publish(run, evaluation)


@flow(name="graceful-update", persist_result=False, validate_parameters=True)
def update(workspace: str, again: bool = False, train_paragon: bool | None = None) -> UpdateResult:
    """Train, evaluate, decide, act: one update of a workspace with the configuration that lies in it.

    Args:
        workspace: Folder or URI of the workspace.
        again: Judge anew even if these very data and this configuration were decided about before.
        train_paragon: Also train without constraints; by default what the configuration says.
    """
    overrides = {} if train_paragon is None else {"train_paragon": train_paragon}
    config = load_workspace_config(workspace, overrides)
    with open_session(workspace, config, FlowProgress()) as session:
        # Nobody sits beside a scheduled run: it waits for an update that was started by hand.
        return run_update(session, again=again, wait_s=config.cluster.deadline_hours * 3600)


def run_update(
    session: Session,
    *,
    again: bool = False,
    adopted: str | None = None,
    wait_s: float = 0.0,
    claimed: bool = False,
    serve_anyway: bool = False,
) -> UpdateResult:
    """The body of an update, within a flow.

    `claimed`: the caller holds the workspace's claim already. `serve_anyway`: where the decision serves nothing new,
    the operator orders a full backfill; decision and order both stand in the lineage.
    """
    root = session.workspace.root
    with nullcontext() if claimed else claim(root, "an update", wait_s=wait_s):
        release_when_due(session)
        run = freeze_inputs(session, again, adopted)
        decided = run.decided()
        if decided is not None and run.completed():
            return _result(run, decided, ReindexReport(), repeated=True)
        for predecessor in run.frozen.predecessors:
            extend_cache(run, predecessor)
        candidate = train_candidate(run)
        paragon = None
        if session.config.train_paragon and run.frozen.predecessors:  # the first generation is its own paragon
            paragon = train_paragon(run)
        for generation in (*run.frozen.generations, candidate, *([paragon] if paragon else [])):
            embed_evaluation(run, generation)
        evaluation = judge(run, candidate, paragon)
        report = ReindexReport()
        if run.acts_on(evaluation) or serve_anyway:
            rollout = run.rollout(evaluation) if run.acts_on(evaluation) else run.ordered_backfill(evaluation)
            report = embed_before_move(run, rollout)
            move_serving_state(run, rollout)
    report = report.plus(reindex(run))
    run.conclude(evaluation)
    publish_evaluation(run, evaluation)
    return _result(run, evaluation, report)


def _result(run: UpdateRun, evaluation: Evaluation, report: ReindexReport, *, repeated: bool = False) -> UpdateResult:
    location = run.workspace.evaluation_uri(run.evaluation_id())
    decision = evaluation.decision
    return UpdateResult(
        update_key=run.frozen.update_key,
        candidate=decision.candidate,
        outcome=decision.outcome,
        summary=decision.summary,
        champion=run.registry.serving().champion,
        fraction=decision.fraction,
        evaluation=location,
        report=join(location, "report.html"),
        num_training_images=run.frozen.num_training_images,
        num_classes=run.frozen.num_classes,
        num_unreadable=run.frozen.num_unreadable,
        num_dropped=run.frozen.num_dropped,
        rows_reindexed=report.embedded,
        failures=len(report.failures),
        paragon=run.recorded_paragon(),
        repeated=repeated,
    )
