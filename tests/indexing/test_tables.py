"""Versioned tables: real Delta logs, two real handles, several real processes."""

import json
import multiprocessing
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graceful.errors import UnknownFormatError
from graceful.files import join, set_crash_hook
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.tables import MERGE_FILES, TableConflictError, VersionedTable

SCHEMA = pa.schema([("name", pa.string()), ("number", pa.int64())])
BY_GENERATION = pa.schema([("name", pa.string()), ("generation", pa.string())])


def rows(*numbers, name="row"):
    return pa.table({"name": [f"{name}-{number}" for number in numbers], "number": list(numbers)}, schema=SCHEMA)


def numbers(table, version=None):
    return sorted(table.snapshot(version).rows(["number"])["number"].to_pylist())


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "table")


def test_appended_rows_are_read_by_another_handle(uri):
    first, second = VersionedTable(uri, SCHEMA, create=True), VersionedTable(uri, SCHEMA)
    assert first.append(rows(1, 2))
    assert numbers(second) == [1, 2]
    assert second.append(rows(3))
    assert numbers(first) == [1, 2, 3]
    assert first.snapshot().rows().schema == SCHEMA


def test_every_past_version_stays_readable(uri):
    table = VersionedTable(uri, SCHEMA, create=True)
    versions = {table.version(): []}
    for number in range(25):  # past two checkpoints of the log
        table.append(rows(number))
        versions[table.version()] = list(range(number + 1))
    table.compact()
    reopened = VersionedTable(uri, SCHEMA)
    for version, expected in versions.items():
        assert numbers(reopened, version) == expected


def test_unit_commits_once_however_often_it_is_tried(uri):
    first, second = VersionedTable(uri, SCHEMA, create=True), VersionedTable(uri, SCHEMA)
    assert not first.committed("wave-1")
    assert first.append(rows(1), unit="wave-1") is True
    assert second.committed("wave-1")
    assert second.append(rows(1), unit="wave-1") is False
    assert first.append(rows(1), unit="wave-1") is False
    assert numbers(first) == [1]


def test_unit_survives_checkpoints_and_compaction_of_the_log(uri):
    table = VersionedTable(uri, SCHEMA, create=True)
    table.append(rows(1), unit="early")
    for number in range(2, 70):
        table.append(rows(number), unit=f"unit-{number}")
    assert table.compact()
    assert VersionedTable(uri, SCHEMA).append(rows(1), unit="early") is False
    assert numbers(table) == list(range(1, 70))


def test_serial_writer_that_did_not_see_the_newest_commit_is_refused(uri):
    first, second = VersionedTable(uri, SCHEMA, create=True), VersionedTable(uri, SCHEMA)
    version = first.version()
    assert second.version() == version
    assert first.append(rows(1), expected_version=version)
    with pytest.raises(TableConflictError, match=r"another writer finished first\); read again and retry"):
        second.append(rows(2), expected_version=version)
    assert numbers(second) == [1]
    assert second.append(rows(2), expected_version=second.version())
    assert numbers(first) == [1, 2]


def test_serial_writer_is_not_refused_because_of_a_compaction(uri):
    """Compacting changes no row: whoever read the table before it may still write."""
    table = VersionedTable(uri, SCHEMA, create=True)
    for number in range(MERGE_FILES):
        table.append(rows(number), expected_version=table.version())
    reader = VersionedTable(uri, SCHEMA)
    version = reader.version()
    assert table.compact()
    assert reader.append(rows(1000), expected_version=version)
    assert len(numbers(table)) == MERGE_FILES + 1


def test_compaction_keeps_the_rows_merges_the_files_and_waits_until_it_pays(uri):
    table = VersionedTable(uri, SCHEMA, create=True)
    for number in range(MERGE_FILES - 1):
        table.append(rows(number))
    assert not table.compact()
    table.append(rows(1000))
    before = numbers(table)
    assert table.compact()
    assert len(table.snapshot().files) == 1
    assert numbers(table) == before
    assert not table.compact()


def test_two_compactions_at_once_keep_the_rows_and_raise_nothing(uri, monkeypatch):
    """Both handles see the same small files; the slower one finds them merged already."""
    first, second = VersionedTable(uri, SCHEMA, create=True), VersionedTable(uri, SCHEMA)
    for number in range(MERGE_FILES):
        first.append(rows(number))
    both_have_looked = threading.Barrier(2)
    look = VersionedTable.snapshot

    def look_and_wait(self, version=None):
        found = look(self, version)
        both_have_looked.wait(20)
        return found

    monkeypatch.setattr(VersionedTable, "snapshot", look_and_wait)
    outcomes = []

    def compact(table):
        try:
            outcomes.append(table.compact())
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=compact, args=(table,)) for table in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    monkeypatch.undo()
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
    assert True in outcomes
    assert numbers(VersionedTable(uri, SCHEMA)) == list(range(MERGE_FILES))


def test_vacuum_spares_kept_versions_and_files_of_workers(uri):
    table = VersionedTable(uri, SCHEMA, create=True)
    for number in range(3):
        table.append(rows(number))
    pinned = table.version()
    staged = join(uri, "_staging", "unit.parquet")
    os.makedirs(os.path.dirname(staged))
    pq.write_table(rows(9), staged)
    table.delete_rows("name", ["row-1"])
    assert numbers(table) == [0, 2]
    table.vacuum([pinned])
    assert numbers(table, pinned) == [0, 1, 2]
    table.vacuum()
    assert numbers(table) == [0, 2]
    with pytest.raises(DamagedFileError, match="expected a file, found none"):
        numbers(table, pinned)
    assert os.path.exists(staged)
    table.vacuum(orphan_age_s=0)
    assert not os.path.exists(staged)
    assert numbers(table) == [0, 2]


def test_quotes_in_a_value_do_not_change_what_is_deleted(uri):
    table = VersionedTable(uri, SCHEMA, create=True)
    odd = "it's' OR name IN ('row-1"
    table.append(pa.table({"name": [odd, "row-1", "row-2"], "number": [0, 1, 2]}, schema=SCHEMA))
    table.delete_rows("name", [odd])
    assert numbers(table) == [1, 2]


def test_table_of_an_unknown_format_is_refused(uri):
    VersionedTable(uri, SCHEMA, create=True)
    log = os.path.join(uri, "_delta_log", f"{0:020d}.json")
    with open(log) as stream:
        lines = [json.loads(line) for line in stream]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["configuration"]["graceful.format_version"] = "99"
    with open(log, "w") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(UnknownFormatError, match=r"expected format version 2, found 99 .*use the version of"):
        VersionedTable(uri, SCHEMA)


@pytest.mark.parametrize("point", ["table-file-written", "table-committed"])
def test_crash_around_a_commit_leaves_all_of_it_or_nothing(uri, point):
    class CrashError(Exception):
        pass

    def crash(name):
        if name == point:
            raise CrashError

    table = VersionedTable(uri, SCHEMA, create=True)
    set_crash_hook(crash)
    try:
        with pytest.raises(CrashError):
            table.append(rows(1, 2), unit="unit")
    finally:
        set_crash_hook(None)
    reopened = VersionedTable(uri, SCHEMA)
    assert numbers(reopened) == ([] if point == "table-file-written" else [1, 2])
    reopened.append(rows(1, 2), unit="unit")
    assert numbers(reopened) == [1, 2]


def create_and_append(uri, worker, start):
    start.wait(60)
    table = VersionedTable(uri, SCHEMA, create=True)
    for step in range(5):
        for _ in range(50):
            try:
                table.append(rows(step, name="shared"), unit=f"unit-{step}")
                break
            except TableConflictError:
                continue
    for _ in range(200):
        version = table.version()
        count = len([n for n in numbers(table, version) if n >= 100])
        try:
            table.append(rows(100 + count, name=f"worker-{worker}"), expected_version=version)
            break
        except TableConflictError:
            continue


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_units_of_four_processes_commit_once_and_serial_writes_never_overwrite(uri):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.indexing.test_tables"])
    start = context.Event()
    processes = [context.Process(target=create_and_append, args=(uri, worker, start)) for worker in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    table = VersionedTable(uri, SCHEMA, create=True)
    assert numbers(table) == [0, 1, 2, 3, 4, 100, 101, 102, 103]
