"""The order of an update: what makes a candidate, then `act.decide_and_act`. Plain Python; there is no other order.

Everything that updates a workspace calls `update`: the Prefect flow, the command line, a replay, and every test. What
surrounds a step (a task of the flow UI, nothing at all) is handed in as `step`. Each step finds its own earlier output
and goes on, so that an update killed anywhere and called again ends where one ends that was never killed. A decision
to hold is an update that went well.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from graceful.evaluation.decision import Decision
from graceful.files import crash_point, join
from graceful.flows.runtime.notify import Kind, Notice, tell
from graceful.flows.runtime.preflight import require_nodes
from graceful.flows.runtime.progress import Artifact
from graceful.flows.runtime.session import Session
from graceful.flows.settings.rollout import RolloutConfig
from graceful.flows.store.approvals import Approval, answer, approval_of
from graceful.flows.store.claim import claim
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import Decided, Overridden, Promoted
from graceful.flows.store.reports import REPORT_FILE, report_address
from graceful.flows.store.variants import refuse_variant
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.act import Case, Order, Step, carry_on, decide_and_act, plain
from graceful.flows.update.assess import mix_drift
from graceful.flows.update.conclude import completed, conclude, release_when_due
from graceful.flows.update.foresee import foresee
from graceful.flows.update.freeze import Inputs, freeze
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.judge import class_distance, judge, recorded
from graceful.flows.update.publish import publish, publish_newest, question
from graceful.flows.update.rollout import ACTED_ON
from graceful.flows.update.serving import operator, refuse_retired
from graceful.flows.update.train import embed_evaluation, extend_cache, train_candidate, train_paragon
from graceful.flows.update.variants import make_variants
from graceful.indexing.reindex import ReindexReport
from graceful.training.probes import EncoderChangedError

T = TypeVar("T")
_HISTORY = "the history serves every generation"


class UpdateResult(BaseModel):
    """What an update came to. `fraction` is the decided one; `repeated`: it had been decided and done before.

    `approval`: where a person is asked, whether the decision waits, or what was said to it; `word` is that in one line.
    """

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
    approval: Literal["waiting", "accepted", "rejected", "expired"] | None = None
    word: str = ""

    @property
    def is_held(self) -> bool:
        """Whether the gate or a person decided to leave everything as it is."""
        return self.outcome == "HOLD" or self.approval in ("rejected", "expired")


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
        try:
            result = step(name, act)
        except EncoderChangedError as error:
            _tell(session, Notice("encoder", str(error), str(error)))
            raise
        crash_point(f"after {name}")
        return result

    def make_all() -> None:
        if session.config.variants and session.workspace.registry.serving().champion is not None:
            give_variants(session, list(session.config.variants), wait_s=wait_s, claimed=claimed, step=do)

    with ExitStack() as held:
        if not claimed:
            held.enter_context(claim(session.workspace.root, "an update", wait_s=wait_s))
        release_when_due(session)
        inputs = do("freeze inputs", lambda: freeze(session, again=again, adopted=adopted))
        session.progress.entitle(f"{session.config.name} g{inputs.frozen.ordinal:03d}")
        known = recorded(inputs)
        if known is not None and completed(inputs):
            evaluation = read_evaluation(inputs.workspace.evaluation_uri(known.evaluation))
            held.close()
            # Decided and done; what cannot be read since (a damaged file that was dropped) is embedded all the same.
            report = do("re-index", lambda: carry_on(session.workspace, session.config.gallery, session.progress))
            if not claimed:
                _tell_what_is_unreadable(session)
            make_all()
            return _result(inputs, known, evaluation, report, repeated=True)
        if known is None:
            foresee(inputs)
            if session.config.cluster.num_workers or session.config.cluster.embed_workers:
                require_nodes(session.cluster, session.workspace.root, session.progress.say)
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

        def settled() -> None:
            held.close()
            if not claimed:  # a history that is replayed is no news
                _tell_what_was_decided(inputs, candidate)

        case = Case(
            workspace=session.workspace,
            update_key=inputs.frozen.update_key,
            champion=inputs.frozen.champion,
            gallery=session.config.gallery,
            judge=lambda: judge(inputs, candidate, paragon),
            publish=lambda *made: publish(
                session.workspace,
                *made,
                shows=session.config.report,
                name=session.config.name,
                progress=session.progress,
            ),
            conclude=lambda decision: _conclude(inputs, decision),
            progress=session.progress,
            class_distance=lambda view: class_distance(session.workspace, view),
            # A history that is replayed is nobody's production.
            approval=RolloutConfig() if claimed else session.config.rollout,
        )
        decided, evaluation, report = decide_and_act(
            case, do=do, order=Order(_HISTORY) if serve_anyway else None, settled=settled
        )
    if not claimed:
        _tell_what_is_unreadable(session)
    make_all()
    result = _result(inputs, decided, evaluation, report)
    if result.approval == "waiting":
        asked = Artifact(
            f"{session.config.name}-approval", "A decision waits for you", question(evaluation, result.word)
        )
        session.progress.show(lambda: [asked])
    return result


def give_variants(
    session: Session, names: Sequence[str], *, wait_s: float = 0.0, claimed: bool = False, step: Step = plain
) -> dict[str, str]:
    """Train and judge variants of the generation that serves, and show them in its report; name -> id. Killed, it goes
    on.

    Raises: ConfigError, UpdateInProgressError.
    """
    workspace, config = session.workspace, session.config
    with ExitStack() as held:
        if not claimed:
            held.enter_context(claim(workspace.root, f"making {', '.join(names)}", wait_s=wait_s))
        found = make_variants(session, names, step)
    champion = workspace.registry.serving().champion
    if champion is not None:
        shown = partial(publish_newest, workspace, champion, config.report, config.name, session.progress)
        step("publish variants", shown)
    return found


def accept(session: Session, generation: str, order: Order, *, by: str = "", step: Step = plain) -> Decided:
    """Carry out the operator's word on a candidate that the gate held, left open, or waits with. Nothing is trained.

    The same way as after a decision: certificates, wave 0 or everything, the move, the waves, the report. Killed and
    called again, it goes on. `by`: who says so, if not who runs this.

    Raises:
        MoveRefusedError: nobody decided about the generation, the gate rolls it out itself, it serves or has served by
            this decision, it was retired, or another one served when it was judged, or the gallery has changed since.
        AlreadyAnsweredError: it waited for a person, and was rejected or not accepted in time.
    """
    workspace, registry = session.workspace, session.workspace.registry
    refuse_variant(registry, f"accepting {generation}", generation)
    found = [event for event in registry.events(Decided) if event.generation == generation]
    if not found:
        raise MoveRefusedError(
            f"accepting {generation}: expected a decision about it, found none; run 'graceful update' to judge it"
        )
    decided, key = found[-1].payload, found[-1].update_key
    evaluation = read_evaluation(workspace.evaluation_uri(decided.evaluation))
    champion = evaluation.decision.champion
    with ExitStack() as held:
        held.enter_context(claim(workspace.root, f"accepting {generation}"))
        asked = approval_of(registry, decided.evaluation)
        _refuse(workspace, generation, key, evaluation.decision, decided.evaluation, order, asked)
        if asked is not None:
            _approve(session, asked, evaluation, by=by or operator(), reason=order.reason)
        case = Case(
            workspace=workspace,
            update_key=key,
            champion=champion,
            gallery=session.config.gallery,
            judge=lambda: (decided, evaluation),
            publish=lambda *made: publish(
                workspace, *made, shows=session.config.report, name=session.config.name, progress=session.progress
            ),
            conclude=lambda decision: conclude(
                workspace, key, decision, supported=session.config.gallery.supported_query_generations
            ),
            progress=session.progress,
            class_distance=lambda view: class_distance(workspace, view),
            approval=session.config.rollout,
        )
        # What waits is carried out as it was decided; anything else is the operator's order beside the decision.
        decide_and_act(case, do=step, order=None if asked is not None else order, settled=held.close)
    return decided


def answer_in_form(session: Session, asked: Approval, *, accepts: bool, by: str, reason: str) -> Approval:
    """Record what a person says to a decision that waits, for an update that follows to carry it out.

    Raises as `accept`.
    """
    workspace = session.workspace
    if not accepts:
        return answer(workspace.registry, asked, "rejected", by=by, reason=reason)
    act = f"accepting {asked.generation}"
    refuse_retired(workspace, act, asked.generation)
    _refuse_other_champion(workspace, act, asked.generation, asked.champion)
    evaluation = read_evaluation(workspace.evaluation_uri(asked.evaluation))
    return _approve(session, asked, evaluation, by=by, reason=reason)


def _approve(session: Session, asked: Approval, evaluation: Evaluation, *, by: str, reason: str) -> Approval:
    """Record that a person accepts what was decided, unless the gallery it was decided about has changed too much."""
    drift, limit = mix_drift(session.workspace, evaluation), session.config.gallery.max_mix_drift
    if asked.word is None and drift > limit:
        raise MoveRefusedError(
            f"accepting {asked.generation}: expected the gallery that it was judged on, found {drift:.1%} of it with "
            f"other vectors, above {limit:.1%}; run 'graceful update', which judges it anew and asks again"
        )
    return answer(session.workspace.registry, asked, "accepted", by=by, reason=reason)


def _refuse(
    workspace: Workspace,
    generation: str,
    key: str,
    decision: Decision,
    evaluation: str,
    order: Order,
    asked: Approval | None,
) -> None:
    """Raise MoveRefusedError where accepting would do nothing, or not what was judged. One that was killed goes on."""
    registry = workspace.registry
    serving, act = registry.serving(), f"accepting {generation}"
    finished = any(event.generation == generation for event in registry.events(Promoted, key))
    if serving.champion == generation and serving.active_plan is None and finished:
        raise MoveRefusedError(f"{act}: expected another generation to serve, found that it serves already")
    # A move names the evaluation that it carries out, and after a comma who ordered it.
    moved = any(
        state.champion == generation and state.moved_by.partition(",")[0] == evaluation
        for state in registry.serving_history()
    )
    if moved and serving.champion != generation:
        raise MoveRefusedError(
            f"{act}: expected a candidate that has not served, found that it has, and was taken back; run 'graceful "
            f"promote {generation} --reason ...'"
        )
    if decision.outcome in ACTED_ON and asked is None:
        raise MoveRefusedError(
            f"{act}: expected a decision to hold or an open one, found {decision.outcome}; run 'graceful update', "
            "which carries it out"
        )
    if asked is not None and order.fraction is not None:
        raise MoveRefusedError(
            f"{act}: expected no --fraction, found {order.fraction:g}: what waits is carried out as it was decided, "
            f"{decision.outcome}; leave it out"
        )
    refuse_retired(workspace, act, generation)
    _refuse_other_champion(workspace, act, generation, decision.champion)
    for event in registry.events(Overridden, key):
        if event.generation == generation and event.payload.ordered != order.ordered:
            raise MoveRefusedError(
                f"{act}: expected the order that is under way, {event.payload.ordered}, found {order.ordered}; give "
                "the same --fraction"
            )


def _refuse_other_champion(workspace: Workspace, act: str, generation: str, champion: str | None) -> None:
    serving = workspace.registry.serving()
    if serving.champion not in (generation, champion):
        raise MoveRefusedError(
            f"{act}: expected champion {champion}, about which it was judged, found {serving.champion}; run "
            "'graceful update --again' to judge it against that"
        )


def _conclude(inputs: Inputs, decision: Decision) -> None:
    session = inputs.session
    compute_s = session.compute_s + session.encoders.busy_s - inputs.busy_before_s
    supported = session.config.gallery.supported_query_generations
    conclude(session.workspace, inputs.frozen.update_key, decision, compute_s, supported)


def _tell_what_was_decided(inputs: Inputs, candidate: str) -> None:
    """Tell that a decision was made and acted on, that it holds, or that it waits; before the waves that may follow."""
    decided, registry = recorded(inputs), inputs.registry
    assert decided is not None
    asked = approval_of(registry, decided.evaluation)
    held = decided.outcome == "HOLD" or (asked is not None and asked.word in ("rejected", "expired"))
    waits = asked is not None and asked.word is None
    details = {
        "outcome": decided.outcome,
        "champion": registry.serving().champion,
        "evaluation": inputs.workspace.evaluation_uri(decided.evaluation),
        "report": report_address(inputs.session.config.report.url, decided.evaluation),
        "approval": None if asked is None else asked.said,
    }
    key = f"{decided.evaluation}/{None if asked is None else asked.word}"
    kind: Kind = "awaiting_approval" if waits else "hold" if held else "decision"
    _tell(inputs.session, Notice(kind, decided.summary, key, candidate, details))


def _tell_what_is_unreadable(session: Session) -> None:
    """Tell where more items cannot be read than may be so untold."""
    champion, limit = session.workspace.registry.serving().champion, session.config.notify.max_unreadable_share
    if champion is None:
        return
    view = session.workspace.view(champion)
    unreadable = len(view.unreadable())
    if unreadable > limit * view.num_items:
        summary = f"{unreadable:,} of {view.num_items:,} items cannot be read by {champion}"
        details = {"unreadable": unreadable, "items": view.num_items}
        _tell(session, Notice("unreadable", summary, f"{champion}/{unreadable}", champion, details))


def _tell(session: Session, notice: Notice) -> None:
    for line in tell(session.workspace.root, session.config.name, session.config.notify, notice):
        session.progress.say(f"Not told of this ({notice.kind}): {line}; the update goes on.")


def _result(
    inputs: Inputs, decided: Decided, evaluation: Evaluation, report: ReindexReport, *, repeated: bool = False
) -> UpdateResult:
    location = inputs.workspace.evaluation_uri(decided.evaluation)
    decision, frozen = evaluation.decision, inputs.frozen
    asked = approval_of(inputs.registry, decided.evaluation)
    return UpdateResult(
        update_key=frozen.update_key,
        candidate=decision.candidate,
        outcome=decision.outcome,
        summary=decision.summary,
        champion=inputs.registry.serving().champion,
        fraction=decision.fraction,
        evaluation=location,
        report=join(location, REPORT_FILE),
        num_training_images=frozen.num_training_images,
        num_classes=frozen.num_classes,
        num_unreadable=frozen.num_unreadable,
        num_dropped=frozen.num_dropped,
        rows_reindexed=report.embedded,
        failures=len(report.failures),
        paragon=decided.paragon,
        repeated=repeated,
        approval=None if asked is None else asked.word or "waiting",
        word="" if asked is None else asked.said,
    )
