"""Faults in real files: each is found, by an error that names the file and the remedy, or changes no answer."""

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from graceful.errors import GracefulError, is_disk_full
from graceful.files import list_files, set_crash_hook
from graceful.indexing import checked_files
from graceful.indexing.checked_files import SMALL_BYTES, CheckedFile, DamagedFileError, write_checked
from graceful.indexing.doctor import examine_gallery
from graceful.indexing.embed import embed_units
from graceful.indexing.gallery import Gallery
from graceful.indexing.maintenance import collect, forget, survey
from graceful.indexing.reindex import carry_out, embed_missing
from graceful.indexing.tables import DamagedLogError, MissingTableError
from tests.synthetic import SyntheticGeneration, item_row, open_synthetic

G1, G2 = "g001-aaaaaa", "g002-bbbbbb"
READABLE = [[G1], [G1, G2]]


def batch(*numbers, image="a"):
    return pa.Table.from_pylist([item_row(f"item-{number}", f"id{number}", image) for number in numbers])


def embedder(generation):
    def work(units, on_unit):
        embed_units(units, functools.partial(open_synthetic, SyntheticGeneration(generation)), on_unit=on_unit)

    return work


def embed(gallery, generation, **options):
    return embed_missing(gallery, generation, embedder(generation), **options)


def revision(gallery, *item_ids):
    return gallery.items.find(list(item_ids))["revision"].to_numpy()


@pytest.fixture
def gallery(tmp_path):
    """Three items with vectors of g1, one of them of g2 too."""
    opened = Gallery(str(tmp_path / "gallery"), create=True)
    opened.ingest(batch(1, 2, 3))
    embed(opened, G1)
    embed(opened, G2, revisions=revision(opened, "item-1"))
    return opened


def as_a_new_process(gallery):
    """What a process that has just started knows of a gallery's files: nothing."""
    checked_files._verified.clear()
    gallery.forget_cached()
    gallery.items._live = None


def answers(gallery):
    """Everything that anybody can ask."""
    as_a_new_process(gallery)
    view = gallery.view([G1, G2])
    readable = np.flatnonzero(view.owner >= 0)
    return (
        view.items(["item_id", "source", "label", "content_sha256", "attributes"]).to_pylist(),
        gallery.items.find(["item-1", "item-2", "item-3"]).to_pylist(),
        gallery.items.with_sources(["synthetic:id1/a"]).to_pylist(),
        view.owner.tolist(),
        view.vectors(readable).tobytes(),
    )


def file_of(table):
    return Path(table.uri, table.snapshot().files[0].path)


def what_is_said(act):
    """The answer, or the error."""
    try:
        return act()
    except (OSError, GracefulError) as error:
        return error


def write(location, wanted):
    Gallery(location).ingest(wanted)
    embed(Gallery(location), G1)


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["items_table", "vectors_table"])
def test_one_flipped_byte_anywhere_is_found_or_changes_nothing(gallery, name):
    path, right = file_of(getattr(gallery, name)), answers(gallery)
    content, num_found = path.read_bytes(), 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= (1, 0x12, 0xFF)[place % 3]
        path.write_bytes(flipped)
        said = what_is_said(lambda: answers(gallery))
        if isinstance(said, DamagedFileError):
            num_found += 1
            assert str(path) in str(said)
            assert "restore it from a backup" in str(said)
        else:
            assert said == right, f"byte {place}"
    assert num_found > 0.9 * len(content)
    path.write_bytes(content)
    assert answers(gallery) == right


def test_flipped_byte_in_how_a_page_of_a_large_file_is_coded_is_found(tmp_path):
    """A page's header has no checksum: it could make other numbers, or nulls, of the same bytes."""
    rows = 9_000
    table = pa.table({"revision": np.arange(rows), "label": ["x" * 120] * rows})
    path = tmp_path / write_checked(str(tmp_path), table, key="revision").name
    content = path.read_bytes()
    assert len(content) > SMALL_BYTES
    metadata = CheckedFile(str(path))._file.metadata.row_group(0)
    wrong = []
    for column in range(2):
        first = metadata.column(column).data_page_offset
        for place in range(first, first + 30):
            for mask in (1, 2, 4, 6, 8, 0x0E, 0x12):
                flipped = bytearray(content)
                flipped[place] ^= mask
                path.write_bytes(flipped)
                checked_files._verified.clear()
                try:
                    found = CheckedFile(str(path)).read()
                except DamagedFileError:
                    continue
                if not checked_files.nullable(found).equals(table):
                    wrong.append((column, place - first, mask))
    assert wrong == []


@pytest.mark.parametrize("name", ["items_table", "vectors_table"])
@pytest.mark.parametrize("fault", ["torn", "emptied", "removed", "lengthened"])
def test_torn_file_is_named(gallery, name, fault):
    path = file_of(getattr(gallery, name))
    content = path.read_bytes()
    kept = {"torn": content[:-100], "emptied": b"", "lengthened": content + b"x"}
    if fault == "removed":
        path.unlink()
    else:
        path.write_bytes(kept[fault])
    with pytest.raises(DamagedFileError, match=f"{path.name}.*restore it from a backup"):
        answers(Gallery(gallery.location))
    found = [one for one in examine_gallery(gallery.location, protected=READABLE) if one.severity == "error"]
    assert [one for one in found if path.name in " ".join(one.examples)]


# The log --------------------------------------------------------------------------------------------------------------


def log_of(table):
    return Path(table.uri, "_delta_log")


@pytest.mark.parametrize("fault", ["torn", "emptied", "removed", "flipped"])
@pytest.mark.parametrize("name", ["items_table", "vectors_table"])
def test_damaged_newest_entry_of_the_log_is_noticed_in_one_line(gallery, name, fault):
    newest = max(log_of(getattr(gallery, name)).glob("*.json"))
    content = newest.read_bytes()
    if fault == "removed":
        newest.unlink()
    elif fault == "flipped":
        newest.write_bytes(content.replace(b'"numRecords', b'"numRecorda').replace(b"numRecords", b"numRecorda"))
    else:
        newest.write_bytes(content[:60] if fault == "torn" else b"")
    with pytest.raises(DamagedLogError) as raised:
        Gallery(gallery.location)
    line = str(raised.value)
    assert "_delta_log from a backup" in line
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 600
    assert any(one.severity == "error" for one in examine_gallery(gallery.location))


@pytest.mark.parametrize("fault", ["torn", "removed"])
def test_damaged_checkpoint_is_found_and_is_derived(tmp_path, fault):
    opened = Gallery(str(tmp_path / "gallery"), create=True)
    for number in range(25):
        opened.ingest(batch(number))
    checkpoint = next(log_of(opened.items_table).glob("*.checkpoint.parquet"))
    if fault == "torn":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    else:
        checkpoint.unlink()
    with pytest.raises(DamagedLogError, match="or see 'graceful doctor'"):
        Gallery(opened.location)
    found = [one for one in examine_gallery(opened.location) if one.severity == "error"]
    assert [one.repair for one in found] == ["checkpoints"]
    for path in log_of(opened.items_table).iterdir():
        if "checkpoint" in path.name:
            path.unlink()
    assert Gallery(opened.location).view([]).num_items == 25


@pytest.mark.parametrize("name", ["items", "vectors"])
@pytest.mark.parametrize("what", ["", "_delta_log"])
def test_folder_that_is_gone_is_never_an_empty_gallery(gallery, name, what):
    gone = Path(gallery.location, name, what)
    shutil.rmtree(gone)
    for create in (False, True):
        with pytest.raises(MissingTableError, match=f"expected one at .*{name}, found none; restore it"):
            Gallery(gallery.location, create=create)
    assert not gone.exists()
    found = [one for one in examine_gallery(gallery.location, protected=READABLE) if one.severity == "error"]
    assert [one.repair for one in found] == [{"items": "", "vectors": "create vectors"}[name]]


# The doctor -----------------------------------------------------------------------------------------------------------


def severities(gallery, **options):
    return [(one.severity, one.count) for one in examine_gallery(gallery.location, protected=READABLE, **options)]


def test_healthy_gallery_has_no_errors_and_looking_changes_nothing(gallery):
    before = {file: Path(file).read_bytes() for file in list_files(gallery.location)}
    assert severities(gallery, known=[G1, G2], deep=True) == []
    assert {file: Path(file).read_bytes() for file in list_files(gallery.location)} == before


def test_doctor_finds_vectors_that_are_stored_twice_and_those_of_lost_images(gallery):
    table = gallery.vectors_table
    rows = table.snapshot().files[0]
    opened = CheckedFile(table.snapshot().location(rows)).read()
    table.commit([table.write(opened, partition=rows.partition)])
    lost = opened.set_column(0, "revision", pa.array(opened["revision"].to_numpy() + 5))
    table.commit([table.write(lost, partition=rows.partition)])
    said = " ".join(one.what for one in examine_gallery(gallery.location, protected=READABLE))
    assert "rows are stored twice" in said
    assert "belong to images that were lost" in said


def test_doctor_finds_bad_norms_unknown_generations_and_dead_rows(gallery):
    gallery.ingest(batch(2, image="b"))
    table = gallery.vectors_table
    bad = np.full((1, 24), 0.5, np.float32)
    column = pa.array([bad[0].tobytes()], pa.binary(96))
    rows = pa.table({"revision": revision(gallery, "item-3"), "embedding": column})
    table.commit([table.write(rows, partition="g009-ffffff")])
    found = examine_gallery(gallery.location, protected=READABLE, known=[G1, G2], deep=True)
    said = " ".join(one.what for one in found)
    assert "1 vectors of g009-ffffff, which the registry does not know" in said
    assert "1 vectors are not finite or not of norm 1" in said
    assert "1 vectors that nobody reads" in said
    assert "which nobody may read" in " ".join(
        one.what for one in examine_gallery(gallery.location, protected=READABLE)
    )


def test_doctor_finds_orphans_and_staged_files_by_age(gallery):
    table = gallery.items_table
    table.write(CheckedFile(table.snapshot().location(table.snapshot().files[0])).read())
    staged = Path(gallery.staging_file(G1, "unit"))
    staged.parent.mkdir(parents=True, exist_ok=True)
    staged.write_bytes(b"x")
    assert severities(gallery) == [("note", 1), ("note", 1)]
    assert severities(gallery, orphan_age_s=0) == [("warning", 1), ("warning", 1)]
    collect(gallery, lambda: READABLE, orphan_age_s=0)
    assert severities(gallery, orphan_age_s=0) == []


def test_doctor_tells_open_leases_from_those_that_ran_out(gallery):
    with gallery.lease():
        lease = next(Path(gallery.location, "leases").glob("*.json"))
        lease.with_name("over.json").write_text(json.dumps({**json.loads(lease.read_text()), "expires_at": 1.0}))
        said = [one.what for one in examine_gallery(gallery.location)]
    assert any("1 open leases" in line for line in said)
    assert any("1 leases of readers that ended without a word" in line for line in said)


def test_survey_says_what_a_collection_will_do(gallery):
    gallery.ingest(batch(2, image="b"))
    embed(gallery, G1)
    gallery.delete(["item-3"])
    files = list_files(gallery.location)
    expected = survey(gallery, READABLE)
    assert list_files(gallery.location) == files
    found = collect(gallery, lambda: READABLE)
    assert (found.generations, found.rows) == (expected.generations, expected.rows)
    assert found.rows == 2
    assert found.size_bytes > 0


# Machines -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_is_one_clear_error_and_the_same_call_ends_right_afterwards(small_disk):
    opened = Gallery(str(small_disk / "gallery"), create=True)
    opened.ingest(batch(*range(10)))
    filler, refused = small_disk / "filler", 0
    for step, keep in enumerate(range(0, 32_768, 4_096)):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(b"x" * max(0, free - keep))
        wanted = batch(*range(100 + 20 * step, 120 + 20 * step))
        for _ in range(3):
            said = what_is_said(lambda wanted=wanted: write(opened.location, wanted))
            if isinstance(said, Exception):
                refused += 1
                assert is_disk_full(said)
                assert not isinstance(said, GracefulError) or "disk full: free space and run again" in str(said)
        filler.unlink()
        reopened = Gallery(opened.location)
        reopened.ingest(wanted)
        embed(reopened, G1)
        assert reopened.view([G1]).rows_by_generation() == {G1: 10 + 20 * (step + 1)}
    assert refused > 8
    assert not [one for one in examine_gallery(opened.location, deep=True) if one.severity == "error"]


# Forgotten ------------------------------------------------------------------------------------------------------------

SECRET, SECRET_ID, SECRET_PERSON = "item-77", b"item-77", b"id77"
POINTS = (
    "table-file-written", "table-committed", "vectors-before-commit", "vectors-after-commit", "wave-done",
    "rewrite-before-commit", "rewrite-after-commit", "merge-before-commit", "collect-before-leases",
    "collect-after-leases",
)  # fmt: skip


def life(location, step=None):
    """Everything that can happen to an item, step by step; each may be tried again."""

    def act(name, work):
        if step is None or step == name:
            work(Gallery(location))

    def waves(gallery):
        live = gallery.view([]).revisions
        plan = pa.table({"wave": [1] * len(live), "position": range(len(live)), "revision": live})
        carry_out(gallery, G2, plan, embedder(G2), unit_rows=4)

    act("ingest", lambda gallery: [gallery.ingest(batch(number)) for number in (1, 2, 3, 77, 4, 5, 6, 7)])
    act("embed", lambda gallery: embed(gallery, G1, unit_rows=1))
    act("change", lambda gallery: gallery.ingest(batch(77, 1, image="b")))
    act("again", lambda gallery: embed(gallery, G1, unit_rows=1))
    act("waves", waves)
    act("merge", lambda gallery: gallery.merge_small_files())
    act("collect", lambda gallery: collect(gallery, lambda: [[G1, G2]]))
    act("delete", lambda gallery: gallery.delete([SECRET]))
    act("forget", lambda gallery: forget(gallery, [SECRET]))


def traces(root):
    """What must be nowhere: id, source, hash, and the vectors of both images by both generations."""
    rows = [item_row(SECRET, "id77", image) for image in "ab"]
    texts = [SECRET_ID, *[row["source"].encode() for row in rows], *[row["content_sha256"].encode() for row in rows]]
    vectors = [
        SyntheticGeneration(name).encode([row["source"]])[0].astype("<f4").tobytes()[:40]
        for row in rows
        for name in (G1, G2)
    ]
    found = []
    for file in list_files(root):
        content = Path(file).read_bytes()
        found += [(file, number) for number, text in enumerate([*texts, *vectors]) if text in content]
    return found


class KilledError(BaseException):
    pass


def hits_of(tmp_path):
    """Every crash point of a life, as (name, which time)."""
    seen: list[tuple[str, int]] = []
    counts: dict[str, int] = {}

    def note(name):
        counts[name] = counts.get(name, 0) + 1
        seen.append((name, counts[name]))

    set_crash_hook(note)
    try:
        Gallery(str(tmp_path / "counted"), create=True)
        life(str(tmp_path / "counted"))
    finally:
        set_crash_hook(None)
    return seen


def test_forgotten_is_forgotten_wherever_it_was_killed(tmp_path):
    hits = hits_of(tmp_path)
    assert {name for name, _ in hits} == set(POINTS)
    # Every point the first and the last time, and every time in forget, delete and collect: what comes late.
    last = dict(hits)
    wanted = [hit for hit in hits if hit[1] in (1, last[hit[0]])] + hits[-8:]
    for name, number in dict.fromkeys(wanted):
        location, left = str(tmp_path / f"{name}-{number}"), [number]

        def kill(point, name=name, left=left):
            if point == name:
                left[0] -= 1
                if left[0] == 0:
                    raise KilledError

        Gallery(location, create=True)
        set_crash_hook(kill)
        try:
            with pytest.raises(KilledError):
                life(location)
        finally:
            set_crash_hook(None)
        life(location)
        opened = Gallery(location)
        collect(opened, lambda: [[G1, G2]], orphan_age_s=0)
        assert traces(location) == [], (name, number)
        assert opened.view([G1, G2]).num_items == 7
        shutil.rmtree(location)


def test_trace_is_found_where_there_is_one(tmp_path):
    location = str(tmp_path / "gallery")
    Gallery(location, create=True)
    for step in ("ingest", "embed"):
        life(location, step)
    assert {number for _, number in traces(location)} == {0, 1, 3, 5, 6}, "the two encoders are alike"


# Writers --------------------------------------------------------------------------------------------------------------


def ingest_one_by_one(location, writer, num, start):
    start.wait(60)
    opened = Gallery(location)
    for number in range(num):
        opened.ingest(batch(10_000 + 1_000 * writer + number))
        embed(opened, G1, revisions=revision(opened, f"item-{10_000 + 1_000 * writer + number}"))


def ingest_together(location, first, num, start):
    start.wait(60)
    Gallery(location).ingest(batch(*range(first, first + num)))


@pytest.fixture
def run_together():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.indexing.test_faults"])
    started = []

    def run(*calls):
        start = context.Event()
        processes = [context.Process(target=call[0], args=(*call[1:], start)) for call in calls]
        started.extend(processes)
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join(100)
        return [process.exitcode for process in processes]

    yield run
    for process in started:
        if process.is_alive():
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_six_writers_of_single_photos_end_well(tmp_path, run_together):
    location = str(tmp_path / "gallery")
    opened = Gallery(location, create=True)
    opened.ingest(batch(*range(200)))
    embed(opened, G1)
    started = time.monotonic()
    assert run_together(*[(ingest_one_by_one, location, writer, 25) for writer in range(6)]) == [0] * 6
    print(f"150 ingests by 6 processes: {time.monotonic() - started:.1f} s")
    opened = Gallery(location)
    view = opened.view([G1])
    assert view.rows_by_generation() == {G1: 350}
    assert opened.generations() == {G1: 350}, "no vector is lost, none is stored twice"
    assert len(set(view.item_ids)) == 350
    collect(opened, lambda: [[G1]], orphan_age_s=0)
    assert not opened.items_table.orphans(older_than_s=0)
    assert not opened.vectors_table.orphans(older_than_s=0)
    assert severities(opened, orphan_age_s=0) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_large_batch_ends_beside_a_stream_of_single_photos(tmp_path, run_together):
    location = str(tmp_path / "gallery")
    Gallery(location, create=True)
    started = time.monotonic()
    codes = run_together(
        (ingest_together, location, 100_000, 3_000),
        *[(ingest_one_by_one, location, writer, 15) for writer in range(2)],
    )
    print(f"3,000 items beside 30 single ones: {time.monotonic() - started:.1f} s")
    assert codes == [0] * 3
    assert Gallery(location).view([G1]).num_items == 3_030


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_that_write_the_same_items_store_them_once(tmp_path, run_together):
    location = str(tmp_path / "gallery")
    Gallery(location, create=True)
    assert run_together(*[(ingest_together, location, 0, 200)] * 2) == [0, 0]
    opened = Gallery(location)
    assert opened.view([G1]).num_items == 200
    rows = opened.items_table.snapshot().rows(["revision"])["revision"].to_pylist()
    assert len(rows) == len(set(rows)) == 200
