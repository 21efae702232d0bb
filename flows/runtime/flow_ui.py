"""What a running update shows in the flow UI: log lines, and a progress artifact for each long step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger

from graceful.flows.runtime.progress import Advance, Artifact, Progress

_SECONDS_BETWEEN_UPDATES = 2.0
_SECONDS_BETWEEN_GLANCES = 60.0


class FlowProgress:
    """Reports to the flow run that it is called in, and to another progress (a terminal) if there is one."""

    def __init__(self, beside: Progress | None = None) -> None:
        self.beside = beside

    def say(self, text: str) -> None:
        """Write a log line of the run."""
        if _in_run():
            get_run_logger().info(text)
        if self.beside is not None:
            self.beside.say(text)

    def say_step(self, name: str) -> None:
        """Hand on the name of a step; in the flow UI it is a task with a name of its own."""
        if self.beside is not None:
            self.beside.say_step(name)

    def show(self, artifacts: Sequence[Artifact]) -> None:
        """Leave artifacts, under keys that are the same from update to update."""
        if not _in_run():
            return
        for found in artifacts:
            if found.link:
                create_link_artifact(key=found.key, link=found.link, description=found.description)
            else:
                create_markdown_artifact(key=found.key, markdown=found.markdown, description=found.description)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Keep a progress artifact of the task, updated every few seconds."""
        counter = _Counter(label, total) if _in_run() and total > 0 else None
        if self.beside is None:
            yield (counter.advance if counter else _ignore)
        else:
            with self.beside.track(label, total) as advance:

                def both(count: int, note: str = "") -> None:
                    advance(count, note)
                    if counter:
                        counter.advance(count, note)

                yield both
        if counter:
            counter.finish()


class _Counter:
    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total, self._done, self._written = total, 0, time.monotonic()
        self._logged = time.monotonic()
        self._artifact: Any = create_progress_artifact(progress=0.0, description=label)

    def advance(self, count: int, note: str = "") -> None:
        # What is no piece of work, only a look at one that is under way, is logged once a minute.
        if note and _in_run() and (count or time.monotonic() - self._logged > _SECONDS_BETWEEN_GLANCES):
            self._logged = time.monotonic()
            get_run_logger().info("%s: %s", self._label, note)
        self._done += count
        if time.monotonic() - self._written > _SECONDS_BETWEEN_UPDATES:
            self._written = time.monotonic()
            update_progress_artifact(self._artifact, progress=min(100.0, 100.0 * self._done / self._total))

    def finish(self) -> None:
        update_progress_artifact(self._artifact, progress=100.0)


def _in_run() -> bool:
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _ignore(count: int, note: str = "") -> None:
    """Count nothing."""
