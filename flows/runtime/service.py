"""The service of a workspace: one at a time, and what a killed one left working.

A service holds a lock that the kernel takes back when it dies, however it dies. Its runs say in the workspace's claim
whose they are, so that one whose service has gone is known.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from graceful.errors import GracefulError
from graceful.flows.runtime.environment import SERVER_FILE
from graceful.flows.runtime.notify import Notice
from graceful.flows.store.claim import holder
from graceful.processes import process_start

RUNS_LOG = "runs.log"
_LARGEST_LOG = 16 * 2**20
_SECONDS_TO_END = 20.0


class ServiceRunsError(GracefulError):
    """Another service runs on this workspace."""


@contextlib.contextmanager
def only_service(root: str) -> Iterator[None]:
    """Hold the right to serve a workspace in a local folder while the block runs.

    Raises:
        ServiceRunsError: another process holds it.
    """
    home = Path(root, ".prefect")
    home.mkdir(parents=True, exist_ok=True)
    with (home / "service.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ServiceRunsError(
                f"starting the service: expected a workspace that nobody serves, found {lock.read().strip()} (at "
                f"{root}); end that one first"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def log_runs(root: str) -> None:
    """In a process that a service started for a run: write to the log of the runs from now on, not to the service.

    What a process writes to a service that was killed would end it.
    """
    log = Path(root, ".prefect", RUNS_LOG)
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LARGEST_LOG:
            log.replace(log.with_suffix(".log.1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def end_orphan(root: str) -> str | None:
    """End the update that a killed service left working on this machine, kindly at first; say which it was."""
    found, held = holder(root)
    service = str(found.get("service") or "")
    if not held or not service or found.get("host") != socket.gethostname() or _lives(service):
        return None
    pid = int(str(found["pid"]))
    _end(pid, str(found["started"]))
    return f"{found.get('purpose')} (process {pid})"


def end_server_left_behind(root: str) -> None:
    """End the flow server of a killed service, which would end by itself soon; call it where `only_service` is held."""
    place = Path(root, ".prefect", SERVER_FILE)
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = json.loads(place.read_text())
        if state["host"] == socket.gethostname():
            _end(int(state["pid"]), str(state["process_start"]))
            place.unlink(missing_ok=True)


def stuck_update(root: str, hours: float) -> Notice | None:
    """What there is to tell where the work that holds the workspace's claim has done so for longer than `hours`."""
    found, held = holder(root)
    since = int(str(found.get("nonce") or 0)) / 1e9
    if not held or not since or time.time() - since < hours * 3600:
        return None
    summary = (
        f"{found.get('purpose')} has been under way for more than {hours:g} hours (process {found.get('pid')} on "
        f"{found.get('host')})"
    )
    return Notice("stuck", summary, f"claim {found['nonce']}", details={"since": int(since)})


def _end(pid: int, started: str) -> None:
    """End a process of this machine, kindly at first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _SECONDS_TO_END
        if process_start(pid) == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, sign)
        while process_start(pid) == started and time.monotonic() < deadline:
            time.sleep(0.1)


def _lives(service: str) -> bool:
    pid, _, started = service.partition("@")
    return pid.isdigit() and process_start(int(pid)) == started
