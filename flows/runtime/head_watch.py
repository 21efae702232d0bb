"""The process that watches the head of a Ray cluster for another one, its parent, which may not come to do so itself.

Ray waits for a head that has gone with the interpreter held, so that no thread of the process runs, and after a minute
ends the process from C++ without a word. This one is small, knows nothing of Ray, and ends with its parent.
"""

import base64
import json
import os
import select
import signal
import socket
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass

from graceful.processes import descendants, process_start

SIGNAL = signal.SIGUSR1
"""What tells the parent; it raises in its main thread."""

_SECONDS_TO_CONNECT = 5.0


@dataclass(frozen=True)
class Watched:
    """Whom to watch for whom.

    `silence_s`: how long the head may refuse connections; `hear_s`: how long the parent has to come to hear of it;
    `end_s`: how long it has after SIGTERM. `line` is said where it did not hear. `run`: address of the parent's run at
    the flow server, empty where it has none.
    """

    address: str
    parent: int
    line: str
    run: str
    between_looks_s: float
    silence_s: float
    hear_s: float
    end_s: float

    def as_argument(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))


def listens(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT):
            return True
    except OSError:
        return False


def watch(given: Watched) -> None:
    """Look until the parent wants no more or has gone; where the head goes first, see to it that the parent ends."""
    heard = time.monotonic()
    while not _is_dismissed(given, given.between_looks_s):
        if listens(given.address):
            heard = time.monotonic()
        elif time.monotonic() - heard > given.silence_s:
            if not _is_heard(given):
                _end(given)
            return


def _is_heard(given: Watched) -> bool:
    """Tell the parent, again and again, for what is suppressed once is heard the next time; True once it has let go."""
    deadline = time.monotonic() + given.hear_s
    while time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.kill(given.parent, SIGNAL)
        if _is_dismissed(given, given.between_looks_s):
            return True
    return False


def _is_dismissed(given: Watched, seconds: float) -> bool:
    """Wait so long; whether the parent has closed its end of the pipe, or is gone."""
    closed, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(closed) or os.getppid() != given.parent


def _end(given: Watched) -> None:
    """Say why, mark the run as crashed, and end the parent with all that it started."""
    print(f"graceful: {given.line}", file=sys.stderr, flush=True)
    if given.run:
        with suppress(OSError):
            _mark_as_crashed(given)
    started = process_start(given.parent)
    with suppress(ProcessLookupError):
        os.kill(given.parent, signal.SIGTERM)
    deadline = time.monotonic() + given.end_s
    while process_start(given.parent) == started and time.monotonic() < deadline:
        time.sleep(0.1)
    if process_start(given.parent) != started:
        return
    for pid in [given.parent, *descendants(given.parent)]:
        if pid != os.getpid():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _mark_as_crashed(given: Watched) -> None:
    """Tell the flow server, as Prefect's client would, by whose variables of the environment it lets one in."""
    state = {"type": "CRASHED", "name": "Crashed", "message": f"The Ray head has gone: {given.line}"}
    headers = {"content-type": "application/json"}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    elif pair := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    body = json.dumps({"state": state, "force": True}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{given.run}/set_state", body, headers), timeout=_SECONDS_TO_CONNECT
    ):
        pass


if __name__ == "__main__":
    watch(Watched(**json.loads(sys.argv[1])))
