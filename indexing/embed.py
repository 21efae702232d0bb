"""The one embedding engine: units of images in, one Parquet file of unit vectors per unit out.

Waves, evaluation sets and predecessor caches are all embedded here; how an image is read and which network sees it is
the business of the injected encoder (`EncodeSources`), which also overlaps decoding with the network.

Invariants:
* One unit is one file under a name that the caller chose. A file appears whole or not at all, and a unit that runs
  twice (a worker thought dead may finish as well) replaces the file by an equal one.
* Every stored row is finite and of norm 1; a row that the encoder reports as failed is left out and reported.
* A worker that dies is replaced and its unit runs again, `max_attempts` times at most; an exception of the encoder is
  not tried again, because the same images would raise it again.

Shapes: n rows, D width.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from indexing.embedding_files import EMBEDDING_COLUMN, EmbeddingFileError, read_embeddings, write_embedding_file

__all__ = [
    "EMBEDDING_COLUMN",
    "EmbedUnit",
    "EmbeddedUnit",
    "EmbeddingFailedError",
    "EmbeddingFileError",
    "EmbeddingInterruptedError",
    "EncodeSources",
    "embed_unit",
    "embed_units",
    "read_embeddings",
    "write_embedding_file",
]

# The longest silent wait for workers; the deadline is looked at in between.
POLL_S = 5.0
NORM_TOLERANCE = 1e-5

EncodeSources = Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]


class EmbeddingFailedError(RuntimeError):
    """The encoder raised, or returned vectors that cannot be stored; not tried again."""


class EmbeddingInterruptedError(RuntimeError):
    """Workers died too often or the deadline passed; the finished units' files are complete."""


@dataclass(frozen=True)
class EmbedUnit:
    """What one worker embeds at a time.

    `sources` name the images; `keys` has one value per source and column and travels into the file (not with a column
    named `embedding`); `path` is the file to write: a local path, a URI, or a path inside the file system given to
    `embed_units`.
    """

    unit_id: str
    sources: tuple[str, ...]
    keys: Mapping[str, Sequence[object]] | pa.Table
    path: str


@dataclass(frozen=True)
class EmbeddedUnit:
    """A unit that is on disk. `failures` are (position in `sources`, reason); those rows are not in the file."""

    unit_id: str
    path: str
    num_rows: int
    size_bytes: int
    width: int
    failures: tuple[tuple[int, str], ...]
    seconds: float


def embed_units(
    units: Sequence[EmbedUnit],
    open_encoder: Callable[[], EncodeSources],
    *,
    num_workers: int = 0,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    filesystem: fs.FileSystem | None = None,
    deadline_s: float = 3600.0,
    max_attempts: int = 3,
    on_unit: Callable[[EmbeddedUnit], None] | None = None,
) -> list[EmbeddedUnit]:
    """Embed every unit and return the results in the order of `units`.

    `open_encoder` runs once in each worker. `on_unit` runs in the calling process as soon as a unit's file is complete,
    in order of completion, once per unit. `num_workers=0` works in this process without Ray and looks at the deadline
    between units; otherwise Ray must have been initialised, and the workers end with the call. Each is given
    `cpus_per_worker` and as many threads.

    Raises:
        EmbeddingFailedError: the encoder raised or returned vectors that cannot be stored; names the unit.
        EmbeddingInterruptedError: workers died too often, or `deadline_s` passed.
    """
    _check_units(units, num_workers, max_attempts)
    results: dict[str, EmbeddedUnit] = {}

    def finished(result: EmbeddedUnit) -> None:
        results[result.unit_id] = result
        if on_unit is not None:
            on_unit(result)

    if units and num_workers:
        pool = _RayPool(open_encoder, filesystem, num_workers, cpus_per_worker, gpus_per_worker, max_attempts)
        pool.run(units, finished, deadline_s)
    elif units:
        deadline = time.monotonic() + deadline_s
        encode = open_encoder()
        for unit in units:
            if time.monotonic() > deadline:
                raise _deadline_error(deadline_s, len(results), len(units))
            finished(embed_unit(unit, encode, filesystem))
    return [results[unit.unit_id] for unit in units]


def embed_unit(unit: EmbedUnit, encode: EncodeSources, filesystem: fs.FileSystem | None = None) -> EmbeddedUnit:
    """Encode one unit and write its file; rows that failed are left out.

    Raises:
        EmbeddingFailedError: see `embed_units`.
    """
    started = time.perf_counter()
    try:
        vectors, failures = encode(unit.sources)
    except Exception as error:
        raise EmbeddingFailedError(
            f"embedding unit {unit.unit_id}: the encoder raised {type(error).__name__}: {error}; "
            "let it report bad images as failures, or take them out"
        ) from error
    vectors = _checked_vectors(unit, vectors, failures)
    keys = unit.keys if isinstance(unit.keys, pa.Table) else pa.table({name: list(v) for name, v in unit.keys.items()})
    if failures:
        kept = np.ones(len(unit.sources), dtype=bool)
        kept[list(failures)] = False
        keys, vectors = keys.filter(pa.array(kept)), vectors[kept]
    size_bytes = write_embedding_file(unit.path, keys, vectors, filesystem=filesystem)
    return EmbeddedUnit(
        unit_id=unit.unit_id,
        path=unit.path,
        num_rows=len(vectors),
        size_bytes=size_bytes,
        width=int(vectors.shape[1]),
        failures=tuple(sorted((int(index), str(reason)) for index, reason in failures.items())),
        seconds=time.perf_counter() - started,
    )


class _Worker:
    """The actor: one encoder, opened by the first `ping` so that its errors are answers and not a dead actor."""

    def __init__(self, open_encoder: Callable[[], EncodeSources], filesystem: fs.FileSystem | None) -> None:
        self._open_encoder = open_encoder
        self._filesystem = filesystem
        self._encode: EncodeSources | None = None

    def ping(self) -> None:
        try:
            self._encode = self._open_encoder()
        except Exception as error:
            raise EmbeddingFailedError(
                f"embedding: opening the encoder in a worker raised {type(error).__name__}: {error}"
            ) from error

    def embed(self, unit: EmbedUnit) -> EmbeddedUnit:
        assert self._encode is not None
        return embed_unit(unit, self._encode, self._filesystem)


class _RayPool:
    """Workers that each do one unit at a time. A replacement gets its first unit when it has answered.

    Work given to an actor that has not started yet would wait with it, for ever if the cluster has no room for it.
    """

    def __init__(
        self,
        open_encoder: Callable[[], EncodeSources],
        filesystem: fs.FileSystem | None,
        num_workers: int,
        cpus_per_worker: float,
        gpus_per_worker: float,
        max_attempts: int,
    ) -> None:
        # The only lazy import: the in-process path and readers of embeddings must not pay seconds for Ray.
        import ray

        if not ray.is_initialized():
            raise RuntimeError(
                f"embedding with {num_workers} workers: expected a Ray cluster, found none; "
                "call ray.init(...) first or use num_workers=0"
            )
        self._ray: Any = ray
        threads = str(max(1, int(cpus_per_worker)))
        self._actor_class: Any = ray.remote(_Worker).options(
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        self._arguments = (open_encoder, filesystem)
        self._num_workers = num_workers
        self._max_attempts = max_attempts
        self._busy: dict[Any, tuple[EmbedUnit | None, Any]] = {}
        self._idle: list[Any] = []
        self._todo: deque[EmbedUnit] = deque()

    def run(self, units: Sequence[EmbedUnit], finished: Callable[[EmbeddedUnit], None], deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        deaths: Counter[str | None] = Counter()
        self._todo.extend(units)
        num_done = 0
        try:
            for _ in range(min(self._num_workers, len(units))):
                self._spawn()
            while num_done < len(units):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise _deadline_error(deadline_s, num_done, len(units))
                ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=min(POLL_S, left_s))
                for reference in ready:
                    result = self._collect(reference, deaths)
                    self._give_work()
                    # After the worker has its next unit: committing this one must not keep it waiting.
                    if result is not None:
                        num_done += 1
                        finished(result)
        finally:
            for actor in [*self._idle, *(actor for _, actor in self._busy.values())]:
                self._ray.kill(actor)

    def _spawn(self) -> None:
        actor = self._actor_class.remote(*self._arguments)
        self._busy[actor.ping.remote()] = (None, actor)

    def _give_work(self) -> None:
        while self._todo and self._idle:
            unit, actor = self._todo.popleft(), self._idle.pop()
            self._busy[actor.embed.remote(unit)] = (unit, actor)

    def _collect(self, reference: Any, deaths: Counter[str | None]) -> EmbeddedUnit | None:
        """Take one answer: a finished unit, or None from a worker that has started or died."""
        unit, actor = self._busy.pop(reference)
        try:
            result: EmbeddedUnit | None = self._ray.get(reference, timeout=POLL_S)
        except self._ray.exceptions.RayTaskError as error:
            self._ray.kill(actor)
            # What the worker raised, without the remote traceback in its message.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            # Dead, or unreachable, which is treated alike: its unit may run twice, and the same file is written twice.
            self._ray.kill(actor)
            name = unit.unit_id if unit else None
            deaths[name] += 1
            allowed = self._max_attempts * (1 if unit else self._num_workers)
            if deaths[name] >= allowed:
                raise EmbeddingInterruptedError(
                    f"embedding {f'unit {name}' if unit else 'before the first unit'}: expected a worker to survive, "
                    f"found {deaths[name]} dead ones ({type(error).__name__}: {str(error).splitlines()[0]}); "
                    "look at the memory of the workers and at Ray's logs"
                ) from error
            if unit is not None:
                self._todo.appendleft(unit)
            self._spawn()
            return None
        self._idle.append(actor)
        return result


def _checked_vectors(unit: EmbedUnit, vectors: NDArray[np.float32], failures: dict[int, str]) -> NDArray[np.float32]:
    """Return the vectors with norm 1; failed rows stay as they are."""
    if vectors.ndim != 2 or len(vectors) != len(unit.sources) or vectors.shape[1] == 0:
        raise EmbeddingFailedError(
            f"embedding unit {unit.unit_id}: expected vectors ({len(unit.sources)}, D), found shape {vectors.shape}"
        )
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    good = np.ones(len(vectors), dtype=bool)
    good[list(failures)] = False
    bad = good & ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise EmbeddingFailedError(
            f"embedding unit {unit.unit_id}: expected finite vectors other than 0, found norm {norms[row]} for "
            f"{unit.sources[row]} ({int(bad.sum())} such rows, not reported as failures); check the encoder"
        )
    off = good & (np.abs(norms - 1) > NORM_TOLERANCE)
    if off.any():
        vectors = vectors.copy()
        vectors[off] /= norms[off, None]
    return vectors


def _check_units(units: Sequence[EmbedUnit], num_workers: int, max_attempts: int) -> None:
    if num_workers < 0 or max_attempts < 1:
        raise ValueError(
            f"embedding: expected num_workers >= 0, max_attempts >= 1; found {num_workers}, {max_attempts}"
        )
    for name in ("unit_id", "path"):
        values = [getattr(unit, name) for unit in units]
        if len(set(values)) != len(values):
            double = next(value for value in values if values.count(value) > 1)
            raise ValueError(f"embedding: expected a different {name} for every unit, found {double} twice")
    for unit in units:
        if isinstance(unit.keys, pa.Table):
            names, lengths = list(unit.keys.column_names), {unit.keys.num_rows}
        else:
            names, lengths = list(unit.keys), {len(values) for values in unit.keys.values()}
        if EMBEDDING_COLUMN in names or (names and lengths != {len(unit.sources)}):
            raise ValueError(
                f"embedding unit {unit.unit_id}: expected key columns of {len(unit.sources)} values, none named "
                f"{EMBEDDING_COLUMN!r}; found {names} with {sorted(lengths)} values"
            )


def _deadline_error(deadline_s: float, num_done: int, num_units: int) -> EmbeddingInterruptedError:
    return EmbeddingInterruptedError(
        f"embedding: expected {num_units} units within {deadline_s:g} s, found {num_done} done; "
        "run again (finished files stay) or allow more time"
    )
