"""The one embedding engine: units of images in, one Parquet file of unit vectors per unit out.

Waves, evaluation sets and predecessor caches are all embedded here; how an image is read and which network sees it is
the business of the injected encoder (`EncodeSources`), which also overlaps decoding with the network.

Invariants:
* One unit is one file under a name that the caller chose. A file appears whole or not at all, and a unit that runs
  twice (a worker thought dead may finish as well) replaces the file by an equal one.
* Every stored row is finite and of norm 1; a row that the encoder reports as failed is left out and reported.
* A worker that dies is replaced and its unit runs again, `max_attempts` times at most; an exception of the encoder is
  not tried again, because the same images would raise it again.

The column `embedding` is fixed-size binary: D little-endian float32 values, plain, neither compressed nor
dictionary-coded, so that reading is near the speed of a memory copy. Width and dtype stand in the schema metadata too.
Compaction of a Delta table turns fixed-size binary into binary and drops that metadata; `read_embeddings` reads both.

Shapes: n rows, D width.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

EMBEDDING_COLUMN = "embedding"
EMBEDDING_FORMAT_VERSION = "1"
ROW_GROUP_ROWS = 65_536
NORM_TOLERANCE = 1e-5

EncodeSources = Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]


class EmbeddingFileError(Exception):
    """A Parquet file does not hold embeddings of the expected width and form."""


class EmbeddingFailedError(Exception):
    """The encoder raised, or returned vectors that cannot be stored; not tried again."""


class EmbeddingInterruptedError(Exception):
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
    in order of completion, once per unit. `num_workers=0` works in this process without Ray.

    Raises:
        EmbeddingFailedError: the encoder raised or returned vectors that cannot be stored; names the unit.
        EmbeddingInterruptedError: workers died too often, or `deadline_s` passed.
    """
    _check_units(units, num_workers, max_attempts)
    deadline = time.monotonic() + deadline_s
    results: dict[str, EmbeddedUnit] = {}

    def finished(result: EmbeddedUnit) -> None:
        results[result.unit_id] = result
        if on_unit is not None:
            on_unit(result)

    if not units:
        return []
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


def write_embedding_file(
    path: str | Path, keys: pa.Table, vectors: NDArray[np.float32], *, filesystem: fs.FileSystem | None = None
) -> int:
    """Write key columns and vectors (n, D) as one Parquet file and return its size in bytes.

    A local file is written beside its place, synced and renamed. Elsewhere the object is sent in one piece after it is
    complete in memory: closing a half-written upload would publish it.
    """
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"writing {path}: expected vectors (n, D) with D > 0, found shape {vectors.shape}")
    if keys.num_columns and keys.num_rows != len(vectors):
        raise ValueError(f"writing {path}: expected one vector per key row, found {keys.num_rows} keys, {len(vectors)}")
    width = vectors.shape[1]
    packed = np.ascontiguousarray(vectors, dtype="<f4")
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), len(packed), [None, pa.py_buffer(packed)])
    metadata = {
        "embedding_format_version": EMBEDDING_FORMAT_VERSION,
        "embedding_width": str(width),
        "embedding_dtype": "float32",
    }
    field = pa.field(EMBEDDING_COLUMN, column.type, nullable=False)
    table = keys.append_column(field, column) if keys.num_columns else pa.table([column], schema=pa.schema([field]))
    table = table.replace_schema_metadata(metadata)

    remote, target = _locate(str(path), filesystem)
    if remote is not None:
        sink = pa.BufferOutputStream()
        _write_parquet(table, sink, keys.column_names)
        buffer = sink.getvalue()
        with remote.open_output_stream(target) as stream:
            stream.write(buffer)
        return int(buffer.size)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    part = f"{target}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as file:
            _write_parquet(table, file, keys.column_names)
            file.flush()
            os.fsync(file.fileno())
        size_bytes = os.path.getsize(part)
        os.replace(part, target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return size_bytes


def read_embeddings(
    paths: Sequence[str | Path],
    columns: Sequence[str] | None = None,
    *,
    width: int | None = None,
    filesystem: fs.FileSystem | None = None,
) -> tuple[pa.Table, NDArray[np.float32]]:
    """Read files of `write_embedding_file`, or what compaction made of them, in the order of `paths`.

    `columns` are the key columns to read (None: all; empty: none). `width` is what the caller's own metadata says;
    needed only when no file has a row or states its width. The vectors (n, D) are not to be written to: they may be a
    view of the decoded file.

    Raises:
        EmbeddingFileError: a width that differs, a null, or rows of several lengths; names the file.
    """
    tables: list[pa.Table] = []
    vectors: NDArray[np.float32] | None = None
    with ExitStack() as stack:
        files = [(str(path), stack.enter_context(_open_parquet(str(path), filesystem))) for path in paths]
        for path, file in files:
            stated = _stated_width(path, file.schema_arrow, columns)
            if width is not None and stated is not None and stated != width:
                raise EmbeddingFileError(f"reading {path}: expected width {width}, found {stated}; wrong file?")
            width = width if width is not None else stated
        num_rows = sum(file.metadata.num_rows for _, file in files)
        start = 0
        for path, file in files:
            # One row group at a time: besides the result, no more than one group is in memory.
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=None if columns is None else [*columns, EMBEDDING_COLUMN])
                position = table.schema.get_field_index(EMBEDDING_COLUMN)
                for chunk in table.column(position).chunks:
                    part = _vectors_of(chunk, path, width)
                    width = part.shape[1]
                    if len(part) == num_rows:
                        vectors = part
                        break
                    if vectors is None:
                        vectors = np.empty((num_rows, width), dtype=np.float32)
                    vectors[start : start + len(part)] = part
                    start += len(part)
                tables.append(table.remove_column(position).replace_schema_metadata(None))
            if not file.metadata.num_row_groups:
                empty = file.schema_arrow.empty_table()
                keep = [name for name in empty.column_names if name != EMBEDDING_COLUMN]
                tables.append(empty.select(keep if columns is None else list(columns)).replace_schema_metadata(None))
    keys = pa.concat_tables(tables) if tables else pa.table({})
    return keys, np.zeros((0, width or 0), dtype=np.float32) if vectors is None else vectors


def _write_parquet(table: pa.Table, sink: object, key_columns: list[str]) -> None:
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=False,
        compression="none",
        # Statistics of the embedding column would cost a pass over it and help nobody.
        write_statistics=key_columns,
    )


def _open_parquet(path: str, filesystem: fs.FileSystem | None) -> pq.ParquetFile:
    remote, target = _locate(path, filesystem)
    return pq.ParquetFile(target, memory_map=remote is None, filesystem=remote)


def _stated_width(path: str, schema: pa.Schema, columns: Sequence[str] | None) -> int | None:
    """Return the width that the file's type or metadata states, once its columns are known to be there."""
    missing = [name for name in [*(columns or ()), EMBEDDING_COLUMN] if name not in schema.names]
    if missing:
        raise EmbeddingFileError(f"reading {path}: expected columns {missing}, found {schema.names}; wrong file?")
    column_type = schema.field(EMBEDDING_COLUMN).type
    if pa.types.is_fixed_size_binary(column_type):
        return int(column_type.byte_width) // 4
    stated = (schema.metadata or {}).get(b"embedding_width")
    return None if stated is None else int(stated)


def _vectors_of(chunk: pa.Array, path: str, width: int | None) -> NDArray[np.float32]:
    """View one chunk of (fixed-size) binary values as (n, D) float32 without a copy."""
    if chunk.null_count:
        raise EmbeddingFileError(f"reading {path}: expected an embedding in every row, found {chunk.null_count} nulls")
    if pa.types.is_fixed_size_binary(chunk.type):
        size, data, first = chunk.type.byte_width, chunk.buffers()[1], chunk.offset * chunk.type.byte_width
    elif pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type):
        kind = np.int32 if pa.types.is_binary(chunk.type) else np.int64
        offsets = np.frombuffer(chunk.buffers()[1], dtype=kind)[chunk.offset : chunk.offset + len(chunk) + 1]
        sizes = np.diff(offsets)
        size, data, first = int(sizes[0]), chunk.buffers()[2], int(offsets[0])
        if not (sizes == size).all():
            raise EmbeddingFileError(f"reading {path}: expected rows of one width, found {np.unique(sizes)[:3]} bytes")
    else:
        raise EmbeddingFileError(f"reading {path}: expected binary embeddings, found {chunk.type}; wrong file?")
    if size == 0 or size % 4 or (width is not None and size != 4 * width):
        raise EmbeddingFileError(f"reading {path}: expected width {width}, found {size} bytes a row; wrong file?")
    values = np.frombuffer(data, dtype="<f4", count=len(chunk) * size // 4, offset=first)
    return values.reshape(len(chunk), size // 4)


def _locate(path: str, filesystem: fs.FileSystem | None) -> tuple[fs.FileSystem | None, str]:
    """Return (None, local path) or (file system, path in it)."""
    if filesystem is None and "://" in path:
        filesystem, path = fs.FileSystem.from_uri(path)
    return (None, path) if isinstance(filesystem, fs.LocalFileSystem) else (filesystem, path)


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
