"""Environment variables that Prefect and Ray read when they are imported: quiet, local, and without telemetry.

Everything is a default: what the caller has set stays. Call before the first import of prefect or ray.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import urllib.request
from pathlib import Path

from graceful.processes import process_start

SERVER_FILE = "server.json"
LIBRARIES_LOG = "libraries.log"
_LARGEST_LOG = 16 * 2**20

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The newer of the two interfaces asks an outside address whatever is switched off.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # Migrating a new database on a busy machine takes longer than the default of 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def prepare_environment(root: str, *, logs_to_terminal: bool = False) -> None:
    """Set the defaults; the flow server's database lies in the workspace when that is a local folder.

    What a run logs shows in the flow UI, with the traceback of a failure; on the terminal only with `logs_to_terminal`.

    A server that `graceful serve` runs for this workspace is used, so that its UI shows what is started by hand too.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    if not logs_to_terminal:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if "://" in root:
        return
    server = running_server(root)
    if server is not None:
        os.environ.setdefault("PREFECT_API_URL", server)
    home = os.environ.setdefault("PREFECT_HOME", os.path.join(os.path.abspath(root), ".prefect"))
    os.makedirs(home, exist_ok=True)


def running_server(root: str) -> str | None:
    """API address of the flow server that runs for a workspace on this machine, if one does and answers."""
    try:
        state = json.loads(Path(root, ".prefect", SERVER_FILE).read_text())
        if state["host"] != socket.gethostname() or process_start(state["pid"]) != state["process_start"]:
            return None
        return str(state["api_url"]) if is_healthy(state["api_url"]) else None
    except (OSError, ValueError, KeyError):
        return None


def is_healthy(api_url: str, timeout_s: float = 5.0) -> bool:
    """Whether a flow server answers at its API address within so many seconds."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout_s):
            return True
    except OSError:  # URLError is one
        return False


def append_to_log(log: Path) -> int:
    """A descriptor to append to a log with; one that has grown large becomes `<name>.1` first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LARGEST_LOG:
            log.replace(log.with_suffix(".log.1"))
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def divert_libraries(root: str) -> str:
    """Send what libraries write to this process's standard error past Python, and Ray's processes, to a log; its path.

    What Python itself writes to `sys.stderr` goes where it went before. For a process that is a command.
    """
    log = Path(tempfile.gettempdir() if "://" in root else root, ".prefect", LIBRARIES_LOG)
    descriptor = append_to_log(log)
    sys.stderr.flush()
    terminal = os.dup(sys.stderr.fileno())
    os.set_inheritable(terminal, False)
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    return str(log)
