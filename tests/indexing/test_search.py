"""Index snapshots and the searcher against the exact oracle: mixed generations, waves, deletes, damage and swaps."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import graceful.indexing.search as search
from graceful.errors import UnknownFormatError
from graceful.files import set_crash_hook
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError, top_k
from graceful.indexing.search import (
    IndexCorruptedError,
    Manifest,
    SearchResult,
    SegmentRows,
    SwappableSearcher,
    open_snapshot,
    prune_snapshots,
    publish_snapshot,
    read_manifest,
    write_segment,
)

WIDTH = 6


def grid_vectors(seed: int, num: int, width: int = WIDTH) -> NDArray[np.float32]:
    """Small multiples of 1/4: products are exact, ties are many."""
    return (np.random.default_rng(seed).integers(-4, 5, (num, width)) / 4).astype(np.float32)


@dataclass
class Shelf:
    """A view in a dictionary: item -> (revision, generation, vector); and what was loaded for each publication."""

    items: dict[str, tuple[int, str, NDArray[np.float32]]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    revisions: dict[str, int] = field(default_factory=dict)  # never fall, as in the gallery: a delete is one too

    def put(self, item_ids: list[str], generation: str, seed: int, width: int = WIDTH) -> None:
        for item_id, vector in zip(item_ids, grid_vectors(seed, len(item_ids), width), strict=True):
            self.revisions[item_id] = self.revisions.get(item_id, 0) + 1
            self.items[item_id] = (self.revisions[item_id], generation, vector)

    def rows(self) -> list[SegmentRows]:
        parts = []
        for generation in sorted({entry[1] for entry in self.items.values()}):
            mine = [item_id for item_id, entry in self.items.items() if entry[1] == generation]

            def load(positions: NDArray[np.int64], mine: list[str] = mine) -> NDArray[np.float32]:
                self.loaded += [mine[position] for position in positions]
                return np.stack([self.items[mine[position]][2] for position in positions])

            parts.append(SegmentRows(generation, mine, [self.items[item_id][0] for item_id in mine], load))
        return parts

    def publish(self, root: Path, name: str, reuse: Manifest | None = None) -> Manifest:
        self.loaded.clear()
        return publish_snapshot(root, name, "g9", {"vectors": 7}, self.rows(), reuse)

    def expected(self, queries: NDArray[np.float32], k: int) -> SearchResult:
        """The oracle over rows in the order of their item ids, so that its ties are ours."""
        item_ids = sorted(self.items)
        vectors = np.stack([self.items[item_id][2] for item_id in item_ids]) if item_ids else np.zeros((0, WIDTH), "f4")
        scores, rows = top_k(queries, vectors, k)
        names = np.array([*item_ids, None], dtype=object)
        owners = np.array([*(self.items[item_id][1] for item_id in item_ids), None], dtype=object)
        return SearchResult(names[rows], scores, owners[rows], "")


def check(found: SearchResult, expected: SearchResult) -> None:
    assert found.item_ids.tolist() == expected.item_ids.tolist()
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.generations.tolist() == expected.generations.tolist()


def names(start: int, stop: int) -> list[str]:
    return [f"i{number:04d}" for number in range(start, stop)]


class TestSnapshots:
    def test_mixed_generations_are_searched_like_one(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 90), "g1", 1)
        shelf.put(names(40, 130), "g2", 2)
        shelf.publish(tmp_path, "s1")
        searcher = open_snapshot(tmp_path / "s1")
        for k in (1, 5, 40, 129, 200):
            check(searcher.search(grid_vectors(9, 7), k), shelf.expected(grid_vectors(9, 7), k))
        assert searcher.search(grid_vectors(9, 1), 1).snapshot_id == "s1"
        assert searcher.num_rows == 130

    def test_answers_do_not_depend_on_how_many_queries_are_asked(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((500, 24)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = [SegmentRows("g1", names(0, 500), np.ones(500), lambda positions: vectors[positions])]
        publish_snapshot(tmp_path, "s1", "g1", {}, rows)
        searcher = open_snapshot(tmp_path / "s1")
        batch = searcher.search(vectors[:100], 10)
        for query in (0, 57, 99):
            alone = searcher.search(vectors[query : query + 1], 10)
            assert alone.scores[0].tobytes() == batch.scores[query].tobytes()
            assert alone.item_ids[0].tolist() == batch.item_ids[query].tolist()
        assert batch.item_ids[:, 0].tolist() == names(0, 100)

    def test_equal_rows_beyond_all_candidates_are_ordered_by_item_id(self, tmp_path: Path) -> None:
        vector = np.full((1, WIDTH), 0.25, dtype=np.float32)
        shuffled = [names(0, 300)[number] for number in np.random.default_rng(0).permutation(300)]
        rows = [SegmentRows("g1", shuffled, np.ones(300), lambda positions: np.repeat(vector, len(positions), 0))]
        publish_snapshot(tmp_path, "s1", "g1", {}, rows)
        found = open_snapshot(tmp_path / "s1").search(vector, 5)
        assert found.item_ids.tolist() == [names(0, 5)]

    def test_only_new_rows_are_loaded_and_written(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 100), "g1", 1)
        first = shelf.publish(tmp_path, "s1")
        shelf.put(names(10, 20), "g2", 2)  # a wave
        shelf.put(names(50, 52), "g1", 3)  # changed images
        shelf.put(names(100, 105), "g1", 4)  # new items
        del shelf.items["i0000"]
        second = shelf.publish(tmp_path, "s2", first)
        assert sorted(shelf.loaded) == sorted(names(10, 20) + names(50, 52) + names(100, 105))
        assert [entry.num_current for entry in second.segments] == [87, 7, 10]
        assert second.num_rows == 104
        check(open_snapshot(tmp_path / "s2").search(grid_vectors(8, 5), 12), shelf.expected(grid_vectors(8, 5), 12))
        third = shelf.publish(tmp_path, "s3", second)
        assert shelf.loaded == []
        assert [entry.segment for entry in third.segments] == [entry.segment for entry in second.segments]

    def test_earlier_snapshots_stay_as_they_were(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 60), "g1", 1)
        first = shelf.publish(tmp_path, "s1")
        expected = shelf.expected(grid_vectors(5, 4), 8)
        shelf.put(names(0, 60), "g2", 2)
        shelf.publish(tmp_path, "s2", first)
        check(open_snapshot(tmp_path / "s1").search(grid_vectors(5, 4), 8), expected)

    def test_mostly_dead_or_too_many_segments_become_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf = Shelf()
        shelf.put(names(0, 40), "g1", 1)
        manifest = shelf.publish(tmp_path, "s0")
        shelf.put(names(0, 25), "g2", 2)
        manifest = shelf.publish(tmp_path, "s1", manifest)
        assert shelf.loaded == names(0, 25)  # the 15 rows of g1 that live on come from its segment
        assert [(entry.segment.num_rows, entry.num_current) for entry in manifest.segments] == [(15, 15), (25, 25)]
        monkeypatch.setattr("graceful.indexing.snapshots.MAX_SEGMENTS", 3)
        counts = []
        for step in range(4):
            shelf.put(names(100 + step, 101 + step), "g2", 10 + step)
            manifest = shelf.publish(tmp_path, f"t{step}", manifest)
            counts.append(sum(entry.segment.generation == "g2" for entry in manifest.segments))
        assert counts == [2, 3, 1, 2]
        check(open_snapshot(tmp_path / "t3").search(grid_vectors(5, 4), 8), shelf.expected(grid_vectors(5, 4), 8))

    def test_empty_snapshot_answers_with_nothing(self, tmp_path: Path) -> None:
        publish_snapshot(tmp_path, "s1", "g1", {}, [])
        found = open_snapshot(tmp_path / "s1").search(grid_vectors(1, 2), 3)
        assert found.item_ids.tolist() == [[None] * 3] * 2
        assert np.isnan(found.scores).all()

    def test_several_widths_are_merged_where_declared(self, tmp_path: Path) -> None:
        wide = np.array([[0, 0, 1], [0, 0.6, 0.8]], dtype=np.float32)
        narrow = np.array([[1, 0], [0, 1]], dtype=np.float32)
        rows = [
            SegmentRows("g1", ["b", "d"], [1, 1], lambda positions: narrow[positions]),
            SegmentRows("g2", ["a", "c"], [1, 1], lambda positions: wide[positions]),
        ]
        query = np.array([[0, 0.6, 0.8]], dtype=np.float32)
        publish_snapshot(tmp_path, "s1", "g2", {}, rows)
        with pytest.raises(WidthMismatchError, match="width 3, found 2"):
            open_snapshot(tmp_path / "s1").search(query, 1)
        publish_snapshot(tmp_path, "s2", "g2", {}, rows, prefix_widths=[2])
        found = open_snapshot(tmp_path / "s2").search(query, 4)
        assert found.item_ids.tolist() == [["c", "d", "a", "b"]]
        np.testing.assert_allclose(found.scores, [[1, 1, 0.8, 0]], atol=1e-6)
        assert found.generations.tolist() == [["g2", "g1", "g2", "g1"]]

    def test_contradicting_rows_and_names_are_refused(self, tmp_path: Path) -> None:
        rows = [SegmentRows("g1", ["a", "a"], [1, 2], lambda positions: grid_vectors(0, len(positions)))]
        with pytest.raises(ValueError, match="one row per item, found 2 for 1"):
            publish_snapshot(tmp_path, "s1", "g1", {}, rows)
        publish_snapshot(tmp_path, "s1", "g1", {}, [])
        with pytest.raises(FileExistsError, match="expected a new name"):
            publish_snapshot(tmp_path, "s1", "g1", {}, [])
        write_segment(tmp_path, "x", grid_vectors(0, 1), ["a"], [1], "g1")
        with pytest.raises(FileExistsError):
            write_segment(tmp_path, "x", grid_vectors(1, 1), ["a"], [1], "g1")

    def test_pruning_keeps_what_kept_snapshots_serve(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 40), "g1", 1)
        first = shelf.publish(tmp_path, "s1")
        shelf.put(names(0, 10), "g2", 2)
        second = shelf.publish(tmp_path, "s2", first)
        shelf.put(names(0, 40), "g3", 3)
        shelf.publish(tmp_path, "s3", second)
        (tmp_path / "newest.json").write_text("{}")
        assert prune_snapshots(tmp_path, ["s3"], older_than_s=600) == 0  # a publication may be under way
        assert prune_snapshots(tmp_path, ["s3"]) > 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["newest.json", "s3", "segments"]
        assert len(list((tmp_path / "segments").iterdir())) == 2
        check(open_snapshot(tmp_path / "s3").search(grid_vectors(5, 4), 8), shelf.expected(grid_vectors(5, 4), 8))

    @settings(max_examples=25)
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["put", "delete"]), st.integers(0, 30), st.integers(1, 12), st.integers(1, 3)),
            min_size=1,
            max_size=6,
        ),
        k=st.integers(1, 6),
    )
    def test_every_history_of_publications_equals_the_oracle(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, int]], k: int
    ) -> None:
        root = tmp_path_factory.mktemp("index")
        shelf, manifest, served = Shelf(), None, None
        for number, (act, start, count, generation) in enumerate(steps):
            if act == "put":
                shelf.put(names(start, start + count), f"g{generation}", number)
            else:
                for item_id in names(start, start + count):
                    shelf.items.pop(item_id, None)
            manifest = shelf.publish(root, f"s{number}", manifest)
            served = open_snapshot(root / f"s{number}")
            check(served.search(grid_vectors(99, 3), k), shelf.expected(grid_vectors(99, 3), k))


class TestDamage:
    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        shelf = Shelf()
        shelf.put(names(0, 50), "g1", 1)
        shelf.publish(tmp_path, "s1")
        return tmp_path / "s1"

    @pytest.mark.parametrize("ending", [".faiss", ".rows.parquet", ".bitmap"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_damaged_files_are_refused(self, snapshot: Path, ending: str, damage: str) -> None:
        (path,) = (file for file in snapshot.parent.rglob("*") if file.name.endswith(ending))
        content = bytearray(path.read_bytes())
        if damage == "remove":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[:-1])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        with pytest.raises(IndexCorruptedError, match=r"expected .*, found .*rebuild the index"):
            open_snapshot(snapshot)

    def test_damaged_or_missing_manifest_is_refused(self, snapshot: Path) -> None:
        path = snapshot / "manifest.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "format_version": 99}))
        with pytest.raises(UnknownFormatError, match="expected format_version 1, found 99"):
            open_snapshot(snapshot)
        path.write_text(json.dumps({**values, "extra": 1}))
        with pytest.raises(IndexCorruptedError, match="1 wrong fields"):
            open_snapshot(snapshot)
        path.write_text("{")
        with pytest.raises(IndexCorruptedError, match="manifest"):
            open_snapshot(snapshot)
        path.unlink()
        with pytest.raises(IndexCorruptedError, match="FileNotFoundError"):
            open_snapshot(snapshot)

    @pytest.mark.parametrize("point", ["snapshot-after-segment", "snapshot-before-manifest"])
    def test_crash_while_publishing_leaves_the_earlier_snapshot_and_can_be_repeated(
        self, tmp_path: Path, point: str
    ) -> None:
        shelf = Shelf()
        shelf.put(names(0, 30), "g1", 1)
        first = shelf.publish(tmp_path, "s1")
        shelf.put(names(0, 10), "g2", 2)

        def die(name: str) -> None:
            if name == point:
                raise KeyboardInterrupt

        set_crash_hook(die)
        try:
            with pytest.raises(KeyboardInterrupt):
                shelf.publish(tmp_path, "s2", first)
        finally:
            set_crash_hook(None)
        with pytest.raises(IndexCorruptedError):
            open_snapshot(tmp_path / "s2")
        assert open_snapshot(tmp_path / "s1").num_rows == 30
        shelf.publish(tmp_path, "s2", first)
        check(open_snapshot(tmp_path / "s2").search(grid_vectors(5, 4), 8), shelf.expected(grid_vectors(5, 4), 8))


class TestSwaps:
    def test_waves_in_place_equal_the_oracle(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 80), "g1", 1)
        manifest = shelf.publish(tmp_path, "s1")
        searcher = SwappableSearcher(tmp_path / "s1")
        for wave, (start, stop) in enumerate([(10, 30), (20, 50), (0, 5)]):
            shelf.put(names(start, stop), "g2", 20 + wave)
            vectors = np.stack([shelf.items[item_id][2] for item_id in names(start, stop)])
            searcher.apply_wave(names(start, stop), vectors, "g2", f"wave{wave}")
            found = searcher.search(grid_vectors(7, 6), 9)
            check(found, shelf.expected(grid_vectors(7, 6), 9))
            assert found.snapshot_id == f"wave{wave}"
        shelf.publish(tmp_path, "s2", manifest)
        assert searcher.swap(tmp_path / "s2") == "s2"
        check(searcher.search(grid_vectors(7, 6), 9), shelf.expected(grid_vectors(7, 6), 9))

    def test_what_cannot_be_applied_or_opened_changes_nothing(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 20), "g1", 1)
        shelf.publish(tmp_path, "s1")
        searcher = SwappableSearcher(tmp_path / "s1")
        expected = shelf.expected(grid_vectors(7, 3), 5)
        with pytest.raises(WidthMismatchError, match="found 1 more such as i0020"):
            searcher.apply_wave(names(19, 21), grid_vectors(2, 2), "g2", "w")
        with pytest.raises(WidthMismatchError, match="width 3"):
            searcher.apply_wave(names(1, 3), grid_vectors(2, 2, 3), "g2", "w")
        with pytest.raises(NonFiniteEmbeddingError):
            searcher.apply_wave(names(1, 2), np.full((1, WIDTH), np.nan, dtype=np.float32), "g2", "w")
        with pytest.raises(IndexCorruptedError):
            searcher.swap(tmp_path / "absent")
        found = searcher.search(grid_vectors(7, 3), 5)
        check(found, expected)
        assert found.snapshot_id == "s1"

    @pytest.mark.timeout(60)
    def test_no_query_sees_a_torn_state_while_waves_and_swaps_go_on(self, tmp_path: Path) -> None:
        """All rows of a state have one direction of their own, so a mixture of two states is visible in any answer."""
        num = 400
        item_ids = names(0, num)
        queries = np.eye(8, dtype=np.float32)[:3]

        def state(number: int) -> NDArray[np.float32]:
            return np.full((num, 8), (number + 1) / 64, dtype=np.float32)

        def publish(name: str, number: int) -> None:
            part = SegmentRows("g1", item_ids, np.full(num, number), lambda positions: state(number)[positions])
            publish_snapshot(tmp_path, name, "g1", {}, [part])

        publish("n0", 0)
        publish("n1", 1)
        searcher = SwappableSearcher(tmp_path / "n0")
        stop = threading.Event()
        problems: list[str] = []
        answers = [0] * 4

        def ask(worker: int) -> None:
            while not stop.is_set():
                found = searcher.search(queries, 300)
                expected = np.float32((int(found.snapshot_id[1:]) + 1) / 64)
                if not (found.scores == expected).all() or found.item_ids[0, 0] != "i0000":
                    problems.append(f"{found.snapshot_id}: {np.unique(found.scores)}")
                answers[worker] += 1

        threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 2
        number, waves = 1, 0
        while time.monotonic() < until:
            number += 1
            searcher.apply_wave(item_ids, state(number), "g1", f"n{number}")
            waves += 1
            if waves % 10 == 0:
                searcher.swap(tmp_path / "n1")
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []
        assert waves > 10
        assert min(answers) > 0

    def test_a_searcher_taken_before_a_wave_answers_from_one_state(self, tmp_path: Path) -> None:
        shelf = Shelf()
        shelf.put(names(0, 10), "g1", 1)
        shelf.publish(tmp_path, "s1")
        searcher = SwappableSearcher(tmp_path / "s1")
        taken = searcher.current
        searcher.apply_wave(names(0, 10), grid_vectors(4, 10), "g2", "w1")
        assert taken.search(grid_vectors(7, 1), 1).snapshot_id == "s1"
        assert taken is not searcher.current


def test_manifest_holds_plain_values(tmp_path: Path) -> None:
    version: Mapping[str, object] = {"items": 3, "vectors": 4}
    written = publish_snapshot(tmp_path, "s1", "g2", version, [], prefix_widths={4, 2})
    assert read_manifest(tmp_path / "s1") == written
    assert written.gallery_version == version
    assert written.prefix_widths == (2, 4)
    assert search.read_manifest is read_manifest
