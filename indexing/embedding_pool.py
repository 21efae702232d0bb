"""Embedding on a Ray cluster: workers that stay between calls, one unit at a time each.

Starting a worker takes seconds (an interpreter, torch, the encoder's weights), and an update embeds many times: every
predecessor's cache, the evaluation set with every generation, every wave. So the workers of a pool outlive a call and
open another encoder when the next one asks for it. They hold their processors until `close`.

Invariants:
* A worker that dies is replaced and its unit runs again, `max_attempts` times at most; an exception of the encoder is
  not tried again, because the same images would raise it again.
* A call that raises ends all workers: nothing of it runs on behind the next one.
* No work is given to an actor that has not answered yet: it would wait with it, for ever if the cluster has no room.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from pyarrow import fs

from graceful.indexing.embed import (
    EmbeddedUnit,
    EmbeddingFailedError,
    EmbeddingInterruptedError,
    EmbedUnit,
    EncodeSources,
    OpenEncoder,
    check_units,
    deadline_error,
    embed_unit,
)

# The longest silent wait for workers; the deadline is looked at in between.
POLL_S = 5.0


class EmbeddingPool:
    """At most `num_workers` actors, started when units come, each with `cpus_per_worker` and as many threads.

    `resources` and `labels` choose their nodes: custom resources that each takes, and Ray labels.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        filesystem: fs.FileSystem | None = None,
        max_attempts: int = 3,
    ) -> None:
        if num_workers < 1 or max_attempts < 1:
            raise ValueError(
                f"embedding: expected num_workers and max_attempts of at least 1; found {num_workers}, {max_attempts}"
            )
        threads = str(max(1, int(cpus_per_worker)))
        self._actor_class: Any = ray.remote(_Worker).options(  # type: ignore[attr-defined]
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
            resources=dict(resources or {}),
            label_selector=dict(labels or {}),
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        self._filesystem = filesystem
        self._num_workers = num_workers
        self._max_attempts = max_attempts
        self._open_encoder: OpenEncoder | None = None
        self._opened: dict[Any, OpenEncoder] = {}  # worker -> what it was last told to open
        self._busy: dict[Any, tuple[EmbedUnit | None, Any]] = {}  # answer -> unit (None: opening), worker
        self._idle: list[Any] = []
        self._todo: deque[EmbedUnit] = deque()

    def __enter__(self) -> EmbeddingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        self._todo.clear()
        self._end([*self._opened])

    def embed(
        self,
        units: Sequence[EmbedUnit],
        open_encoder: OpenEncoder,
        *,
        deadline_s: float = 3600.0,
        on_unit: Callable[[EmbeddedUnit], None] | None = None,
    ) -> list[EmbeddedUnit]:
        """Embed every unit and return the results in the order of `units`.

        `open_encoder` travels to the workers and runs once in each, unless the worker's last call was with the very
        same one. `on_unit` runs in this process as soon as a unit's file is complete, in order of completion, once per
        unit.

        Raises:
            RuntimeError: this process is not connected to a Ray cluster.
            EmbeddingFailedError: the encoder raised or returned vectors that cannot be stored; names the unit.
            EmbeddingInterruptedError: workers died too often, or `deadline_s` passed.
        """
        check_units(units)
        if not units:
            return []
        if not ray.is_initialized():
            raise RuntimeError(
                f"embedding with {self._num_workers} workers: expected a Ray cluster, found none; "
                "call ray.init(...) first or embed in this process"
            )
        results: dict[str, EmbeddedUnit] = {}
        self._open_encoder = open_encoder
        try:
            for result in self._run(units, deadline_s):
                results[result.unit_id] = result
                if on_unit is not None:
                    on_unit(result)
        except BaseException:
            self.close()
            raise
        return [results[unit.unit_id] for unit in units]

    def _run(self, units: Sequence[EmbedUnit], deadline_s: float) -> Iterator[EmbeddedUnit]:
        deadline = time.monotonic() + deadline_s
        deaths: Counter[str | None] = Counter()
        self._todo.extend(units)
        for _ in range(min(self._num_workers, len(units)) - len(self._opened)):
            self._spawn()
        self._give_work()
        num_done = 0
        while num_done < len(units):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise deadline_error(deadline_s, num_done, len(units))
            ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=min(POLL_S, left_s))
            for answer in ready:
                result = self._collect(answer, deaths)
                self._give_work()
                # After the worker has its next unit: committing this one must not keep it waiting.
                if result is not None:
                    num_done += 1
                    yield result

    def _spawn(self) -> None:
        self._open(self._actor_class.remote(self._filesystem))

    def _open(self, worker: Any) -> None:
        assert self._open_encoder is not None
        self._opened[worker] = self._open_encoder
        self._busy[worker.open.remote(self._open_encoder)] = (None, worker)

    def _give_work(self) -> None:
        while self._todo and self._idle:
            worker = self._idle.pop()
            if self._opened[worker] is self._open_encoder:
                unit = self._todo.popleft()
                self._busy[worker.embed.remote(unit)] = (unit, worker)
            else:
                self._open(worker)

    def _end(self, workers: Sequence[Any]) -> None:
        for worker in workers:
            if ray.is_initialized():
                ray.kill(worker)
            self._opened.pop(worker, None)
        self._busy = {answer: (unit, worker) for answer, (unit, worker) in self._busy.items() if worker in self._opened}
        self._idle = [worker for worker in self._idle if worker in self._opened]

    def _collect(self, answer: Any, deaths: Counter[str | None]) -> EmbeddedUnit | None:
        """Take one answer: a finished unit, or None from a worker that has opened its encoder or died."""
        unit, worker = self._busy.pop(answer)
        # A worker that was still opening the encoder of an earlier call when that call had all its units.
        is_late = self._opened[worker] is not self._open_encoder
        try:
            result: EmbeddedUnit | None = ray.get(answer, timeout=POLL_S)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) and not is_late:
                # What the worker raised, without the remote traceback in its message.
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            # Dead, or unreachable, which is treated alike: its unit may run twice, and the same file is written twice.
            self._end([worker])
            if not is_late:
                self._count_death(unit, deaths, error)
            if unit is not None:
                self._todo.appendleft(unit)
            self._spawn()
            return None
        self._idle.append(worker)
        return result

    def _count_death(self, unit: EmbedUnit | None, deaths: Counter[str | None], error: Exception) -> None:
        name = unit.unit_id if unit else None
        deaths[name] += 1
        if deaths[name] >= self._max_attempts * (1 if unit else self._num_workers):
            raise EmbeddingInterruptedError(
                f"embedding {f'unit {name}' if unit else 'before the first unit'}: expected a worker to survive, "
                f"found {deaths[name]} dead ones ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "look at the memory of the workers and at Ray's logs"
            ) from error


class _Worker:
    """The actor. Encoders are opened by a call of its own, so that their errors are answers and not a dead actor."""

    def __init__(self, filesystem: fs.FileSystem | None) -> None:
        self._filesystem = filesystem
        self._encode: EncodeSources | None = None

    def open(self, open_encoder: OpenEncoder) -> None:
        self._encode = None  # one network at a time in memory
        try:
            self._encode = open_encoder()
        except Exception as error:
            raise EmbeddingFailedError(
                f"embedding: opening the encoder in a worker raised {type(error).__name__}: {error}"
            ) from error

    def embed(self, unit: EmbedUnit) -> EmbeddedUnit:
        assert self._encode is not None
        return embed_unit(unit, self._encode, self._filesystem)
