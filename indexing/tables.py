"""Versioned tables: a Delta log for the commits, Parquet files read and written with pyarrow.

Invariants. A commit is atomic; a unit of work commits at most once, however often it is tried (its name is stored in
the log as an application transaction); in a table opened for serial writing, a writer that did not see the newest
commit is refused. Rows are only ever appended. Nothing of the log expires by itself.

Format: the Delta protocol (deltalake writes the log only). `to_pyarrow_table` and `to_pyarrow_dataset` of deltalake
are not used: beside pyarrow they abort or hang some processes, while reading the files named by the log is safe.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import crash_point, join, resolve, size_bytes

FORMAT_VERSION = "1"
_CONFIGURATION = {
    # Delta drops log entries after 30 days by default; our history is the promotion history and the rollback.
    "delta.enableExpiredLogCleanup": "false",
    "delta.checkpointInterval": "10",
}
_FORMAT_KEY = "graceful.format_version"
_SERIAL = "serial"
_REWRITE = "rewrite"
_REWRITE_ATTEMPTS = 10
_ROW_GROUP_ROWS = 65_536
_COMPACT_AFTER_FILES = 64


class TableConflictError(GracefulError):
    """Another writer committed first; nothing was written."""


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a table: path relative to the table, rows, bytes and partition values."""

    path: str
    num_rows: int
    size_bytes: int
    partition: tuple[tuple[str, str], ...] = ()


class TableSnapshot:
    """One version of a table: its files, and their rows on demand."""

    def __init__(self, uri: str, schema: pa.Schema, table: DeltaTable) -> None:
        """Pin the version that `table` is at."""
        self.uri = uri
        self.schema = schema
        self.version: int = table.version()
        actions = pa.table(table.get_add_actions(flatten=True)).to_pydict()
        partitions = [name.removeprefix("partition.") for name in actions if name.startswith("partition.")]
        self.files: tuple[DataFile, ...] = tuple(
            sorted(
                (
                    DataFile(path, rows or 0, size, tuple((p, actions[f"partition.{p}"][row]) for p in partitions))
                    for row, (path, rows, size) in enumerate(
                        zip(actions["path"], actions["num_records"], actions["size_bytes"], strict=True)
                    )
                ),
                key=lambda file: file.path,
            )
        )

    def location(self, file: DataFile) -> str:
        """Where one of the files lies."""
        return join(self.uri, file.path)

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows (unpartitioned tables), in no particular order."""
        names = list(columns) if columns is not None else self.schema.names
        schema = pa.schema([self.schema.field(name) for name in names])
        parts = []
        for file in self.files:
            filesystem, path = resolve(self.location(file))
            parts.append(pq.read_table(path, columns=names, filesystem=filesystem, partitioning=None).cast(schema))
        return pa.concat_tables(parts) if parts else schema.empty_table()


class VersionedTable:
    """A handle on one table. Cheap to make; every read looks for the newest version unless told otherwise."""

    def __init__(self, uri: str, schema: pa.Schema, partition_by: str | None = None) -> None:
        """Open the table at `uri`, or create it empty."""
        self.uri = uri
        self.schema = schema
        self._partition_by = [partition_by] if partition_by else []
        self._delta_schema = Schema.from_arrow(schema)
        try:
            self._table = DeltaTable(uri)
        except TableNotFoundError:
            self._table = self._create()
        found = self._table.metadata().configuration.get(_FORMAT_KEY)
        if found != FORMAT_VERSION:
            raise UnknownFormatError(
                f"opening the table: expected format version {FORMAT_VERSION}, found {found} ({uri}); "
                "upgrade graceful to the version that wrote it"
            )

    def snapshot(self, version: int | None = None) -> TableSnapshot:
        """Pin the newest version, or the named one."""
        if version is not None and version != self._table.version():
            self._table.update_incremental()
            if version != self._table.version():
                return TableSnapshot(self.uri, self.schema, DeltaTable(self.uri, version=version))
            return TableSnapshot(self.uri, self.schema, self._table)
        if version is None:
            self._table.update_incremental()
        return TableSnapshot(self.uri, self.schema, self._table)

    def version(self) -> int:
        """Number of the newest version."""
        self._table.update_incremental()
        return int(self._table.version())

    def committed(self, unit: str) -> bool:
        """Tell whether a unit of work has committed."""
        self._table.update_incremental()
        return self._table.transaction_version(unit) is not None

    def append(self, rows: pa.Table, *, unit: str | None = None, expected_version: int | None = None) -> bool:
        """Append rows in one commit; False when `unit` had committed before (nothing is written then).

        With `expected_version` the commit is serial: it is refused if any serial commit followed that version.

        Raises:
            TableConflictError: another serial writer, or the same unit, committed at the same moment.
        """
        if unit is not None and self.committed(unit):
            return False
        path = f"{uuid.uuid4().hex}.parquet"
        filesystem, target = resolve(join(self.uri, path))
        pq.write_table(rows.cast(self.schema), target, filesystem=filesystem)
        crash_point("table-file-written")
        file = DataFile(path, rows.num_rows, size_bytes(join(self.uri, path)))
        return self.commit_files([file], unit=unit, expected_version=expected_version)

    def commit_files(
        self, files: Sequence[DataFile], *, unit: str | None = None, expected_version: int | None = None
    ) -> bool:
        """Register Parquet files that lie below the table in one commit; False when `unit` had committed before.

        Raises:
            TableConflictError: another serial writer, or the same unit, committed at the same moment.
        """
        table = DeltaTable(self.uri, version=expected_version)
        if unit is not None:
            self._table.update_incremental()
            if self._table.transaction_version(unit) is not None:
                return False
        transactions = [Transaction(unit, 1)] if unit is not None else []
        if expected_version is not None:
            transactions.append(Transaction(_SERIAL, expected_version + 1))
        actions: list[AddAction | RemoveAction] = [self._add_action(file) for file in files]
        try:
            table.create_write_transaction(
                actions,
                mode="append",
                schema=self._delta_schema,
                partition_by=self._partition_by,
                commit_properties=CommitProperties(app_transactions=transactions),
            )
        except CommitFailedError as error:
            raise TableConflictError(
                f"committing to {self.uri}: expected version {expected_version or table.version()}, found a newer "
                "one (another writer finished first); read again and retry"
            ) from error
        crash_point("table-committed")
        return True

    def drop_partition(self, value: str) -> int:
        """Remove all rows of one partition from the newest version; returns the number of files dropped."""
        self._table.update_incremental()
        return int(self._table.delete(f"{self._partition_by[0]} = '{value}'")["num_removed_files"])

    def delete_rows(self, column: str, values: Sequence[str]) -> None:
        """Rewrite the files that hold any of the values without those rows. The log does not name the values.

        Raises:
            TableConflictError: other processes kept rewriting the same files.
        """
        for _ in range(_REWRITE_ATTEMPTS):
            snapshot = self.snapshot()
            replaced, written = [], []
            for file in snapshot.files:
                rows = _read_whole(snapshot.location(file))
                kept = rows.filter(pc.invert(pc.is_in(rows[column], value_set=pa.array(values, pa.string()))))
                if kept.num_rows < rows.num_rows:
                    replaced.append(file)
                    if kept.num_rows:
                        written.append(self._write_rows(kept.schema, [kept], file.partition))
            if not replaced or self._replace(snapshot, replaced, written, data_change=True):
                return
        raise TableConflictError(f"deleting rows of {self.uri}: others rewrote it {_REWRITE_ATTEMPTS} times; try again")

    def vacuum(self, keep_versions: Sequence[int] = ()) -> list[str]:
        """Delete the files that neither the newest version nor a kept one names; files never committed stay."""
        self._table.update_incremental()
        return list(
            self._table.vacuum(
                retention_hours=0, dry_run=False, enforce_retention_duration=False, keep_versions=list(keep_versions)
            )
        )

    def compact(self) -> bool:
        """Merge many small files into few; the older versions stay readable. True when this merged some.

        Of two at the same time one does nothing. deltalake's own `optimize.compact` is not used: two of them at once
        both succeed and double the rows, and it makes views of the fixed-size binary column.
        """
        snapshot = self.snapshot()
        if len(snapshot.files) < _COMPACT_AFTER_FILES:
            return False
        written = []
        for partition in sorted({file.partition for file in snapshot.files}):
            files = [file for file in snapshot.files if file.partition == partition]
            tables = (_read_whole(snapshot.location(file)) for file in files)
            written.append(self._write_rows(_stored_schema(snapshot.location(files[0])), tables, partition))
        return self._replace(snapshot, snapshot.files, written, data_change=False)

    def _write_rows(
        self, schema: pa.Schema, tables: Iterable[pa.Table], partition: tuple[tuple[str, str], ...]
    ) -> DataFile:
        """Write tables one after the other into one new file that no version names yet."""
        path = "/".join([*(f"{name}={value}" for name, value in partition), f"{uuid.uuid4().hex}.parquet"])
        filesystem, target = resolve(join(self.uri, path))
        num_rows = 0
        with pq.ParquetWriter(
            target, schema, filesystem=filesystem, use_dictionary=False, compression="none"
        ) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=_ROW_GROUP_ROWS)
                num_rows += table.num_rows
        return DataFile(path, num_rows, size_bytes(join(self.uri, path)), partition)

    def _replace(
        self, snapshot: TableSnapshot, files: Sequence[DataFile], written: Sequence[DataFile], *, data_change: bool
    ) -> bool:
        """Replace files of a version by new ones in one commit; False when another rewrite came first."""
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            RemoveAction(file.path, data_change, now, file.size_bytes, dict(file.partition)) for file in files
        ]
        actions += [self._add_action(file, data_change) for file in written]
        try:
            DeltaTable(self.uri, version=snapshot.version).create_write_transaction(
                actions,
                mode="append",
                schema=self._delta_schema,
                partition_by=self._partition_by,
                commit_properties=CommitProperties(app_transactions=[Transaction(_REWRITE, snapshot.version + 1)]),
            )
        except CommitFailedError:
            return False
        return True

    def _add_action(self, file: DataFile, data_change: bool = True) -> AddAction:
        statistics = json.dumps({"numRecords": file.num_rows})
        partition: Mapping[str, str | None] = dict(file.partition)
        return AddAction(file.path, file.size_bytes, partition, int(time.time() * 1000), data_change, statistics)

    def _create(self) -> DeltaTable:
        try:
            return DeltaTable.create(
                self.uri,
                schema=self._delta_schema,
                partition_by=self._partition_by or None,
                mode="ignore",
                configuration={**_CONFIGURATION, _FORMAT_KEY: FORMAT_VERSION},
                raise_if_key_not_exists=False,
            )
        except CommitFailedError:  # two creators at once: the other one won
            return DeltaTable(self.uri)


def _read_whole(location: str) -> pa.Table:
    filesystem, path = resolve(location)
    return pq.read_table(path, filesystem=filesystem, partitioning=None)


def _stored_schema(location: str) -> pa.Schema:
    filesystem, path = resolve(location)
    return pq.read_schema(path, filesystem=filesystem)
