"""Entry point of the console script: signals, and a process that ends."""

import os
import signal
import sys
import threading
import time

from graceful.flows.cli.shell import INTERRUPTED, TERMINATED, Terminated, app

_SECONDS_TO_END = 6.0


def main() -> None:
    """Entry point of the console script."""
    _look_for_modules_here()

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            _end_soon(end.code)
        raise


def _end_soon(code: int) -> None:
    """End this process within seconds, whatever still waits: a library's thread may wait for a server that is gone."""

    def end() -> None:
        time.sleep(_SECONDS_TO_END)
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end").start()


def _look_for_modules_here() -> None:
    """Find a user's own package.module:factory in this folder, as 'python -m' would; nothing installed is hidden."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
