"""The head of a Ray cluster, watched: whoever works on a cluster whose head has gone is told so, in bounded time.

Ray itself tries for a minute and then ends the process from C++ without a word; a new process that joins the same
address waits in silence. So the head is asked for a connection before a cluster is joined, and every few seconds while
it is used, by a process of its own (`runtime.head_watch`). Where the head does not answer, `ClusterLostError` is raised
in the main thread; where that does not come to hear it, because Ray holds the interpreter, the process is ended from
outside with the same line, and its run is marked as crashed. What a head that answers and does nothing holds up is
bounded by `cluster.deadline_hours` alone.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import IO

from graceful.errors import GracefulError
from graceful.flows.runtime.head_watch import SIGNAL, Watched, listens

SECONDS_OF_SILENCE = 20.0
"""How long a head may refuse connections; it may be started again meanwhile, where it keeps its state elsewhere."""

FLOW_RUN: ContextVar[str] = ContextVar("graceful_flow_run", default="")
"""Address of the run of this process at its flow server (`<api>/flow_runs/<id>`), empty outside a run."""

_SECONDS_TO_JOIN = 10.0
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_HEAR = 10.0
_SECONDS_TO_END = 5.0  # with the others this stays far below Ray's minute


class ClusterLostError(GracefulError):
    """The head of the Ray cluster has gone, or is not there."""


def require_head(address: str) -> None:
    """Raise ClusterLostError unless something listens at a head's address (host:port) within seconds."""
    deadline = time.monotonic() + _SECONDS_TO_JOIN
    while not listens(address):
        if time.monotonic() > deadline:
            raise ClusterLostError(
                f"joining the Ray cluster at {address}: expected its head to answer, found nothing for "
                f"{_SECONDS_TO_JOIN:g} s; start it ('ray start --head') or correct cluster.address"
            )
        time.sleep(0.5)


class HeadWatch:
    """Watches the head at host:port, from `start` to `stop`. To be started by the main thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._before: object = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._before = signal.signal(SIGNAL, self._raise)
        given = Watched(
            address=self._address,
            parent=os.getpid(),
            line=self._line(),
            run=FLOW_RUN.get(),
            between_looks_s=_SECONDS_BETWEEN_LOOKS,
            silence_s=SECONDS_OF_SILENCE,
            hear_s=_SECONDS_TO_HEAR,
            end_s=_SECONDS_TO_END,
        )
        # A session of its own: Ctrl-C in the terminal reaches this process, which lets the other go.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graceful.flows.runtime.head_watch", given.as_argument()],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=_terminal(), start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Look no more, and raise nothing from now on."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        signal.signal(SIGNAL, self._before or signal.SIG_DFL)  # type: ignore[arg-type]

    def _raise(self, *_: object) -> None:
        if self._process is not None:
            raise ClusterLostError(self._line())

    def _line(self) -> str:
        return (
            f"working on the Ray cluster at {self._address}: expected its head to answer, found nothing for "
            f"{SECONDS_OF_SILENCE:g} s; start the cluster again, then run the same command again to go on"
        )


def _terminal() -> IO[str] | None:
    """Where this process says what went wrong; None (what it was started with) where that is no file."""
    with suppress(OSError, AttributeError, ValueError):
        sys.stderr.fileno()
        return sys.stderr
    return None
