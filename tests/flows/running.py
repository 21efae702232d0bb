"""Updates for tests: the real order in this process, and the real command in a process that can be killed."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import torch
from click.testing import Result
from prefect.exceptions import Pause
from prefect.flow_engine import load_flow_run, run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from graceful.files import CRASH_VARIABLE, set_crash_hook
from graceful.flows import cli
from graceful.flows.commands import updates  # noqa: F401  imported before a child is forked: it starts in no time
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.update import flow, order
from graceful.flows.update.order import UpdateResult
from graceful.processes import end_in_time

DONE = 0


class Killed(BaseException):
    """The end of work at a crash point, in this process."""


@contextmanager
def killed_at(point: str) -> Iterator[None]:
    """Work in the block must reach a crash point, and ends there."""

    def kill(passed: str) -> None:
        if passed == point:
            raise Killed

    set_crash_hook(kill)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        set_crash_hook(None)


def update(root: object, *, again: bool = False, adopted: str | None = None) -> UpdateResult:
    """Run the update of a workspace to its end, without a flow server."""
    config = load_workspace_config(str(root))
    with open_session(str(root), config) as session:
        return order.update(session, again=again, adopted=adopted)


def command(*arguments: object, code: int = 0) -> Result:
    """Run a command of the command line in this process; it must end with `code`."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def document(*arguments: object, code: int = 0) -> Any:
    """What a command prints with --json."""
    return json.loads(command(*arguments, "--json", code=code).stdout)


def ask_server(api: str, method: str, path: str, body: object = None) -> Any:
    """What a flow server answers; SQLite refuses some writes while others write, and is asked again."""
    deadline = time.monotonic() + 60
    while True:
        found = httpx.request(method, f"{api}{path}", json=body, timeout=30)
        if found.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            assert found.is_success, f"{found.status_code}: {found.text}"
            return found.json() if found.content else None
        time.sleep(0.2)


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


def deployed_run_in_child(run: str, log: str, environment: Mapping[str, str], act: str = "update") -> None:
    """Entry point of a child process: carry a run of a deployment out, as the process that a runner starts for it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), suppress(Pause):
        run_flow(getattr(flow, act), flow_run=load_flow_run(UUID(run)))
    end_in_time(10)  # Prefect's threads may wait for their last events
