"""The gallery's tables below the reading rule: revisions, units, versions, leases; two handles, several processes."""

import functools
import hashlib
import multiprocessing

import numpy as np
import pyarrow as pa
import pytest

from graceful.files import exists, set_crash_hook
from graceful.indexing.embed import embed_units
from graceful.indexing.embedding_files import read_embeddings, write_embedding_file
from graceful.indexing.gallery import Gallery, GalleryVersion, gallery_exists
from graceful.indexing.maintenance import forget
from graceful.indexing.reindex import carry_out, embed_missing
from tests.synthetic import SyntheticGeneration, item_row, open_synthetic

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"


@pytest.fixture
def gallery(tmp_path):
    return Gallery(str(tmp_path / "gallery"))


def batch(*numbers, image="a"):
    return pa.Table.from_pylist([item_row(f"item-{number}", f"id{number}", image) for number in numbers])


def embedder(generation):
    def embed(units, on_unit):
        opened = functools.partial(open_synthetic, SyntheticGeneration(generation))
        embed_units(units, opened, on_unit=on_unit)

    return embed


def embed_all(gallery, generation, **options):
    return embed_missing(gallery, generation, embedder(generation), **options)


def owners(view):
    names = [view.readable[code] if code >= 0 else None for code in view.owner]
    return dict(zip(view.item_ids, names, strict=True))


def stage(gallery, generation, unit, rows):
    """What a worker would have written: one vector for each (item id, revision, image)."""
    revisions = pa.array([revision for _, revision, _ in rows], pa.int64())
    keys = pa.table({"item_id": [item for item, _, _ in rows], "revision": revisions})
    sources = [f"synthetic:{item.replace('item-', 'id')}/{image}" for item, _, image in rows]
    write_embedding_file(
        gallery.staging_file(generation, unit), keys, SyntheticGeneration(generation).encode(sources)[0]
    )  # fmt: skip


def test_gallery_exists_once_it_was_opened(tmp_path):
    location = str(tmp_path / "gallery")
    assert not gallery_exists(location)
    Gallery(location)
    assert gallery_exists(location)


def test_ingest_counts_new_changed_and_unchanged_items(gallery):
    first = gallery.ingest(batch(1, 2), unit="a")
    assert (first.added, first.changed, first.unchanged) == (2, 0, 0)
    mixed = pa.concat_tables([batch(1), batch(2, image="b"), batch(3)])
    second = gallery.ingest(mixed, unit="b")
    assert (second.added, second.changed, second.unchanged) == (1, 1, 1)
    assert second.rows["item_id"].to_pylist() == ["item-2", "item-3"]
    assert second.rows["revision"].to_pylist() == [2, 1]


def test_ingest_tried_again_writes_nothing_twice(gallery, tmp_path):
    gallery.ingest(batch(1, 2), unit="a")
    other = Gallery(gallery.location)
    again = other.ingest(batch(1, 2), unit="a")
    assert (again.added, again.unchanged) == (0, 2)
    assert other.items_table.snapshot().rows().num_rows == 2


def test_repeated_item_in_a_batch_is_refused(gallery):
    with pytest.raises(ValueError, match="each item id once, found repeated ids; split the batch"):
        gallery.ingest(pa.concat_tables([batch(1), batch(1)]), unit="a")
    assert gallery.view([G1]).num_items == 0


def test_delete_and_return_of_an_item_are_revisions(gallery):
    gallery.ingest(batch(1, 2), unit="a")
    assert gallery.delete(["item-1", "item-9"], unit="d") == 1
    assert gallery.delete(["item-1"], unit="d2") == 0
    back = gallery.ingest(batch(1), unit="b")
    assert (back.added, back.rows["revision"].to_pylist()) == (1, [3])


def test_view_takes_the_newest_readable_generation_of_the_latest_revision_only(gallery):
    gallery.ingest(batch(1, 2, 3), unit="a")
    embed_all(gallery, G1)
    embed_missing(gallery, G2, embedder(G2), item_ids=pa.array(["item-1"]))
    gallery.ingest(batch(3, image="b"), unit="b")
    assert owners(gallery.view([G1])) == {"item-1": G1, "item-2": G1, "item-3": None}
    assert owners(gallery.view([G1, G2])) == {"item-1": G2, "item-2": G1, "item-3": None}
    assert owners(gallery.view([G2])) == {"item-1": G2, "item-2": None, "item-3": None}
    assert owners(gallery.view([])) == {"item-1": None, "item-2": None, "item-3": None}
    assert gallery.view([G1, G2]).rows_by_generation() == {G1: 1, G2: 1}
    assert gallery.view([G1]).owned_by("g009-ffffff").tolist() == []


def test_vectors_of_a_view_are_those_of_the_images(gallery):
    gallery.ingest(batch(*range(10)), unit="a")
    embed_all(gallery, G1, unit_rows=3)
    embed_missing(gallery, G2, embedder(G2), item_ids=pa.array(["item-4", "item-7"]), unit_rows=1)
    view = gallery.view([G1, G2])
    for name in (G1, G2):
        positions = view.owned_by(name)[::-1]
        sources = [view.items["source"][int(position)].as_py() for position in positions]
        expected = SyntheticGeneration(name).encode(sources)[0]
        np.testing.assert_allclose(view.vectors(positions), expected, atol=1e-6)
    assert view.vectors(np.array([], int)).shape == (0, 0)


def test_unreadable_position_gives_no_vector(gallery):
    gallery.ingest(batch(1), unit="a")
    with pytest.raises(ValueError, match="expected readable positions, found unreadable items"):
        gallery.view([G1]).vectors(np.array([0]))


def test_past_version_shows_what_was_seen_then(gallery):
    gallery.ingest(batch(1, 2), unit="a")
    embed_all(gallery, G1)
    then = gallery.version()
    gallery.ingest(batch(1, image="b"), unit="b")
    gallery.delete(["item-2"], unit="d")
    embed_all(gallery, G2)
    assert owners(gallery.view([G1, G2], then)) == {"item-1": G1, "item-2": G1}
    assert owners(gallery.view([G1, G2])) == {"item-1": G2}
    assert owners(Gallery(gallery.location).view([G1, G2], then)) == {"item-1": G1, "item-2": G1}


def test_unit_of_vectors_commits_once_from_two_handles(gallery):
    gallery.ingest(batch(1, 2), unit="a")
    other = Gallery(gallery.location)
    rows = [("item-1", 1, "a"), ("item-2", 1, "a")]
    stage(gallery, G1, "unit", rows)
    assert gallery.commit_vectors(G1, "unit").committed == 2
    stage(other, G1, "unit", rows)
    again = other.commit_vectors(G1, "unit")
    assert (again.committed, again.repeated) == (0, True)
    stage(other, G1, "another-unit", rows)
    assert other.commit_vectors(G1, "another-unit").duplicate == 2
    assert other.generations() == {G1: 2}


def test_collected_vectors_can_be_embedded_again(gallery):
    """The unit has the name of one that committed before, but its rows are gone."""
    gallery.ingest(batch(1, 2), unit="a")
    assert embed_all(gallery, G1).embedded == 2
    gallery.vectors_table.drop_partition(G1)
    assert owners(gallery.view([G1])) == {"item-1": None, "item-2": None}
    assert embed_all(gallery, G1).embedded == 2
    assert owners(Gallery(gallery.location).view([G1])) == {"item-1": G1, "item-2": G1}


def test_forgotten_item_that_comes_back_is_embedded(gallery):
    gallery.ingest(batch(1), unit="a")
    embed_all(gallery, G1)
    gallery.delete(["item-1"], unit="d")
    forget(gallery, ["item-1"])
    gallery.ingest(batch(1), unit="again")
    assert embed_all(gallery, G1).embedded == 1
    assert owners(gallery.view([G1])) == {"item-1": G1}


def test_stale_rows_are_dropped_and_counted_and_the_others_stored(gallery):
    gallery.ingest(batch(1, 2, 3), unit="a")
    stage(gallery, G1, "unit", [("item-1", 1, "a"), ("item-2", 1, "a"), ("item-3", 1, "a"), ("item-9", 1, "a")])
    gallery.ingest(batch(2, image="b"), unit="b")
    gallery.delete(["item-3"], unit="d")
    done = gallery.commit_vectors(G1, "unit")
    assert (done.committed, done.stale, done.duplicate) == (1, 3, 0)
    assert owners(gallery.view([G1])) == {"item-1": G1, "item-2": None}
    assert not exists(gallery.staging_file(G1, "unit"))


def test_unit_of_stale_rows_only_commits_nothing(gallery):
    gallery.ingest(batch(1), unit="a")
    stage(gallery, G1, "unit", [("item-1", 1, "a")])
    gallery.ingest(batch(1, image="b"), unit="b")
    version = gallery.version()
    assert gallery.commit_vectors(G1, "unit").stale == 1
    assert gallery.version() == version


def test_late_write_of_a_worker_cannot_touch_committed_rows(gallery):
    gallery.ingest(batch(1), unit="a")
    stage(gallery, G1, "unit", [("item-1", 1, "a")])
    gallery.commit_vectors(G1, "unit")
    before = gallery.view([G1]).vectors(np.array([0]))
    stage(gallery, G1, "unit", [("item-1", 1, "something else")])
    np.testing.assert_array_equal(Gallery(gallery.location).view([G1]).vectors(np.array([0])), before)


@pytest.mark.parametrize("point", ["vectors-before-commit", "vectors-after-commit", "wave-done", "table-committed"])
@pytest.mark.parametrize("hit", [0, 1])
def test_reindex_killed_between_two_writes_ends_in_the_same_gallery(gallery, tmp_path, point, hit):
    class CrashError(BaseException):
        pass

    plan = pa.table({"wave": [1, 1, 1, 2, 2], "position": range(5), "item_id": [f"item-{n}" for n in range(5)]})
    expected = Gallery(str(tmp_path / "expected"))
    for place in (gallery, expected):
        place.ingest(batch(*range(6)), unit="a")
    carry_out(expected, G1, plan, embedder(G1), unit_rows=2)
    left = [hit]

    def crash(name):
        if name == point:
            left[0] -= 1
            if left[0] < 0:
                raise CrashError

    set_crash_hook(crash)
    try:
        with pytest.raises(CrashError):
            carry_out(gallery, G1, plan, embedder(G1), unit_rows=2)
    finally:
        set_crash_hook(None)
    resumed = Gallery(gallery.location)
    carry_out(resumed, G1, plan, embedder(G1), unit_rows=2)
    assert owners(resumed.view([G1])) == owners(expected.view([G1]))
    assert resumed.generations() == expected.generations() == {G1: 5}


def test_reindex_of_a_part_touches_no_other_row(gallery):
    gallery.ingest(batch(*range(8)), unit="a")
    embed_all(gallery, G1)
    files = {file.path for file in gallery.vectors_table.snapshot().files}
    plan = pa.table({"wave": [1, 1], "position": [0, 1], "item_id": ["item-1", "item-5"]})
    report = carry_out(gallery, G2, plan, embedder(G2))
    assert (report.embedded, report.waves) == (2, (1,))
    assert files < {file.path for file in gallery.vectors_table.snapshot().files}


def test_image_that_cannot_be_read_is_reported_and_not_waited_for(gallery):
    broken = SyntheticGeneration(G1, unreadable=frozenset({"synthetic:id1/a"}))

    def embed(units, on_unit):
        embed_units(units, functools.partial(open_synthetic, broken), on_unit=on_unit)

    gallery.ingest(batch(1, 2), unit="a")
    report = embed_missing(gallery, G1, embed)
    assert report.failures == (("item-1", "cannot be read"),)
    assert owners(gallery.view([G1])) == {"item-1": None, "item-2": G1}


def test_lease_pins_a_version_until_its_block_ends(gallery):
    gallery.ingest(batch(1), unit="a")
    other = Gallery(gallery.location)
    with gallery.lease() as version:
        assert other.leased_versions() == [version] == [gallery.version()]
        gallery.ingest(batch(2), unit="b")
        assert other.leased_versions() == [version] != [gallery.version()]
    assert other.leased_versions() == []


def test_compacted_vectors_are_the_same_vectors(gallery):
    """Compaction turns fixed-size binary into binary; the view does not notice."""
    gallery.ingest(batch(*range(70)), unit="a")
    embed_all(gallery, G1, unit_rows=1)
    before = gallery.view([G1])
    vectors = before.vectors(np.arange(70))
    assert gallery.vectors_table.compact()
    after = Gallery(gallery.location).view([G1])
    assert len(after.files) == 1
    np.testing.assert_array_equal(after.vectors(np.arange(70)), vectors)
    np.testing.assert_array_equal(gallery.view([G1], before.version).vectors(np.arange(70)), vectors)
    keys, _ = read_embeddings([after.files[0]])
    assert keys.num_rows == 70


def test_version_is_a_pair_that_can_be_written_down(gallery):
    gallery.ingest(batch(1), unit="a")
    assert gallery.version() == GalleryVersion(items=1, vectors=0)


def work_at_once(location, worker, start):
    """Ingest one's own items and embed everybody's, as an ingest and a re-index at the same time do."""
    gallery = Gallery(location)
    start.wait(60)
    own = pa.Table.from_pylist([item_row(f"own-{worker}-{n}", f"id{worker}", str(n)) for n in range(4)])
    gallery.ingest(own, unit=f"worker-{worker}")
    shared = pa.Table.from_pylist([item_row(f"shared-{n}", "shared", str(n)) for n in range(4)])
    gallery.ingest(shared, unit="shared")
    embed_all(gallery, G1, unit_rows=3)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_processes_that_ingest_and_embed_at_once_lose_nothing_and_double_nothing(tmp_path):
    location = str(tmp_path / "gallery")
    context = multiprocessing.get_context("forkserver")
    start = context.Event()
    processes = [context.Process(target=work_at_once, args=(location, worker, start)) for worker in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(150)
    assert [process.exitcode for process in processes] == [0] * 3
    gallery = Gallery(location)
    embed_all(gallery, G1)
    assert set(owners(gallery.view([G1])).values()) == {G1}
    assert gallery.view([G1]).num_items == 16
    assert len(set(gallery.view([G1]).item_ids)) == 16
    assert gallery.generations() == {G1: 16}
    assert gallery.items_table.snapshot().rows().num_rows == 16
    assert set(gallery.latest_items()["revision"].to_pylist()) == {1}


def test_unit_is_named_by_what_it_holds(gallery):
    gallery.ingest(batch(1, 2), unit="a")
    names = []

    def remember(units, on_unit):
        names.append([unit.unit_id for unit in units])

    embed_missing(gallery, G1, remember)
    embed_missing(Gallery(gallery.location), G2, remember)
    assert names[0] == names[-1]
    assert names[0] == [hashlib.sha256(b"item-1@1\nitem-2@1").hexdigest()[:24]]
