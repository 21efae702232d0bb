"""The head of a Ray cluster, watched: whoever works on a cluster whose head has gone is told so, in bounded time.

Ray itself tries for a minute and then ends the process from C++ without a word; a new process that joins the same
address waits in silence. So the head is asked for a connection before a cluster is joined, and every few seconds while
it is used. Where it does not answer, `ClusterLostError` is raised in the main thread; where that does not come to hear
it, the process is ended with the same line. Where Ray waits for the head and holds the interpreter meanwhile, no thread
of Python runs, this one included, and it is Ray that ends the process after its minute. What a head that answers and
does nothing holds up is bounded by `cluster.deadline_hours` alone.
"""

import os
import signal
import socket
import sys
import threading
import time

from graceful.errors import GracefulError
from graceful.processes import end_descendants

SECONDS_OF_SILENCE = 20.0
"""How long a head may refuse connections; it may be started again meanwhile, where it keeps its state elsewhere."""

_SECONDS_TO_JOIN = 10.0
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_CONNECT = 5.0
_SECONDS_TO_HEAR = 15.0  # then Ray would soon end the process itself
_SIGNAL = signal.SIGUSR1


class ClusterLostError(GracefulError):
    """The head of the Ray cluster has gone, or is not there."""


def require_head(address: str) -> None:
    """Raise ClusterLostError unless something listens at a head's address (host:port) within seconds."""
    deadline = time.monotonic() + _SECONDS_TO_JOIN
    while not _listens(address):
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
        self._stopped = threading.Event()
        self._before: object = None

    def start(self) -> None:
        """Begin to look."""
        self._before = signal.signal(_SIGNAL, self._raise)
        threading.Thread(target=self._watch, daemon=True, name="ray-head").start()

    def stop(self) -> None:
        """Look no more, and raise nothing from now on."""
        self._stopped.set()
        signal.signal(_SIGNAL, self._before or signal.SIG_DFL)  # type: ignore[arg-type]

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            if _listens(self._address):
                heard = time.monotonic()
            elif time.monotonic() - heard > SECONDS_OF_SILENCE:
                self._tell()
                return

    def _tell(self) -> None:
        """Raise in the main thread, again and again: what is suppressed once is heard the next time."""
        main = threading.main_thread().ident
        deadline = time.monotonic() + _SECONDS_TO_HEAR
        while time.monotonic() < deadline:
            if main is not None and not self._stopped.is_set():
                signal.pthread_kill(main, _SIGNAL)
            if self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
                return
        print(f"graceful: {self._line()}", file=sys.stderr, flush=True)
        end_descendants()
        os._exit(1)

    def _raise(self, *_: object) -> None:
        if not self._stopped.is_set():
            raise ClusterLostError(self._line())

    def _line(self) -> str:
        return (
            f"working on the Ray cluster at {self._address}: expected its head to answer, found nothing for "
            f"{SECONDS_OF_SILENCE:g} s; start the cluster again, then run the same command again to go on"
        )


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT):
            return True
    except OSError:
        return False
