"""Update, replay, backfill and report as Prefect flows: the order of `update.order`, each step a task of the flow UI.

A run's name, the name of its last state and its tags say what it came to, so that a list of runs reads as a history.
The flow server records and shows; it is not needed. `run_flow` gives what the work came to even if the server dies on
the way, and does the work without it if it does not answer at the start.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

from graceful.errors import GracefulError
from graceful.files import is_remote
from graceful.flows.runtime.flow_ui import FlowProgress, answers, ask_no_more, asking_again
from graceful.flows.runtime.head import FLOW_RUN
from graceful.flows.runtime.progress import Progress, SilentProgress
from graceful.flows.runtime.service import log_runs
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_config, load_workspace_config
from graceful.flows.store.approvals import awaited
from graceful.flows.store.claim import SERVICE_VARIABLE
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update import order
from graceful.flows.update import replay as history
from graceful.flows.update.by_hand import accept_candidate, publish_again
from graceful.flows.update.form import AWAITING_APPROVAL, is_resumed, suspend, word_in_form
from graceful.flows.update.order import Step, UpdateResult
from graceful.flows.update.publish import question
from graceful.flows.update.replay import ReplayResult
from graceful.processes import end_in_time

T = TypeVar("T")
_LONGEST_NAME = 100
_SECONDS_TO_HAND_OVER = 300.0  # the end of a run, its logs and events, to a server that may be gone
NOTHING_NEW = "Nothing new"
"""State of a run that found everything decided and done."""

BESIDE: ContextVar[Progress | None] = ContextVar("graceful_beside", default=None)
"""Where a flow that is run in this process reports to beside the flow UI: the terminal of whoever started it."""


class _Box(Generic[T]):
    """What the work in a flow came to, whatever becomes of the flow run around it."""

    def __init__(self) -> None:
        self.started = False
        self.results: list[T] = []
        self.error: Exception | None = None

    def fill(self, work: Callable[[], T]) -> T:
        self.started = True
        here = FLOW_RUN.set(_address_of_run())
        try:
            self.results.append(work())
        except Exception as error:
            self.error = error
            self._end_soon()
            raise
        finally:
            FLOW_RUN.reset(here)
        self._end_soon()
        return self.results[0]

    def _end_soon(self) -> None:
        """Where somebody waits for a process whose flow server has gone, let it end without asking that for minutes."""
        if _BOX.get() is self and not answers(PREFECT_API_URL.value() or ""):
            ask_no_more()


def _address_of_run() -> str:
    run = FlowRunContext.get()
    api = PREFECT_API_URL.value()
    return "" if run is None or run.flow_run is None or not api else f"{api}/flow_runs/{run.flow_run.id}"


_BOX: ContextVar[_Box[Any] | None] = ContextVar("graceful_box", default=None)


def run_flow(in_flow: Callable[[], object], without: Callable[[], T]) -> T:
    """Call a flow of this module in this process and return what its work came to.

    `without` does the same work outside a flow run, for a flow server that does not answer. An error of the work is
    raised as it is.
    """
    box: _Box[T] = _Box()
    token = _BOX.set(box)
    try:
        with asking_again():
            in_flow()
    except Exception as error:
        if box.error is not None:
            raise box.error from None
        say = (BESIDE.get() or SilentProgress()).say
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not box.started:
            say(f"The flow server does not answer ({why}); the work is done without it.")
            return without()
        if not box.results:
            raise
        say(f"The flow server does not answer ({why}): the run's end is not recorded there. The work is complete.")
    finally:
        _BOX.reset(token)
    return box.results[0]


def as_task(name: str, act: Callable[[], T]) -> T:
    """Carry a step out as a task that is neither cached nor retried: the steps themselves know what is done."""
    return task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)(act)()


@flow(name="graceful-update", persist_result=False, validate_parameters=True)
def update(
    workspace: str,
    again: bool = False,
    train_paragon: bool | None = None,
    adopted: str | None = None,
    wait_hours: float | None = None,
) -> State:
    """Train, evaluate, decide, act: one update of a workspace with the configuration that lies in it.

    Args:
        workspace: Folder or URI of the workspace.
        again: Judge anew even if these very data and this configuration were decided about before.
        train_paragon: Also train without constraints; by default what the configuration says.
        adopted: Id of a generation that came from elsewhere, to be judged instead of training one.
        wait_hours: How long to wait for another update of this workspace to end; by default cluster.deadline_hours.
    """
    with _reporting(workspace) as progress:
        resumed = is_resumed()
        if resumed:
            _record_word(workspace, progress)
        result = (_BOX.get() or _Box[UpdateResult]()).fill(
            lambda: update_plainly(
                workspace, progress, as_task, again and not resumed, train_paragon, adopted, wait_hours
            )
        )
        waits = result.approval == "waiting"
        if waits:
            progress.tag(AWAITING_APPROVAL)
        else:
            progress.tag(NOTHING_NEW if result.repeated else result.outcome, without=AWAITING_APPROVAL)
    if waits:
        evaluation = read_evaluation(result.evaluation)
        suspend(result.evaluation.rpartition("/")[2], question(evaluation, result.word))
    return Completed(name=state_name(result), message=result.summary)


@flow(name="graceful-replay", persist_result=False, validate_parameters=True)
def replay(config_file: str, workspace: str, overrides: dict[str, Any] | None = None) -> State:
    """Replay a history of generations.

    Args:
        config_file: TOML file with a [replay] table.
        workspace: Folder or URI of the workspace that the history lives in; run again, it goes on where it stopped.
        overrides: Dotted keys of the configuration to other values.
    """
    with _reporting(workspace) as progress:
        result = (_BOX.get() or _Box[ReplayResult]()).fill(
            lambda: replay_plainly(config_file, workspace, overrides, progress, as_task)
        )
    return Completed(name=f"{len(result.lines)} generations", message=f"Serving {result.champion}.")


@flow(name="graceful-backfill", persist_result=False, validate_parameters=True)
def backfill(workspace: str, generation: str, reason: str, fraction: float | None = None, by: str = "") -> State:
    """Serve a candidate that the gate held or left open, or with which it waits: 'graceful accept' as a run.

    Args:
        workspace: Folder or URI of the workspace.
        generation: Id of the candidate, or its first part, such as g002.
        reason: Why; it stands in the lineage.
        fraction: Serve after wave 0 and re-embed so much; by default everything is re-embedded first.
        by: Who decides; by default the account that runs this.
    """
    with _reporting(workspace) as progress:
        found = accept_candidate(workspace, progress, generation, reason=reason, fraction=fraction, by=by, step=as_task)
        progress.tag(found["ordered"])
    return Completed(name=found["ordered"], message=f"Serving {found['serving']}.")


@flow(name="graceful-report", persist_result=False, validate_parameters=True)
def report(workspace: str, evaluation: str | None = None) -> State:
    """Write the report of a decision anew, and show its artifacts: nothing is measured or decided.

    Args:
        workspace: Folder or URI of the workspace.
        evaluation: Id of the evaluation; by default the newest.
    """
    with _reporting(workspace) as progress:
        decided, place = as_task("publish", lambda: publish_again(workspace, progress, evaluation))
    return Completed(name=decided.outcome, message=place)


@contextmanager
def _reporting(workspace: str) -> Iterator[FlowProgress]:
    """Where a run reports to. In a process that a service started for it, also where it logs, and that it ends."""
    is_alone = SERVICE_VARIABLE in os.environ
    if is_alone and not is_remote(workspace):
        log_runs(workspace)
    progress = FlowProgress(BESIDE.get())
    yield progress
    progress.close()
    if is_alone:
        end_in_time(_SECONDS_TO_HAND_OVER)


def update_plainly(
    workspace: str,
    progress: Progress,
    step: Step,
    again: bool = False,
    train_paragon: bool | None = None,
    adopted: str | None = None,
    wait_hours: float | None = None,
) -> UpdateResult:
    """The work of `update`."""
    overrides = {} if train_paragon is None else {"train_paragon": train_paragon}
    config = load_workspace_config(workspace, overrides)
    # Nobody sits beside a scheduled run: it waits for an update that was started by hand.
    wait_s = 3600 * (config.cluster.deadline_hours if wait_hours is None else wait_hours)
    with open_session(workspace, config, progress) as session:
        return order.update(session, again=again, adopted=adopted, wait_s=wait_s, step=step)


def _record_word(workspace: str, progress: Progress) -> None:
    """Record what was said in the form of this run; the update that follows carries it out.

    Where it cannot be carried out any more, that is said, and the update judges anew, or holds.
    """
    asked = awaited(open_workspace(workspace).registry)
    word = None if asked is None else word_in_form(asked.evaluation)
    if asked is None or word is None:
        return
    with open_session(workspace, load_workspace_config(workspace), progress) as session:
        try:
            given = order.answer_in_form(
                session, asked, accepts=word.answer == "accept", by=word.by, reason=word.reason
            )
            progress.say(given.said)
        except GracefulError as error:
            progress.say(str(error))


def replay_plainly(
    config_file: str, workspace: str, overrides: dict[str, Any] | None, progress: Progress, step: Step
) -> ReplayResult:
    """The work of `replay`."""
    return history.replay(load_config(config_file, workspace, overrides), workspace, progress, step)


def state_name(result: UpdateResult) -> str:
    """What an update came to, for a list of runs: 'COMPATIBLE_ROLLOUT 25 %', 'HOLD: ...', 'Nothing new'.

    >>> from types import SimpleNamespace as Result
    >>> state_name(Result(approval=None, repeated=False, outcome="COMPATIBLE_ROLLOUT", fraction=0.25, summary=""))
    'COMPATIBLE_ROLLOUT 25 %'
    >>> state_name(Result(approval=None, repeated=False, outcome="HOLD", summary="HOLD: NFR 3.9 %. More."))
    'HOLD: NFR 3.9 %. More.'
    """
    if result.approval == "waiting":
        return AWAITING_APPROVAL
    if result.repeated:
        return NOTHING_NEW
    if result.approval in ("rejected", "expired"):
        return "REJECTED" if result.approval == "rejected" else "HOLD: not accepted in time"
    if result.outcome in ("HOLD", "INCONCLUSIVE"):
        short = result.summary if len(result.summary) <= _LONGEST_NAME else f"{result.summary[: _LONGEST_NAME - 4]} ..."
        return short or result.outcome
    if result.outcome == "COMPATIBLE_ROLLOUT" and result.fraction is not None:
        return f"{result.outcome} {100 * result.fraction:g} %"
    return result.outcome
