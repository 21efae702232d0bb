"""What is under way in a workspace, for whoever asks: step, progress and time left, in a small file beside the runs.

Written by the process that works, every few seconds, and removed when it ends; that of a process which was killed is
recognised by its start time and removed by the next one.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from graceful.files import exists, is_remote, join, list_files, read_json, remove, write_json
from graceful.flows.runtime.progress import Advance, Artifact, Progress
from graceful.processes import process_start

_FOLDER = "under_way"
_SECONDS_BETWEEN_WRITES = 2.0
_SECONDS_BETWEEN_WRITES_REMOTE = 20.0


class RecordedProgress:
    """Hands everything on to another progress, and keeps the newest of it in the workspace."""

    def __init__(self, root: str, beside: Progress) -> None:
        self.beside = beside
        self._uri = _file(root, socket.gethostname(), os.getpid())
        self._seconds = _SECONDS_BETWEEN_WRITES_REMOTE if is_remote(root) else _SECONDS_BETWEEN_WRITES
        self._written = -self._seconds
        self._record: dict[str, Any] = {"process_start": process_start(os.getpid()), "since": _now()}
        _remove_dead(root)

    def say(self, text: str) -> None:
        """Hand on."""
        self.beside.say(text)

    def say_step(self, name: str) -> None:
        """Hand on, and record the step."""
        self._record |= {"step": name, "step_since": _now(), "progress": None}
        self._write()
        self.beside.say_step(name)

    def entitle(self, title: str) -> None:
        """Hand on, and record the title."""
        self._record["title"] = title
        self._write()
        self.beside.entitle(title)

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        """Hand on."""
        self.beside.show(make)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Hand on, and record how far it is."""
        started, done = time.monotonic(), 0

        def counted(count: int, note: str = "") -> None:
            nonlocal done
            advance(count, note)
            done += count
            left = (time.monotonic() - started) / max(done, 1) * max(total - done, 0)
            self._record["progress"] = {
                "label": label, "done": done, "total": total, "note": note, "seconds_left": round(left),
            }  # fmt: skip
            self._write()

        with self.beside.track(label, total) as advance:
            yield counted
        self._record["progress"] = None

    def close(self) -> None:
        """Remove the record."""
        with suppress(Exception):
            remove(self._uri)

    def _write(self) -> None:
        """Write at most every few seconds; a place that cannot be written to stops nothing."""
        if time.monotonic() - self._written < self._seconds:
            return
        self._written = time.monotonic()
        with suppress(Exception):
            write_json(self._uri, {**self._record, "seen": _now()})


def record_of(root: str, host: str, pid: int, started: str) -> dict[str, Any] | None:
    """What a process says of its work, or None where it says nothing or is another one by now."""
    uri = _file(root, host, pid)
    if not exists(uri):
        return None
    with suppress(OSError, ValueError):
        found: dict[str, Any] = read_json(uri)
        if found.pop("process_start", None) == started:
            return found
    return None


def _remove_dead(root: str) -> None:
    """Remove the records of processes of this machine that have ended."""
    with suppress(Exception):
        for place in list_files(join(root, _FOLDER)):
            name = place.rpartition("/")[2].removesuffix(".json")
            host, _, pid = name.rpartition("@")
            if host == socket.gethostname() and pid.isdigit() and not process_start(int(pid)):
                remove(join(root, _FOLDER, f"{name}.json"))


def _file(root: str, host: str, pid: int) -> str:
    return join(root, _FOLDER, f"{host}@{pid}.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
