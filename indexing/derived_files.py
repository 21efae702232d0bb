"""Derived files with a checksum: written whole or not at all, read into memory and compared in the same pass.

The checksum is xxh3 of 128 bits over the checksums of blocks of 16 MiB, so that blocks are read and compared by several
threads. It tells damage, not malice. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from graceful.errors import GracefulError

BLOCK_BYTES = 16 * 2**20
READ_THREADS = 4


class IndexCorruptedError(GracefulError):
    """A derived file of the index is missing or is not what was written; it is to be built again from the gallery."""


def checksum(content: bytes | memoryview | NDArray[Any]) -> str:
    """Checksum of bytes in memory, the same as that of a file that holds them."""
    view = _bytes_of(content)
    starts = range(0, len(view), BLOCK_BYTES)
    return _whole([xxhash.xxh3_128_digest(view[start : start + BLOCK_BYTES]) for start in starts], len(view))


def write_checked(path: Path, chunks: Iterable[bytes | memoryview | NDArray[Any]]) -> str:
    """Write the chunks as one file, which appears whole or not at all, and return its checksum.

    Raises:
        FileExistsError: there is a file of that name; it is never replaced.
    """

    def write(part: str) -> None:
        with open(part, "wb", buffering=0) as file:
            for chunk in chunks:
                view = _bytes_of(chunk)
                while len(view):
                    view = view[file.write(view) :]

    return publish_file(path, write)


def publish_file(target: Path, write: Callable[[str], object]) -> str:
    """Let `write` fill a file of a temporary name, give it its own name, which must be free; return its checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        write(str(part))
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        digest = checksum_of(part)
        # A link fails where a rename would replace.
        os.link(part, target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def checksum_of(path: Path) -> str:
    """Checksum of a file, block by block. Raises OSError."""
    size = path.stat().st_size
    return _read_blocks(path, size, lambda _, length: memoryview(bytearray(length)))


def verify(path: Path, expected: str) -> None:
    """Compare a file with its checksum. Raises IndexCorruptedError."""
    try:
        found = checksum_of(path)
    except OSError as error:
        raise corrupted(path, f"a file, found {error}") from error
    if found != expected:
        raise corrupted(path, f"checksum {expected[:12]}, found {found[:12]}")


def read_checked(path: Path, out: NDArray[Any], expected: str) -> None:
    """Fill an array with a file of exactly its size and compare the checksum. Raises IndexCorruptedError."""
    view = _bytes_of(out)
    try:
        size = path.stat().st_size
        if size != len(view):
            raise corrupted(path, f"{len(view)} bytes, found {size}")
        found = _read_blocks(path, size, lambda start, length: view[start : start + length])
    except OSError as error:
        raise corrupted(path, f"a file, found {error}") from error
    if found != expected:
        raise corrupted(path, f"checksum {expected[:12]}, found {found[:12]}")


def map_checked(path: Path, dtype: Any, shape: tuple[int, ...], expected: str) -> NDArray[Any]:
    """Map a file of an array of known shape into memory, read-only, once its checksum is compared.

    Raises:
        IndexCorruptedError: it is missing, of another size, or not what was written.
    """
    verify(path, expected)
    if path.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise corrupted(path, f"an array {shape} of {np.dtype(dtype)}, found {path.stat().st_size} bytes")
    if not np.prod(shape):
        return np.empty(shape, dtype)
    # A plain view of the map: the subclass np.memmap costs time in every operation.
    return np.asarray(np.memmap(path, dtype, "r", shape=shape))


def corrupted(path: Path, expectation: str) -> IndexCorruptedError:
    """The error of a derived file; `expectation` says what was expected and found."""
    return IndexCorruptedError(f"opening the index: expected {expectation} ({path}); build it again from the gallery")


def _read_blocks(path: Path, size: int, block: Callable[[int, int], memoryview]) -> str:
    """Read a file into the memory that `block` gives for each part of it, and return the checksum of what was read."""
    file = os.open(path, os.O_RDONLY)
    try:

        def read(start: int) -> bytes:
            into = block(start, min(BLOCK_BYTES, size - start))
            done = 0
            while done < len(into):
                count = os.preadv(file, [into[done:]], start + done)
                if not count:
                    raise OSError(f"{size} bytes became {start + done} while they were read")
                done += count
            return xxhash.xxh3_128_digest(into)

        starts = range(0, size, BLOCK_BYTES)
        if len(starts) < 2:
            return _whole([read(start) for start in starts], size)
        with ThreadPoolExecutor(READ_THREADS) as threads:
            return _whole(list(threads.map(read, starts)), size)
    finally:
        os.close(file)


def _whole(digests: list[bytes], size: int) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(digests) + size.to_bytes(8, "little"))


def _bytes_of(content: Any) -> memoryview:
    """View the memory of bytes or of a contiguous array; an empty array cannot be cast as it is."""
    view = memoryview(content)
    return view.cast("B") if view.nbytes else memoryview(b"")
