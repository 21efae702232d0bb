"""Ctrl-C and SIGTERM end a command, whichever it is and whatever it is doing: one line, 130 or 143, within seconds.

The first signal raises in the main thread, so that every `finally` runs: the run is marked, the claim is given back,
workers end. What has not ended by then is ended from here, with all that it started. A thread reads the signals beside
Python's own handling, because a main thread that waits in a library for something that is gone never comes back to it.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time

from graceful.processes import end_descendants

SECONDS_TO_END = 7.0
LINE = "interrupted; run the same command again to go on"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
_has_raised = False
_saying = threading.Lock()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM end this process. Called once, by the main thread, before libraries are imported."""
    atexit.register(_leave)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="signals").start()
    for sign in _SIGNALS:
        signal.signal(sign, _interrupt)


def exit_code() -> int | None:
    """130 or 143 once a signal has come, None before."""
    return 128 + _received[0] if _received else None


def say_once() -> None:
    """Print the line, whoever comes first."""
    if _saying.acquire(blocking=False):
        print(LINE, file=sys.stderr, flush=True)


def begin_to_end(sign: int) -> None:
    """Give this process so many seconds from its first signal."""
    if not _received:
        _received.append(sign)
        threading.Thread(target=_end, daemon=True, name="end-after-signal").start()


def _interrupt(sign: int, _frame: object) -> None:
    """Interrupt the main thread, once: what it does then in order to end is left alone."""
    global _has_raised
    begin_to_end(sign)
    if not _has_raised:
        _has_raised = True
        raise Interrupted


def _listen(reader: int) -> None:
    while True:
        for sign in os.read(reader, 64):
            if sign in _SIGNALS:
                begin_to_end(sign)


def _leave() -> None:
    """End an interrupted process; registered first, and so called after what any library does at exit.

    What Python takes apart after that holds a busy machine up for many seconds, in which no thread can end it.
    """
    code = exit_code()
    if code is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end() -> None:
    time.sleep(SECONDS_TO_END)
    say_once()
    end_descendants()
    os._exit(exit_code() or 1)
