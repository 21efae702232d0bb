"""Which process of this machine holds something: a process id alone is used again, its start time is not."""

from pathlib import Path


def process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's own count; empty when there is none (or no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
