"""The items of a gallery: one row per revision, and what is the latest revision of each.

A row names the revision that it takes the place of (`replaces`), so that what is live follows from numbers alone: the
rows that are no tombstone and that no other row replaces. Rows lie in order of revision, bucket by bucket; looking up
an item reads its bucket. `source_key` is the hash of the source, to find an item by where its image is.

Two writers conflict only where they write into the same bucket: a commit names the counters of the buckets it numbers.

Shapes: n rows asked about, N live items.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graceful.errors import UsageError
from graceful.files import crash_point, join
from graceful.indexing.checked_files import CheckedFile, DamagedFileError
from graceful.indexing.columns import ColumnCache
from graceful.indexing.revisions import (
    NUM_BUCKETS,
    NUMBER_BITS,
    bucket_of_revision,
    buckets_of,
    hashes_of,
    is_member,
    number_revisions,
)
from graceful.indexing.tables import TableConflictError, TableSnapshot, VersionedTable, attempts

ITEMS_SCHEMA = pa.schema(
    [
        ("revision", pa.int64()),
        ("item_id", pa.string()),
        ("source", pa.string()),
        ("content_sha256", pa.string()),
        ("label", pa.string()),
        ("attributes", pa.string()),
        ("replaces", pa.int64()),
        ("deleted", pa.bool_()),
        ("source_key", pa.int64()),
    ]
)
_STATE = pa.schema([ITEMS_SCHEMA.field(name) for name in ("revision", "replaces", "deleted")])
"""What tells which revisions are live."""
REPEATED_COLUMNS = ("label", "attributes", "replaces")
NEW_ITEM_COLUMNS = ("item_id", "source", "content_sha256", "label", "attributes")
NOTHING = -1
"""What a row `replaces` that takes nobody's place."""
_COMMIT_ROWS = 262_144
_FEW = 64
"""Reading the buckets of some rows pays where there are this many times more."""
_TRIES_BEFORE_SPLITTING = 5


@dataclass(frozen=True)
class IngestResult:
    """What an ingest changed. `rows` (revision, item_id, source, content_sha256) were written.

    `revisions` (n,) int64 has the live revision of every item that was given, in the order given.
    """

    added: int
    changed: int
    unchanged: int
    rows: pa.Table
    revisions: NDArray[np.int64]


class Items:
    """A handle on the items table."""

    def __init__(self, table: VersionedTable) -> None:
        self.table = table
        self.columns = ColumnCache()
        self._live: tuple[int, NDArray[np.int64]] | None = None
        self._one_writer = threading.RLock()

    # Reading ----------------------------------------------------------------------------------------------------------

    def live(self, version: int) -> NDArray[np.int64]:
        """Revisions (N,) of all items that are not deleted, ascending."""
        known = self._live
        if known is not None and known[0] == version:
            return known[1]
        live = self._live_from(known, version) if known is not None and known[0] < version else None
        if live is None:
            live = self._live_of(self.table.snapshot(version))
        if known is None or known[0] < version:
            self._live = (version, live)
        return live

    def live_in(self, first: int, last: int, version: int) -> NDArray[np.int64]:
        """Live revisions of the buckets [first, last), ascending; of the files only what holds these is read."""
        if self._live is not None and self._live[0] == version:
            live = self._live[1]
            return live[slice(*np.searchsorted(live, [first << NUMBER_BITS, last << NUMBER_BITS]))]
        live = self._live_of_buckets(self.table.snapshot(version), np.arange(first, last))
        return live[slice(*np.searchsorted(live, [first << NUMBER_BITS, last << NUMBER_BITS]))]

    def are_live(self, revisions: NDArray[np.int64], version: int) -> NDArray[np.bool_]:
        """Tell which revisions (n,) are live; of few of them, only their buckets are read."""
        if not len(revisions):
            return np.zeros(0, bool)
        known = self._live
        snapshot = self.table.snapshot(version)
        num_rows = sum(file.num_rows for file in snapshot.files)
        if (known is not None and known[0] == version) or len(revisions) * _FEW > num_rows:
            return is_member(revisions, self.live(version))
        return is_member(revisions, self._live_of_buckets(snapshot, np.unique(bucket_of_revision(revisions))))

    def find(self, item_ids: Sequence[str] | pa.Array, version: int | None = None) -> pa.Table:
        """Latest row of each item id, tombstones included, in the order asked; all null where it is not known."""
        ids = pa.array(item_ids, pa.string())
        snapshot = self.table.snapshot(version)
        wanted = np.unique(buckets_of(ids))
        parts = [ITEMS_SCHEMA.empty_table()]
        for file in snapshot.files:
            rows = self._of_buckets(snapshot.location(file), wanted, ITEMS_SCHEMA.names)
            parts.append(rows.filter(pc.is_in(rows["item_id"], value_set=ids)))
        found = pa.concat_tables(parts).sort_by("revision").combine_chunks()
        place = pc.index_in(found["item_id"], value_set=ids).to_numpy()
        # The last of several assignments stays: the highest revision.
        latest = np.full(len(ids), -1, np.int64)
        latest[place] = np.arange(found.num_rows)
        return found.take(pa.array(latest, mask=latest < 0))

    def take(self, revisions: NDArray[np.int64], columns: Sequence[str], version: int | None = None) -> pa.Table:
        """Columns of the rows with these revisions, in the order asked. Raises KeyError for one that is not there."""
        snapshot = self.table.snapshot(version)
        order = np.argsort(revisions, kind="stable")
        ordered = revisions[order]
        schema = pa.schema([ITEMS_SCHEMA.field(name) for name in ("revision", *columns)])
        parts = [schema.empty_table()]
        for file in snapshot.files:
            low, high = np.searchsorted(ordered, [file.lowest, file.highest + 1])
            if low == high:
                continue
            opened = CheckedFile(snapshot.location(file))
            groups = _groups_with(opened, ordered[low:high], ordered[low:high])
            if len(groups):
                rows = opened.read(schema.names, groups).cast(schema)
                parts.append(rows.filter(pa.array(is_member(rows["revision"].to_numpy(), ordered))))
        found = pa.concat_tables(parts).combine_chunks()
        numbers = found["revision"].to_numpy()
        by_number = np.argsort(numbers, kind="stable")
        place = np.searchsorted(numbers[by_number], revisions)
        if (place >= len(numbers)).any() or (numbers[chosen := by_number[place]] != revisions).any():
            raise KeyError("reading items: expected revisions of the gallery, found another one")
        return found.take(pa.array(chosen)).select(list(columns))

    def with_sources(self, sources: Sequence[str] | pa.Array, version: int | None = None) -> pa.Table:
        """Live rows whose source is one of these."""
        snapshot = self.table.snapshot(version)
        wanted = np.unique(hashes_of(sources))
        names = pa.array(sources, pa.string())
        parts = [ITEMS_SCHEMA.empty_table()]
        for file in snapshot.files:
            location = snapshot.location(file)
            hit = np.flatnonzero(is_member(self.columns.read(location, "source_key")[0], wanted))
            if not len(hit):
                continue
            opened = CheckedFile(location)
            groups = np.unique(np.searchsorted(opened.group_starts(), hit, side="right") - 1)
            rows = opened.read(ITEMS_SCHEMA.names, groups.tolist()).cast(ITEMS_SCHEMA)
            parts.append(rows.filter(pc.is_in(rows["source"], value_set=names)))
        found = pa.concat_tables(parts).combine_chunks()
        return found.filter(pa.array(self.are_live(found["revision"].to_numpy(), snapshot.version)))

    def rows_added(self, since: int, until: int, columns: Sequence[str]) -> pa.Table | None:
        """Columns of the rows that were committed after one version, up to another; None where the log cannot tell."""
        files = self.table.files_added(since, until)
        if files is None:
            return None
        schema = pa.schema([ITEMS_SCHEMA.field(name) for name in columns])
        parts = [schema.empty_table()]
        try:
            for file in files:
                parts.append(CheckedFile(join(self.table.uri, file.path)).read(columns).cast(schema))
        except DamagedFileError:  # merged and collected since; a file that is really damaged is met again
            return None
        return pa.concat_tables(parts).combine_chunks()

    # Writing ----------------------------------------------------------------------------------------------------------

    def ingest(self, items: pa.Table) -> IngestResult:
        """Add new items and new revisions of changed ones; see `Gallery.ingest`."""
        ids = items["item_id"].combine_chunks()
        if pc.count_distinct(ids).as_py() != len(ids):
            raise UsageError("ingesting items: expected each item id once, found repeated ids; split the batch")
        if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
            raise UsageError("ingesting items: expected an id for every item, found an empty one; give it an id")
        with self._one_writer:
            parts = [
                self._ingest_part(items.slice(start, _COMMIT_ROWS))
                for start in range(0, max(1, items.num_rows), _COMMIT_ROWS)
            ]
        return _summed(parts)

    def delete(self, item_ids: Sequence[str]) -> int:
        """Write tombstones; returns how many items were there to delete."""
        ids = pa.array(list(dict.fromkeys(item_ids)), pa.string())
        with self._one_writer:
            for _ in attempts():
                snapshot = self.table.snapshot()
                latest = self.find(ids, snapshot.version)
                latest = not_deleted(latest)
                if not latest.num_rows:
                    return 0
                blank = pa.array([""] * latest.num_rows, pa.string())
                tombstones = pa.table(
                    {
                        "item_id": latest["item_id"],
                        **dict.fromkeys(NEW_ITEM_COLUMNS[1:], blank),
                        "replaces": latest["revision"],
                        "deleted": pa.array(np.ones(latest.num_rows, bool)),
                        "source_key": pa.array(np.zeros(latest.num_rows, np.int64)),
                    }
                )
                try:
                    self._commit(tombstones, buckets_of(tombstones["item_id"]), snapshot)
                except TableConflictError:
                    continue
                return int(latest.num_rows)
        raise TableConflictError("deleting items: other writers won too often; try again")

    def _ingest_part(self, items: pa.Table) -> IngestResult:
        """One commit; a batch that loses too often is cut in two by bucket, so that it ends whatever others do."""
        buckets = buckets_of(items["item_id"])
        touched = np.unique(buckets)
        known = _Known.nothing(items.num_rows)
        seen = np.full(NUM_BUCKETS, -1, np.int64)
        for attempt in attempts():
            if attempt >= _TRIES_BEFORE_SPLITTING and len(touched) > 1:
                middle = int(touched[len(touched) // 2])
                halves = (np.flatnonzero(buckets < middle), np.flatnonzero(buckets >= middle))
                results = [self._ingest_part(items.take(pa.array(rows))) for rows in halves]
                return _summed(results, np.argsort(np.concatenate(halves), kind="stable"))
            snapshot = self.table.snapshot()
            counters = self._counters(touched)
            # A bucket whose counter stands where it stood has had no other writer.
            stale = np.flatnonzero(np.isin(buckets, touched[counters[touched] != seen[touched]]))
            if len(stale):
                known.learn(stale, items, self.find(items["item_id"].take(pa.array(stale)).combine_chunks(),
                                                    snapshot.version))  # fmt: skip
            seen = counters
            changed = np.flatnonzero(~known.same)
            if not len(changed):
                return known.result(items, changed, np.empty(0, np.int64))
            rows = items.select(NEW_ITEM_COLUMNS).take(pa.array(changed))
            rows = rows.append_column("replaces", pa.array(known.revisions[changed]))
            rows = rows.append_column("deleted", pa.array(np.zeros(len(changed), bool)))
            rows = rows.append_column("source_key", pa.array(hashes_of(rows["source"])))
            try:
                revisions = self._commit(rows, buckets[changed], snapshot)
            except TableConflictError:
                continue
            return known.result(items, changed, revisions)
        raise TableConflictError("ingesting items: other writers won too often; try again")

    def _commit(self, rows: pa.Table, buckets: NDArray[np.int64], snapshot: TableSnapshot) -> NDArray[np.int64]:
        """Number the rows, commit them on top of a version, and return their revisions."""
        touched = np.unique(buckets)
        revisions = number_revisions(buckets, self._counters(touched))
        file = self.table.write(rows.append_column("revision", pa.array(revisions)))
        crash_point("table-file-written")
        highest = np.zeros(NUM_BUCKETS, np.int64)
        np.maximum.at(highest, buckets, revisions & ((1 << NUMBER_BITS) - 1))
        counters = {_counter(bucket): int(highest[bucket]) for bucket in touched}
        with self.table.discarding([file]):
            self.table.commit([file], at=snapshot.version, counters=counters)
        return revisions

    def counters(self) -> NDArray[np.int64]:
        """The highest number given out so far in each bucket, (256,)."""
        self.table.version()
        return self._counters(np.arange(NUM_BUCKETS))

    def _counters(self, touched: NDArray[np.int64]) -> NDArray[np.int64]:
        counters = np.zeros(NUM_BUCKETS, np.int64)
        for bucket in touched.tolist():
            counters[bucket] = self.table.counter(_counter(bucket))
        return counters

    # Inside -----------------------------------------------------------------------------------------------------------

    def _of_buckets(self, location: str, buckets: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of a file's row groups that meet some buckets (ascending)."""
        opened = CheckedFile(location)
        groups = _groups_with(opened, buckets << NUMBER_BITS, ((buckets + 1) << NUMBER_BITS) - 1)
        schema = pa.schema([ITEMS_SCHEMA.field(name) for name in columns])
        return opened.read(columns, groups).cast(schema) if groups else schema.empty_table()

    def _live_of_buckets(self, snapshot: TableSnapshot, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Live revisions, ascending: all of these buckets (ascending), and some of others in the same row groups."""
        parts = [self._of_buckets(snapshot.location(file), buckets, _STATE.names) for file in snapshot.files]
        rows = pa.concat_tables([_STATE.empty_table(), *parts])
        there = np.sort(rows["revision"].to_numpy()[~as_mask(rows["deleted"])], kind="stable")
        return _without(there, rows["replaces"].to_numpy())

    def _live_of(self, snapshot: TableSnapshot) -> NDArray[np.int64]:
        parts = self.columns.read_all([snapshot.location(file) for file in snapshot.files], *_STATE.names)
        if not parts:
            return np.empty(0, np.int64)
        revisions, replaces, deleted = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _without(np.sort(revisions[deleted == 0], kind="stable"), replaces)

    def _live_from(self, known: tuple[int, NDArray[np.int64]], version: int) -> NDArray[np.int64] | None:
        rows = self.rows_added(known[0], version, _STATE.names)
        if rows is None:
            return None
        new = rows["revision"].to_numpy()[~as_mask(rows["deleted"])]
        if not rows.num_rows:
            return known[1]
        return _without(np.sort(np.concatenate([known[1], new]), kind="stable"), rows["replaces"].to_numpy())


@dataclass
class _Known:
    """What is known of the items of a batch: the revision to replace, whether the content is the same, or deleted."""

    revisions: NDArray[np.int64]
    same: NDArray[np.bool_]
    deleted: NDArray[np.bool_]

    @classmethod
    def nothing(cls, num: int) -> "_Known":
        return cls(np.full(num, NOTHING, np.int64), np.zeros(num, bool), np.zeros(num, bool))

    def learn(self, rows: NDArray[np.int64], items: pa.Table, latest: pa.Table) -> None:
        self.revisions[rows] = pc.fill_null(latest["revision"], NOTHING).to_numpy()
        self.deleted[rows] = as_mask(latest["deleted"])
        given = items["content_sha256"].take(pa.array(rows))
        self.same[rows] = as_mask(pc.equal(latest["content_sha256"], given)) & ~self.deleted[rows]

    def result(self, items: pa.Table, changed: NDArray[np.int64], revisions: NDArray[np.int64]) -> IngestResult:
        is_new = (self.revisions[changed] == NOTHING) | self.deleted[changed]
        live = self.revisions.copy()
        live[changed] = revisions
        rows = items.select(["item_id", "source", "content_sha256"]).take(pa.array(changed))
        return IngestResult(
            added=int(is_new.sum()),
            changed=int((~is_new).sum()),
            unchanged=int(self.same.sum()),
            rows=rows.add_column(0, "revision", pa.array(revisions, pa.int64())),
            revisions=live,
        )


def _summed(parts: Sequence[IngestResult], order: NDArray[np.int64] | None = None) -> IngestResult:
    revisions = np.concatenate([part.revisions for part in parts])
    return IngestResult(
        added=sum(part.added for part in parts),
        changed=sum(part.changed for part in parts),
        unchanged=sum(part.unchanged for part in parts),
        rows=pa.concat_tables([part.rows for part in parts]),
        revisions=revisions if order is None else revisions[order],
    )


def _counter(bucket: int) -> str:
    return f"revisions/{bucket:03d}"


def _groups_with(opened: CheckedFile, lowest: NDArray[np.int64], highest: NDArray[np.int64]) -> list[int]:
    """Row groups whose range of revisions meets one of the ranges [lowest, highest], ascending and disjoint."""
    ranges = opened.group_ranges("revision")
    first = np.searchsorted(highest, ranges[:, 0])
    met = (first < len(lowest)) & (lowest[np.minimum(first, len(lowest) - 1)] <= ranges[:, 1])
    return np.flatnonzero(met).tolist()


def _without(ordered: NDArray[np.int64], gone: NDArray[np.int64]) -> NDArray[np.int64]:
    gone = gone[gone != NOTHING]
    return ordered[~is_member(ordered, np.sort(gone))] if len(gone) else ordered


def not_deleted(latest: pa.Table) -> pa.Table:
    """Of the rows that `find` gives: those that are known and no tombstone."""
    return latest.filter(pc.fill_null(pc.invert(latest["deleted"]), False))


def as_mask(values: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Booleans as NumPy, null counting as False."""
    mask: NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False).astype(bool)
    return mask
