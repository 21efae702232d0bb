"""Places where bytes are kept: one way to name them, write them whole, and crash between two writes.

A location is a local path or an object-store URI (`s3://bucket/prefix`). A file written here is either whole or absent:
locally through a temporary name, fsync and rename; in an object store a put is atomic by itself.

`crash_point` is the seam of the resume tests: production code names each gap between two writes, and a test kills the
process there.
"""

import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pyarrow import fs

CRASH_VARIABLE = "GRACEFUL_CRASH_POINT"
"""Environment variable naming the crash point at which this process is to die (tests only)."""

CRASH_EXIT_CODE = 137
"""What a process killed by SIGKILL reports to a shell."""

_on_crash_point: Callable[[str], None] | None = None


def crash_point(name: str) -> None:
    """Die here if a test asked for it: the process that reads CRASH_VARIABLE ends without clean-up, as by SIGKILL."""
    if _on_crash_point is not None:
        _on_crash_point(name)
    if os.environ.get(CRASH_VARIABLE) == name:
        os._exit(CRASH_EXIT_CODE)


def set_crash_hook(hook: Callable[[str], None] | None) -> None:
    """Install a function called at every crash point of this process (None removes it); it may raise."""
    global _on_crash_point
    _on_crash_point = hook


def join(base: str, *parts: str) -> str:
    """Append path parts to a location, local or remote."""
    return "/".join([base.rstrip("/"), *[part.strip("/") for part in parts]])


def is_remote(location: str) -> bool:
    """Tell an object-store URI from a local path."""
    return "://" in location and not location.startswith("file://")


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """Open the file system of a location and return it with the path inside it."""
    if is_remote(location):
        filesystem, path = fs.FileSystem.from_uri(location)
        return filesystem, path
    return fs.LocalFileSystem(), str(Path(location.removeprefix("file://")).absolute())


def exists(location: str) -> bool:
    """Tell whether a file or folder is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def size_bytes(location: str) -> int:
    """Size of one file."""
    filesystem, path = resolve(location)
    return int(filesystem.get_file_info(path).size)


def read_bytes(location: str) -> bytes:
    """Read one file whole. Raises FileNotFoundError."""
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


@contextmanager
def writing(location: str) -> Iterator[IO[bytes]]:
    """Open a file to write that appears whole or not at all, replacing what was there.

    Locally: a temporary name beside it, fsync, rename. In an object store the bytes are kept until the block has ended
    well and are sent in one piece: closing a half-written upload would publish it.
    """
    filesystem, path = resolve(location)
    if is_remote(location):
        buffer = io.BytesIO()
        yield buffer
        with filesystem.open_output_stream(path) as stream:
            stream.write(buffer.getbuffer())
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(location: str, content: bytes) -> None:
    """Write one file whole or not at all, replacing what was there."""
    with writing(location) as stream:
        stream.write(content)


def read_json(location: str) -> Any:
    """Read one JSON document."""
    return json.loads(read_bytes(location))


def write_json(location: str, value: Any) -> None:
    """Write one JSON document whole or not at all, keys sorted, so that equal values give equal bytes."""
    write_bytes(location, json.dumps(value, indent=2, sort_keys=True, default=str).encode() + b"\n")


def list_files(location: str) -> list[str]:
    """Locations of all files below a folder, sorted; empty where the folder is absent."""
    filesystem, path = resolve(location)
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    below = [info.path[len(path) :] for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    return sorted(join(location, relative) for relative in below)


def file_stats(location: str) -> dict[str, tuple[float, int]]:
    """Age in seconds and size in bytes of every file below a folder, by its path in it; empty where it is absent."""
    filesystem, path = resolve(location)
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    now = time.time()
    return {
        info.path[len(path) :].lstrip("/"): (now - (info.mtime_ns or 0) / 1e9, int(info.size))
        for info in filesystem.get_file_info(selector)
        if info.type == fs.FileType.File
    }


def file_ages(location: str) -> dict[str, float]:
    """Age in seconds of every file below a folder, by its path in it; empty where the folder is absent.

    By the clock of the storage, which stamped the files: a clock of this machine that is wrong, or steps, makes no file
    older than it is.
    """
    behind_s = time.time() - _storage_time(location)
    return {path: age_s - behind_s for path, (age_s, _) in file_stats(location).items()}


def _storage_time(location: str) -> float:
    """What the storage takes the time for: the stamp of a file that is written and removed; else this machine's."""
    filesystem, path = resolve(join(location, f"_clock-{uuid.uuid4().hex[:8]}"))
    try:
        with filesystem.open_output_stream(path) as stream:
            stream.write(b"now")
        stamp = filesystem.get_file_info(path).mtime_ns
        filesystem.delete_file(path)
    except OSError:  # a folder that is not there or may not be written
        return time.time()
    return time.time() if stamp is None else stamp / 1e9


def move(source: str, target: str) -> None:
    """Give a file another name; in an object store a copy and a delete."""
    filesystem, path = resolve(source)
    _, target_path = resolve(target)
    if not is_remote(target):
        Path(target_path).parent.mkdir(parents=True, exist_ok=True)
    filesystem.move(path, target_path)


def remove(location: str) -> None:
    """Remove one file or a whole folder, if it is there."""
    filesystem, path = resolve(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)
