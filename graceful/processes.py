"""Which process of this machine holds something: a process id alone is used again, its start time is not."""

import os
import socket
import threading
import time
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


def process_space() -> str:
    """Where process ids mean the same as here: this host since it was started, and of containers this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def end_in_time(seconds: float, code: int = 0) -> None:
    """End this process so many seconds from now, wherever it is; for one that is about to end, and may not.

    A library's thread may wait for something that is gone: Prefect, for a server that is to take its last events.
    """

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end-in-time").start()
