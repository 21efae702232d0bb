"""The gallery: items and their revisions, vectors, leases, and the view that a query generation has of them.

Three versioned tables (see `indexing.tables`), all append-only:

* items: one row per revision of an item; a delete is a tombstone revision; the latest revision counts.
* vectors: one row `(item_id, revision, generation, embedding)`, partitioned by generation, never updated.
* leases: open readers' promises that a version's files stay (see `indexing.leases`).

The reading rule, and nothing else, decides what is seen: for every item whose latest revision is not a delete, among
the vectors *of that revision* whose generation is in `readable`, the one of the last such generation. `readable` is the
list of generations that the query generation holds certificates for, oldest first; the registry makes it. An item
without such a vector is unreadable: listed in the view, never served from a wrong vector.

Shapes: N items of a view, R rows of a vectors partition, D width.
"""

import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graceful.errors import UsageError
from graceful.files import crash_point, exists, join, move, remove, resolve, size_bytes
from graceful.indexing.embedding_files import read_embeddings, write_embedding_file
from graceful.indexing.leases import LIFETIME_S, GalleryVersion, Lease, Leases
from graceful.indexing.tables import DataFile, TableConflictError, TableSnapshot, VersionedTable

ITEMS_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("revision", pa.int64()),
        ("source", pa.string()),
        ("content_sha256", pa.string()),
        ("label", pa.string()),
        ("attributes", pa.string()),
        ("deleted", pa.bool_()),
    ]
)
VECTORS_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("revision", pa.int64()), ("generation", pa.string()), ("embedding", pa.binary())]
)
KEYS_SCHEMA = pa.schema([("item_id", pa.string()), ("revision", pa.int64())])
NEW_ITEM_COLUMNS = ("item_id", "source", "content_sha256", "label", "attributes")
_SERIAL_ATTEMPTS = 20


@dataclass(frozen=True)
class IngestResult:
    """What an ingest changed: rows (item_id, revision, source, content_sha256) that need vectors now."""

    added: int
    changed: int
    unchanged: int
    rows: pa.Table


@dataclass(frozen=True)
class VectorCommit:
    """What became of one unit of vectors: rows committed, and rows dropped because they came too late or twice."""

    committed: int
    stale: int
    duplicate: int
    repeated: bool = False


@dataclass(frozen=True)
class View:
    """What a query generation sees at one gallery version. Rows are sorted by item id.

    `owner` (N,) int16 indexes `readable`; -1 marks an unreadable item. `file` and `row` (N,) say where the vector lies.
    """

    version: GalleryVersion
    readable: tuple[str, ...]
    items: pa.Table
    owner: NDArray[np.int16]
    file: NDArray[np.int32]
    row: NDArray[np.int64]
    files: tuple[str, ...] = field(repr=False)

    @property
    def num_items(self) -> int:
        """Items that are not deleted, readable or not."""
        return self.items.num_rows

    @property
    def item_ids(self) -> NDArray[np.object_]:
        """Item ids (N,)."""
        return self.items["item_id"].to_numpy(zero_copy_only=False)

    @property
    def revisions(self) -> NDArray[np.int64]:
        """Revisions (N,)."""
        return self.items["revision"].to_numpy()

    def unreadable(self) -> NDArray[np.int64]:
        """Positions of the items that this query generation cannot read."""
        return np.flatnonzero(self.owner < 0)

    def owned_by(self, generation: str) -> NDArray[np.int64]:
        """Positions of the items read from vectors of one generation."""
        if generation not in self.readable:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.owner == self.readable.index(generation))

    def rows_by_generation(self) -> dict[str, int]:
        """Number of items read from each readable generation."""
        counts = np.bincount(self.owner[self.owner >= 0], minlength=len(self.readable))
        return {generation: int(count) for generation, count in zip(self.readable, counts, strict=True)}

    def vectors(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read the vectors (n, D) of items that one generation, or generations of one width, own."""
        if np.any(self.owner[positions] < 0):
            raise UsageError("reading vectors of a view: expected readable positions, found unreadable items")
        parts: list[NDArray[np.float32]] = []
        order: list[NDArray[np.int64]] = []
        for file in np.unique(self.file[positions]):
            chosen = np.flatnonzero(self.file[positions] == file)
            _, embeddings = read_embeddings([self.files[file]])
            parts.append(embeddings[self.row[positions[chosen]]])
            order.append(chosen)
        if not parts:
            return np.empty((0, 0), np.float32)
        vectors = np.empty((len(positions), parts[0].shape[1]), np.float32)
        for chosen, part in zip(order, parts, strict=True):
            vectors[chosen] = part
        return vectors


class Gallery:
    """A handle on the gallery below one location. Any number of handles and processes may be open at once."""

    def __init__(self, location: str) -> None:
        """Open the gallery, or create it empty."""
        self.location = location
        self.items_table = VersionedTable(join(location, "items"), ITEMS_SCHEMA)
        self.vectors_table = VersionedTable(join(location, "vectors"), VECTORS_SCHEMA, partition_by="generation")
        self._leases = Leases(join(location, "leases"))
        self._keys: dict[str, pa.Table] = {}
        self._latest: tuple[int, pa.Table] | None = None

    def version(self) -> GalleryVersion:
        """Pin the newest version. Vectors are pinned first: a vector never precedes its item."""
        vectors = self.vectors_table.version()
        return GalleryVersion(self.items_table.version(), vectors)

    # Items ------------------------------------------------------------------------------------------------------------

    def latest_items(self, version: int | None = None) -> pa.Table:
        """Latest revision of every item, tombstones included, sorted by item id."""
        number = self.items_table.version() if version is None else version
        if self._latest is not None and self._latest[0] == number:
            return self._latest[1]
        rows = self.items_table.snapshot(number).rows()
        rows = rows.sort_by([("item_id", "ascending"), ("revision", "ascending")]).combine_chunks()
        if rows.num_rows:
            ids = rows["item_id"]
            last = np.ones(rows.num_rows, bool)
            last[:-1] = pc.not_equal(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
            rows = rows.filter(pa.array(last))
        self._latest = (number, rows)
        return rows

    def ingest(self, items: pa.Table, *, unit: str) -> IngestResult:
        """Add new items and new revisions of changed ones; an item with the same content is left alone.

        `items` has the columns NEW_ITEM_COLUMNS. `unit` names the batch: tried again, it writes nothing twice.
        """
        ids = items["item_id"].to_pylist()
        if len(set(ids)) != len(ids):
            raise UsageError("ingesting items: expected each item id once, found repeated ids; split the batch")
        for _ in range(_SERIAL_ATTEMPTS):
            version = self.items_table.version()
            latest = self.latest_items(version)
            position = pc.index_in(pa.array(ids, pa.string()), value_set=latest["item_id"].combine_chunks())
            known = latest.take(position)
            same = _as_mask(
                pc.and_(pc.equal(known["content_sha256"], items["content_sha256"]), pc.invert(known["deleted"]))
            )
            is_known = _as_mask(pc.is_valid(position))
            was_deleted = _as_mask(known["deleted"])
            revision = pc.add(pc.fill_null(known["revision"], 0), 1)
            rows = pa.table(
                {
                    **{name: items[name] for name in NEW_ITEM_COLUMNS},
                    "revision": revision,
                    "deleted": pa.array(np.zeros(items.num_rows, bool)),
                }
            ).filter(pa.array(~same))
            result = IngestResult(
                added=int((~is_known | was_deleted).sum()),
                changed=int((is_known & ~same & ~was_deleted).sum()),
                unchanged=int(same.sum()),
                rows=rows.select(["item_id", "revision", "source", "content_sha256"]),
            )
            if not rows.num_rows:
                return result
            try:
                self.items_table.append(
                    rows.select(ITEMS_SCHEMA.names), unit=f"ingest/{unit}", expected_version=version
                )
            except TableConflictError:
                continue
            return result
        raise TableConflictError(f"ingesting {unit}: other writers won {_SERIAL_ATTEMPTS} times; try again")

    def delete(self, item_ids: Sequence[str], *, unit: str) -> int:
        """Write tombstones; returns how many items were there to delete. Vectors stay until they are collected."""
        for _ in range(_SERIAL_ATTEMPTS):
            version = self.items_table.version()
            latest = self.latest_items(version)
            chosen = pc.and_(pc.is_in(latest["item_id"], pa.array(item_ids, pa.string())), pc.invert(latest["deleted"]))
            rows = latest.filter(chosen)
            if not rows.num_rows:
                return 0
            rows = rows.set_column(1, "revision", pc.add(rows["revision"], 1))
            rows = rows.set_column(6, "deleted", pa.array(np.ones(rows.num_rows, bool)))
            try:
                self.items_table.append(rows, unit=f"delete/{unit}", expected_version=version)
            except TableConflictError:
                continue
            return int(rows.num_rows)
        raise TableConflictError(f"deleting {unit}: other writers won {_SERIAL_ATTEMPTS} times; try again")

    # Vectors ----------------------------------------------------------------------------------------------------------

    def staging_file(self, generation: str, unit: str) -> str:
        """Where the worker that embeds a unit is to write its file: deterministic, so that twice is once.

        A commit moves the file away under a name of its own: a worker believed dead that writes once more cannot touch
        committed rows.
        """
        return join(self.staging_location(), generation, f"{unit}.parquet")

    def staging_location(self) -> str:
        """The folder of files written by workers and not committed yet."""
        return join(self.vectors_table.uri, "_staging")

    def forget_cached_keys(self) -> None:
        """Drop what this handle remembers of files and items (after they were removed physically)."""
        self._keys.clear()
        self._latest = None

    def has_unit(self, generation: str, unit: str) -> bool:
        """Tell whether a unit of vectors has committed."""
        return self.vectors_table.committed(f"{generation}/{unit}")

    def commit_vectors(self, generation: str, unit: str) -> VectorCommit:
        """Commit the file that a worker wrote for a unit, exactly once.

        Rows of a revision that is no longer the latest, and rows whose vector is already stored, are dropped and
        counted. A revision that becomes stale after this check does no harm: the reading rule asks for the latest.
        The commit is serial, so that two processes that embed an item in different units store its vector once.
        """
        for attempts_left in reversed(range(_SERIAL_ATTEMPTS)):
            try:
                return self._commit_staged(generation, unit)
            except (TableConflictError, FileNotFoundError):  # another process committed, perhaps this very unit
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _commit_staged(self, generation: str, unit: str) -> VectorCommit:
        staged = self.staging_file(generation, unit)
        repeated = self.has_unit(generation, unit)
        if repeated and not exists(staged):
            return VectorCommit(0, 0, 0, repeated=True)
        keys = _read_keys(staged)
        latest = self.latest_items()
        position = pc.index_in(keys["item_id"], value_set=latest["item_id"].combine_chunks())
        current = latest.take(position)
        is_fresh = _as_mask(pc.and_(pc.equal(current["revision"], keys["revision"]), pc.invert(current["deleted"])))
        snapshot = self.vectors_table.snapshot()
        is_stored = _same_rows(keys, self._stored_keys(generation, snapshot))
        keep = is_fresh & ~is_stored
        result = VectorCommit(int(keep.sum()), int((~is_fresh).sum()), int((is_fresh & is_stored).sum()))
        if not result.committed:
            remove(staged)
            return replace(result, repeated=repeated)
        attempt = uuid.uuid4().hex[:12]
        # A unit may have committed and its rows have been collected or forgotten since: it is another unit then.
        name = f"{generation}/{unit}/{attempt}" if repeated else f"{generation}/{unit}"
        path = f"generation={generation}/{unit}-{attempt}.parquet"
        location = join(self.vectors_table.uri, path)
        if keep.all():
            move(staged, location)
        else:
            _, embeddings = read_embeddings([staged])
            write_embedding_file(location, keys.filter(pa.array(keep)), embeddings[keep])
            remove(staged)
        crash_point("vectors-before-commit")
        file = DataFile(path, result.committed, size_bytes(location), (("generation", generation),))
        try:
            if not self.vectors_table.commit_files([file], unit=name, expected_version=snapshot.version):
                return VectorCommit(0, 0, 0, repeated=True)
        except TableConflictError:
            move(location, staged)
            raise
        crash_point("vectors-after-commit")
        return result

    def missing_vectors(self, generation: str, version: GalleryVersion | None = None) -> pa.Table:
        """Live items without a vector of a generation: (item_id, revision, source, content_sha256)."""
        view = self.view([generation], version)
        return view.items.take(pa.array(view.unreadable())).select(["item_id", "revision", "source", "content_sha256"])

    def generations(self) -> dict[str, int]:
        """Rows stored of each generation, dead ones included."""
        counts: dict[str, int] = {}
        for file in self.vectors_table.snapshot().files:
            generation = dict(file.partition)["generation"]
            counts[generation] = counts.get(generation, 0) + file.num_rows
        return counts

    # Views ------------------------------------------------------------------------------------------------------------

    def view(self, readable: Sequence[str], version: GalleryVersion | None = None) -> View:
        """Apply the reading rule for a query generation that may read `readable` (oldest first)."""
        pinned = version or self.version()
        latest = self.latest_items(pinned.items)
        live = latest.filter(pc.invert(latest["deleted"])).combine_chunks()
        revisions = live["revision"].to_numpy()
        owner = np.full(live.num_rows, -1, np.int16)
        file_of = np.full(live.num_rows, -1, np.int32)
        row_of = np.full(live.num_rows, -1, np.int64)
        snapshot = self.vectors_table.snapshot(pinned.vectors)
        live_ids = live["item_id"].combine_chunks()
        files: list[str] = []
        for code in reversed(range(len(readable))):
            for file in _files_of(snapshot, readable[code]):
                location = snapshot.location(file)
                keys = self._file_keys(location)
                files.append(location)
                position = pc.fill_null(pc.index_in(keys["item_id"], value_set=live_ids), -1).to_numpy()
                row = np.flatnonzero(position >= 0)
                position = position[row]
                right = (revisions[position] == keys["revision"].to_numpy()[row]) & (owner[position] < 0)
                row, position = row[right], position[right]
                owner[position], file_of[position], row_of[position] = code, len(files) - 1, row
        return View(pinned, tuple(readable), live, owner, file_of, row_of, tuple(files))

    def lease(self, lifetime_s: float = LIFETIME_S) -> AbstractContextManager[GalleryVersion]:
        """Pin the newest version for as long as the block runs: its files are not collected."""
        return self._leases.hold(self.version, lifetime_s)

    def take_lease(self, lifetime_s: float = LIFETIME_S) -> Lease:
        """Pin the newest version until the lease is released; for a reader that stays open."""
        return self._leases.take(self.version, lifetime_s)

    def leased_versions(self) -> list[GalleryVersion]:
        """Versions that an open lease pins now."""
        return self._leases.open_versions()

    def _stored_keys(self, generation: str, snapshot: TableSnapshot) -> pa.Table:
        tables = [self._file_keys(snapshot.location(file)) for file in _files_of(snapshot, generation)]
        return pa.concat_tables([KEYS_SCHEMA.empty_table(), *tables]).combine_chunks()

    def _file_keys(self, location: str) -> pa.Table:
        """Keys of one committed file; files never change, so they are read once."""
        if location not in self._keys:
            self._keys[location] = _read_keys(location)
        return self._keys[location]


def _files_of(snapshot: TableSnapshot, generation: str) -> list[DataFile]:
    return [file for file in snapshot.files if dict(file.partition)["generation"] == generation]


def _read_keys(location: str) -> pa.Table:
    filesystem, path = resolve(location)
    table = pq.read_table(path, columns=["item_id", "revision"], filesystem=filesystem, partitioning=None)
    return table.cast(KEYS_SCHEMA).combine_chunks()


def _as_mask(values: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Booleans as NumPy, null counting as False."""
    mask: NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)
    return mask


def _same_rows(keys: pa.Table, stored: pa.Table) -> NDArray[np.bool_]:
    """Tell for each (item_id, revision) of `keys` whether `stored` has it too."""
    if not stored.num_rows:
        return np.zeros(keys.num_rows, bool)
    return _as_mask(pc.is_in(_joined_key(keys), value_set=_joined_key(stored).combine_chunks()))


def _joined_key(keys: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(keys["item_id"], pc.cast(keys["revision"], pa.string()), "\x00")


def gallery_exists(location: str) -> bool:
    """Tell whether a gallery was created at a location."""
    return exists(join(location, "items", "_delta_log"))
