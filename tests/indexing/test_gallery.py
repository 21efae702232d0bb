"""The gallery's tables below the reading rule: revisions, units, versions, leases; two handles, several processes."""

import functools
import hashlib
import itertools
import multiprocessing

import numpy as np
import pyarrow as pa
import pytest

from graceful.files import exists, join, set_crash_hook
from graceful.indexing import tables
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.embed import embed_units
from graceful.indexing.embedding_files import read_embeddings, write_embedding_file
from graceful.indexing.gallery import Gallery, GalleryVersion, VectorCommit
from graceful.indexing.items import NOTHING
from graceful.indexing.maintenance import collect, forget
from graceful.indexing.reindex import carry_out, embed_missing
from graceful.indexing.revisions import NUMBER_BITS, buckets_of
from graceful.indexing.tables import MissingTableError
from tests.synthetic import SyntheticGeneration, item_row, open_synthetic

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"


@pytest.fixture
def gallery(tmp_path):
    return Gallery(str(tmp_path / "gallery"), create=True)


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


def revision(gallery, *item_ids):
    """Latest revisions (n,) of some items."""
    return gallery.items.find(list(item_ids))["revision"].to_numpy()


def nth(item_id, number):
    """The revision with a number in the bucket of an item (no two items of these tests share one)."""
    return int(buckets_of([item_id])[0] << NUMBER_BITS) + number


def plan_of(gallery, *waves):
    """A plan: for each wave, the ids of its items."""
    rows = [(wave, number) for wave, ids in waves for number in revision(gallery, *ids).tolist()]
    waves, revisions = zip(*rows, strict=True)
    return pa.table({"wave": waves, "position": range(len(rows)), "revision": revisions})


def stage(gallery, generation, unit, rows):
    """What a worker would have written: one vector for each (item id, how often it was written, image)."""
    keys = pa.table({"revision": [nth(item, number) for item, number, _ in rows]})
    sources = [f"synthetic:{item.replace('item-', 'id')}/{image}" for item, _, image in rows]
    write_embedding_file(
        gallery.staging_file(generation, unit), keys, SyntheticGeneration(generation).encode(sources)[0]
    )  # fmt: skip


def test_opening_a_gallery_creates_nothing(tmp_path):
    location = str(tmp_path / "gallery")
    with pytest.raises(MissingTableError, match=r"expected one at .*, found none; restore it"):
        Gallery(location)
    assert not (tmp_path / "gallery").exists()
    Gallery(location, create=True)
    Gallery(location)


def test_ingest_counts_new_changed_and_unchanged_items(gallery):
    first = gallery.ingest(batch(1, 2))
    assert (first.added, first.changed, first.unchanged) == (2, 0, 0)
    mixed = pa.concat_tables([batch(1), batch(2, image="b"), batch(3)])
    second = gallery.ingest(mixed)
    assert (second.added, second.changed, second.unchanged) == (1, 1, 1)
    assert second.rows["item_id"].to_pylist() == ["item-2", "item-3"]
    assert second.rows["revision"].to_pylist() == [nth("item-2", 2), nth("item-3", 1)]
    assert second.revisions.tolist() == [nth("item-1", 1), nth("item-2", 2), nth("item-3", 1)]


def test_ingest_tried_again_writes_nothing_twice(gallery, tmp_path):
    gallery.ingest(batch(1, 2))
    other = Gallery(gallery.location)
    again = other.ingest(batch(1, 2))
    assert (again.added, again.unchanged) == (0, 2)
    assert other.items_table.snapshot().rows().num_rows == 2


def test_repeated_item_in_a_batch_is_refused(gallery):
    with pytest.raises(ValueError, match="each item id once, found repeated ids; split the batch"):
        gallery.ingest(pa.concat_tables([batch(1), batch(1)]))
    assert gallery.view([G1]).num_items == 0


def test_delete_and_return_of_an_item_are_revisions(gallery):
    gallery.ingest(batch(1, 2))
    assert gallery.delete(["item-1", "item-9"]) == 1
    assert gallery.delete(["item-1"]) == 0
    back = gallery.ingest(batch(1))
    assert (back.added, back.rows["revision"].to_pylist()) == (1, [nth("item-1", 3)])


def test_view_takes_the_newest_readable_generation_of_the_latest_revision_only(gallery):
    gallery.ingest(batch(1, 2, 3))
    embed_all(gallery, G1)
    embed_missing(gallery, G2, embedder(G2), revisions=revision(gallery, "item-1"))
    gallery.ingest(batch(3, image="b"))
    assert owners(gallery.view([G1])) == {"item-1": G1, "item-2": G1, "item-3": None}
    assert owners(gallery.view([G1, G2])) == {"item-1": G2, "item-2": G1, "item-3": None}
    assert owners(gallery.view([G2])) == {"item-1": G2, "item-2": None, "item-3": None}
    assert owners(gallery.view([])) == {"item-1": None, "item-2": None, "item-3": None}
    assert gallery.view([G1, G2]).rows_by_generation() == {G1: 1, G2: 1}
    assert gallery.view([G1]).owned_by("g009-ffffff").tolist() == []


def test_vectors_of_a_view_are_those_of_the_images(gallery):
    gallery.ingest(batch(*range(10)))
    embed_all(gallery, G1, unit_rows=3)
    embed_missing(gallery, G2, embedder(G2), revisions=revision(gallery, "item-4", "item-7"), unit_rows=1)
    view = gallery.view([G1, G2])
    for name in (G1, G2):
        positions = view.owned_by(name)[::-1]
        sources = view.column("source", positions).to_pylist()
        expected = SyntheticGeneration(name).encode(sources)[0]
        np.testing.assert_allclose(view.vectors(positions), expected, atol=1e-6)
    assert view.vectors(np.array([], int)).shape == (0, 0)


@pytest.mark.parametrize("remembered", [True, False])
def test_view_of_a_range_of_buckets_is_that_part_of_the_whole_view(gallery, remembered):
    gallery.ingest(batch(*range(300)))
    embed_all(gallery, G1)
    embed_missing(gallery, G2, embedder(G2), revisions=gallery.view([]).revisions[::3])
    gallery.ingest(batch(*range(0, 300, 7), image="b"))
    gallery.delete([f"item-{number}" for number in range(0, 300, 11)])
    whole = gallery.view([G1, G2])
    handle = gallery if remembered else Gallery(gallery.location)
    parts = [handle.view([G1, G2], buckets=buckets) for buckets in ((0, 1), (1, 100), (100, 255), (255, 256))]
    np.testing.assert_array_equal(np.concatenate([part.revisions for part in parts]), whole.revisions)
    np.testing.assert_array_equal(np.concatenate([part.owner for part in parts]), whole.owner)
    assert len({owner for part in parts for owner in part.owner.tolist()}) == 3
    readable = np.flatnonzero(parts[1].owner >= 0)
    place = np.searchsorted(whole.revisions, parts[1].revisions[readable])
    np.testing.assert_array_equal(parts[1].vectors(readable), whole.vectors(place))


def test_unreadable_position_gives_no_vector(gallery):
    gallery.ingest(batch(1))
    with pytest.raises(ValueError, match="expected readable positions, found unreadable items"):
        gallery.view([G1]).vectors(np.array([0]))


def test_past_version_shows_what_was_seen_then(gallery):
    gallery.ingest(batch(1, 2))
    embed_all(gallery, G1)
    then = gallery.version()
    gallery.ingest(batch(1, image="b"))
    gallery.delete(["item-2"])
    embed_all(gallery, G2)
    assert owners(gallery.view([G1, G2], then)) == {"item-1": G1, "item-2": G1}
    assert owners(gallery.view([G1, G2])) == {"item-1": G2}
    assert owners(Gallery(gallery.location).view([G1, G2], then)) == {"item-1": G1, "item-2": G1}


def test_unit_of_vectors_commits_once_from_two_handles(gallery):
    gallery.ingest(batch(1, 2))
    other = Gallery(gallery.location)
    rows = [("item-1", 1, "a"), ("item-2", 1, "a")]
    stage(gallery, G1, "unit", rows)
    assert gallery.commit_vectors(G1, "unit").committed == 2
    stage(other, G1, "unit", rows)
    assert other.commit_vectors(G1, "unit").duplicate == 2
    assert other.commit_vectors(G1, "unit") == VectorCommit(0, 0, 0)  # nothing is staged any more
    stage(other, G1, "another-unit", rows)
    assert other.commit_vectors(G1, "another-unit").duplicate == 2
    assert other.generations() == {G1: 2}


def test_collected_vectors_can_be_embedded_again(gallery):
    gallery.ingest(batch(1, 2))
    assert embed_all(gallery, G1).embedded == 2
    embed_all(gallery, G2)
    assert collect(gallery, lambda: [[G2]]).generations == (G1,)
    assert owners(gallery.view([G1])) == {"item-1": None, "item-2": None}
    assert embed_all(gallery, G1).embedded == 2
    assert owners(Gallery(gallery.location).view([G1])) == {"item-1": G1, "item-2": G1}


def test_forgotten_item_that_comes_back_is_embedded(gallery):
    gallery.ingest(batch(1))
    embed_all(gallery, G1)
    gallery.delete(["item-1"])
    forget(gallery, ["item-1"])
    gallery.ingest(batch(1))
    assert embed_all(gallery, G1).embedded == 1
    assert owners(gallery.view([G1])) == {"item-1": G1}


def test_stale_rows_are_dropped_and_counted_and_the_others_stored(gallery):
    gallery.ingest(batch(1, 2, 3))
    stage(gallery, G1, "unit", [("item-1", 1, "a"), ("item-2", 1, "a"), ("item-3", 1, "a"), ("item-9", 1, "a")])
    gallery.ingest(batch(2, image="b"))
    gallery.delete(["item-3"])
    done = gallery.commit_vectors(G1, "unit")
    assert (done.committed, done.stale, done.duplicate) == (1, 3, 0)
    assert owners(gallery.view([G1])) == {"item-1": G1, "item-2": None}
    assert not exists(gallery.staging_file(G1, "unit"))


def test_unit_of_stale_rows_only_commits_nothing(gallery):
    gallery.ingest(batch(1))
    stage(gallery, G1, "unit", [("item-1", 1, "a")])
    gallery.ingest(batch(1, image="b"))
    version = gallery.version()
    assert gallery.commit_vectors(G1, "unit").stale == 1
    assert gallery.version() == version


def test_late_write_of_a_worker_cannot_touch_committed_rows(gallery):
    gallery.ingest(batch(1))
    stage(gallery, G1, "unit", [("item-1", 1, "a")])
    gallery.commit_vectors(G1, "unit")
    before = gallery.view([G1]).vectors(np.array([0]))
    stage(gallery, G1, "unit", [("item-1", 1, "something else")])
    np.testing.assert_array_equal(Gallery(gallery.location).view([G1]).vectors(np.array([0])), before)


@pytest.mark.parametrize("point", ["vectors-before-commit", "vectors-after-commit", "wave-done"])
@pytest.mark.parametrize("hit", [0, 1])
def test_reindex_killed_between_two_writes_ends_in_the_same_gallery(gallery, tmp_path, point, hit):
    class CrashError(BaseException):
        pass

    expected = Gallery(str(tmp_path / "expected"), create=True)
    for place in (gallery, expected):
        place.ingest(batch(*range(6)))
    plan = plan_of(gallery, (1, ["item-0", "item-1", "item-2"]), (2, ["item-3", "item-4"]))
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
    gallery.ingest(batch(*range(8)))
    embed_all(gallery, G1)
    files = {file.path for file in gallery.vectors_table.snapshot().files}
    plan = plan_of(gallery, (1, ["item-1", "item-5"]))
    report = carry_out(gallery, G2, plan, embedder(G2))
    assert (report.embedded, report.waves) == (2, (1,))
    assert files < {file.path for file in gallery.vectors_table.snapshot().files}


def test_image_that_cannot_be_read_is_reported_and_not_waited_for(gallery):
    broken = SyntheticGeneration(G1, unreadable=frozenset({"synthetic:id1/a"}))

    def embed(units, on_unit):
        embed_units(units, functools.partial(open_synthetic, broken), on_unit=on_unit)

    gallery.ingest(batch(1, 2))
    report = embed_missing(gallery, G1, embed)
    assert report.failures == (("item-1", "cannot be read"),)
    assert owners(gallery.view([G1])) == {"item-1": None, "item-2": G1}


def test_lease_pins_a_version_until_its_block_ends(gallery):
    gallery.ingest(batch(1))
    other = Gallery(gallery.location)
    with gallery.lease() as version:
        assert other.leased_versions() == [version] == [gallery.version()]
        gallery.ingest(batch(2))
        assert other.leased_versions() == [version] != [gallery.version()]
    assert other.leased_versions() == []


def test_merged_vectors_are_the_same_vectors_in_the_order_of_their_revisions(gallery, monkeypatch):
    monkeypatch.setattr(tables, "MERGED_BYTES", 8_192)
    gallery.ingest(batch(*range(70)))
    with monkeypatch.context() as patched:
        patched.setattr(tables.VersionedTable, "compact", lambda _: False)
        embed_all(gallery, G1, unit_rows=7)
    before = gallery.view([G1])
    vectors = before.vectors(np.arange(70))
    assert gallery.vectors_table.compact()
    after = Gallery(gallery.location).view([G1])
    files = sorted(gallery.vectors_table.snapshot().files, key=lambda file: file.lowest)
    assert 1 < len(files) < 10
    assert all(one.highest < other.lowest for one, other in itertools.pairwise(files))
    np.testing.assert_array_equal(after.vectors(np.arange(70)), vectors)
    np.testing.assert_array_equal(gallery.view([G1], before.version).vectors(np.arange(70)), vectors)
    keys, _ = read_embeddings([join(gallery.vectors_table.uri, file.path) for file in files])
    np.testing.assert_array_equal(keys["revision"].to_numpy(), after.revisions)


def test_version_is_a_pair_that_can_be_written_down(gallery):
    gallery.ingest(batch(1))
    assert gallery.version() == GalleryVersion(items=1, vectors=0)


def work_at_once(location, worker, start):
    """Ingest one's own items and embed everybody's, as an ingest and a re-index at the same time do."""
    gallery = Gallery(location, create=True)
    start.wait(60)
    own = pa.Table.from_pylist([item_row(f"own-{worker}-{n}", f"id{worker}", str(n)) for n in range(4)])
    gallery.ingest(own)
    shared = pa.Table.from_pylist([item_row(f"shared-{n}", "shared", str(n)) for n in range(4)])
    gallery.ingest(shared)
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
    assert (gallery.items_table.snapshot().rows(["replaces"])["replaces"].to_numpy() == NOTHING).all()


def test_unit_is_named_by_what_it_holds(gallery):
    gallery.ingest(batch(1, 2))
    names = []

    def remember(units, on_unit):
        names.append([unit.unit_id for unit in units])

    embed_missing(gallery, G1, remember)
    embed_missing(Gallery(gallery.location), G2, remember)
    assert names[0] == names[-1]
    held = np.sort(revision(gallery, "item-1", "item-2")).astype("<i8").tobytes()
    assert names[0] == [hashlib.sha256(held).hexdigest()[:24]]


def embed_twice_at_once(gallery):
    gallery.ingest(batch(1, 2))
    other = Gallery(gallery.location)
    done = []

    def overtake(name):
        if name == "vectors-before-commit" and not done:
            done.append(name)
            set_crash_hook(None)
            assert embed_all(other, G1).embedded == 2

    set_crash_hook(overtake)
    try:
        assert embed_all(gallery, G1).duplicate == 2
    finally:
        set_crash_hook(None)
    view = Gallery(gallery.location).view([G1])
    assert owners(view) == {"item-1": G1, "item-2": G1}
    assert view.vectors(np.arange(2)).shape[0] == 2


def test_unit_that_two_handles_embed_at_once_is_kept_once_and_its_file_stays(gallery):
    """The slower one takes its file back; it must not be the file that the faster one has committed."""
    embed_twice_at_once(gallery)


def test_handles_that_share_the_file_of_a_unit_would_lose_it(gallery, monkeypatch):
    """The test above can fail: this is what it is there for."""
    shared = lambda self, generation, unit: join(self.staging_location(), generation, f"{unit}.parquet")  # noqa: E731
    monkeypatch.setattr(Gallery, "staging_file", shared)
    with pytest.raises(DamagedFileError, match="found none"):
        embed_twice_at_once(gallery)


def test_unit_whose_staged_file_was_cleared_away_is_embedded_again(gallery):
    """Forgetting an item clears the staging area, whoever else is about to commit."""
    gallery.ingest(batch(1, 2, 3))
    gallery.delete(["item-3"])
    cleared = []

    def embed(units, on_unit):
        def clear_first(done):
            if not cleared:
                cleared.append(done)
                forget(Gallery(gallery.location), ["item-3"])
            on_unit(done)

        embedder(G1)(units, clear_first)

    asked = gallery.missing_vectors(G1)
    assert embed_missing(gallery, G1, embed, revisions=asked).embedded == 2
    assert owners(gallery.view([G1])) == {"item-1": G1, "item-2": G1}
