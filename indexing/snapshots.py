"""Index snapshots on disk: immutable segments of vectors, and per snapshot a manifest and bitmaps of live rows.

    <index root>/segments/<segment id>.vectors     vectors of one generation, (n, D) little-endian float32
    <index root>/segments/<segment id>.revisions   (n,) int64, ascending: the revision that each row is a vector of
    <index root>/segments/<index id>.faiss         an approximate index over the rows of some segments of one width
    <index root>/segments/<items id>.arrow         items by revision (see `indexing.sidecar`)
    <index root>/<snapshot id>/<segment id>.live   which of its rows this snapshot serves (one bit each, low bit first)
    <index root>/<snapshot id>/manifest.json       written last: without it there is no snapshot

Invariants:
* A segment is never changed or overwritten; snapshots share segments, so publishing costs the rows that are new.
* The manifest carries the checksum of every file and its own; what does not match is not served.
* The files are derived from the gallery and can be built again at any time. The root is a local folder: on several
  nodes each keeps its own copy; an object store is not supported.

Shapes: n rows of a segment, D width.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graceful.errors import UnknownFormatError
from graceful.files import crash_point, write_bytes
from graceful.indexing.derived_files import (
    checksum,
    corrupted,
    map_checked,
    publish_file,
    read_checked,
    verify,
    write_checked,
)
from graceful.indexing.index_choice import IndexReport, SearchConfig
from graceful.indexing.kinds import choose_index
from graceful.indexing.sidecar import write_sidecar

FORMAT_VERSION = 2
SEGMENTS_FOLDER = "segments"
# Indexes of shards lie below it, each a root of its own.
SHARDS_FOLDER = "shards"
MANIFEST_NAME = "manifest.json"
_RESERVED = (SEGMENTS_FOLDER, SHARDS_FOLDER)
# A generation's segments are merged into one when more than this share of their rows is dead, or there are more.
MAX_DEAD_SHARE = 0.2
MAX_SEGMENTS = 16
# Rows beside an approximate index are searched exactly; beyond this share of them it is built again.
MAX_UNINDEXED_SHARE = 0.05
# Rows that are in memory at a time while they are written.
WRITE_ROWS = 2**20

LoadVectors = Callable[[NDArray[np.int64]], NDArray[np.float32]]


class SegmentInfo(BaseModel):
    """One immutable segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment_id: str = Field(description="Name of its files, without endings.")
    generation: str = Field(description="Generation that wrote all of its vectors.")
    num_rows: int = Field(ge=1, description="Rows in the segment, dead ones too.")
    width: int = Field(ge=1, description="Width of its vectors.")
    vectors_checksum: str = Field(description="Checksum of the vectors' file.")
    revisions_checksum: str = Field(description="Checksum of the revisions' file.")


class ServedSegment(BaseModel):
    """What a snapshot serves of a segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment: SegmentInfo = Field(description="The segment.")
    num_live: int = Field(ge=0, description="How many of its rows this snapshot serves.")
    live_checksum: str = Field(description="Checksum of the bitmap that says which.")


class StoredIndex(BaseModel):
    """An approximate index over all rows, dead ones too, of some segments of one width, in this order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index_id: str = Field(description="Name of its file, without ending.")
    width: int = Field(ge=1, description="Width of the vectors.")
    segment_ids: tuple[str, ...] = Field(description="Segments whose rows it holds.")
    checksum: str = Field(description="Checksum of its file.")
    report: IndexReport = Field(description="What it is and what was measured.")


class StoredItems(BaseModel):
    """The items of the gallery by revision, as they were when the snapshot was published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items_id: str = Field(description="Name of its file, without ending.")
    num_items: int = Field(ge=0, description="Items in it, readable or not.")
    checksum: str = Field(description="Checksum of its file.")


class Manifest(BaseModel):
    """An index snapshot: what one query generation sees of the gallery at one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(description="Version of this format; a reader refuses others.")
    snapshot_id: str = Field(description="Name of the snapshot and of its folder.")
    query_generation: str = Field(description="Generation whose view it was made of.")
    gallery_version: dict[str, int] = Field(description="Table versions that the view was read at.")
    readable: tuple[str, ...] = Field(description="Generations that the query generation may read, oldest first.")
    segments: tuple[ServedSegment, ...] = Field(description="Segments that it serves rows of.")
    indexes: tuple[StoredIndex, ...] = Field(description="Approximate indexes; rows of other segments: exact search.")
    items: StoredItems | None = Field(description="Ids, sources and labels of the items.")

    @property
    def num_rows(self) -> int:
        return sum(served.num_live for served in self.segments)


@dataclass(frozen=True)
class SegmentRows:
    """The live rows of one generation: `revisions` (n,), and `load`: vectors of positions, (m,) to (m, D)."""

    generation: str
    revisions: NDArray[np.int64]
    load: LoadVectors


@dataclass(frozen=True)
class SnapshotSource:
    """What a snapshot is made of. `items` loads the table (revision, item_id, source, label) of all live items."""

    query_generation: str
    gallery_version: Mapping[str, int]
    readable: Sequence[str]
    rows: Sequence[SegmentRows]
    items: Callable[[], pa.Table] | None = None


def publish_snapshot(
    index_root: str | Path,
    snapshot_id: str,
    source: SnapshotSource,
    reuse: Manifest | None = None,
    *,
    config: SearchConfig = SearchConfig(),
    stored_items: StoredItems | None = None,
) -> Manifest:
    """Write a snapshot that serves exactly the rows of `source`, and return its manifest.

    Segments of the snapshot `reuse` (under the same root) are used again: only rows that they lack are loaded and
    written. `stored_items` names a file of items that still says the same. A crash leaves at most files that no
    manifest names.

    Raises:
        FileExistsError: a snapshot of that name exists.
        IndexCorruptedError: a segment of `reuse` is damaged; publish without it.
        OSError: the folder is full, or not writable.
    """
    root, folder = Path(index_root), Path(index_root, snapshot_id)
    if Path(folder, MANIFEST_NAME).exists() or snapshot_id in _RESERVED:
        raise FileExistsError(f"publishing snapshot {snapshot_id}: expected a new name, found one in {index_root}")
    _check_rows(snapshot_id, source.rows)
    folder.mkdir(parents=True, exist_ok=True)
    stored = [entry.segment for entry in reuse.segments] if reuse else []
    served: list[ServedSegment] = []
    for part in source.rows:
        reused = [segment for segment in stored if segment.generation == part.generation]
        for segment, live in _segments_for(root / SEGMENTS_FOLDER, part, reused):
            bits = np.packbits(live, bitorder="little").tobytes()
            write_bytes(str(Path(folder, f"{segment.segment_id}.live")), bits)
            served.append(
                ServedSegment(segment=segment, num_live=int(np.count_nonzero(live)), live_checksum=checksum(bits))
            )
    if stored_items is None and source.items is not None:
        stored_items = _write_items(root / SEGMENTS_FOLDER, source.items())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        snapshot_id=snapshot_id,
        query_generation=source.query_generation,
        gallery_version=dict(source.gallery_version),
        readable=tuple(source.readable),
        segments=tuple(served),
        indexes=_indexes_for(root / SEGMENTS_FOLDER, served, reuse.indexes if reuse else (), config),
        items=stored_items,
    )
    crash_point("snapshot-before-manifest")
    content = manifest.model_dump(mode="json")
    document = {"checksum": checksum(_canonical(content)), "content": content}
    write_bytes(str(Path(folder, MANIFEST_NAME)), json.dumps(document, indent=1).encode())
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Read a snapshot's manifest.

    Raises:
        UnknownFormatError: written by a version that this one does not know.
        IndexCorruptedError: missing or damaged.
    """
    path = Path(folder, MANIFEST_NAME)
    try:
        document = json.loads(path.read_bytes())
        # Format 1 stood at the top, without a checksum.
        content = document if "format_version" in document else document["content"]
        found = content["format_version"]
        intact = content is document or checksum(_canonical(content)) == document["checksum"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupted(path, f"a manifest, found {type(error).__name__}: {error}") from error
    if not intact:
        raise corrupted(path, "a manifest of its checksum, found another")
    if found != FORMAT_VERSION:
        raise UnknownFormatError(
            f"opening the index: expected format_version {FORMAT_VERSION}, found {found} ({path}); "
            "it is built again from the gallery"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise corrupted(path, f"a manifest, found {error.error_count()} wrong fields") from error


def read_live(folder: str | Path, served: ServedSegment) -> NDArray[np.bool_]:
    """Read which rows (n,) of a segment a snapshot serves. Raises IndexCorruptedError."""
    path = Path(folder, f"{served.segment.segment_id}.live")
    bits = np.empty((served.segment.num_rows + 7) // 8, np.uint8)
    read_checked(path, bits, served.live_checksum)
    live = np.unpackbits(bits, count=served.segment.num_rows, bitorder="little").astype(bool)
    if np.count_nonzero(live) != served.num_live:
        raise corrupted(path, f"{served.num_live} live rows, found {np.count_nonzero(live)}")
    return live


def read_revisions(index_root: str | Path, segment: SegmentInfo) -> NDArray[np.int64]:
    """Read the revision (n,) of each row of a segment, ascending. Raises IndexCorruptedError."""
    revisions = np.empty(segment.num_rows, np.int64)
    path = Path(index_root, SEGMENTS_FOLDER, f"{segment.segment_id}.revisions")
    read_checked(path, revisions, segment.revisions_checksum)
    return revisions


def read_vectors(index_root: str | Path, segment: SegmentInfo, out: NDArray[np.float32]) -> None:
    """Fill `out` (n, D) with the vectors of all rows of a segment. Raises IndexCorruptedError."""
    path = Path(index_root, SEGMENTS_FOLDER, f"{segment.segment_id}.vectors")
    read_checked(path, out, segment.vectors_checksum)


def map_vectors(index_root: str | Path, segment: SegmentInfo) -> NDArray[np.float32]:
    """Map the vectors (n, D) of all rows of a segment. Raises IndexCorruptedError."""
    path = Path(index_root, SEGMENTS_FOLDER, f"{segment.segment_id}.vectors")
    return map_checked(path, "<f4", (segment.num_rows, segment.width), segment.vectors_checksum)


def read_index(index_root: str | Path, stored: StoredIndex) -> Any:
    """Read an approximate index. Raises IndexCorruptedError."""
    path = Path(index_root, SEGMENTS_FOLDER, f"{stored.index_id}.faiss")
    verify(path, stored.checksum)
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise corrupted(path, f"a FAISS index, found {str(error).splitlines()[0]}") from error


def items_path(index_root: str | Path, stored: StoredItems) -> Path:
    """Where the items of a snapshot lie."""
    return Path(index_root, SEGMENTS_FOLDER, f"{stored.items_id}.arrow")


def discard_snapshot(index_root: str | Path, snapshot_id: str) -> None:
    """Make a snapshot be none, whatever of it is left; segments are left to `prune_snapshots`. Raises OSError."""
    shutil.rmtree(Path(index_root, snapshot_id), ignore_errors=True)
    Path(index_root, snapshot_id, MANIFEST_NAME).unlink(missing_ok=True)


def prune_snapshots(index_root: str | Path, keep: Collection[str], *, older_than_s: float = 0.0) -> int:
    """Remove all snapshots but `keep`, then the files that none of those left names; return the bytes freed.

    Only what was written more than `older_than_s` seconds ago goes: a snapshot that another process is publishing is
    younger than that, and is left alone. Where a manifest that stays cannot be read, no shared file goes.
    """
    root, before = Path(index_root), time.time() - older_than_s
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in _RESERVED]
    doomed = [path for path in folders if path.name not in keep and path.stat().st_mtime <= before]
    left = [path for path in folders if path not in doomed and (path / MANIFEST_NAME).exists()]
    used = {name for path in left for name in _names_in(read_manifest(path))}
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


def _names_in(manifest: Manifest) -> set[str]:
    names = {served.segment.segment_id for served in manifest.segments}
    names |= {index.index_id for index in manifest.indexes}
    return names | ({manifest.items.items_id} if manifest.items else set())


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _check_rows(snapshot_id: str, rows: Sequence[SegmentRows]) -> None:
    if len({part.generation for part in rows}) != len(rows):
        raise ValueError(f"publishing snapshot {snapshot_id}: expected each generation once, found one twice")
    revisions = np.sort(np.concatenate([np.empty(0, np.int64), *(part.revisions for part in rows)]))
    repeated = revisions[1:][revisions[1:] == revisions[:-1]]
    if len(repeated):
        raise ValueError(
            f"publishing snapshot {snapshot_id}: expected one row per revision, found {len(repeated)} repeated such as "
            f"{repeated[0]}"
        )


def _segments_for(
    folder: Path, part: SegmentRows, old: Sequence[SegmentInfo]
) -> list[tuple[SegmentInfo, NDArray[np.bool_]]]:
    """Return the segments that hold the wanted rows of one generation and which of their rows are live."""
    order = np.argsort(part.revisions, kind="stable")
    revisions = part.revisions[order]
    missing = np.ones(len(revisions), dtype=bool)
    found: list[tuple[SegmentInfo, NDArray[np.bool_]]] = []
    for segment in old:
        stored = read_revisions(folder.parent, segment)
        places = np.minimum(np.searchsorted(revisions, stored), max(0, len(revisions) - 1))
        live = (revisions[places] == stored) & missing[places] if len(revisions) else np.zeros(len(stored), bool)
        missing[places[live]] = False
        found.append((segment, live))
    num_stored = sum(segment.num_rows for segment in old)
    new = np.flatnonzero(missing)
    num_dead = num_stored - (len(revisions) - len(new))
    if num_dead > MAX_DEAD_SHARE * (num_stored + len(new)) or len(old) + bool(len(new)) > MAX_SEGMENTS:
        found, new = [], np.arange(len(revisions))
    result = [(segment, live) for segment, live in found if live.any()]
    if len(new):
        segment = _write_segment(folder, part.generation, revisions[new], lambda rows: part.load(order[new[rows]]))
        crash_point("snapshot-after-segment")
        result.append((segment, np.ones(len(new), dtype=bool)))
    return result


def _write_segment(folder: Path, generation: str, revisions: NDArray[np.int64], load: LoadVectors) -> SegmentInfo:
    segment_id = f"{generation}-{uuid.uuid4().hex[:12]}"
    widths: set[int] = set()

    def chunks() -> Any:
        for start in range(0, len(revisions), WRITE_ROWS):
            rows = np.arange(start, min(start + WRITE_ROWS, len(revisions)))
            vectors = np.ascontiguousarray(load(rows), dtype="<f4")
            widths.add(vectors.shape[1])
            if vectors.shape[0] != len(rows) or len(widths) != 1:
                raise ValueError(f"writing segment {segment_id}: expected {len(rows)} rows, found {vectors.shape}")
            yield vectors

    vectors_checksum = write_checked(Path(folder, f"{segment_id}.vectors"), chunks())
    revisions_checksum = write_checked(Path(folder, f"{segment_id}.revisions"), [np.ascontiguousarray(revisions)])
    return SegmentInfo(
        segment_id=segment_id,
        generation=generation,
        num_rows=len(revisions),
        width=widths.pop(),
        vectors_checksum=vectors_checksum,
        revisions_checksum=revisions_checksum,
    )


def _write_items(folder: Path, items: pa.Table) -> StoredItems:
    items_id = f"items-{uuid.uuid4().hex[:12]}"
    digest = publish_file(Path(folder, f"{items_id}.arrow"), lambda part: write_sidecar(part, items))
    return StoredItems(items_id=items_id, num_items=items.num_rows, checksum=digest)


def _indexes_for(
    folder: Path, served: Sequence[ServedSegment], old: Sequence[StoredIndex], config: SearchConfig
) -> tuple[StoredIndex, ...]:
    """Approximate indexes over the segments of each width, where the configuration asks for one and it is good enough.

    An index is used again where it covers these very segments, or all but a few rows of them.
    """
    result: list[StoredIndex] = []
    for width in dict.fromkeys(entry.segment.width for entry in served):
        members = [entry for entry in served if entry.segment.width == width]
        kind = config.kind_for(sum(entry.num_live for entry in members))
        if kind == "flat":
            continue
        segments = [entry.segment for entry in members]
        names = tuple(segment.segment_id for segment in segments)
        usable = [
            index
            for index in old
            if set(index.segment_ids) <= set(names)
            and (index.report.kind, index.report.recall_target) == (kind, config.recall_target)
            and sum(s.num_rows for s in segments if s.segment_id not in index.segment_ids)
            <= MAX_UNINDEXED_SHARE * sum(s.num_rows for s in segments)
        ]
        if usable:
            result.append(usable[-1])
            continue
        vectors = np.empty((sum(segment.num_rows for segment in segments), width), np.float32)
        start = 0
        for segment in segments:
            read_vectors(folder.parent, segment, vectors[start : start + segment.num_rows])
            start += segment.num_rows
        chosen = choose_index(kind, vectors, config.recall_target)
        if chosen is None:
            continue
        index, report = chosen
        index_id = f"{report.kind}-{uuid.uuid4().hex[:12]}"
        path = Path(folder, f"{index_id}.faiss")
        digest = publish_file(path, partial(faiss.write_index, index))
        result.append(StoredIndex(index_id=index_id, width=width, segment_ids=names, checksum=digest, report=report))
    return tuple(result)
