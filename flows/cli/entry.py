"""Entry point of the console script: signals, and a process that ends."""

import os
import signal
import sys

from graceful.flows.cli.shell import INTERRUPTED, TERMINATED, Terminated, app
from graceful.processes import end_in_time

_SECONDS_TO_END = 6.0
_SECONDS_TO_HAND_OVER = 10.0  # to a flow server, what it has not got yet


def main() -> None:
    """Entry point of the console script."""
    _look_for_modules_here()

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code in (INTERRUPTED, TERMINATED):
            end_in_time(_SECONDS_TO_END, code)
        elif "prefect" in sys.modules:
            end_in_time(_SECONDS_TO_HAND_OVER, code)
        raise


def _look_for_modules_here() -> None:
    """Find a user's own package.module:factory in this folder, as 'python -m' would; nothing installed is hidden."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
