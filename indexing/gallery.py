"""The gallery: what is known of items, their vectors, and the view that a query generation has of them.

Three versioned tables (see `indexing.tables`), all append-only:

* items: one row per revision of an item; a delete is a tombstone revision (see `indexing.items`).
* vectors: one row `(revision, generation, embedding)`, partitioned by generation, never updated.
* leases: open readers' promises that a version's files stay (see `indexing.leases`).

The reading rule, and nothing else, decides what is seen: for every live item, among the vectors *of its latest
revision* whose generation is in `readable`, the one of the last such generation. `readable` is the list of generations
that the query generation holds certificates for, oldest first; the registry makes it. An item without such a vector is
unreadable: listed in the view, never served from a wrong vector.

Both tables lie in the order of revisions, so that what is live, who owns it and what is missing are joins of sorted
numbers, and a part of them (a range of buckets) is a part of the files.

Shapes: N items of a view, R rows of a vectors partition, D width.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.files import crash_point, exists, join, list_files, move, remove
from graceful.indexing.checked_files import CheckedFile, DamagedFileError
from graceful.indexing.columns import ColumnCache
from graceful.indexing.embedding_files import read_embeddings, read_rows, write_embedding_file
from graceful.indexing.items import (
    ITEMS_SCHEMA,
    NEW_ITEM_COLUMNS,
    NOTHING,
    REPEATED_COLUMNS,
    IngestResult,
    Items,
    as_mask,
)
from graceful.indexing.leases import LIFETIME_S, GalleryVersion, Lease, Leases
from graceful.indexing.revisions import Positions, is_member
from graceful.indexing.tables import (
    STAGING,
    DataFile,
    TableConflictError,
    TableSnapshot,
    VersionedTable,
    attempts,
    in_use,
)
from graceful.indexing.view import Changes, VectorRows, View, check_norms

__all__ = ["ITEMS_SCHEMA", "NEW_ITEM_COLUMNS", "Gallery", "GalleryVersion", "IngestResult", "VectorCommit", "View"]

VECTORS_SCHEMA = pa.schema([("revision", pa.int64()), ("generation", pa.string()), ("embedding", pa.binary())])
PROTECTION = "protection"
"""The serial thread of collections: see `Gallery.fence`."""


@dataclass(frozen=True)
class VectorCommit:
    """What became of one unit of vectors: rows committed, and rows dropped because they came too late or twice."""

    committed: int
    stale: int
    duplicate: int


class Gallery:
    """A handle on the gallery below one location. Any number of handles and processes may be open at once."""

    def __init__(
        self, location: str, *, create: bool = False, check_owner: Callable[[str], object] = lambda _: None
    ) -> None:
        """Open the gallery; with `create` it is made empty where there is none.

        `check_owner` is asked before a vector is written, and raises for a generation that may own none.

        Raises:
            MissingTableError: there is none, or a part of it is gone: an empty table does not take its place.
        """
        self.location = location
        self._check_owner = check_owner
        create = create and not in_use(location, ("items", "vectors"))
        self.items_table = VersionedTable(
            join(location, "items"), ITEMS_SCHEMA, key="revision", repeated=REPEATED_COLUMNS, create=create
        )
        self.vectors_table = VersionedTable(
            join(location, "vectors"), VECTORS_SCHEMA, partition_by="generation", key="revision", create=create
        )
        self.items = Items(self.items_table)
        self._leases = Leases(join(location, "leases"))
        self._columns = ColumnCache()
        self._handle = uuid.uuid4().hex[:8]

    def version(self) -> GalleryVersion:
        """Pin the newest version. Vectors are pinned first: a vector never precedes its item."""
        vectors = self.vectors_table.version()
        return GalleryVersion(self.items_table.version(), vectors)

    def identity(self) -> str:
        """What tells this gallery from every other, one made later at the same place too."""
        return self.items_table.identity()[:12]

    # Items ------------------------------------------------------------------------------------------------------------

    def ingest(self, items: pa.Table) -> IngestResult:
        """Add new items and new revisions of changed ones; an item with the same content is left alone.

        `items` has the columns NEW_ITEM_COLUMNS. Tried again, it writes nothing twice: what is there already is the
        same content.
        """
        return self.items.ingest(items)

    def delete(self, item_ids: Sequence[str]) -> int:
        """Write tombstones; returns how many items were there to delete. Vectors stay until they are collected."""
        return self.items.delete(item_ids)

    # Vectors ----------------------------------------------------------------------------------------------------------

    def staging_file(self, generation: str, unit: str) -> str:
        """Where the worker that embeds a unit is to write its file: the same for this handle, so that twice is once.

        Another handle that embeds the same unit has another place, and its file another name after the commit: what one
        takes back because the other was faster is never what the other has committed. A commit moves the file away: a
        worker believed dead that writes once more cannot touch committed rows. Raises what `check_owner` raises.
        """
        self._check_owner(generation)
        return join(self.staging_location(), generation, f"{unit}-{self._handle}.parquet")

    def staging_location(self) -> str:
        """The folder of files written by workers and not committed yet."""
        return join(self.vectors_table.uri, STAGING)

    def column_of(self, location: str, name: str) -> NDArray[np.int64]:
        """A column of numbers of one of the files, (n,)."""
        return self._columns.read(location, name)[0]

    def forget_cached(self) -> None:
        """Drop what this handle remembers of files (after some were removed physically)."""
        self._columns.clear()
        self.items.columns.clear()

    def missing_vectors(
        self, generation: str, revisions: NDArray[np.int64] | None = None, version: GalleryVersion | None = None
    ) -> NDArray[np.int64]:
        """Live revisions without a vector of a generation, of all or of those asked for; ascending."""
        pinned = version or self.version()
        if revisions is None:
            live = self.items.live(pinned.items)
        else:
            live = np.unique(revisions)
            live = live[self.items.are_live(live, pinned.items)]
        return live[~self._stored(generation, live, self.vectors_table.snapshot(pinned.vectors))]

    def commit_vectors(self, generation: str, unit: str, since: GalleryVersion | None = None) -> VectorCommit:
        """Commit the file that a worker wrote for a unit, exactly once.

        Rows of a revision that is no longer live, and rows whose vector is already stored, are dropped and counted.
        A revision that becomes stale after this check does no harm: the reading rule asks for the latest. The commit
        is serial within its generation, so that two processes that embed an item store its vector once. With `since`,
        the version at which the rows were found live and missing, only what was committed after it is looked at.
        """
        staged = self.staging_file(generation, unit)
        for _ in attempts():
            try:
                keys = CheckedFile(staged).read(["revision"])
            except DamagedFileError:
                if exists(staged):
                    raise
                return VectorCommit(0, 0, 0)  # somebody has cleared the staging area
            revisions = keys["revision"].to_numpy()
            now = self.version()
            fresh, stored = self._look(generation, revisions, since, now)
            keep = fresh & ~stored
            result = VectorCommit(int(keep.sum()), int((~fresh).sum()), int((fresh & stored).sum()))
            if not result.committed:
                remove(staged)
                return result
            if not keep.all():
                _, embeddings = read_embeddings([staged])
                kept = pa.table({"revision": revisions[keep]})
                write_embedding_file(staged, kept, embeddings[keep])
                keys = kept
            try:
                self._commit_staged(generation, staged, keys, now)
            except (TableConflictError, FileNotFoundError):  # another process committed, perhaps these very rows
                continue
            return result
        raise TableConflictError(f"committing vectors of {generation}: other writers won too often; try again")

    def _commit_staged(self, generation: str, staged: str, keys: pa.Table, at: GalleryVersion) -> None:
        file = self.vectors_table.take_in(staged, unit_stem(staged), keys, partition=generation)
        crash_point("vectors-before-commit")
        try:
            self.vectors_table.commit([file], at=at.vectors, serial=(generation,))
        except TableConflictError:
            move(join(self.vectors_table.uri, file.path), staged)
            raise
        crash_point("vectors-after-commit")

    def fence(self) -> None:
        """Make every collection that has not committed yet look again at what is protected."""
        self.vectors_table.fence(PROTECTION)

    def fence_writers(self) -> None:
        """Make every unit of vectors that has not committed yet look again at what is live."""
        generations = [name for name in self.vectors_table.snapshot().by_partition if name]
        staged = {path.split("/")[-2] for path in list_files(self.staging_location())}
        self.vectors_table.fence(*sorted({*generations, *staged}))

    def generations(self) -> dict[str, int]:
        """Rows stored of each generation, dead ones included."""
        partitions = self.vectors_table.snapshot().by_partition
        return {str(name): sum(file.num_rows for file in files) for name, files in partitions.items()}

    def merge_small_files(self) -> None:
        """Merge files of about the same size where there are many."""
        self.items_table.compact()
        self.vectors_table.compact()

    # Views ------------------------------------------------------------------------------------------------------------

    def view(
        self,
        readable: Sequence[str],
        version: GalleryVersion | None = None,
        buckets: tuple[int, int] | None = None,
    ) -> View:
        """Apply the reading rule for a query generation that may read `readable` (oldest first).

        `buckets` (first, one past the last) asks for the items of some buckets only.
        """
        pinned = version or self.version()
        live = self.items.live(pinned.items) if buckets is None else self.items.live_in(*buckets, pinned.items)
        # File and row in one number: one scatter a file instead of three.
        place = np.full(len(live), -1, np.int64)
        snapshot = self.vectors_table.snapshot(pinned.vectors)
        files: list[str] = []
        codes: list[int] = []
        positions = Positions(live)
        for code in reversed(range(len(readable))):
            locations = [snapshot.location(file) for file in _meeting(snapshot, readable[code], live)]
            for location, (revisions,) in zip(locations, self._columns.read_all(locations, "revision"), strict=True):
                position = positions.of(revisions)
                row = np.flatnonzero((position >= 0) & (place[position] < 0))
                place[position[row]] = row + (len(files) << 32)
                files.append(location)
                codes.append(code)
        file_of, row_of = (place >> 32).astype(np.int32), place.astype(np.int32)
        owner = np.array([*codes, -1], np.int16)[file_of]

        def read_items(revisions: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
            return self.items.take(revisions, columns, pinned.items)

        return View(pinned, tuple(readable), live, owner, file_of, row_of, tuple(files), read_items)

    def changes(self, since: GalleryVersion, until: GalleryVersion) -> Changes | None:
        """What was committed after one version, up to another; None where the log no longer tells it.

        Costs what changed. Where it is None, compare two views.
        """
        columns = ["revision", "item_id", "source", "label", "replaces", "deleted"]
        rows = self.items.rows_added(since.items, until.items, columns)
        files = self.vectors_table.files_added(since.vectors, until.vectors)
        if rows is None or files is None:
            return None
        replaced = np.sort(rows["replaces"].to_numpy())
        replaced = replaced[replaced != NOTHING]
        gone = is_member(rows["revision"].to_numpy(), replaced) | as_mask(rows["deleted"])
        added = []
        try:
            for file in files:
                location = join(self.vectors_table.uri, file.path)
                (revisions,) = self._columns.read(location, "revision")
                added.append(VectorRows(str(file.partition), revisions, _loader(location)))
        except DamagedFileError:  # merged and collected since; a file that is really damaged is met again
            return None
        items = rows.filter(pa.array(~gone)).select(["revision", "item_id", "source", "label"])
        return Changes(replaced, items, tuple(added))

    def lease(self, lifetime_s: float = LIFETIME_S) -> AbstractContextManager[GalleryVersion]:
        """Pin the newest version for as long as the block runs: its files are not collected."""
        return self._leases.hold(self.version, lifetime_s)

    def take_lease(self, lifetime_s: float = LIFETIME_S) -> Lease:
        """Pin the newest version until the lease is released; for a reader that stays open."""
        return self._leases.take(self.version, lifetime_s)

    def leased_versions(self) -> list[GalleryVersion]:
        """Versions that an open lease pins now."""
        return self._leases.open_versions()

    # Inside -----------------------------------------------------------------------------------------------------------

    def _look(
        self, generation: str, revisions: NDArray[np.int64], since: GalleryVersion | None, now: GalleryVersion
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows of a unit are still live, and which are stored already."""
        if since is not None:
            dead = self.items.rows_added(since.items, now.items, ["replaces"])
            files = self.vectors_table.files_added(since.vectors, now.vectors)
            if dead is not None and files is not None:
                gone = np.sort(dead["replaces"].to_numpy())
                stored = np.zeros(len(revisions), bool)
                try:
                    for file in files:
                        if file.partition == generation:
                            location = join(self.vectors_table.uri, file.path)
                            stored |= is_member(revisions, np.sort(self._columns.read(location, "revision")[0]))
                    return ~is_member(revisions, gone), stored
                except DamagedFileError:  # merged and collected since
                    pass
        snapshot = self.vectors_table.snapshot(now.vectors)
        return self.items.are_live(revisions, now.items), self._stored(generation, revisions, snapshot)

    def _stored(self, generation: str, revisions: NDArray[np.int64], snapshot: TableSnapshot) -> NDArray[np.bool_]:
        """Tell which revisions have a vector of a generation."""
        ordered = np.sort(revisions)
        found = np.zeros(len(ordered), bool)
        for file in _meeting(snapshot, generation, ordered):
            (held,) = self._columns.read(snapshot.location(file), "revision")
            if len(held) > 8 * len(ordered):
                found |= is_member(ordered, held if _ascending(held) else np.sort(held))
            else:
                place = np.searchsorted(ordered, held)
                place[place == len(ordered)] = 0
                found[place[ordered[place] == held]] = True
        return found[np.searchsorted(ordered, revisions)]


def unit_stem(staged: str) -> str:
    """What the file of a unit is called, without its digests."""
    return staged.rpartition("/")[2].removesuffix(".parquet")


def _meeting(snapshot: TableSnapshot, generation: str, ordered: NDArray[np.int64]) -> list[DataFile]:
    """Files of a generation whose range holds one of these revisions (ascending)."""
    files = snapshot.by_partition.get(generation, ())
    if not files or not len(ordered):
        return []
    low = np.searchsorted(ordered, [file.lowest for file in files])
    high = np.searchsorted(ordered, [file.highest for file in files], side="right")
    return [file for file, first, last in zip(files, low, high, strict=True) if first < last]


def _ascending(values: NDArray[np.int64]) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _loader(location: str) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    def load(positions: NDArray[np.int64]) -> NDArray[np.float32]:
        vectors = read_rows(location, positions)
        check_norms(vectors, location)
        return vectors

    return load
