"""Index snapshots on disk: immutable segments of vectors, and per snapshot a manifest and bitmaps of current rows.

    <index root>/segments/<segment id>.faiss          vectors of one generation (an IndexFlatIP)
    <index root>/segments/<segment id>.rows.parquet   item_id and revision of each of its rows
    <index root>/<snapshot id>/<segment id>.bitmap    which of its rows this snapshot serves (np.packbits)
    <index root>/<snapshot id>/manifest.json          written last: without it there is no snapshot

Invariants:
* A segment is never changed or overwritten; snapshots share segments, so publishing costs the rows that are new.
* The manifest names every file with its sha256; what does not match is not served.
* The files are derived from the gallery and can be rebuilt at any time. The root is a local folder: on several nodes
  each keeps its own copy; an object store is not supported.

Shapes: n rows of a segment, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import crash_point, write_bytes

FORMAT_VERSION = 1
SEGMENTS_FOLDER = "segments"
MANIFEST_NAME = "manifest.json"
# A generation's segments are merged into one when more than this share of their rows is dead, or there are more.
MAX_DEAD_SHARE = 0.5
MAX_SEGMENTS = 16

LoadVectors = Callable[[NDArray[np.int64]], NDArray[np.float32]]


class IndexCorruptedError(GracefulError):
    """A file of an index snapshot is missing or is not what the manifest says; the snapshot must be rebuilt."""


class SegmentInfo(BaseModel):
    """One immutable segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment_id: str = Field(description="Name of its files, without endings.")
    generation: str = Field(description="Generation that wrote all of its vectors.")
    num_rows: int = Field(ge=0, description="Rows in the segment, dead ones too.")
    width: int = Field(ge=1, description="Width of its vectors.")
    index_sha256: str = Field(description="Checksum of the vectors' file.")
    rows_sha256: str = Field(description="Checksum of the rows' file.")


class ServedSegment(BaseModel):
    """What a snapshot serves of a segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment: SegmentInfo = Field(description="The segment.")
    num_current: int = Field(ge=0, description="How many of its rows this snapshot serves.")
    bitmap_sha256: str = Field(description="Checksum of the bitmap that says which.")


class Manifest(BaseModel):
    """An index snapshot: what one query generation sees of the gallery at one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(description="Version of this format; a reader refuses others.")
    snapshot_id: str = Field(description="Name of the snapshot and of its folder.")
    query_generation: str = Field(description="Generation whose queries may search it.")
    gallery_version: dict[str, Any] = Field(description="Table versions that the view was read at.")
    prefix_widths: tuple[int, ...] = Field(description="Narrower widths that the query generation declares.")
    segments: tuple[ServedSegment, ...] = Field(description="Segments that it serves rows of.")

    @property
    def num_rows(self) -> int:
        return sum(served.num_current for served in self.segments)


@dataclass(frozen=True)
class SegmentRows:
    """The current rows of one generation in a view; `load` reads the vectors of some positions, (m,) to (m, D)."""

    generation: str
    item_ids: ArrayLike | pa.Array
    revisions: ArrayLike | pa.Array
    load: LoadVectors


def write_segment(
    folder: str | Path,
    segment_id: str,
    vectors: NDArray[np.float32],
    item_ids: ArrayLike | pa.Array,
    revisions: ArrayLike | pa.Array,
    generation: str,
) -> SegmentInfo:
    """Write one segment's two files; a segment of that name must not exist.

    Raises:
        FileExistsError: there is one already; segments are immutable.
    """
    rows = pa.table({"item_id": as_strings(item_ids), "revision": pa.array(np.asarray(revisions), pa.int64())})
    if vectors.ndim != 2 or vectors.shape[1] == 0 or rows.num_rows != len(vectors):
        raise ValueError(f"writing segment {segment_id}: expected {rows.num_rows} vectors, found {vectors.shape}")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    os.makedirs(folder, exist_ok=True)
    rows_sha256 = _publish_file(
        Path(folder, f"{segment_id}.rows.parquet"), lambda part: pq.write_table(rows, part, use_dictionary=False)
    )
    index_sha256 = _publish_file(Path(folder, f"{segment_id}.faiss"), lambda part: faiss.write_index(index, part))
    return SegmentInfo(
        segment_id=segment_id,
        generation=generation,
        num_rows=len(vectors),
        width=vectors.shape[1],
        index_sha256=index_sha256,
        rows_sha256=rows_sha256,
    )


def read_segment_rows(folder: str | Path, segment: SegmentInfo, *, verify: bool = True) -> pa.Table:
    """Read item_id and revision of every row of a segment.

    Raises:
        IndexCorruptedError: the file is missing or not what was written.
    """
    path = Path(folder, f"{segment.segment_id}.rows.parquet")
    if verify:
        _verify(path, segment.rows_sha256)
    try:
        rows = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _corrupted(path, f"a Parquet file, found {error}") from error
    if rows.num_rows != segment.num_rows:
        raise _corrupted(path, f"{segment.num_rows} rows, found {rows.num_rows}")
    return rows.combine_chunks()


def read_segment_vectors(
    folder: str | Path,
    segment: SegmentInfo,
    current: NDArray[np.bool_],
    *,
    out: NDArray[np.float32] | None = None,
    verify: bool = True,
) -> NDArray[np.float32]:
    """Copy the vectors of the current rows (n,) of a segment, into `out` if given.

    Raises:
        IndexCorruptedError: the file is missing or not what was written.
    """
    path = Path(folder, f"{segment.segment_id}.faiss")
    if verify:
        _verify(path, segment.index_sha256)
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise _corrupted(path, f"a FAISS index, found {str(error).splitlines()[0]}") from error
    if (index.ntotal, index.d) != (segment.num_rows, segment.width):
        raise _corrupted(path, f"{segment.num_rows} x {segment.width}, found {index.ntotal} x {index.d}")
    if out is None:
        out = np.empty((int(np.count_nonzero(current)), segment.width), dtype=np.float32)
    if len(out) == segment.num_rows:
        np.copyto(out, vectors_of(index))
    else:
        np.compress(current, vectors_of(index), axis=0, out=out)
    return out


def vectors_of(index: Any) -> NDArray[np.float32]:
    """View the vectors (n, D) of a flat index without a copy: writes change the index, which must outlive the view."""
    view: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return view.reshape(index.ntotal, index.d)


def publish_snapshot(
    index_root: str | Path,
    snapshot_id: str,
    query_generation: str,
    gallery_version: Mapping[str, Any],
    rows: Sequence[SegmentRows],
    reuse: Manifest | None = None,
    *,
    prefix_widths: Collection[int] = (),
) -> Manifest:
    """Write a snapshot that serves exactly `rows`, at most one row per item, and return its manifest.

    Segments of the snapshot `reuse` (under the same root) are used again: only rows that they lack are loaded and
    written, as one new segment per generation. A crash leaves at most files that no manifest names.

    Raises:
        FileExistsError: a snapshot of that name exists.
        IndexCorruptedError: a segment of `reuse` is damaged; publish without it.
    """
    folder = Path(index_root, snapshot_id)
    if Path(folder, MANIFEST_NAME).exists() or snapshot_id == SEGMENTS_FOLDER:
        raise FileExistsError(f"publishing snapshot {snapshot_id}: expected a new name, found one in {index_root}")
    if len({part.generation for part in rows}) != len(rows):
        raise ValueError(f"publishing snapshot {snapshot_id}: expected each generation once, found one twice")
    all_ids = pa.chunked_array([as_strings(part.item_ids) for part in rows], pa.large_string())
    num_items = pc.count_distinct(all_ids).as_py()
    if num_items != len(all_ids):
        raise ValueError(f"publishing {snapshot_id}: expected one row per item, found {len(all_ids)} for {num_items}")
    folder.mkdir(parents=True, exist_ok=True)
    stored = [entry.segment for entry in reuse.segments] if reuse else []
    served: list[ServedSegment] = []
    for part in rows:
        reused = [segment for segment in stored if segment.generation == part.generation]
        for segment, current in _segments_for(Path(index_root, SEGMENTS_FOLDER), part, reused):
            bitmap = np.packbits(current).tobytes()
            write_bytes(str(Path(folder, f"{segment.segment_id}.bitmap")), bitmap)
            digest = hashlib.sha256(bitmap).hexdigest()
            served.append(ServedSegment(segment=segment, num_current=int(current.sum()), bitmap_sha256=digest))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        snapshot_id=snapshot_id,
        query_generation=query_generation,
        gallery_version=dict(gallery_version),
        prefix_widths=tuple(sorted(prefix_widths)),
        segments=tuple(served),
    )
    crash_point("snapshot-before-manifest")
    write_bytes(str(Path(folder, MANIFEST_NAME)), manifest.model_dump_json(indent=1).encode())
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Read a snapshot's manifest.

    Raises:
        UnknownFormatError: written by a version that this one does not know.
        IndexCorruptedError: missing or damaged.
    """
    path = Path(folder, MANIFEST_NAME)
    try:
        values = json.loads(path.read_bytes())
        found = values["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _corrupted(path, f"a manifest, found {type(error).__name__}: {error}") from error
    if found != FORMAT_VERSION:
        raise UnknownFormatError(
            f"opening index snapshot: expected format_version {FORMAT_VERSION}, found {found} ({path}); "
            "rebuild the index or update this program"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise _corrupted(path, f"a manifest, found {error.error_count()} wrong fields") from error


def read_bitmap(folder: str | Path, served: ServedSegment) -> NDArray[np.bool_]:
    """Read which rows (n,) of a segment a snapshot serves.

    Raises:
        IndexCorruptedError: the bitmap is missing or not what was written.
    """
    path = Path(folder, f"{served.segment.segment_id}.bitmap")
    _verify(path, served.bitmap_sha256)
    packed = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    return np.unpackbits(packed, count=served.segment.num_rows).astype(bool)


def prune_snapshots(index_root: str | Path, keep: Collection[str], *, older_than_s: float = 0.0) -> int:
    """Remove all snapshots but `keep`, then the segments that none of those left serves; return the bytes freed.

    Only what was written more than `older_than_s` seconds ago goes: a snapshot that another process is publishing is
    younger than that, and is left alone.
    """
    root, before = Path(index_root), time.time() - older_than_s
    folders = [path for path in root.iterdir() if path.is_dir() and path.name != SEGMENTS_FOLDER]
    doomed = [path for path in folders if path.name not in keep and path.stat().st_mtime <= before]
    left = [path for path in folders if path not in doomed and (path / MANIFEST_NAME).exists()]
    used = {served.segment.segment_id for path in left for served in read_manifest(path).segments}
    freed = 0
    for path in doomed:
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
    for path in list((root / SEGMENTS_FOLDER).glob("*")):
        if path.name.split(".")[0] not in used and path.stat().st_mtime <= before:
            freed += path.stat().st_size
            path.unlink()
    return freed


def _segments_for(
    folder: Path, part: SegmentRows, old: Sequence[SegmentInfo]
) -> list[tuple[SegmentInfo, NDArray[np.bool_]]]:
    """Return the segments that hold the wanted rows of one generation and which of their rows are current."""
    item_ids = as_strings(part.item_ids)
    revisions = np.asarray(part.revisions, dtype=np.int64)
    if len(revisions) != len(item_ids):
        raise ValueError(f"publishing {part.generation}: expected {len(item_ids)} revisions, found {len(revisions)}")
    missing = np.ones(len(item_ids), dtype=bool)
    found: list[tuple[SegmentInfo, NDArray[np.bool_], NDArray[np.int32]]] = []
    for segment in old:
        rows = read_segment_rows(folder, segment)
        positions = (
            pc.index_in(as_strings(rows["item_id"]), value_set=item_ids).fill_null(-1).to_numpy().astype(np.int64)
        )
        current = positions >= 0
        current[current] = missing[positions[current]]
        current[current] = revisions[positions[current]] == rows["revision"].to_numpy()[current]
        missing[positions[current]] = False
        found.append((segment, current, positions[current]))
    new = np.flatnonzero(missing)
    num_stored = sum(segment.num_rows for segment in old)
    num_dead = num_stored - (len(item_ids) - len(new))
    if num_dead > MAX_DEAD_SHARE * (num_stored + len(new)) or len(old) + bool(len(new)) > MAX_SEGMENTS:
        if not len(item_ids):
            return []
        vectors = _gather(folder, part, found, new)
        return [(_write_new(folder, part.generation, vectors, item_ids, revisions), np.ones(len(vectors), dtype=bool))]
    result = [(segment, current) for segment, current, _ in found if current.any()]
    if len(new):
        vectors = part.load(new)
        segment = _write_new(folder, part.generation, vectors, item_ids.take(pa.array(new)), revisions[new])
        result.append((segment, np.ones(len(new), dtype=bool)))
    return result


def _gather(
    folder: Path,
    part: SegmentRows,
    found: Sequence[tuple[SegmentInfo, NDArray[np.bool_], NDArray[np.int32]]],
    new: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Collect the current vectors of several segments, and load those that none has."""
    loaded = part.load(new) if len(new) else None
    width = found[0][0].width if found else (0 if loaded is None else loaded.shape[1])
    vectors = np.empty((len(new) + sum(len(positions) for _, _, positions in found), width), dtype=np.float32)
    for segment, current, positions in found:
        vectors[positions] = read_segment_vectors(folder, segment, current)
    if loaded is not None:
        vectors[new] = loaded
    return vectors


def _write_new(
    folder: Path, generation: str, vectors: NDArray[np.float32], item_ids: pa.Array, revisions: NDArray[np.int64]
) -> SegmentInfo:
    segment_id = f"{generation}-{uuid.uuid4().hex[:12]}"
    segment = write_segment(folder, segment_id, vectors, item_ids, revisions, generation)
    crash_point("snapshot-after-segment")
    return segment


def as_strings(values: ArrayLike | pa.Array) -> pa.Array:
    """Return item ids as one Arrow array of large strings."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values.cast(pa.large_string())
    return pa.array(np.asarray(values).tolist(), pa.large_string())


def _publish_file(target: Path, write: Callable[[str], object]) -> str:
    """Write a file that must not exist under a temporary name, link it into place, return its sha256."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        write(str(part))
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A link fails where a rename would replace.
        os.link(part, target)
    finally:
        part.unlink(missing_ok=True)
    return digest


def _verify(path: Path, expected: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _corrupted(path, f"a file, found {error}") from error
    if found != expected:
        raise _corrupted(path, f"sha256 {expected[:12]}, found {found[:12]}")


def _corrupted(path: Path, expectation: str) -> IndexCorruptedError:
    return IndexCorruptedError(f"opening index snapshot: expected {expectation} ({path}); rebuild the index")
