"""Which process of this machine holds something: a process id alone is used again, its start time is not."""

import os
import socket
from pathlib import Path


def process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's own count; empty when there is none (or no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def process_space() -> str:
    """Where process ids mean the same as here: this host since it was started, and of containers this one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
