"""Update and replay as Prefect flows: the order of `update.order`, each step a task that the flow UI shows."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from graceful.flows.runtime.flow_ui import FlowProgress
from graceful.flows.runtime.progress import Progress
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_config, load_workspace_config
from graceful.flows.update import order
from graceful.flows.update import replay as history
from graceful.flows.update.order import UpdateResult
from graceful.flows.update.replay import ReplayResult

T = TypeVar("T")


def as_task(name: str, act: Callable[[], T]) -> T:
    """Carry a step out as a task that is neither cached nor retried: the steps themselves know what is done."""
    return task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)(act)()


BESIDE: ContextVar[Progress | None] = ContextVar("graceful_beside", default=None)
"""Where a flow that is run in this process reports to beside the flow UI: the terminal of whoever started it."""


@flow(name="graceful-update", persist_result=False, validate_parameters=True)
def update(
    workspace: str,
    again: bool = False,
    train_paragon: bool | None = None,
    adopted: str | None = None,
    wait_hours: float | None = None,
) -> UpdateResult:
    """Train, evaluate, decide, act: one update of a workspace with the configuration that lies in it.

    Args:
        workspace: Folder or URI of the workspace.
        again: Judge anew even if these very data and this configuration were decided about before.
        train_paragon: Also train without constraints; by default what the configuration says.
        adopted: Id of a generation that came from elsewhere, to be judged instead of training one.
        wait_hours: How long to wait for another update of this workspace to end; by default cluster.deadline_hours.
    """
    overrides = {} if train_paragon is None else {"train_paragon": train_paragon}
    config = load_workspace_config(workspace, overrides)
    # Nobody sits beside a scheduled run: it waits for an update that was started by hand.
    wait_s = 3600 * (config.cluster.deadline_hours if wait_hours is None else wait_hours)
    with open_session(workspace, config, FlowProgress(BESIDE.get())) as session:
        return order.update(session, again=again, adopted=adopted, wait_s=wait_s, step=as_task)


@flow(name="graceful-replay", persist_result=False, validate_parameters=True)
def replay(config_file: str, workspace: str, overrides: dict[str, Any] | None = None) -> ReplayResult:
    """Replay a history of generations.

    Args:
        config_file: TOML file with a [replay] table.
        workspace: Folder or URI of the workspace that the history lives in; run again, it goes on where it stopped.
        overrides: Dotted keys of the configuration to other values.
    """
    config = load_config(config_file, workspace, overrides)
    return history.replay(config, workspace, FlowProgress(BESIDE.get()), as_task)
