"""Images by name: where one image's bytes are, how to read many of them, and how they become pixels.

A source names one image: "/abs/file.png" (or any URI) or "/abs/file.parquet#123", row 123 of a Parquet file with a
Hugging Face image column (struct of bytes and path, or plain binary). "#123@photo" names the column where a file has
several; without it the column is `image`, or else the only one that holds images.
"""

import io
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from graceful.errors import GracefulError, UsageError
from graceful.files import join, read_bytes, resolve
from graceful.training.generation import Preprocessing

_CACHED_GROUPS_BYTES = 256 * 2**20
_MAX_PIXELS = 2**28
_PNG_START = b"\x89PNG\r\n\x1a\n"


class UnreadableImageError(GracefulError):
    """The bytes of one image cannot be read or decoded."""


def split_source(source: str) -> tuple[str, int | None, str | None]:
    """Return file, row and column of a source; row and column are None for a plain file.

    >>> split_source("/a/b.parquet#7")
    ('/a/b.parquet', 7, None)
    """
    place, mark, tail = source.rpartition("#")
    row, _, column = tail.partition("@")
    if not mark or not row.isdigit():
        return source, None, None
    return place, int(row), column or None


def image_column(schema: pa.Schema, place: str) -> str:
    """Return the name of the column that holds images: `image`, or else the only one of a fitting type."""
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if "image" in fitting:
        return "image"
    if len(fitting) != 1:
        raise UsageError(
            f"reading images: expected one image column (struct with bytes, or binary), found {fitting} among "
            f"{schema.names} (in {place}); name it in image_column"
        )
    return fitting[0]


def payloads_of(column: pa.ChunkedArray | pa.Array, place: str) -> list[bytes | None]:
    """Return the encoded bytes of each row of an image column; None where a row has none.

    A row without bytes but with a path is read from the file of that name beside the Parquet file.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not pa.types.is_struct(column.type):
        return list(column.to_pylist())
    payloads: list[bytes | None] = column.field("bytes").to_pylist()
    if "path" in [field.name for field in column.type] and any(payload is None for payload in payloads):
        folder = place.rpartition("/")[0]
        paths = column.field("path").to_pylist()
        for row, (payload, path) in enumerate(zip(payloads, paths, strict=True)):
            if payload is None and path:
                try:
                    payloads[row] = read_bytes(path if path.startswith("/") or "://" in path else join(folder, path))
                except OSError:
                    payloads[row] = None
    return payloads


def read_payloads(sources: Sequence[str], failures: dict[int, str] | None = None) -> list[bytes]:
    """Return the encoded bytes of every source, in order.

    Reads only the row groups that are needed and keeps the most recent ones. With `failures` given, an unreadable image
    is noted there as {index: reason} and its bytes are empty; without it, UnreadableImageError is raised.
    """
    payloads = [b""] * len(sources)
    notes: dict[int, str] = {}
    wanted: dict[tuple[str, str | None], list[tuple[int, int]]] = defaultdict(list)
    for index, source in enumerate(sources):
        place, row, column = split_source(source)
        if row is not None:
            wanted[place, column].append((index, row))
            continue
        try:
            payloads[index] = read_bytes(place)
        except OSError as error:
            notes[index] = f"cannot be read: {_one_line(error)}"
    for (place, column), rows in wanted.items():
        try:
            _read_rows(place, column, rows, payloads, notes)
        except (OSError, pa.ArrowInvalid) as error:
            notes.update({index: f"cannot be read: {_one_line(error)}" for index, _ in rows})
    if failures is None and notes:
        index = min(notes)
        raise UnreadableImageError(
            f"reading images: expected {len(sources)} readable ones, found {len(notes)} that are not (first "
            f"{sources[index]}: {notes[index]})"
        )
    if failures is not None:
        failures.update(notes)
    return payloads


def decode(payload: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the pixels (channels, size, size) of one encoded image.

    Raises: UnreadableImageError on empty, truncated or foreign bytes.
    """
    with _open(payload) as image:
        converted = image.convert("L" if preprocessing.channels == 1 else "RGB")
        size = (preprocessing.image_size, preprocessing.image_size)
        if converted.size != size:
            converted = converted.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(converted)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def unreadable_reason(payload: bytes | None) -> str | None:
    """Return why an image cannot be decoded, or None when it can: it is decoded in full."""
    if payload is None:
        return "no bytes"
    try:
        with _open(payload):
            return None
    except UnreadableImageError as error:
        return str(error)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG of pixels (h, w) or (h, w, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _open(payload: bytes) -> Image.Image:
    if not payload:
        raise UnreadableImageError("empty")
    if payload.startswith(_PNG_START) and b"IEND" not in payload:  # PIL accepts a file that lost only its end
        raise UnreadableImageError("truncated: the file has no end")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked below; EXIF warnings say nothing about pixels
            image = Image.open(io.BytesIO(payload))
            if image.width * image.height > _MAX_PIXELS:
                raise UnreadableImageError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
            image.load()
            return image
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise UnreadableImageError(f"cannot be decoded: {_one_line(error)}") from error


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_rows(
    place: str,
    column: str | None,
    rows: list[tuple[int, int]],
    payloads: list[bytes],
    notes: dict[int, str],
) -> None:
    reader = _GroupReader(place, column)
    by_group: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, row in rows:
        if row >= reader.starts[-1]:
            notes[index] = f"cannot be read: the file has {reader.starts[-1]} rows"
            continue
        by_group[int(np.searchsorted(reader.starts, row, side="right")) - 1].append((index, row))
    for group, members in by_group.items():
        offset = int(reader.starts[group])
        taken = reader.read(group).take(pa.array([row - offset for _, row in members]))
        for (index, _), payload in zip(members, payloads_of(taken, place), strict=True):
            if payload is None:
                notes[index] = "no bytes"
            else:
                payloads[index] = payload


class _GroupCache:
    """The most recently used image columns of row groups, up to a number of bytes, shared by the threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._columns: OrderedDict[tuple[object, ...], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> pa.ChunkedArray | None:
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
            return self._columns.get(key)

    def put(self, key: tuple[object, ...], column: pa.ChunkedArray) -> None:
        with self._lock:
            self._columns[key] = column
            while len(self._columns) > 1 and sum(kept.nbytes for kept in self._columns.values()) > self._limit_bytes:
                self._columns.popitem(last=False)


_CACHE = _GroupCache(_CACHED_GROUPS_BYTES)


class _GroupReader:
    """One Parquet file's image column, a row group at a time. A changed file is not taken from the cache."""

    def __init__(self, place: str, column: str | None) -> None:
        file_system, path = resolve(place)
        info = file_system.get_file_info(path)
        self._file = pq.ParquetFile(file_system.open_input_file(path))
        self._column = column or image_column(self._file.schema_arrow, place)
        self._key = (place, self._column, info.size, info.mtime_ns)
        metadata = self._file.metadata
        self.starts = np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def read(self, group: int) -> pa.ChunkedArray:
        key = (*self._key, group)
        column = _CACHE.get(key)
        if column is None:
            column = self._file.read_row_group(group, columns=[self._column]).column(0)
            _CACHE.put(key, column)
        return column


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
