"""The index in memory against the exact oracle: mixed generations, changes, ties, dead rows, widths, and threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.indexing.index_choice import SearchConfig
from graceful.indexing.parts import AddedRows
from graceful.indexing.search import IndexState, SearchResult, build_state
from graceful.indexing.snapshots import SegmentRows

WIDTH = 6


def grid_vectors(seed: int, num: int, width: int = WIDTH) -> NDArray[np.float32]:
    """Small multiples of 1/4: products are exact, ties are many."""
    return (np.random.default_rng(seed).integers(-4, 5, (num, width)) / 4).astype(np.float32)


@dataclass
class Shelf:
    """A view in a dictionary: revision -> (generation, vector)."""

    rows: dict[int, tuple[str, NDArray[np.float32]]] = field(default_factory=dict)

    def put(self, revisions: Sequence[int], generation: str, seed: int, width: int = WIDTH) -> AddedRows:
        vectors = grid_vectors(seed, len(revisions), width)
        for revision, vector in zip(revisions, vectors, strict=True):
            self.rows[revision] = (generation, vector)
        return AddedRows(generation, np.array(revisions, np.int64), vectors)

    def drop(self, revisions: Sequence[int]) -> NDArray[np.int64]:
        for revision in revisions:
            self.rows.pop(revision, None)
        return np.array(revisions, np.int64)

    def segment_rows(self) -> list[SegmentRows]:
        parts = []
        for generation in sorted({owner for owner, _ in self.rows.values()}):
            mine = np.array([revision for revision, (owner, _) in self.rows.items() if owner == generation])

            def load(positions: NDArray[np.int64], mine: NDArray[np.int64] = mine) -> NDArray[np.float32]:
                return np.stack([self.rows[int(revision)][1] for revision in mine[positions]])

            parts.append(SegmentRows(generation, mine, load))
        return parts

    def state(self, name: str = "s0") -> IndexState:
        return build_state(name, "g9", self.segment_rows())

    def copy(self) -> Shelf:
        return Shelf(dict(self.rows))


def brute_force(shelf: Shelf, queries: NDArray[np.float32], k: int) -> SearchResult:
    """The oracle: every score, sorted by (score, then the lower revision)."""
    revisions = np.array(sorted(shelf.rows), np.int64)
    found = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), np.nan, np.float32)
    owners = np.full((len(queries), k), None, object)
    if len(revisions):
        vectors = np.stack([shelf.rows[int(revision)][1] for revision in revisions])
        for number, query in enumerate(queries):
            every = np.einsum("d,nd->n", query, vectors)
            best = np.lexsort((revisions, -every))[:k]
            found[number, : len(best)], scores[number, : len(best)] = revisions[best], every[best]
            owners[number, : len(best)] = [shelf.rows[int(revision)][0] for revision in revisions[best]]
    return SearchResult(found, scores, owners, "")


def check(found: SearchResult, expected: SearchResult) -> None:
    assert found.revisions.tolist() == expected.revisions.tolist()
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.generations.tolist() == expected.generations.tolist()


def check_state(state: IndexState, shelf: Shelf, seed: int = 99, num: int = 5, k: int = 12) -> None:
    queries = grid_vectors(seed, num)
    check(state.search(queries, k), brute_force(shelf, queries, k))
    assert state.num_rows == len(shelf.rows)
    revisions, codes = state.live_rows()
    assert revisions.tolist() == sorted(shelf.rows)
    assert [state.generations[code] for code in codes] == [shelf.rows[int(r)][0] for r in revisions]
    owners = state.owners(revisions)
    assert owners.tolist() == codes.tolist()


class TestExact:
    def test_mixed_generations_are_searched_like_one(self) -> None:
        shelf = Shelf()
        shelf.put(range(90), "g1", 1)
        shelf.put(range(40, 130), "g2", 2)
        state, queries = shelf.state(), grid_vectors(9, 7)
        for k in (1, 5, 40, 129, 200):
            check(state.search(queries, k), brute_force(shelf, queries, k))
        assert state.search(queries, 1).snapshot_id == "s0"
        assert state.num_rows == 130

    def test_answers_do_not_depend_on_how_many_queries_are_asked(self) -> None:
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((500, 24)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        state = build_state("s", "g1", [SegmentRows("g1", np.arange(500), lambda positions: vectors[positions])])
        batch = state.search(vectors[:100], 10)
        for query in (0, 57, 99):
            alone = state.search(vectors[query : query + 1], 10)
            assert alone.scores[0].tobytes() == batch.scores[query].tobytes()
            assert alone.revisions[0].tolist() == batch.revisions[query].tolist()
        assert batch.revisions[:, 0].tolist() == list(range(100))

    def test_equal_rows_beyond_all_candidates_are_ordered_by_revision(self) -> None:
        vector = np.full((1, WIDTH), 0.25, dtype=np.float32)
        shuffled = np.random.default_rng(0).permutation(300)
        rows = [SegmentRows("g1", shuffled, lambda positions: np.repeat(vector, len(positions), 0))]
        state = build_state("s", "g1", rows)
        assert state.search(vector, 5).revisions.tolist() == [[0, 1, 2, 3, 4]]
        fewer = state.changed("t", np.array([0, 2, 3]))
        assert fewer.search(vector, 5).revisions.tolist() == [[1, 4, 5, 6, 7]]

    def test_an_empty_state_answers_with_nothing(self) -> None:
        found = Shelf().state().search(grid_vectors(1, 2), 3)
        assert found.revisions.tolist() == [[-1] * 3] * 2
        assert np.isnan(found.scores).all()
        assert found.generations.tolist() == [[None] * 3] * 2

    def test_several_widths_are_merged_where_declared(self) -> None:
        wide = np.array([[0, 0, 1], [0, 0.6, 0.8]], dtype=np.float32)
        narrow = np.array([[1, 0], [0, 1]], dtype=np.float32)
        rows = [
            SegmentRows("g1", np.array([2, 4]), lambda positions: narrow[positions]),
            SegmentRows("g2", np.array([1, 3]), lambda positions: wide[positions]),
        ]
        query = np.array([[0, 0.6, 0.8]], dtype=np.float32)
        state = build_state("s1", "g2", rows)
        with pytest.raises(WidthMismatchError, match="width 3, found 2"):
            state.search(query, 1)
        found = build_state("s2", "g2", rows, prefix_widths=[2]).search(query, 4)
        assert found.revisions.tolist() == [[3, 4, 1, 2]]
        np.testing.assert_allclose(found.scores, [[1, 1, 0.8, 0]], atol=1e-6)
        assert found.generations.tolist() == [["g2", "g1", "g2", "g1"]]
        # A row that changes its width leaves the other one.
        moved = state.changed("s3", np.empty(0, np.int64), [AddedRows("g2", np.array([2, 4]), wide)])
        assert moved.search(query, 9).revisions.tolist() == [[3, 4, 1, 2, -1, -1, -1, -1, -1]]

    def test_rows_that_are_no_numbers_are_refused_or_never_found(self) -> None:
        vectors = grid_vectors(1, 30)
        vectors[3] = np.nan
        state = build_state("s", "g1", [SegmentRows("g1", np.arange(30), lambda positions: vectors[positions])])
        found = state.search(grid_vectors(2, 2), 30)
        assert (found.revisions != 3).all()
        assert (found.revisions[:, -1] == -1).all()
        with pytest.raises(NonFiniteEmbeddingError):
            state.changed("t", np.empty(0, np.int64), [AddedRows("g1", np.array([50]), vectors[3:4])])
        with pytest.raises(NonFiniteEmbeddingError):
            state.search(vectors[3:4], 1)


class TestChanges:
    def test_each_change_equals_the_oracle_and_earlier_states_stay_as_they_were(self) -> None:
        shelf = Shelf()
        shelf.put(range(80), "g1", 1)
        states = [(shelf.state(), shelf.copy())]
        for number, (start, stop) in enumerate([(10, 30), (20, 50), (0, 5), (90, 400)]):
            added = shelf.put(range(start, stop), "g2", 20 + number)
            dead = shelf.drop([60 + number, 70 + number, 10_000])
            states.append((states[-1][0].changed(f"w{number}", dead, [added]), shelf.copy()))
        for state, expected in states:
            check_state(state, expected)

    def test_two_states_made_of_one_do_not_disturb_one_another(self) -> None:
        shelf = Shelf()
        shelf.put(range(50), "g1", 1)
        first = shelf.state().changed("a", np.empty(0, np.int64), [shelf.put([100], "g1", 2)])
        left, right = shelf.copy(), shelf.copy()
        one = first.changed("b", np.empty(0, np.int64), [left.put([101], "g1", 3)])
        other = first.changed("c", np.empty(0, np.int64), [right.put([102], "g2", 4)])
        check_state(one, left)
        check_state(other, right)
        check_state(first, shelf)

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
    def test_dead_rows_where_the_query_looks_cost_no_answer(self, share: float) -> None:
        """The dead rows are the ones that score best: all proposals of FAISS are dead."""
        rng = np.random.default_rng(3)
        vectors = rng.standard_normal((4_000, 16)).astype(np.float32)
        query = rng.standard_normal((1, 16)).astype(np.float32)
        order = np.argsort(-(vectors @ query[0]))
        dead = np.sort(order[: int(share * len(order))])
        state = build_state("s", "g1", [SegmentRows("g1", np.arange(4_000), lambda positions: vectors[positions])])
        found = state.changed("t", dead).search(query, 7)
        assert found.revisions[0].tolist() == order[len(dead) : len(dead) + 7].tolist()

    def test_a_revision_that_is_added_twice_is_refused(self) -> None:
        rows = AddedRows("g1", np.array([1]), grid_vectors(1, 1))
        with pytest.raises(ValueError, match="each added revision once"):
            Shelf().state().changed("s", np.empty(0, np.int64), [rows, rows])

    @settings(max_examples=60)
    @given(
        steps=st.lists(
            st.tuples(
                st.integers(0, 40), st.integers(0, 12), st.integers(0, 40), st.integers(0, 12), st.integers(1, 3)
            ),
            max_size=7,
        ),
        k=st.integers(1, 50),
    )
    def test_every_history_equals_the_oracle(self, steps: list[tuple[int, int, int, int, int]], k: int) -> None:
        shelf = Shelf()
        shelf.put(range(25), "g1", 7)
        state, past = shelf.state(), []
        for number, (start, count, gone, num_gone, generation) in enumerate(steps):
            past.append((state, shelf.copy()))
            dead = shelf.drop(range(gone, gone + num_gone))
            added = shelf.put(range(start, start + count), f"g{generation}", number)
            state = state.changed(f"s{number}", dead, [added])
        for each, expected in [*past, (state, shelf)]:
            check_state(each, expected, k=k)

    def test_a_change_costs_what_changed(self) -> None:
        """Ten rows of 400,000 in less than a fiftieth of the time of copying the rows once."""
        vectors = np.zeros((400_000, 32), np.float32)
        vectors[:, 0] = np.arange(400_000)
        state = build_state("s", "g", [SegmentRows("g", np.arange(400_000), lambda p: vectors[p])],
                            config=SearchConfig(index="flat"))  # fmt: skip

        def change(number: int) -> float:
            started = time.perf_counter()
            rows = np.arange(10, dtype=np.int64) + 10 * number
            state.changed("t", np.empty(0, np.int64), [AddedRows("g2", rows, np.ones((10, 32), np.float32))])
            return time.perf_counter() - started

        def copy(_: int) -> float:
            started = time.perf_counter()
            vectors.copy()
            return time.perf_counter() - started

        assert min(map(change, range(20))) < min(map(copy, range(5))) / 50


@pytest.mark.timeout(60)
def test_answers_of_many_threads_equal_brute_force_for_the_state_that_they_name() -> None:
    """Three threads search while one changes rows and builds the base anew."""
    rng = np.random.default_rng(0)
    shelf = Shelf()
    shelf.put(range(300), "g1", 1)
    current = shelf.state("n0")
    expected = {"n0": shelf.copy()}
    stop, problems, answers = threading.Event(), [], [0] * 3
    queries = grid_vectors(5, 2)

    def ask(worker: int) -> None:
        while not stop.is_set():
            found = current.search(queries, 9)
            oracle = brute_force(expected[found.snapshot_id], queries, 9)
            if found.revisions.tolist() != oracle.revisions.tolist() or found.scores.tolist() != oracle.scores.tolist():
                problems.append(found.snapshot_id)
            answers[worker] += 1

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    number, until = 0, time.monotonic() + 4
    while time.monotonic() < until:
        number += 1
        dead = shelf.drop(rng.integers(0, 400, 5).tolist())
        added = shelf.put(np.unique(rng.integers(0, 400, 20)).tolist(), f"g{1 + number % 3}", number)
        expected[f"n{number}"] = shelf.copy()
        current = shelf.state(f"n{number}") if number % 7 == 0 else current.changed(f"n{number}", dead, [added])
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert min(answers) > 10
    assert number > 20
