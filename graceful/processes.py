"""Which process of this machine holds something: a process id alone is used again, its start time is not."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path


def process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's own count; empty when there is none (or no /proc).

    One that has ended and was not reaped by its parent is none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


def descendants(pid: int) -> list[int]:
    """The living processes of this machine that a process started, and that these started; the nearest first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found[1:]


def end_descendants() -> None:
    """Kill all that this process started."""
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def process_space() -> str:
    """Where process ids mean the same as here: this host since it was started, and of containers this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def end_in_time(seconds: float, code: int = 0, *, with_descendants: bool = False) -> None:
    """End this process so many seconds from now, wherever it is; for one that is about to end, and may not.

    A library's thread may wait for something that is gone: Prefect, for a server that is to take its last events.
    """

    def end() -> None:
        time.sleep(seconds)
        if with_descendants:
            end_descendants()
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end-in-time").start()
