"""Updates for tests: the real order in this process, and the real command in a process that can be killed."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from prefect.settings import PREFECT_API_URL, temporary_settings

from graceful.files import CRASH_VARIABLE, set_crash_hook
from graceful.flows import cli
from graceful.flows.commands import updates  # noqa: F401  imported before a child is forked: it starts in no time
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.update import order
from graceful.flows.update.order import UpdateResult

DONE = 0


def update(root: object, *, again: bool = False, adopted: str | None = None) -> UpdateResult:
    """Run the update of a workspace to its end, without a flow server."""
    config = load_workspace_config(str(root))
    with open_session(str(root), config) as session:
        return order.update(session, again=again, adopted=adopted)


def update_in_child(root: str, log: str, copies: str = "") -> None:
    """Entry point of a child process: run an update to its end.

    `copies`: a folder for a copy of the workspace at every crash point, by its name: what a kill there would leave.
    """
    _prepare_child(log)

    def copy(point: str) -> None:
        if not Path(copies, point).exists():
            shutil.copytree(root, Path(copies, point))

    if copies:
        set_crash_hook(copy)
    update(root)


def _prepare_child(log: str) -> None:
    # Whatever the fork server was started with: weights depend on how many threads train.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)


def command_in_child(
    arguments: list[str], crash_at: str = "", log: str = "", environment: Mapping[str, str] | None = None
) -> None:
    """Entry point of a child process: be `graceful ...`, and die at `crash_at`."""
    os.environ.update(environment or {})
    _prepare_child(log)
    if crash_at:
        os.environ[CRASH_VARIABLE] = crash_at
    sys.argv = ["graceful", *arguments]
    # Prefect was imported before the fork and has read the environment of then.
    with temporary_settings({PREFECT_API_URL: os.environ.get("PREFECT_API_URL", "")}):
        cli.main()
