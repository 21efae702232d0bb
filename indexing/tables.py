"""Versioned tables: a Delta log for the commits, Parquet files read and written with pyarrow.

Invariants. A commit is atomic; a unit of work commits at most once, however often it is tried (its name is stored in
the log as an application transaction); two commits that name the same `serial` thread do not both succeed unless one
saw the other; a counter of the log never goes back. Rows are only ever appended, or rewritten without what nobody may
see. Nothing of the log expires by itself, and a log that lost its newest entry is noticed. Opening never creates.

Format: the Delta protocol (deltalake writes the log only). `to_pyarrow_table` and `to_pyarrow_dataset` of deltalake
are not used: beside pyarrow they abort or hang some processes, while reading the files named by the log is safe.
"""

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from graceful.errors import GracefulError, StorageError, UnknownFormatError, in_one_line, is_disk_full
from graceful.files import (
    crash_point,
    exists,
    file_ages,
    file_stats,
    join,
    move,
    read_bytes,
    read_json,
    remove,
    write_json,
)
from graceful.indexing.checked_files import (
    CheckedFile,
    digest_of,
    key_range,
    named,
    nullable,
    write_checked,
)

FORMAT_VERSION = "2"
_CONFIGURATION = {
    # Delta drops log entries after 30 days by default; our history is the promotion history and the rollback.
    "delta.enableExpiredLogCleanup": "false",
    "delta.checkpointInterval": "20",
}
_FORMAT_KEY = "graceful.format_version"
_SERIAL = "serial"
_REWRITE = "rewrite"
_ATTEMPTS = 40
_LONGEST_PAUSE_S = 1.0
# Files of about the same size are merged into one when there are this many of them in a partition: the number of files
# grows with the logarithm of the rows, and so does how often a row is written again.
MERGE_FILES = 8
MERGED_BYTES = 96 * 2**20
ORPHAN_AGE_S = 3600.0
"""A file that no version names is left alone until it is this old: its writer may be about to commit it."""
# What object stores and file systems say when they cannot be read at all, which is no damage.
_NOT_REACHED = (
    "generic s3 error", "generic gcs error", "generic microsoftazure error", "permission denied",
    "error sending request", "timed out", "input/output error", "stale file handle",
)  # fmt: skip
STAGING = "_staging"
_HEAD = "_head.json"


class TableConflictError(GracefulError):
    """Another writer committed first; nothing was written."""


class MissingTableError(GracefulError):
    """There is no table where one was created."""


class DamagedLogError(GracefulError):
    """The log of a table is torn, or has lost what was committed."""


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a table: path relative to the table, rows, bytes, partition, and range of the key column."""

    path: str
    num_rows: int
    size_bytes: int
    partition: str | None = None
    lowest: int = 0
    highest: int = -1


def attempts(limit: int = _ATTEMPTS) -> Iterator[int]:
    """Number the tries of a commit, with a random pause before each but the first: writers do not starve each other."""
    for number in range(limit):
        if number:
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.01 * 2 ** min(number, 7))))
        yield number


class TableSnapshot:
    """One version of a table: its files, and their rows on demand."""

    def __init__(self, uri: str, schema: pa.Schema, table: DeltaTable, partition_by: str | None) -> None:
        """Pin the version that `table` is at."""
        self.uri = uri
        self.schema = schema
        self.version: int = table.version()
        actions = pa.table(table.get_add_actions(flatten=True)).to_pydict()
        nothing = [None] * len(actions["path"])
        partitions = actions.get(f"partition.{partition_by}", nothing)
        keys = [name for name in actions if name.startswith("min.")]
        lowest = actions[keys[0]] if keys else nothing
        highest = actions[keys[0].replace("min.", "max.")] if keys else nothing
        columns = (actions["path"], actions["num_records"], actions["size_bytes"], partitions, lowest, highest)
        self.files: tuple[DataFile, ...] = tuple(
            sorted(
                (
                    DataFile(path, rows or 0, size, part, low if low is not None else 0, -1 if high is None else high)
                    for path, rows, size, part, low, high in zip(*columns, strict=True)
                ),
                key=lambda file: file.path,
            )
        )

    @cached_property
    def by_partition(self) -> dict[str | None, tuple[DataFile, ...]]:
        """Files of each partition."""
        found: dict[str | None, list[DataFile]] = defaultdict(list)
        for file in self.files:
            found[file.partition].append(file)
        return {partition: tuple(files) for partition, files in found.items()}

    @cached_property
    def records(self) -> tuple[dict[str, Any], ...]:
        """All rows by `sequence`, read once: for small tables that are looked at again and again. To be read only."""
        return tuple(self.rows().sort_by("sequence").to_pylist())

    def location(self, file: DataFile) -> str:
        """Where one of the files lies."""
        return join(self.uri, file.path)

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows (unpartitioned tables), in no particular order."""
        names = list(columns) if columns is not None else self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        parts = [CheckedFile(self.location(file)).read(names).cast(schema) for file in self.files]
        return pa.concat_tables(parts) if parts else schema.empty_table()


class VersionedTable:
    """A handle on one table. Cheap to make; every read looks for the newest version unless told otherwise."""

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        *,
        partition_by: str | None = None,
        key: str | None = None,
        repeated: Sequence[str] = (),
        create: bool = False,
    ) -> None:
        """Open the table at `uri`; with `create` it is made empty where there is none.

        `key` is an int64 column whose range is kept for every file; `repeated` columns have few different values.

        Raises:
            MissingTableError: there is none.
            DamagedLogError: its log is torn, or lost its newest entries.
            UnknownFormatError: written by a version that this one does not know.
        """
        self.uri = uri
        self.schema = schema
        self.key = key
        self.repeated = tuple(repeated)
        self.partition_by = partition_by
        self._delta_schema = Schema.from_arrow(schema)
        self._pinned: TableSnapshot | None = None
        if create and not exists(join(uri, "_delta_log")):
            self._create()
        head, digest = _newest_written(uri)  # before the log is read: it may only be older
        self._table = self._open()
        found = self._table.metadata().configuration.get(_FORMAT_KEY)
        if found != FORMAT_VERSION:
            raise UnknownFormatError(
                f"opening the table: expected format version {FORMAT_VERSION}, found {found} ({uri}); "
                "use the version of graceful that wrote it, or create the workspace anew"
            )
        if head is not None and head > self._table.version():
            raise DamagedLogError(
                f"opening the table: expected version {head}, found {self._table.version()} (the log of {uri} lost its "
                "newest entries); restore the folder _delta_log from a backup"
            )
        if head is not None and digest is not None and head == self._table.version():
            self._verify_entry(head, digest)

    # Reading ----------------------------------------------------------------------------------------------------------

    def snapshot(self, version: int | None = None) -> TableSnapshot:
        """Pin the newest version, or the named one."""
        if version is None:
            self._update()
            version = int(self._table.version())
        if self._pinned is not None and self._pinned.version == version:
            return self._pinned
        table = self._at(version)
        pinned = TableSnapshot(self.uri, self.schema, table, self.partition_by)
        if table is self._table:
            self._pinned = pinned
        return pinned

    def version(self) -> int:
        """Number of the newest version."""
        self._update()
        return int(self._table.version())

    def identity(self) -> str:
        """The identifier that the table was given when it was made."""
        return str(self._table.metadata().id)

    def committed(self, unit: str) -> bool:
        """Tell whether a unit of work has committed."""
        self._update()
        return self._table.transaction_version(unit) is not None

    def counter(self, name: str) -> int:
        """A counter at the version last looked at; 0 before its first commit."""
        return int(self._table.transaction_version(name) or 0)

    def files_added(self, since: int, until: int) -> list[DataFile] | None:
        """Files that the commits after `since`, up to `until`, added; None where the log no longer tells.

        What rewrote rows without changing what anybody sees is left out.
        """
        added: list[DataFile] = []
        for version in range(since + 1, until + 1):
            try:
                text = read_bytes(join(self.uri, "_delta_log", f"{version:020d}.json"))
                actions = [json.loads(line) for line in text.splitlines() if line]
            except (FileNotFoundError, ValueError):
                return None
            added += [self._file_in(action["add"]) for action in actions if action.get("add", {}).get("dataChange")]
        return added

    # Writing ----------------------------------------------------------------------------------------------------------

    def append(self, rows: pa.Table, *, unit: str | None = None, expected_version: int | None = None) -> bool:
        """Append rows in one commit; False when `unit` had committed before (nothing is written then).

        With `expected_version` the commit is serial: it is refused if any serial commit followed that version.

        Raises:
            TableConflictError: another serial writer, or the same unit, committed at the same moment.
        """
        if unit is not None and self.committed(unit):
            return False
        file = self.write(rows)
        crash_point("table-file-written")
        serial = (_SERIAL,) if expected_version is not None else ()
        with self.discarding([file]):
            self.commit([file], at=expected_version, serial=serial, unit=unit)
        return True

    def write(self, rows: pa.Table, *, partition: str | None = None) -> DataFile:
        """Write rows into one new file, sorted by the key, that no version names yet."""
        if self.key is not None:
            rows = rows.sort_by(self.key)
        names = [name for name in self.schema.names if name != self.partition_by]
        schema = pa.schema([_stored_field(self.schema.field(name), rows) for name in names])
        folder = join(self.uri, *self._folders(partition))
        written = write_checked(folder, rows.select(names).cast(schema), key=self.key, repeated=self.repeated)
        path = "/".join([*self._folders(partition), written.name])
        return DataFile(path, written.num_rows, written.size_bytes, partition, written.lowest, written.highest)

    def take_in(self, staged: str, stem: str, keys: pa.Table, *, partition: str | None = None) -> DataFile:
        """Give a file that a worker wrote its final name; no version names it yet. `keys` are its key columns."""
        content = read_bytes(staged)
        path = "/".join([*self._folders(partition), named(stem, content)])
        move(staged, join(self.uri, path))
        return DataFile(path, keys.num_rows, len(content), partition, *key_range(keys, self.key))

    def commit(
        self,
        added: Sequence[DataFile],
        removed: Sequence[DataFile] = (),
        *,
        at: int | None = None,
        serial: Sequence[str] = (),
        counters: Mapping[str, int] | None = None,
        unit: str | None = None,
        data_change: bool = True,
    ) -> None:
        """Name files in one commit, made on top of version `at` (the one last looked at).

        Refused if a commit after `at` named one of the same `serial` threads, counters, or the unit.

        Raises:
            TableConflictError: another writer was faster; nothing was committed.
        """
        version = int(self._table.version()) if at is None else at
        transactions = [Transaction(name, version + 1) for name in serial]
        transactions += [Transaction(name, value) for name, value in (counters or {}).items()]
        transactions += [Transaction(unit, 1)] if unit is not None else []
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            RemoveAction(file.path, data_change, now, file.size_bytes, self._partition_values(file)) for file in removed
        ]
        actions += [self._add_action(file, now, data_change) for file in added]
        try:
            self._at(version).create_write_transaction(
                actions,
                mode="append",
                schema=self._delta_schema,
                partition_by=[self.partition_by] if self.partition_by else [],
                commit_properties=CommitProperties(app_transactions=transactions),
            )
        except CommitFailedError as error:
            raise TableConflictError(
                f"committing to {self.uri}: expected version {version}, found a newer one (another writer finished "
                "first); read again and retry"
            ) from error
        except (DeltaError, OSError) as error:
            raise self._refused(error) from error
        crash_point("table-committed")
        self._update()
        self._write_head()

    @contextmanager
    def discarding(self, files: Sequence[DataFile]) -> Iterator[None]:
        """Remove files that were written for a commit when it is refused."""
        try:
            yield
        except TableConflictError:
            for file in files:
                remove(join(self.uri, file.path))
            raise

    def fence(self, *threads: str) -> None:
        """Make every commit of these serial threads that is not through yet fail; nothing else changes."""
        for _ in attempts():
            self._update()
            with suppress(TableConflictError):
                self.commit([], serial=threads)
                return
        raise TableConflictError(f"fencing {self.uri}: others committed {_ATTEMPTS} times in between; try again")

    def rewrite(
        self,
        keep: Callable[[DataFile, pa.Table], np.ndarray],
        *,
        keys: Sequence[str],
        serial: Sequence[str] = (),
        least_share: float = 0.0,
        prepare: Callable[[TableSnapshot], None] = lambda _: None,
    ) -> int:
        """Write files again without the rows that are not to be kept; returns how many rows went.

        `keep` says of a file's key columns which rows stay. A file is left alone unless more than `least_share` of its
        rows go. `prepare` runs on each attempt, with the version that the commit will be made on.

        Raises:
            TableConflictError: other processes kept rewriting the same files.
        """
        for _ in attempts():
            snapshot = self.snapshot()
            prepare(snapshot)
            replaced, written, gone = [], [], 0
            for file in snapshot.files:
                opened = CheckedFile(snapshot.location(file))
                kept = keep(file, opened.read(keys))
                num_gone = int(len(kept) - kept.sum())
                if num_gone and num_gone > least_share * len(kept):
                    gone += num_gone
                    replaced.append(file)
                    if kept.any():
                        written.append(self.write(opened.read().filter(pa.array(kept)), partition=file.partition))
            crash_point("rewrite-before-commit")
            if not replaced:
                return 0
            with suppress(TableConflictError), self.discarding(written):
                self.commit(written, replaced, at=snapshot.version, serial=(_REWRITE, *serial), data_change=False)
                crash_point("rewrite-after-commit")
                return gone
        raise TableConflictError(f"rewriting {self.uri}: others rewrote it {_ATTEMPTS} times; try again")

    def drop(self, files: Sequence[DataFile], *, at: int) -> None:
        """Take files out of the newest version. Raises TableConflictError where one was rewritten since `at`."""
        self.commit([], files, at=at, serial=(_REWRITE,))

    def delete_rows(self, column: str, values: Sequence[str]) -> int:
        """Write the files that hold any of the values again without those rows. The log does not name the values."""
        wanted = pa.array(values, pa.string())

        def keep(_: DataFile, keys: pa.Table) -> np.ndarray:
            found = pc.is_in(keys[column].cast(pa.string()), value_set=wanted)
            return ~found.to_numpy(zero_copy_only=False)

        return self.rewrite(keep, keys=[column])

    def compact(self, *, at_least: int = MERGE_FILES) -> bool:
        """Merge files of about the same size where there are many; the older versions stay readable. True if it did.

        Of two at the same time one does nothing. deltalake's own `optimize.compact` is not used: two of them at once
        both succeed and double the rows, and it makes views of the fixed-size binary column.
        """
        snapshot = self.snapshot()
        replaced: list[DataFile] = []
        written: list[DataFile] = []
        for partition, files in snapshot.by_partition.items():
            for group in _alike(files, at_least):
                replaced += group
                written += self._merged(snapshot, group, partition)
        if not replaced:
            return False
        crash_point("merge-before-commit")
        with suppress(TableConflictError), self.discarding(written):
            self.commit(written, replaced, at=snapshot.version, serial=(_REWRITE,), data_change=False)
            return True
        return False

    def vacuum(
        self, keep_versions: Sequence[int] = (), *, at: int | None = None, orphan_age_s: float = ORPHAN_AGE_S
    ) -> list[str]:
        """Delete files that neither version `at` (the newest), a later nor a kept one names, and what never committed.

        Whoever keeps versions of its readers takes `at` first and asks for them then: a reader that comes later pins
        `at` or a later version. Orphans of killed writers, staged files among them, go once they are old enough.
        """
        there = file_stats(self.uri)
        version = self.version() if at is None else at
        named_before = self._at(version).vacuum(
            retention_hours=0, dry_run=False, enforce_retention_duration=False, keep_versions=list(keep_versions)
        )
        gone = [path for path in named_before if path in there]
        self._update()
        self._pinned = None
        orphans = self.orphans([version, *keep_versions], older_than_s=orphan_age_s)
        for location in orphans:
            remove(location)
        return gone + orphans

    def superseded(self) -> list[str]:
        """Paths, in the table, of files that older versions name and the newest does not: a vacuum deletes them."""
        self._update()
        return list(self._table.vacuum(retention_hours=0, dry_run=True, enforce_retention_duration=False))

    def orphans(self, keep_versions: Sequence[int] = (), *, older_than_s: float = ORPHAN_AGE_S) -> list[str]:
        """Files below the table that neither the newest version nor a kept one names, and that are old enough."""
        ages = file_ages(self.uri) if older_than_s > 0 else dict.fromkeys(file_stats(self.uri), 0.0)
        named_ = {file.path for version in (None, *keep_versions) for file in self._files_at(version)}
        return [
            join(self.uri, path)
            for path, age_s in sorted(ages.items())
            if path not in named_ and not path.startswith("_delta_log/") and path != _HEAD and (age_s >= older_than_s)
        ]

    # Inside -----------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        with suppress(CommitFailedError):  # two creators at once: the other one won
            DeltaTable.create(
                self.uri,
                schema=self._delta_schema,
                partition_by=[self.partition_by] if self.partition_by else None,
                mode="ignore",
                configuration={**_CONFIGURATION, _FORMAT_KEY: FORMAT_VERSION},
                raise_if_key_not_exists=False,
            )

    def _write_head(self) -> None:
        """Write down which entry of the log is the newest, and its digest; the commit is through whatever comes of it.

        Where this fails (a full disk), the next commit writes it down.
        """
        version = int(self._table.version())
        with suppress(OSError):
            write_json(join(self.uri, _HEAD), {"version": version, "digest": digest_of(self._entry(version))})

    def _entry(self, version: int) -> bytes:
        return read_bytes(join(self.uri, "_delta_log", f"{version:020d}.json"))

    def _verify_entry(self, version: int, digest: str) -> None:
        """Compare the newest entry of the log with its digest: an emptied one is an entry to Delta, without rows."""
        try:
            found = digest_of(self._entry(version))
        except FileNotFoundError:
            return  # a checkpoint holds what it said
        if found != digest:
            raise DamagedLogError(
                f"opening the table: expected entry {version} of the log with digest {digest}, found {found} (the log "
                f"of {self.uri} is damaged); restore the folder _delta_log from a backup"
            )

    def _refused(self, error: Exception) -> StorageError:
        said = "disk full: free space and run again" if is_disk_full(error) else in_one_line(error)
        return StorageError(f"committing to {self.uri}: {said}")

    def _open(self, version: int | None = None) -> DeltaTable:
        try:
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            raise MissingTableError(
                f"opening the table: expected one at {self.uri}, found none; restore it from a backup, or see "
                "'graceful doctor'"
            ) from None
        except (DeltaError, OSError) as error:
            raise self._unreadable(error) from error

    def _update(self) -> None:
        try:
            self._table.update_incremental()
        except TableNotFoundError:
            raise MissingTableError(f"reading the table: expected one at {self.uri}, found none; restore it") from None
        except (DeltaError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> GracefulError:
        log = join(self.uri, "_delta_log")
        if any(words in str(error).lower() for words in _NOT_REACHED):
            return StorageError(
                f"reading a table: expected the storage to answer, found {in_one_line(error)} ({log}); see that it can "
                "be reached and read, and run again"
            )
        return DamagedLogError(
            f"opening the table: expected a whole log, found {in_one_line(error)} ({log}); restore the folder "
            "_delta_log from a backup, or see 'graceful doctor'"
        )

    def _at(self, version: int) -> DeltaTable:
        if version == self._table.version():
            return self._table
        self._update()
        return self._table if version == self._table.version() else self._open(version)

    def _files_at(self, version: int | None) -> tuple[DataFile, ...]:
        try:
            return self.snapshot(version).files
        except (DamagedLogError, MissingTableError, FileNotFoundError):
            if version is None:
                raise
            return ()  # a version that no longer exists keeps nothing

    def _folders(self, partition: str | None) -> list[str]:
        return [] if partition is None else [f"{self.partition_by}={partition}"]

    def _partition_values(self, file: DataFile) -> dict[str, str | None]:
        return {self.partition_by: file.partition} if self.partition_by else {}

    def _add_action(self, file: DataFile, now_ms: int, data_change: bool) -> AddAction:
        statistics: dict[str, Any] = {"numRecords": file.num_rows}
        if self.key is not None and file.lowest <= file.highest:
            statistics |= {"minValues": {self.key: file.lowest}, "maxValues": {self.key: file.highest}}
        partition: Mapping[str, str | None] = self._partition_values(file)
        return AddAction(file.path, file.size_bytes, partition, now_ms, data_change, json.dumps(statistics))

    def _file_in(self, action: Mapping[str, Any]) -> DataFile:
        statistics = json.loads(action.get("stats") or "{}")
        partition = (action.get("partitionValues") or {}).get(self.partition_by)
        lowest = statistics.get("minValues", {}).get(self.key, 0)
        highest = statistics.get("maxValues", {}).get(self.key, -1)
        rows, size = statistics.get("numRecords", 0), action.get("size") or 0
        return DataFile(action["path"], rows, size, partition, lowest, highest)

    def _merged(self, snapshot: TableSnapshot, files: Sequence[DataFile], partition: str | None) -> list[DataFile]:
        """Write the rows of some files into as few as their size allows, in the order of the key."""
        total = sum(file.size_bytes for file in files)
        num_parts = -(-total // MERGED_BYTES)
        opened = [CheckedFile(snapshot.location(file)) for file in files]
        if num_parts <= 1 or self.key is None:
            return [self.write(_concat([file.read() for file in opened]), partition=partition)]
        keys = [file.read([self.key])[self.key].to_numpy() for file in opened]
        ordered = np.sort(np.concatenate(keys))
        bounds = ordered[np.linspace(0, len(ordered), num_parts + 1)[1:-1].astype(np.int64)]
        written, lowest = [], np.iinfo(np.int64).min
        for highest in [*bounds.tolist(), np.iinfo(np.int64).max]:
            parts = []
            for file, key in zip(opened, keys, strict=True):
                mask = (key >= lowest) & ((key < highest) if highest != np.iinfo(np.int64).max else (key <= highest))
                if mask.any():
                    parts.append(file.read().filter(pa.array(mask)))
            written.append(self.write(_concat(parts), partition=partition))
            lowest = highest
        return written


def in_use(folder: str, names: Sequence[str]) -> bool:
    """Tell whether something was ever committed to one of the tables of a folder: those beside it are not new then."""
    return any(
        exists(join(folder, name, _HEAD)) or exists(join(folder, name, "_delta_log", f"{1:020d}.json"))
        for name in names
    )


def _alike(files: Sequence[DataFile], at_least: int) -> list[list[DataFile]]:
    """Groups of files to merge: those of about the same size, a factor of eight apart, where there are enough."""
    tiers: dict[int, list[DataFile]] = defaultdict(list)
    for file in files:
        if file.size_bytes < MERGED_BYTES / 2:
            tiers[max(0, (max(1, file.size_bytes) // 65_536).bit_length() // 3)].append(file)
    return [group for group in tiers.values() if len(group) >= at_least]


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables([nullable(table) for table in tables])


def _stored_field(field: pa.Field, rows: pa.Table) -> pa.Field:
    """The schema's field; a column of one width stays of fixed size, which Delta calls binary."""
    found = rows.schema.field(field.name)
    return found if pa.types.is_fixed_size_binary(found.type) else field


def _newest_written(uri: str) -> tuple[int | None, str | None]:
    """The newest version that a commit has written down, and the digest of its entry in the log.

    Never newer than the log, unless the log lost something.
    """
    try:
        head = read_json(join(uri, _HEAD))
        return int(head["version"]), head.get("digest")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
