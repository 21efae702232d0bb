"""The encoded images of a manifest by row, for a training that decodes them while it runs.

Any image can be read at any time for the price of one read. An image in a file of its own stays where it is. Rows of
Parquet files do not allow that (one row costs its row group), so their bytes are copied once, in the manifest's order,
into a scratch folder, and are compared with the manifest on the way:

    records.bin   for each image its content's SHA-256 (32 bytes), its kind (1 byte), and its bytes or its file's name
    starts.i64    where each record starts, and where the last one ends: N + 1 little-endian whole numbers

Nothing of it is held in memory, in however many processes read it, and whatever N is.
"""

import errno
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import is_remote
from graceful.training.images import GroupCache, group_cache, read_payloads, split_source
from graceful.training.manifest import scan_manifest

_RECORDS, _STARTS = "records.bin", "starts.i64"
_COPIED, _NAMED = b"\x00", b"\x01"
_BLOCK = 256
_REMOTE_READS = 16  # at a time, by one process


class ChangedImagesError(GracefulError):
    """An image is not the one that the manifest names."""


class ScratchFullError(GracefulError):
    """The scratch folder has no room for the training images."""


def check_content(payload: bytes, sha256: bytes, source: str) -> None:
    """Refuse an image that is not the one of the manifest. Raises ChangedImagesError."""
    if hashlib.sha256(payload).digest() != sha256:
        raise ChangedImagesError(
            f"reading training images: expected the content that the manifest names, found another (in {source}); "
            "write the manifest again"
        )


def write_records(manifest_uri: str, folder: str) -> None:
    """Copy what is in Parquet files into `folder`, and note where the rest is.

    Raises: ChangedImagesError, UnreadableImageError, ScratchFullError, and what reading the manifest raises.
    """
    end = 0
    groups = group_cache(1)  # rows come in their files' order: the last row group is enough
    try:
        with Path(folder, _RECORDS).open("wb") as records, Path(folder, _STARTS).open("wb") as starts:
            starts.write(struct.pack("<q", 0))
            for block in scan_manifest(manifest_uri, ["source", "content_sha256"], _BLOCK):
                ends = []
                for record in _records_of(block, groups):
                    records.write(record)
                    end += len(record)
                    ends.append(end)
                starts.write(struct.pack(f"<{len(ends)}q", *ends))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ScratchFullError(
            f"copying the training images: expected room for them, found {folder} full after {end / 2**30:.1f} GiB; "
            "set TMPDIR to a folder with more room, or raise training.pixel_memory_mib to hold them decoded in memory"
        ) from error


def _records_of(block: pa.RecordBatch, groups: GroupCache) -> Iterator[bytes]:
    sources, digests = block.column("source").to_pylist(), block.column("content_sha256").to_pylist()
    rows = [place for place, source in enumerate(sources) if split_source(source)[1] is not None]
    copies = dict(zip(rows, read_payloads([sources[place] for place in rows], groups=groups), strict=True))
    for place, (source, digest) in enumerate(zip(sources, map(bytes.fromhex, digests), strict=True)):
        if place in copies:
            check_content(copies[place], digest, source)
            yield digest + _COPIED + copies[place]
        else:
            yield digest + _NAMED + source.encode()


class Records:
    """Reads what `write_records` wrote; a process opens the files when it first reads."""

    def __init__(self, folder: str, manifest_uri: str) -> None:
        self._folder, self._manifest_uri = folder, manifest_uri
        self._files: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_files": None}

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """Return the encoded bytes of some images (n,), in the order asked.

        Raises: ChangedImagesError, UnreadableImageError.
        """
        found = [self._record(int(row)) for row in rows]
        named = [place for place, (_, kind, _) in enumerate(found) if kind == _NAMED]
        payloads = [payload for _, _, payload in found]
        sources = [payloads[place].decode() for place in named]
        for place, payload in zip(named, _read_files(sources), strict=True):
            payloads[place] = payload
        for place, (row, payload) in enumerate(zip(rows, payloads, strict=True)):
            digest = found[place][0]
            if hashlib.sha256(payload).digest() != digest:
                check_content(payload, digest, self.source(int(row)))
        return payloads

    def source(self, row: int) -> str:
        """Return where an image comes from, looked up in the manifest."""
        first = 0
        for block in scan_manifest(self._manifest_uri, ["source"]):
            if row < first + len(block):
                return str(block.column(0)[row - first].as_py())
            first += len(block)
        raise IndexError(row)

    def close(self) -> None:
        """Close the files of this process."""
        if self._files is not None:
            for file in self._files:
                os.close(file)
            self._files = None

    def _record(self, row: int) -> tuple[bytes, bytes, bytes]:
        if self._files is None:
            places = (Path(self._folder, name) for name in (_RECORDS, _STARTS))
            records, starts = (os.open(place, os.O_RDONLY) for place in places)
            self._files = records, starts
        records, starts = self._files
        start, end = struct.unpack("<2q", os.pread(starts, 16, 8 * row))
        record = os.pread(records, end - start, start)
        return record[:32], record[32:33], record[33:]


def _read_files(sources: list[str]) -> list[bytes]:
    if not any(is_remote(source) for source in sources):
        return read_payloads(sources)
    with ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="graceful-read") as pool:
        return [payload for (payload,) in pool.map(lambda source: read_payloads([source]), sources)]
