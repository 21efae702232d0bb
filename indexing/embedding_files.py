"""Embedding files: key columns and one vector a row, read and written near the speed of a memory copy.

The column `embedding` is fixed-size binary: D little-endian float32 values, plain, neither compressed nor
dictionary-coded, in row groups of 16,384, every page with a checksum. Width and dtype stand in the schema metadata too;
a file that was merged has lost that metadata, and a foreign tool's compaction makes plain binary of the column:
`read_embeddings` reads these forms as well.

Invariant: a file appears whole or not at all.

Shapes: n rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from graceful.errors import GracefulError
from graceful.files import writing
from graceful.indexing.checked_files import ROW_GROUP_ROWS, CheckedFile, has_digest, nullable, verify

EMBEDDING_COLUMN = "embedding"
EMBEDDING_FORMAT_VERSION = "1"


class EmbeddingFileError(GracefulError):
    """A Parquet file does not hold embeddings of the expected width and form."""


def write_embedding_file(
    path: str | Path, keys: pa.Table, vectors: NDArray[np.float32], *, filesystem: fs.FileSystem | None = None
) -> int:
    """Write key columns and vectors (n, D) as one Parquet file and return its size in bytes.

    The file appears whole or not at all; in a `filesystem` of the caller's it is sent in one piece.
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

    if filesystem is None:
        with writing(str(path)) as stream:
            _write_parquet(table, stream, keys.column_names)
            return int(stream.tell())
    sink = pa.BufferOutputStream()
    _write_parquet(table, sink, keys.column_names)
    buffer = sink.getvalue()
    with filesystem.open_output_stream(str(path)) as stream:
        stream.write(buffer)
    return int(buffer.size)


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
                tables.append(nullable(table.remove_column(position)))
            if not file.metadata.num_row_groups:
                empty = file.schema_arrow.empty_table()
                keep = [name for name in empty.column_names if name != EMBEDDING_COLUMN]
                tables.append(nullable(empty.select(keep if columns is None else list(columns))))
    keys = pa.concat_tables(tables) if tables else pa.table({})
    return keys, np.zeros((0, width or 0), dtype=np.float32) if vectors is None else vectors


def read_rows(location: str, rows: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.float32]:
    """Read the vectors (n, D) of some rows of one committed file, in the order asked.

    Raises:
        DamagedFileError: the file is not what was written; all of it is compared once a process.
    """
    opened = CheckedFile(location, pages=not has_digest(location))
    opened.verify()
    starts = opened.group_starts()
    group_of = np.searchsorted(starts, rows, side="right") - 1
    vectors: NDArray[np.float32] | None = None
    for group in np.unique(group_of).tolist():
        chunks = opened.read([EMBEDDING_COLUMN], [group]).column(0).chunks
        parts = [_vectors_of(chunk, location, None) for chunk in chunks]
        part = parts[0] if len(parts) == 1 else np.concatenate(parts)
        chosen = np.flatnonzero(group_of == group)
        if vectors is None:
            vectors = np.empty((len(rows), part.shape[1]), np.float32)
        vectors[chosen] = part[rows[chosen] - starts[group]]
    return np.empty((0, 0), np.float32) if vectors is None else vectors


def _write_parquet(table: pa.Table, sink: object, key_columns: list[str]) -> None:
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
        # Statistics of the embedding column would cost a pass over it and help nobody.
        write_statistics=key_columns,
    )


def _open_parquet(path: str, filesystem: fs.FileSystem | None) -> pq.ParquetFile:
    remote, target = _locate(path, filesystem)
    whole = filesystem is None and has_digest(path)
    if whole:
        verify(path)
    return pq.ParquetFile(target, memory_map=remote is None, filesystem=remote, page_checksum_verification=not whole)


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
