"""The one embedding engine: units of images in, one Parquet file of unit vectors per unit out.

Waves, evaluation sets and predecessor caches are all embedded here, in this process or by the workers of
`indexing.embedding_pool`; how an image is read and which network sees it is the business of the injected encoder
(`EncodeSources`), which also overlaps decoding with the network.

Invariants:
* One unit is one file under a name that the caller chose. A file appears whole or not at all, and a unit that runs
  twice (a worker thought dead may finish as well) replaces the file by an equal one.
* Every stored row is finite and of norm 1; a row that the encoder reports as failed is left out and reported.

Shapes: n rows, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from graceful.errors import GracefulError
from graceful.indexing.embedding_files import (
    EMBEDDING_COLUMN,
    EmbeddingFileError,
    read_embeddings,
    write_embedding_file,
)

__all__ = [
    "EMBEDDING_COLUMN",
    "EmbedUnit",
    "EmbeddedUnit",
    "EmbeddingFailedError",
    "EmbeddingFileError",
    "EmbeddingInterruptedError",
    "EncodeSources",
    "OpenEncoder",
    "embed_unit",
    "embed_units",
    "read_embeddings",
    "write_embedding_file",
]

NORM_TOLERANCE = 1e-5

EncodeSources = Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]
OpenEncoder = Callable[[], EncodeSources]


class EmbeddingFailedError(GracefulError):
    """The encoder raised, or returned vectors that cannot be stored; not tried again."""


class EmbeddingInterruptedError(GracefulError):
    """Workers died too often or the deadline passed; the finished units' files are complete."""


@dataclass(frozen=True)
class EmbedUnit:
    """What one worker embeds at a time.

    `sources` name the images; `keys` has one value per source and column and travels into the file (not with a column
    named `embedding`); `path` is the file to write: a local path, a URI, or a path inside the file system that was
    given.
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
    open_encoder: OpenEncoder,
    *,
    filesystem: fs.FileSystem | None = None,
    deadline_s: float = 3600.0,
    on_unit: Callable[[EmbeddedUnit], None] | None = None,
) -> list[EmbeddedUnit]:
    """Embed every unit in this process and return the results in the order of `units`.

    `open_encoder` runs once, and not at all without units. `on_unit` runs as soon as a unit's file is complete. The
    deadline is looked at between units.

    Raises:
        EmbeddingFailedError: the encoder raised or returned vectors that cannot be stored; names the unit.
        EmbeddingInterruptedError: `deadline_s` passed.
    """
    check_units(units)
    if not units:
        return []
    results: list[EmbeddedUnit] = []
    deadline = time.monotonic() + deadline_s
    encode = open_encoder()
    for unit in units:
        if time.monotonic() > deadline:
            raise deadline_error(deadline_s, len(results), len(units))
        results.append(embed_unit(unit, encode, filesystem))
        if on_unit is not None:
            on_unit(results[-1])
    return results


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


def check_units(units: Sequence[EmbedUnit]) -> None:
    """Refuse units that contradict each other: ValueError."""
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


def deadline_error(deadline_s: float, num_done: int, num_units: int) -> EmbeddingInterruptedError:
    """Say what was done when time was up."""
    return EmbeddingInterruptedError(
        f"embedding: expected {num_units} units within {deadline_s:g} s, found {num_done} done; "
        "run again (finished files stay) or allow more time"
    )
