"""Collecting what nobody can read, forgetting what must be gone: nothing else goes, and what goes is gone."""

import functools
import time

import numpy as np
import pyarrow as pa
import pytest

from graceful.files import list_files, set_crash_hook
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.embed import embed_units
from graceful.indexing.gallery import Gallery
from graceful.indexing.maintenance import Collection, LeasedError, collect, forget
from graceful.indexing.reindex import embed_missing
from graceful.indexing.tables import MERGE_FILES
from tests.synthetic import SyntheticGeneration, item_row, open_synthetic

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"


def batch(*numbers, image="a"):
    return pa.Table.from_pylist([item_row(f"item-{number}", f"id{number}", image) for number in numbers])


def revision(gallery, *item_ids):
    return gallery.items.find(list(item_ids))["revision"].to_numpy()


def embed(gallery, generation, *item_ids):
    def work(units, on_unit):
        embed_units(units, functools.partial(open_synthetic, SyntheticGeneration(generation)), on_unit=on_unit)

    revisions = revision(gallery, *item_ids) if item_ids else None
    return embed_missing(gallery, generation, work, revisions=revisions, unit_rows=2)


@pytest.fixture
def gallery(tmp_path):
    """Four items with vectors of g1, one of them of g2 too."""
    opened = Gallery(str(tmp_path / "gallery"), create=True)
    opened.ingest(batch(1, 2, 3, 4))
    embed(opened, G1)
    embed(opened, G2, "item-1")
    return opened


def owners(gallery, *readable):
    view = Gallery(gallery.location).view(readable)
    return {
        item: view.readable[code] if code >= 0 else None for item, code in zip(view.item_ids, view.owner, strict=True)
    }


def bytes_of(gallery):
    from graceful.files import read_bytes

    return b"".join(read_bytes(file) for file in list_files(gallery.location) if file.endswith(".parquet"))


def test_generation_that_owns_no_row_of_any_protected_view_is_dropped(gallery):
    embed(gallery, G3)
    found = collect(gallery, lambda: [[G1, G2]])
    assert found.generations == (G3,)
    assert found.files >= 2
    assert owners(gallery, G1, G2) == {"item-1": G2, "item-2": G1, "item-3": G1, "item-4": G1}
    assert gallery.generations() == {G1: 3, G2: 1}, "the row of g1 that g2 supersedes went as well"
    assert found.rows == 5


def test_single_row_keeps_its_generation(gallery):
    before = owners(gallery, G1, G2)
    assert collect(gallery, lambda: [[G1, G2]]).generations == ()
    assert owners(gallery, G1, G2) == before


def test_every_protected_query_generation_keeps_what_it_sees(gallery):
    embed(gallery, G2)
    embed(gallery, G3)
    before = {readable: owners(gallery, *readable) for readable in ((G1,), (G2, G3))}
    assert collect(gallery, lambda: [[G1], [G2, G3]]).generations == (G2,)
    assert {readable: owners(gallery, *readable) for readable in before} == before


def test_rows_of_replaced_images_and_deleted_items_are_dropped_one_by_one(gallery):
    gallery.ingest(batch(1, image="b"))
    embed(gallery, G1)
    gallery.delete(["item-4"])
    before = owners(gallery, G1, G2)
    assert before == {"item-1": G1, "item-2": G1, "item-3": G1}
    assert collect(gallery, lambda: [[G1, G2]]).rows == 3
    assert owners(gallery, G1, G2) == before
    assert gallery.generations() == {G1: 3}


def test_file_is_not_written_again_for_a_few_dead_rows(gallery):
    embed(gallery, G1)
    files = {file.path for file in gallery.vectors_table.snapshot().files}
    assert collect(gallery, lambda: [[G1, G2]], dead_share=0.5).rows == 0
    assert {file.path for file in gallery.vectors_table.snapshot().files} == files


def test_collection_that_lost_to_a_new_protection_looks_again(gallery, monkeypatch):
    """Between what a collection found unprotected and its commit somebody protects it."""
    protected = [[G1]]

    def protect(name):
        if name == "rewrite-before-commit" and len(protected) == 1:
            protected.append([G1, G2])
            Gallery(gallery.location).fence()

    set_crash_hook(protect)
    try:
        collect(gallery, lambda: list(protected))
    finally:
        set_crash_hook(None)
    assert owners(gallery, G1, G2)["item-1"] == G2


def test_nothing_to_protect_is_a_mistake_and_not_a_reason_to_drop_everything(gallery):
    with pytest.raises(ValueError, match="expected at least one protected query generation, found none"):
        collect(gallery, list)
    assert gallery.generations() == {G1: 4, G2: 1}


def test_collection_spares_files_that_workers_have_not_committed_yet(gallery):
    staged = gallery.staging_file(G3, "unit")
    from graceful.indexing.embedding_files import write_embedding_file

    write_embedding_file(
        staged, pa.table({"revision": revision(gallery, "item-1")}),
        SyntheticGeneration(G3).encode(["synthetic:id1/a"])[0],
    )  # fmt: skip
    collect(gallery, lambda: [[G1, G2]])
    assert gallery.commit_vectors(G3, "unit").committed == 1


def test_collection_again_finds_nothing(gallery):
    embed(gallery, G3)
    collect(gallery, lambda: [[G1, G2]])
    assert collect(gallery, lambda: [[G1, G2]]) == Collection((), 0, 0)


def test_pinned_version_survives_a_collection_and_goes_with_its_lease(gallery):
    embed(gallery, G3)
    with gallery.lease() as version:
        pinned = gallery.view([G3], version)
        collect(gallery, lambda: [[G1, G2]])
        assert pinned.vectors(np.arange(4)).shape[0] == 4
    collect(gallery, lambda: [[G1, G2]])
    with pytest.raises(DamagedFileError, match="expected a file, found none"):
        pinned.vectors(np.arange(4))


def test_forgotten_item_leaves_no_trace_and_the_others_stay(gallery):
    gallery.ingest(batch(2, image="b"))
    embed(gallery, G1)
    gallery.delete(["item-2"])
    others = {item: owner for item, owner in owners(gallery, G1, G2).items() if item != "item-2"}
    vectors = gallery.view([G1]).vectors(np.arange(3))
    assert forget(gallery, ["item-2"]) == 3
    assert b"item-2" not in bytes_of(gallery)
    assert owners(gallery, G1, G2) == others
    np.testing.assert_array_equal(Gallery(gallery.location).view([G1]).vectors(np.arange(3)), vectors)


def test_forgotten_item_is_in_no_log_entry_either(gallery):
    gallery.delete(["item-2"])
    forget(gallery, ["item-2"])
    from graceful.files import read_bytes

    assert not [file for file in list_files(gallery.location) if b"item-2" in read_bytes(file)]


def test_forgotten_item_may_come_back_as_a_new_one(gallery):
    before = revision(gallery, "item-2")[0]
    gallery.delete(["item-2"])
    forget(gallery, ["item-2"])
    again = gallery.ingest(batch(2))
    assert again.added == 1
    assert again.revisions[0] == before + 2  # the number after the tombstone's: none is given twice
    embed(gallery, G1)
    assert owners(gallery, G1)["item-2"] == G1


def test_forgetting_twice_and_forgetting_nobody_changes_nothing(gallery):
    gallery.delete(["item-2"])
    assert forget(gallery, ["item-2"]) == 2
    assert forget(gallery, ["item-2"]) == 0
    assert forget(gallery, ["never-there"]) == 0
    assert len(owners(gallery, G1)) == 3


def test_live_item_is_not_forgotten(gallery):
    with pytest.raises(ValueError, match=r"found live ones \(item-1\); delete them first"):
        forget(gallery, ["item-1", "item-2"])
    assert len(owners(gallery, G1)) == 4


def test_open_lease_is_a_reason_to_refuse(gallery):
    gallery.delete(["item-2"])
    with gallery.lease(), pytest.raises(LeasedError, match="expected no open lease, found 1; wait"):
        forget(gallery, ["item-2"])
    assert forget(gallery, ["item-2"]) == 2


@pytest.mark.parametrize("point", ["collect-before-leases", "collect-after-leases"])
def test_reader_that_comes_while_files_are_deleted_keeps_what_it_pinned(gallery, point):
    """It pins the newest version; then a merge replaces files of that version, and the collection goes on."""
    for number in range(5, 5 + MERGE_FILES):
        gallery.ingest(batch(number))
        embed(gallery, G1)
    other, held = Gallery(gallery.location), []

    def read_and_merge(name):
        if name == point and not held:
            lease = other.take_lease()
            held.append((lease, other.view([G1, G2], lease.version)))
            other.vectors_table.compact(at_least=2)
            assert held[0][1].version.vectors < other.version().vectors

    set_crash_hook(read_and_merge)
    try:
        collect(gallery, lambda: [[G1, G2]])
    finally:
        set_crash_hook(None)
    lease, view = held[0]
    for name in (G1, G2):
        assert len(view.vectors(view.owned_by(name)))
    lease.release()
    assert not Gallery(gallery.location).view([G1, G2]).unreadable().size


def test_clock_that_steps_ahead_makes_no_orphan_of_a_file_that_is_about_to_be_committed(gallery, monkeypatch):
    """Another machine collects while a file is written and not committed; its clock is two hours ahead."""
    ahead = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])

    def collect_elsewhere(name):
        if name == "table-file-written" and not ahead[0]:
            ahead[0] = 7200.0
            collect(Gallery(gallery.location), lambda: [[G1, G2]])

    set_crash_hook(collect_elsewhere)
    try:
        gallery.ingest(batch(7))
    finally:
        set_crash_hook(None)
    assert ahead[0]
    assert "item-7" in Gallery(gallery.location).view([G1, G2]).item_ids
