"""Parquet files that say what they should be: written with checksums, and read so that a flipped byte is found.

The name of a file ends in two digests (XXH3, 64 bits each): one of the whole file, one of its footer. A small file, and
one whose vectors are read, is compared as a whole, once a process. Where a few columns of a larger one are read, its
footer is compared, every page has its own CRC-32, and numbers are compared with the lowest and highest that the footer
names: a page's header, which says how to decode it, has no checksum. Files whose names carry no digest (written by
workers and not committed yet) have the pages' checksums only.
"""

import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from graceful.errors import GracefulError, in_one_line
from graceful.files import is_remote, join, read_bytes, resolve, writing

ROW_GROUP_ROWS = 16_384
SMALL_BYTES = 2**20
"""Files up to this size are compared as a whole when they are opened."""
_NAME = re.compile(r"-([0-9a-f]{16})([0-9a-f]{16})\.parquet$")
_TRAILER_BYTES = 8
_verified: set[tuple[str, str]] = set()
_verified_lock = threading.Lock()


class DamagedFileError(GracefulError):
    """A stored file is not what was written, or is gone."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written: its name, rows, bytes, and the range of its key column (0, -1 where it has none)."""

    name: str
    num_rows: int
    size_bytes: int
    lowest: int = 0
    highest: int = -1


def digest_of(content: bytes | memoryview | pa.Buffer) -> str:
    """XXH3 of some bytes, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


def named(stem: str, content: bytes | memoryview | pa.Buffer) -> str:
    """Name of a Parquet file with this content: `stem`, then its two digests."""
    view = memoryview(content)
    return f"{stem}-{digest_of(view)}{digest_of(view[_footer_start(view) :])}.parquet"


def write_checked(folder: str, table: pa.Table, *, key: str | None = None, repeated: Sequence[str] = ()) -> WrittenFile:
    """Write a table as one new file of a folder; it appears whole or not at all, under a name of its own.

    `repeated` columns, which have few different values, are stored as a dictionary. The range of every
    column of numbers stands in the footer.
    """
    sink = pa.BufferOutputStream()
    numbers = [field.name for field in table.schema if _is_number(field.type)]
    # Without nulls there are no definition levels, whose coding stands in a page's header too.
    table = table.cast(pa.schema([field.with_nullable(table[field.name].null_count > 0) for field in table.schema]))
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=list(repeated) or False,
        compression="none",
        write_statistics=numbers or False,
        write_page_checksum=True,
    )
    content = sink.getvalue()
    name = named(uuid.uuid4().hex[:12], content)
    with writing(join(folder, name)) as stream:
        stream.write(content)
    return WrittenFile(name, table.num_rows, len(content), *key_range(table, key))


def key_range(table: pa.Table, key: str | None) -> tuple[int, int]:
    """Lowest and highest value of the key column; (0, -1) without a key or rows."""
    if key is None or not table.num_rows:
        return 0, -1
    found = pc.min_max(table[key]).as_py()
    return int(found["min"]), int(found["max"])


class CheckedFile:
    """A Parquet file opened for reading; its footer has been compared with the name."""

    def __init__(self, location: str, *, pages: bool = True) -> None:
        """Open a file; `pages` compares every page that is read. Raises DamagedFileError, saying what to do."""
        self.location = location
        self._content: pa.Buffer | None = None
        filesystem, path = resolve(location)
        try:
            if is_remote(location) and (filesystem.get_file_info(path).size or 0) > SMALL_BYTES:
                self._file = pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=pages)
            elif is_remote(location):
                self._content = pa.py_buffer(read_bytes(location))
                self._file = pq.ParquetFile(pa.BufferReader(self._content), page_checksum_verification=pages)
            else:
                source = pa.memory_map(path)
                self._content = source.read_buffer()
                self._file = pq.ParquetFile(source, page_checksum_verification=pages)
        except FileNotFoundError as error:
            raise damaged(location, "a file", "none") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(location, "a Parquet file", in_one_line(error)) from error
        if self._content is not None and len(self._content) <= SMALL_BYTES:
            self.verify()
        else:
            self._verify_footer()

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self._file.schema_arrow

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self._file.metadata.num_rows)

    def group_ranges(self, key: str) -> NDArray[np.int64]:
        """Lowest and highest key of every row group, (R, 2)."""
        metadata, found = self._file.metadata, []
        column = self._file.schema_arrow.get_field_index(key)
        for number in range(metadata.num_row_groups):
            statistics = metadata.row_group(number).column(column).statistics
            found.append((statistics.min, statistics.max) if statistics and statistics.has_min_max else (0, -1))
        return np.array(found, np.int64).reshape(-1, 2)

    def group_starts(self) -> NDArray[np.int64]:
        """First row of every row group, (R,)."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if sizes else np.empty(0, np.int64)

    def read(self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
        """Read columns of all row groups or of some; every page is compared with its checksum."""
        names = None if columns is None else list(columns)
        metadata = self._file.metadata
        try:
            if groups is None:
                expected = metadata.num_rows
                rows = self._file.read(columns=names)
            else:
                expected = sum(metadata.row_group(number).num_rows for number in groups)
                rows = self._file.read_row_groups(list(groups), columns=names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(self.location, "what was written", in_one_line(error)) from error
        # A page of a type that the reader does not know is passed over without a word.
        if rows.num_rows != expected or any(len(column) != expected for column in rows.columns):
            raise damaged(self.location, f"{expected} rows", f"{rows.num_rows}")
        if has_digest(self.location) and not _seen(self.location, "whole"):
            self._verify_ranges(rows, range(metadata.num_row_groups) if groups is None else groups)
        return rows

    def verify(self) -> None:
        """Compare the whole file with the digest in its name, once a process. Raises DamagedFileError."""
        verify(self.location, self._content)

    def _verify_ranges(self, rows: pa.Table, groups: Sequence[int]) -> None:
        """Compare columns of numbers with what the footer says of them: nulls, lowest and highest."""
        metadata = self._file.metadata
        for name in rows.column_names:
            place = self._file.schema_arrow.get_field_index(name)
            if place < 0 or not _is_number(rows.schema.field(name).type) or not rows.num_rows:
                continue
            found = [metadata.row_group(number).column(place).statistics for number in groups]
            stated = [one for one in found if one is not None and one.has_min_max]
            if len(stated) != len(found):
                continue
            expected = (min(one.min for one in stated), max(one.max for one in stated))
            read = pc.min_max(rows[name]).as_py()
            if (read["min"], read["max"]) != expected or rows[name].null_count != sum(one.null_count for one in stated):
                raise damaged(self.location, f"{name} from {expected[0]} to {expected[1]}", f"{read}")

    def _verify_footer(self) -> None:
        found = _NAME.search(self.location)
        if found is None or _seen(self.location, "footer"):
            return
        if self._content is None:
            # Remote: one read of the end. The footer's own length was needed to open the file.
            footer = _remote_footer(self.location)
        else:
            view = memoryview(self._content)
            footer = bytes(view[_footer_start(view) :])
        if digest_of(footer) != found[2]:
            raise damaged(self.location, f"a footer with digest {found[2]}", digest_of(footer))
        _remember(self.location, "footer")


def nullable(table: pa.Table) -> pa.Table:
    """A table as others of its kind: no metadata, and every column may have nulls, whatever one file says."""
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))


def has_digest(location: str) -> bool:
    """Tell whether the name of a file says what is in it."""
    return _NAME.search(location) is not None


def verify(location: str, content: pa.Buffer | bytes | None = None, *, again: bool = False) -> None:
    """Compare a whole file with the digest in its name, once a process (or `again`). Raises DamagedFileError."""
    found = _NAME.search(location)
    if found is None or (not again and _seen(location, "whole")):
        return
    try:
        digest = digest_of(read_bytes(location) if content is None else content)
    except FileNotFoundError as error:
        raise damaged(location, "a file", "none") from error
    if digest != found[1]:
        raise damaged(location, f"digest {found[1]}", digest)
    _remember(location, "whole")


def forget_verified() -> None:
    """Compare every file anew, as a process does that has just started."""
    with _verified_lock:
        _verified.clear()


def damaged(location: str, expected: str, found: str) -> DamagedFileError:
    """The error that names a damaged file."""
    return DamagedFileError(
        f"reading a stored file: expected {expected}, found {found} ({location}); "
        "restore it from a backup, or run 'graceful doctor'"
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _footer_start(content: memoryview) -> int:
    """Where the footer begins; the last eight bytes of a Parquet file are its length and a mark."""
    if len(content) < _TRAILER_BYTES:
        return 0
    length = int.from_bytes(content[-_TRAILER_BYTES:-4], "little")
    return max(0, len(content) - length - _TRAILER_BYTES)


def _remote_footer(location: str) -> bytes:
    filesystem, path = resolve(location)
    with filesystem.open_input_file(path) as stream:
        size: int = stream.size()
        trailer: Any = stream.read_at(_TRAILER_BYTES, size - _TRAILER_BYTES)
        length = int.from_bytes(trailer[:4], "little") + _TRAILER_BYTES
        return bytes(stream.read_at(min(length, size), max(0, size - length)))


def _seen(location: str, part: str) -> bool:
    with _verified_lock:
        return (location, part) in _verified


def _remember(location: str, part: str) -> None:
    with _verified_lock:
        if len(_verified) > 100_000:
            _verified.clear()
        _verified.add((location, part))
