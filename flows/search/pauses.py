"""What keeps the event loop of an endpoint from waiting for the threads beside it.

Three things make it wait: a processor that another thread has, the interpreter's lock that another thread holds, and a
full garbage collection, which holds the lock for as long as it looks at every object of the process.
"""

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator

_NICENESS = 5
_SWITCH_S = 0.0005
"""The loop gives the lock away with every read and write; by default whoever takes it may keep it for 5 ms."""


def stand_back() -> None:
    """Let the event loop come first where processors are scarce; for this thread, and those that it starts."""
    if sys.platform == "linux":  # elsewhere it would be for the whole process
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), _NICENESS))


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Let threads hand the interpreter's lock on sooner, for as long as the block runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def short_collections() -> Iterator[None]:
    """Leave what is there already (libraries, an index) out of every garbage collection, for as long as the block runs.

    Some 300,000 objects are there once PyTorch is loaded; looking at them takes 0.4 s of a core.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
