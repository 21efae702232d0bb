"""Entry point of the console script: signals, and a process that ends."""

import os
import sys

from graceful.flows.cli import signals
from graceful.flows.cli.shell import app
from graceful.processes import end_in_time

_SECONDS_TO_HAND_OVER = 10.0  # to a flow server, what it has not got yet


def main() -> None:
    """Entry point of the console script."""
    _look_for_modules_here()
    signals.end_on_signals()
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        pass
    interrupted = signals.exit_code()
    if interrupted is not None:
        signals.say_once()
        sys.exit(interrupted)
    if "prefect" in sys.modules:
        end_in_time(_SECONDS_TO_HAND_OVER, code)
    sys.exit(code)


def _look_for_modules_here() -> None:
    """Find a user's own package.module:factory in this folder, as 'python -m' would; nothing installed is hidden."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
