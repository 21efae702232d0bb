"""The index follows the gallery: feed, comparison, promotion, restart, rebase, damage, folders that refuse.

Every state is compared with brute force over the gallery's own view.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import graceful.indexing.following as following
from graceful.indexing.embedding_files import write_embedding_file
from graceful.indexing.following import Followed, IndexFollower, Target, snapshot_id_of
from graceful.indexing.gallery import Gallery
from graceful.indexing.index_choice import SearchConfig

WIDTH = 8
G1 = Target("g1", ("g1",))
G2 = Target("g2", ("g1", "g2"))


class Shop:
    """A real gallery, and an encoder that makes a unit vector of (item, source, generation)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gallery = Gallery(str(root / "gallery"), create=True)
        self.units = 0

    def ingest(self, names: Sequence[str], source: str = "a") -> None:
        sources = [f"{source}/{name}" for name in names]
        columns = {"item_id": list(names), "source": sources, "content_sha256": sources}
        self.gallery.ingest(
            pa.table({**columns, "label": [f"label of {n}" for n in names], "attributes": ["{}"] * len(names)})
        )

    def embed(self, generation: str, names: Sequence[str] | None = None) -> int:
        """Embed what a generation lacks, of some items or of all."""
        view = self.gallery.view(())
        ids = view.item_ids
        positions = np.flatnonzero(np.isin(ids, list(names))) if names is not None else np.arange(view.num_items)
        missing = self.gallery.missing_vectors(generation, view.revisions[positions])
        revisions = np.sort(missing)
        if not len(revisions):
            return 0
        sources = view.column("source", np.searchsorted(view.revisions, revisions)).to_pylist()
        vectors = np.stack([vector_of(source, generation) for source in sources])
        self.units += 1
        unit = f"unit{self.units}"
        write_embedding_file(self.gallery.staging_file(generation, unit), pa.table({"revision": revisions}), vectors)
        self.gallery.commit_vectors(generation, unit)
        return len(revisions)

    def follower(self, config: SearchConfig = SearchConfig(), buckets: tuple[int, int] | None = None) -> IndexFollower:
        return IndexFollower(self.gallery, self.root / "index", config, buckets)


def vector_of(source: str, generation: str) -> NDArray[np.float32]:
    """Of coarse values, so that there are ties."""
    seed = [*source.encode(), *generation.encode()]
    vector = np.random.default_rng(seed).integers(-1, 2, WIDTH).astype(np.float32)
    vector[0] = 1
    return vector / np.linalg.norm(vector)


def names(start: int, stop: int) -> list[str]:
    return [f"i{number:04d}" for number in range(start, stop)]


def check(shop: Shop, followed: Followed, buckets: tuple[int, int] | None = None) -> None:
    """What is found, by whom, and what it is called, against the view of the same version."""
    view = shop.gallery.view(followed.target.readable, followed.version, buckets)
    positions = np.flatnonzero(view.owner >= 0)
    vectors = view.vectors(positions) if len(positions) else np.zeros((0, WIDTH), np.float32)
    revisions = view.revisions[positions]
    queries = np.stack([vector_of(f"q{number}", "g") for number in range(3)])
    found = followed.index.search(queries, 7)
    assert found.snapshot_id == snapshot_id_of(
        followed.target.query_generation, followed.version, followed.target.readable
    )
    ids, sources = view.column("item_id").to_pylist(), view.column("source").to_pylist()
    for number, query in enumerate(queries):
        scores = np.einsum("d,nd->n", query, vectors)
        best = np.lexsort((revisions, -scores))[:7]
        assert found.revisions[number, : len(best)].tolist() == revisions[best].tolist()
        assert found.scores[number, : len(best)].tolist() == scores[best].tolist()
        owners = [view.readable[view.owner[positions[row]]] for row in best]
        assert found.generations[number, : len(best)].tolist() == owners
        entries = followed.book.entries(revisions[best])
        assert [entries[int(revisions[row])][0] for row in best] == [ids[positions[row]] for row in best]
        assert [entries[int(revisions[row])][1] for row in best] == [sources[positions[row]] for row in best]
    assert followed.num_items == view.num_items
    assert followed.num_unreadable == len(view.unreadable())
    assert {g: n for g, n in followed.index.rows_by_generation().items() if n} == {
        g: n for g, n in view.rows_by_generation().items() if n
    }


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    shop.ingest(names(0, 60))
    shop.embed("g1")
    return shop


class TestFollowing:
    def test_new_changed_deleted_and_re_embedded_items_are_followed(self, shop: Shop) -> None:
        follower = shop.follower()
        check(shop, follower.follow(G1))
        base = follower.current.index.widths[0].base
        shop.ingest(names(60, 63))
        check(shop, follower.follow(G1))  # not embedded yet
        assert follower.current.num_unreadable == 3
        shop.embed("g1")
        check(shop, follower.follow(G1))
        shop.ingest(names(5, 8), "b")  # changed images
        check(shop, follower.follow(G1))
        shop.embed("g1")
        shop.gallery.delete(names(20, 25))
        check(shop, follower.follow(G1))
        check(shop, follower.follow(G2))  # promoted without a vector of its own
        shop.embed("g2", names(0, 30))
        check(shop, follower.follow(G2))
        check(shop, follower.follow(G1))  # rolled back
        assert np.shares_memory(follower.current.index.widths[0].base.vectors, base.vectors)

    def test_between_two_looks_anything_may_happen_to_an_item(self, shop: Shop) -> None:
        follower = shop.follower()
        follower.follow(G2)
        shop.ingest(["x", "y"])
        shop.embed("g1")
        shop.embed("g2", ["x"])
        shop.ingest(["x"], "b")
        shop.gallery.delete(["y", "i0003"])
        shop.ingest(["i0003"], "again")
        shop.embed("g2", ["i0003", "i0004"])
        check(shop, follower.follow(G2))

    def test_a_late_vector_of_an_older_generation_takes_no_row_from_a_newer_one(self, shop: Shop) -> None:
        follower = shop.follower()
        shop.ingest(["x"])
        shop.embed("g2", ["x"])
        check(shop, follower.follow(G2))
        shop.embed("g1", ["x"])
        check(shop, follower.follow(G2))
        assert follower.current.index.rows_by_generation()["g2"] == 1

    def test_a_feed_that_no_longer_tells_is_replaced_by_a_comparison(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        follower = shop.follower()
        follower.follow(G2)
        monkeypatch.setattr(shop.gallery, "changes", lambda *_: None)
        shop.ingest(names(50, 70), "b")
        shop.embed("g1")
        shop.embed("g2", names(0, 10))
        shop.gallery.delete(names(20, 25))
        check(shop, follower.follow(G2))

    def test_a_shard_holds_its_buckets_alone(self, shop: Shop) -> None:
        whole = shop.follower().follow(G1)
        shards = [
            IndexFollower(shop.gallery, shop.root / f"s{low}", buckets=(low, low + 64)) for low in range(0, 256, 64)
        ]
        parts = [(shard, shard.follow(G1)) for shard in shards]
        assert sum(part.index.num_rows for _, part in parts) == whole.index.num_rows
        shop.ingest(names(55, 80), "b")
        shop.embed("g1")
        shop.gallery.delete(names(0, 10))
        for number, (shard, _) in enumerate(parts):
            check(shop, shard.follow(G1), (64 * number, 64 * number + 64))

    def test_a_view_as_of_an_earlier_version_can_be_followed(self, shop: Shop) -> None:
        follower, earlier = shop.follower(), shop.gallery.version()
        shop.gallery.delete(names(0, 10))
        check(shop, follower.follow(G1))
        check(shop, follower.follow(G1, earlier))
        assert follower.current.num_items == 60

    def test_much_change_is_rebased_in_the_background_while_changes_go_on(
        self, shop: Shop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "REBASE_ROWS", 5)
        follower = shop.follower()
        first = follower.follow(G1)
        reached, go_on = threading.Event(), threading.Event()
        publish = following.publish_snapshot

        def slowly(*args: object, **kwargs: object) -> object:
            reached.set()
            assert go_on.wait(20)
            return publish(*args, **kwargs)

        monkeypatch.setattr(following, "publish_snapshot", slowly)
        shop.ingest(names(60, 90))
        shop.embed("g1")
        check(shop, follower.follow(G1))
        assert reached.wait(20)
        shop.gallery.delete(names(0, 3))
        shop.ingest(names(70, 72), "b")
        shop.embed("g1")
        check(shop, follower.follow(G1))
        check(shop, follower.follow(G2))
        go_on.set()
        follower.wait_for_rebase(20)
        check(shop, follower.current)
        assert (follower.current.target, follower.current.version) == (G2, shop.gallery.version())
        assert len(follower.current.index.widths[0].base) == 90
        assert len(first.index.widths[0].base) == 60
        check(shop, follower.follow(G2))

    @settings(max_examples=15, deadline=None)
    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["ingest", "delete", "g1", "g2", "follow g1", "follow g2", "restart"]),
                st.integers(0, 20),
                st.integers(1, 10),
            ),
            min_size=3,
            max_size=12,
        )
    )
    def test_every_history_shows_what_the_gallery_shows(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
    ) -> None:
        shop = Shop(tmp_path_factory.mktemp("shop"))
        shop.ingest(names(0, 15))
        shop.embed("g1")
        follower = shop.follower()
        target = G1
        for number, (act, start, count) in enumerate(steps):
            chosen = names(start, start + count)
            if act == "ingest":
                shop.ingest(chosen, f"s{number}")
            elif act == "delete":
                shop.gallery.delete(chosen)
            elif act in ("g1", "g2"):
                shop.embed(act, chosen)
            elif act == "restart":
                follower = shop.follower()
            else:
                target = G1 if act.endswith("g1") else G2
            if act.startswith(("follow", "restart")):
                check(shop, follower.follow(target))
        check(shop, follower.follow(target))


class TestOpening:
    def test_a_snapshot_is_caught_up_and_not_published_again(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        shop.follower().follow(G1)
        shop.ingest(names(60, 62))
        shop.embed("g1")
        monkeypatch.setattr(shop.gallery, "view", lambda *_: pytest.fail("the view was read"))
        followed = shop.follower().follow(G1)
        monkeypatch.undo()
        check(shop, followed)
        assert len(list((shop.root / "index").glob("*/manifest.json"))) == 1

    def test_another_generation_starts_from_the_same_snapshot(self, shop: Shop) -> None:
        shop.follower().follow(G1)
        shop.embed("g2", names(0, 10))
        check(shop, shop.follower().follow(G2))
        assert len(list((shop.root / "index").glob("*/manifest.json"))) == 1

    def test_a_large_lag_publishes_and_reuses_segments(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "REBASE_ROWS", 5)
        shop.follower().follow(G1)
        shop.ingest(names(60, 70))
        shop.embed("g1")
        followed = shop.follower().follow(G1)
        check(shop, followed)
        assert [entry.segment.num_rows for entry in followed.manifest.segments] == [60, 10]
        assert len(list((shop.root / "index").glob("*/manifest.json"))) == 2

    def test_widths_beside_one_another(self, shop: Shop) -> None:
        target = Target("g1", ("g1",), (4,))
        assert shop.follower().follow(target).index.prefix_widths == (4,)
        assert shop.follower().follow(target).index.prefix_widths == (4,)


def index_files(shop: Shop) -> list[Path]:
    return sorted(path for path in (shop.root / "index").rglob("*") if path.is_file())


@pytest.mark.parametrize("ending", [".vectors", ".revisions", ".arrow", ".live", "manifest.json", ".faiss"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_heals_with_one_warning(
    shop: Shop, ending: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = SearchConfig()
    if ending == ".faiss":
        shop.ingest(names(60, 800))
        shop.embed("g1")
        config = SearchConfig(index="ivf", recall_target=0.1)
    shop.follower(config).follow(G1)
    (path,) = (file for file in index_files(shop) if file.name.endswith(ending))
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-1] if damage == "cut" else b"")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        followed = shop.follower(config).follow(G1)
    if ending != ".faiss":
        check(shop, followed)
    # A snapshot without its manifest is none: it is built as for the first time.
    quiet = ending == "manifest.json" and damage == "remove"
    assert [record.message.count("built again from the gallery") for record in caplog.records] == [1] * (not quiet)
    caplog.clear()
    again = shop.follower(config).follow(G1)
    assert caplog.records == []
    assert again.index.num_rows == followed.index.num_rows


def test_every_single_flipped_bit_of_a_manifest_is_found(shop: Shop) -> None:
    shop.follower().follow(G1)
    (path,) = (shop.root / "index").glob("*/manifest.json")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises((following.IndexCorruptedError, following.UnknownFormatError)):
            following.read_manifest(path.parent)


@pytest.mark.parametrize("has_snapshot", [False, True])
def test_an_index_folder_that_cannot_be_written_costs_one_warning(
    shop: Shop, has_snapshot: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "REBASE_ROWS", 5)
    if has_snapshot:
        shop.follower().follow(G1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(following, "publish_snapshot", refuse)
    shop.ingest(names(60, 80))
    shop.embed("g1")
    with caplog.at_level(logging.WARNING):
        follower = shop.follower()
        check(shop, follower.follow(G1))
        shop.ingest(names(80, 100))
        shop.embed("g1")
        check(shop, follower.follow(G1))
        follower.wait_for_rebase(20)
        check(shop, follower.follow(G1))
    assert len(caplog.records) == 1
    assert "kept in memory" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_searched_all_the_same(shop: Shop) -> None:
    (shop.root / "index").mkdir()
    (shop.root / "index").chmod(0o500)
    check(shop, shop.follower().follow(G1))


def test_two_processes_that_publish_the_same_view_share_it(shop: Shop) -> None:
    found: list[Followed] = []
    threads = [threading.Thread(target=lambda: found.append(shop.follower().follow(G1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for followed in found:
        check(shop, followed)


def test_only_the_newest_snapshot_of_each_query_generation_stays(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "KEPT_S", 0.0)
    monkeypatch.setattr(following, "REBASE_ROWS", 5)
    for step in range(3):
        shop.ingest(names(60 + 20 * step, 80 + 20 * step))
        shop.embed("g1")
        check(shop, shop.follower().follow(G1))
    assert len(list((shop.root / "index").glob("*/manifest.json"))) == 1
    shutil.rmtree(shop.root / "index")
    check(shop, shop.follower().follow(G1))


def test_a_changed_photo_is_followed_within_a_second(shop: Shop) -> None:
    follower = shop.follower()
    follower.follow(G1)
    shop.ingest(["i0001"], "b")
    shop.embed("g1")
    started = time.monotonic()
    check(shop, follower.follow(G1))
    assert time.monotonic() - started < 1
