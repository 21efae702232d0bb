"""What a running update shows in the flow UI: log lines, a progress artifact for each long step, its name, its outcome.

The UI is never a dependency. Whatever asks the flow server is asked by a thread of its own, in order: a server that has
gone or hangs costs the update nothing, and after a few failures in a row it is left alone for a while. What it did not
take is not shown; the update says so once, and goes on. It says so, too, when one thing takes long: Prefect's client
tries for about a minute before it fails, and a server that is merely slow is not given up.
"""

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, SyncClientContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from graceful.flows.runtime.environment import is_healthy
from graceful.flows.runtime.progress import Advance, Artifact, Progress

SECONDS_LEFT_ALONE = 60.0
"""How long a server that failed is not asked."""

SECONDS_OF_SILENCE = 45.0
"""How long one thing may be under way before the update says so."""

_SECONDS_BETWEEN_UPDATES = 2.0
_SECONDS_BETWEEN_GLANCES = 60.0
_FAILURES = 3
_WAITING = 200
_SECONDS_TO_END = 10.0
_LOOKS = 3
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_TO_ANSWER = 3.0
logger = logging.getLogger(__name__)


def answers(api: str) -> bool:
    """Whether a flow server answers at all; it is asked several times, for it may just be started again.

    True for the empty address: Prefect's own, which has nothing to wait for.
    """
    if not api:
        return True
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if is_healthy(api, _SECONDS_TO_ANSWER):
            return True
    return False


def ask_no_more() -> None:
    """Let all that this flow run still asks its server fail at once; to be called within `asking_again`.

    Prefect's client would try for a minute to record a run's end, and again that this failed.
    """
    get_current_settings().client.max_retries = 0
    if (context := SyncClientContext.get()) is not None:
        context.client._client.timeout = _SECONDS_TO_ANSWER


@contextmanager
def asking_again() -> Iterator[None]:
    """After the block Prefect's client asks as often as before it."""
    client = get_current_settings().client  # changed in place: a copy would read the environment anew
    before = client.max_retries
    try:
        yield
    finally:
        client.max_retries = before


class Aside:
    """Does things in the background, one after the other, and forgets those that fail or are too many.

    `on_silence` is called once: when several have failed in a row, or something is to be done while another thing has
    been under way for SECONDS_OF_SILENCE.
    """

    def __init__(self, on_silence: Callable[[str], None]) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(_WAITING)
        self._on_silence = on_silence
        self._unsaid = threading.Semaphore(1)
        self._begun: float | None = None  # when what is under way began
        self._failures = 0
        self._ask_again = 0.0
        self._thread: threading.Thread | None = None

    def do(self, act: Callable[[], object]) -> None:
        """Do something soon, with the context variables of now; nothing is waited for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="flow-ui")
            self._thread.start()
        context = contextvars.copy_context()
        try:
            self._queue.put_nowait(lambda: context.run(act))
        except queue.Full:
            self._failed("it has not answered for a while")
        begun = self._begun
        if begun is not None and time.monotonic() - begun > SECONDS_OF_SILENCE:
            self._say(f"nothing for {SECONDS_OF_SILENCE:g} s")

    def close(self, seconds: float = _SECONDS_TO_END) -> None:
        """Wait for what is left, at most so long."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _work(self) -> None:
        while (act := self._queue.get()) is not None:
            if time.monotonic() < self._ask_again:
                continue
            self._begun = time.monotonic()
            try:
                act()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                if self._failures >= _FAILURES:
                    self._ask_again = time.monotonic() + SECONDS_LEFT_ALONE
                    self._failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            self._begun = None

    def _failed(self, why: str) -> None:
        logger.warning("the flow server does not answer (%s)", why)
        self._say(why)

    def _say(self, why: str) -> None:
        if self._unsaid.acquire(blocking=False):
            self._on_silence(why)


class FlowProgress:
    """Reports to the flow run that it is called in, and to another progress (a terminal) if there is one."""

    def __init__(self, beside: Progress | None = None) -> None:
        self.beside = beside
        self._aside = Aside(self._say_silence)

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

    def entitle(self, title: str) -> None:
        """Name the run."""
        self._describe(name=title)
        if self.beside is not None:
            self.beside.entitle(title)

    def tag(self, *tags: str, without: str = "") -> None:
        """Add tags to the run, to look for, and take one away."""
        run = FlowRunContext.get()
        if run is not None and run.flow_run is not None:
            self._describe(tags=sorted({*run.flow_run.tags, *tags} - {without}))

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        """Leave artifacts, under keys that are the same from update to update."""
        if not _in_run():
            return
        for found in make():
            self._aside.do(lambda found=found: _leave(found))  # type: ignore[misc]

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Keep a progress artifact of the task, updated every few seconds."""
        counter = _Counter(self._aside, label, total) if _in_run() and total > 0 else None
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

    def close(self) -> None:
        """Let the flow server take what is left, for a few seconds."""
        self._aside.close()

    def _describe(self, **fields: Any) -> None:
        run = FlowRunContext.get()
        if run is not None and run.flow_run is not None:
            identity = run.flow_run.id

            def tell() -> None:
                with get_client(sync_client=True) as client:
                    client.update_flow_run(identity, **fields)

            self._aside.do(tell)

    def _say_silence(self, why: str) -> None:
        if self.beside is not None:
            self.beside.say(f"The flow server does not answer ({why}); the work goes on without it.")


class _Counter:
    def __init__(self, aside: Aside, label: str, total: int) -> None:
        self._aside, self._label = aside, label
        self._total, self._done, self._written = total, 0, time.monotonic()
        self._logged = time.monotonic()
        self._artifact: Any = None
        aside.do(self._create)

    def advance(self, count: int, note: str = "") -> None:
        # What is no piece of work, only a look at one that is under way, is logged once a minute.
        if note and _in_run() and (count or time.monotonic() - self._logged > _SECONDS_BETWEEN_GLANCES):
            self._logged = time.monotonic()
            get_run_logger().info("%s: %s", self._label, note)
        self._done += count
        if time.monotonic() - self._written > _SECONDS_BETWEEN_UPDATES:
            self._written = time.monotonic()
            self._aside.do(self._update)

    def finish(self) -> None:
        self._done = self._total
        self._aside.do(self._update)

    def _create(self) -> None:
        self._artifact = create_progress_artifact(progress=0.0, description=self._label)

    def _update(self) -> None:
        if self._artifact is not None:
            update_progress_artifact(self._artifact, progress=min(100.0, 100.0 * self._done / self._total))


def _leave(found: Artifact) -> None:
    if found.link:
        create_link_artifact(key=found.key, link=found.link, description=found.description)
    else:
        create_markdown_artifact(key=found.key, markdown=found.markdown, description=found.description)


def _in_run() -> bool:
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _ignore(count: int, note: str = "") -> None:
    """Count nothing."""
