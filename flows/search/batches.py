"""Questions of many requests, answered together: a bounded queue, and one thread that takes all that wait.

Nobody waits for a batch to fill: the thread takes what is there, at most `max_batch`, and what comes meanwhile is the
next batch. So one question alone is answered at once, and under load one product answers many.

Invariants: at most `max_waiting` questions wait, and one more is refused at once; an answer belongs to its question,
and an error of one question is not that of another; a question that nobody waits for any more is not answered.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from graceful.errors import GracefulError
from graceful.flows.search.pauses import stand_back

Question = TypeVar("Question")
Answer = TypeVar("Answer")

_SECONDS_TO_END = 2.0


class QueueFullError(GracefulError):
    """So many questions wait that one more is refused."""


@dataclass(frozen=True)
class _Waiting(Generic[Question, Answer]):
    question: Question
    answer: "asyncio.Future[Answer]"


class Batches(Generic[Question, Answer]):
    """One thread that answers, and the queue before it. Asked from one event loop, that which `start` was called in."""

    def __init__(
        self,
        name: str,
        answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]],
        *,
        max_waiting: int,
        max_batch: int,
    ) -> None:
        """`answer` returns for each question its answer, or the error that it is refused with."""
        self.name = name
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self._answer = answer
        self._queue: queue.SimpleQueue[_Waiting[Question, Answer] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def num_waiting(self) -> int:
        """Questions that wait; those being answered do not count."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin to answer, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"search-{self.name}")
        self._thread.start()

    def close(self) -> None:
        """End after what waits now; an answer that takes longer than two seconds is left to end by itself."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)

    def ask(self, question: Question) -> "asyncio.Future[Answer]":
        """Let a question wait for its answer, or for what it is refused with. Cancel it where nobody waits any more.

        Raises:
            QueueFullError: as many wait already as may.
        """
        assert self._loop is not None
        if self.num_waiting >= self.max_waiting:
            raise QueueFullError(
                f"searching: expected at most {self.max_waiting} {self.name} to wait, found as many; ask again later"
            )
        waiting = _Waiting[Question, Answer](question, self._loop.create_future())
        self._queue.put(waiting)
        return waiting.answer

    def _run(self) -> None:
        stand_back()
        assert self._loop is not None
        while (first := self._queue.get()) is not None:
            batch, is_last = self._taken(first)
            if batch:
                answers = self._answers([waiting.question for waiting in batch])
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
                    self._loop.call_soon_threadsafe(_deliver, batch, answers)
            if is_last:
                return

    def _taken(self, first: _Waiting[Question, Answer]) -> tuple[list[_Waiting[Question, Answer]], bool]:
        """What waits, without those whose client has gone; and whether nothing comes after it."""
        batch, is_last = [first], False
        while len(batch) < self.max_batch:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                is_last = True
                break
            batch.append(following)
        return [waiting for waiting in batch if not waiting.answer.cancelled()], is_last

    def _answers(self, questions: Sequence[Question]) -> Sequence[Answer | Exception]:
        try:
            return self._answer(questions)
        except Exception as error:
            return [error] * len(questions)


def _deliver(batch: Sequence[_Waiting[Question, Answer]], answers: Sequence[Answer | Exception]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
