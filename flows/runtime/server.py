"""The flow server: a Prefect server in a process of its own, started for a workspace and ended with whoever wanted it.

It has a session of its own, so that Ctrl-C in a terminal reaches the command and not the server that the command still
talks to; and it watches its parent, so that a killed command leaves no server behind.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from graceful.errors import GracefulError
from graceful.flows.runtime.environment import SERVER_FILE, is_healthy, running_server
from graceful.processes import process_start

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0


class ServiceError(GracefulError):
    """The flow server cannot be started, or ended by itself."""


@contextlib.contextmanager
def flow_server(
    root: str,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    found_by_others: bool = False,
    until_exit: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """The API address of a server that runs for this workspace; one is started, and ended, if there is none.

    PREFECT_API_URL names it while the block runs. Port 0 takes a free one. `meanwhile` is called while it starts.
    `found_by_others`: other commands in this workspace use it while it runs. `until_exit`: it ends when this process
    has ended, not with the block: Prefect tells it things to the last, and waits a minute for one that is gone.
    """
    known = os.environ.get("PREFECT_API_URL") or running_server(root)
    if known:
        os.environ["PREFECT_API_URL"] = known
        meanwhile()
        yield known
        return
    port = port or _free_port(host)
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"starting the flow server: cannot listen on {host}:{port} ({error.strerror}); give another --ui-port"
            ) from None
    home = _home_of(root)
    home.mkdir(parents=True, exist_ok=True)
    reached_at = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    api_url = f"http://{f'[{reached_at}]' if ':' in reached_at else reached_at}:{port}/api"
    log = home / "server.log"
    environment = {**os.environ, "PREFECT_HOME": str(home), "GRACEFUL_PARENT": str(os.getpid())}
    # Where the pages ask for data: wherever they were loaded from. The default is port 4200, whatever the real one is.
    environment.setdefault("PREFECT_SERVER_UI_API_URL", "/api")
    with log.open("ab") as output:
        # A session of its own: Ctrl-C in the terminal reaches this process only, which ends the server last.
        server = subprocess.Popen(
            [sys.executable, "-m", "graceful.flows.runtime.server", host, str(port)],
            env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    found = home / SERVER_FILE
    try:
        os.environ["PREFECT_API_URL"] = api_url
        meanwhile()
        _wait_until_healthy(server, api_url, log)
        state = {"api_url": api_url, "host": socket.gethostname(), "pid": server.pid}
        state["process_start"] = process_start(server.pid)
        if found_by_others:
            found.write_text(json.dumps(state, indent=2) + "\n")
        yield api_url
    finally:
        if not until_exit:
            os.environ.pop("PREFECT_API_URL", None)
        if found_by_others:
            found.unlink(missing_ok=True)
        if not until_exit:
            _end(server)


def _home_of(root: str) -> Path:
    """Where the server's database lies: in the workspace; of one in an object store, where Prefect has its own."""
    if "://" in root:
        return Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    return Path(root, ".prefect")


def _wait_until_healthy(server: "subprocess.Popen[bytes]", api_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if is_healthy(api_url):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            why = f"it ended with {server.returncode}" if server.poll() is not None else "it does not answer"
            tail = " ".join(log.read_text(errors="replace")[-400:].split())
            raise ServiceError(f"starting the flow server: {why}; its log ends: {tail} ({log})")
        time.sleep(0.25)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and what it started, kindly at first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            break


def _free_port(host: str) -> int:
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _serve_flows(host: str, port: str) -> None:
    """Be the flow server; end when the process that wanted it has gone."""
    parent = int(os.environ["GRACEFUL_PARENT"])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()
    sys.argv = ["prefect", "server", "start", "--host", host, "--port", port]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve_flows(*sys.argv[1:])
