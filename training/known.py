"""What earlier readings found about images, so that an unchanged one is neither read nor decoded again.

An index in a folder: Parquet files of (source, size, mtime_ns, content_sha256, reason, decoded), appended to by every
reading that meets something new, merged when there are many. It is derived: a file that is lost, damaged, of another
format or of another decoder is left out (damaged ones are removed, with a warning), and its images are read once more.

An image counts as unchanged while size and modification time of its file are those that were recorded; a row of a
Parquet file, while those of the Parquet file are. Not noticed: a file changed in place whose size and modification time
were both put back. Not recorded, and so hashed each time: files changed within SETTLED_S of being read, since a second
change might leave the same time, and rows whose bytes lie in another file beside the Parquet file. An image of known
content under a new name, or in a rewritten Parquet file, is hashed but not decoded.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graceful.files import join, list_files, remove, resolve, writing
from graceful.training.images import FORMATS, MAX_PIXELS, image_column, read_payloads, split_source, unreadable_reason

KNOWN_FORMAT_VERSION = 1
SETTLED_S = 2.0
"""Age in seconds from which a file's modification time is trusted: file systems stamp in steps of up to two seconds."""

_DECODER = json.dumps([KNOWN_FORMAT_VERSION, PIL.__version__, MAX_PIXELS, FORMATS])
_MOST_FILES = 16
_BLOCK = 256
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("content_sha256", pa.string()),
        ("reason", pa.string()),
        ("decoded", pa.bool_()),
    ]
)

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What is found of N images, by position; `num_decoded` counts the images that were decoded for it."""

    digests: list[str]
    reasons: dict[int, str] = field(default_factory=dict)  # why an image cannot be decoded
    num_decoded: int = 0


class KnownImages:
    """The index in one folder, local or in an object store; without `grows` it is only read."""

    def __init__(self, folder: str, *, grows: bool = True) -> None:
        self._folder = folder
        self._grows = grows

    def read(self) -> pa.Table:
        """Return all entries, the newest first; empty where nothing is known."""
        tables = [table for _, table in self._parts()]
        return pa.concat_tables([*tables, _SCHEMA.empty_table()])

    def add(self, entries: pa.Table) -> None:
        """Append entries; merge the files when there are many."""
        if not len(entries) or not self._grows:
            return
        parts = list(self._parts())
        if len(parts) < _MOST_FILES:
            self._write(entries)
            return
        merged = pa.concat_tables([entries, *(table for _, table in parts)])
        _, first = np.unique(merged["source"].to_numpy(zero_copy_only=False), return_index=True)
        self._write(merged.take(np.sort(first)))
        for location, _ in parts:
            remove(location)

    def _write(self, table: pa.Table) -> None:
        marked = table.replace_schema_metadata({"decoder": _DECODER})
        with writing(join(self._folder, f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet")) as stream:
            pq.write_table(marked, stream, write_page_checksum=True)

    def _parts(self) -> Iterator[tuple[str, pa.Table]]:
        locations = [location for location in list_files(self._folder) if location.endswith(".parquet")]
        for location in reversed(locations):
            file_system, path = resolve(location)
            try:
                with pq.ParquetFile(file_system.open_input_file(path), page_checksum_verification=True) as reader:
                    metadata = reader.schema_arrow.metadata or {}
                    if metadata.get(b"decoder") != _DECODER.encode():
                        continue
                    yield location, reader.read().replace_schema_metadata(None).cast(_SCHEMA)
            except FileNotFoundError:  # merged by another process
                continue
            except (OSError, pa.ArrowInvalid, ValueError) as error:
                logger.warning("the index of known images is damaged and is made again (%s: %s)", location, error)
                if self._grows:
                    remove(location)


def examine(
    sources: Sequence[str], takes: Callable[[str], bool], known: KnownImages | None = None, threads: int | None = None
) -> Findings:
    """Hash every image, and decode those whose content hash `takes` accepts, except what is known already.

    New images are read by `threads` threads (by default one for each core) in blocks of 256.
    """
    table = _SCHEMA.empty_table() if known is None else known.read()
    started_ns = time.time_ns()
    sizes, times = (None, None) if known is None else _stamps(sources)  # before any byte is read
    places = np.full(len(sources), -1, np.int64)
    if len(table) and sizes is not None and times is not None:
        found = pc.index_in(pa.array(sources, pa.string()), value_set=table["source"].combine_chunks())
        places = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        same = (table["size"].to_numpy()[places] == sizes) & (table["mtime_ns"].to_numpy()[places] == times)
        places[~same] = -1
    findings = Findings([""] * len(sources))
    fresh = np.ones(len(sources), bool)
    hits = np.flatnonzero(places >= 0)
    rows = table.take(places[hits])
    columns = (rows[name].to_pylist() for name in ("content_sha256", "reason", "decoded"))
    for position, digest, reason, decoded in zip(hits.tolist(), *columns, strict=True):
        if decoded or not takes(digest):
            fresh[position] = False
            findings.digests[position] = digest
            if decoded and reason is not None and takes(digest):
                findings.reasons[position] = reason
    wanted = np.flatnonzero(fresh)
    if not len(wanted):
        return findings
    checked = table.filter(table["decoded"])
    by_content = dict(zip(checked["content_sha256"].to_pylist(), checked["reason"].to_pylist(), strict=True))
    entries = _read_all(sources, wanted, takes, by_content, findings, threads)
    if known is not None and sizes is not None and times is not None:
        known.add(_entries(sources, sizes, times, entries, started_ns))
    return findings


@dataclass(frozen=True)
class _Seen:
    """One image that was read."""

    digest: str
    reason: str | None
    decoded: bool  # by now or by an earlier reading of the same content
    is_new: bool  # decoded now
    is_missing: bool  # its bytes could not be read: that may pass, and is not recorded


def _read_all(
    sources: Sequence[str],
    wanted: NDArray[np.int64],
    takes: Callable[[str], bool],
    by_content: dict[str, str | None],
    findings: Findings,
    threads: int | None,
) -> list[tuple[int, _Seen]]:
    blocks = [wanted[start : start + _BLOCK].tolist() for start in range(0, len(wanted), _BLOCK)]

    def look(block: list[int]) -> list[_Seen]:
        return _look([sources[position] for position in block], takes, by_content)

    entries: list[tuple[int, _Seen]] = []
    count = min(threads or os.cpu_count() or 1, len(blocks))
    with ThreadPoolExecutor(count, thread_name_prefix="graceful-examine") as pool:
        for block, seen in zip(blocks, pool.map(look, blocks), strict=True):
            for position, image in zip(block, seen, strict=True):
                findings.digests[position] = image.digest
                findings.num_decoded += image.is_new
                if image.reason is not None:
                    findings.reasons[position] = image.reason
                if not image.is_missing:
                    entries.append((position, image))
    return entries


def _look(sources: list[str], takes: Callable[[str], bool], by_content: dict[str, str | None]) -> list[_Seen]:
    failures: dict[int, str] = {}
    seen = []
    for offset, payload in enumerate(read_payloads(sources, failures)):
        digest = hashlib.sha256(payload).hexdigest()
        if not takes(digest):
            seen.append(_Seen(digest, None, False, False, offset in failures))
        elif offset in failures:
            seen.append(_Seen(digest, failures[offset], False, False, True))
        elif digest in by_content:
            seen.append(_Seen(digest, by_content[digest], True, False, False))
        else:
            seen.append(_Seen(digest, unreadable_reason(payload), True, True, False))
    return seen


def _entries(
    sources: Sequence[str],
    sizes: NDArray[np.int64],
    times: NDArray[np.int64],
    entries: list[tuple[int, _Seen]],
    started_ns: int,
) -> pa.Table:
    latest = started_ns - int(SETTLED_S * 1e9)
    inside = cache(_holds_its_bytes)
    kept = []
    for position, image in entries:
        place, row, column = split_source(sources[position])
        if 0 <= times[position] <= latest and (row is None or inside(place, column)):
            kept.append((position, image))
    positions = [position for position, _ in kept]
    return pa.table(
        {
            "source": [sources[position] for position in positions],
            "size": sizes[positions],
            "mtime_ns": times[positions],
            "content_sha256": [image.digest for _, image in kept],
            "reason": [image.reason for _, image in kept],
            "decoded": [image.decoded for _, image in kept],
        },
        schema=_SCHEMA,
    )


def _stamps(sources: Sequence[str], block: int = 1024) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Size in bytes and modification time in ns of every source's file; -1 where there is none."""
    files = list(dict.fromkeys(split_source(source)[0] for source in sources))

    def ask(some: list[str]) -> list[tuple[int, int]]:
        file_system, _ = resolve(some[0])
        infos = file_system.get_file_info([resolve(place)[1] for place in some])
        return [_stamp(info) for info in infos]

    by_store: dict[str, list[str]] = {}
    for place in files:
        by_store.setdefault("/".join(place.split("/")[:3]) if "://" in place else "", []).append(place)
    blocks = [some[start : start + block] for some in by_store.values() for start in range(0, len(some), block)]
    stamps: dict[str, tuple[int, int]] = {}
    with ThreadPoolExecutor(8, thread_name_prefix="graceful-stamps") as pool:
        for some, found in zip(blocks, pool.map(ask, blocks), strict=True):
            stamps.update(zip(some, found, strict=True))
    both = np.array([stamps[split_source(source)[0]] for source in sources], np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _stamp(info: pafs.FileInfo) -> tuple[int, int]:
    if info.type != pafs.FileType.File or info.mtime_ns is None:
        return -1, -1
    return int(info.size), int(info.mtime_ns)


def _holds_its_bytes(place: str, column: str | None) -> bool:
    """Whether every row of a Parquet file's image column has its bytes in the file itself."""
    file_system, path = resolve(place)
    with pq.ParquetFile(file_system.open_input_file(path)) as reader:
        name = column or image_column(reader.schema_arrow, place)
        kind = reader.schema_arrow.field(name).type
        if not pa.types.is_struct(kind) or "path" not in [field.name for field in kind]:
            return True
        metadata = reader.metadata
        for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
            chunks = [group.column(index) for index in range(group.num_columns)]
            for chunk in chunks:
                if chunk.path_in_schema == f"{name}.bytes":
                    numbers = chunk.statistics
                    if numbers is None or not numbers.has_null_count or numbers.null_count:
                        return False
    return True
