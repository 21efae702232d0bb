"""Exact ranks and top-k against brute force in Python, on grids of vectors whose products are exact."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

import graceful.indexing.exact as exact
import graceful.indexing.ranking as ranking
from graceful.indexing.exact import (
    NonFiniteEmbeddingError,
    RelevantRanks,
    WidthMismatchError,
    rank_states,
    relevant_ranks,
    top_k,
)


def grid_vectors(rng: np.random.Generator, num: int, width: int) -> NDArray[np.float32]:
    """Small multiples of 1/4: every product is exact in float32, and ties are many."""
    return (rng.integers(-4, 5, (num, width)) / 4).astype(np.float32)


def unit_vectors(rng: np.random.Generator, num: int, width: int) -> NDArray[np.float32]:
    values = rng.standard_normal((num, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def mixed(galleries: dict[str, NDArray[np.float32]], owner: NDArray[np.int64]) -> NDArray[np.float32]:
    """The gallery whose row i is row i of the generation that owns it."""
    stacked = np.stack(list(galleries.values()))
    return stacked[owner, np.arange(len(owner))]


def brute_ranks(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    query_identities: list[str],
    gallery_identities: list[str],
    query_items: list[str] | None = None,
    gallery_items: list[str] | None = None,
) -> list[list[int]]:
    found = []
    for row, query in enumerate(queries):
        others = [
            (float(query @ vector), gallery_identities[column] == query_identities[row])
            for column, vector in enumerate(gallery)
            if query_items is None or gallery_items is None or gallery_items[column] != query_items[row]
        ]
        # Highest score first; among equal scores the irrelevant ones first.
        others.sort(key=lambda pair: (-pair[0], pair[1]))
        found.append([rank for rank, (_, relevant) in enumerate(others, start=1) if relevant])
    return found


def as_lists(ranks: RelevantRanks) -> list[list[int]]:
    return [ranks.of_query(query).tolist() for query in range(len(ranks.offsets) - 1)]


class TestRelevantRanks:
    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_queries=st.integers(0, 7),
        num_rows=st.integers(0, 30),
        num_identities=st.integers(1, 6),
        block_rows=st.integers(1, 5),
        with_items=st.booleans(),
    )
    def test_equals_brute_force_with_ties_and_own_items(
        self, seed: int, num_queries: int, num_rows: int, num_identities: int, block_rows: int, with_items: bool
    ) -> None:
        rng = np.random.default_rng(seed)
        queries, gallery = grid_vectors(rng, num_queries, 3), grid_vectors(rng, num_rows, 3)
        query_identities = [f"p{code}" for code in rng.integers(0, num_identities, num_queries)]
        gallery_identities = [f"p{code}" for code in rng.integers(0, num_identities, num_rows)]
        query_items = [f"i{code}" for code in rng.permutation(40)[:num_queries]] if with_items else None
        gallery_items = [f"i{code}" for code in rng.permutation(40)[:num_rows]] if with_items else None
        arguments = (queries, gallery, query_identities, gallery_identities, query_items, gallery_items)
        ranks = relevant_ranks(*arguments, block_rows=block_rows)
        assert as_lists(ranks) == brute_ranks(*arguments)
        assert (ranks.offsets.dtype, ranks.ranks.dtype) == (np.int64, np.int32)

    @pytest.mark.parametrize("num_identities", [1, 3, 12, 400])
    def test_comparing_and_sorting_agree_with_brute_force(self, num_identities: int) -> None:
        """Few and many relevant rows, ranked high and low: all branches."""
        rng = np.random.default_rng(num_identities)
        centres = grid_vectors(rng, num_identities, 6)
        gallery_codes = rng.integers(0, num_identities, 600)
        query_codes = rng.integers(0, num_identities, 20)
        query_identities = [f"p{code}" for code in query_codes]
        gallery_identities = [f"p{code}" for code in gallery_codes]
        for weight in (0, 1):  # 0: identities do not matter; 1: they dominate
            gallery = grid_vectors(rng, 600, 6) + weight * 8 * centres[gallery_codes]
            queries = grid_vectors(rng, 20, 6) + weight * 8 * centres[query_codes]
            ranks = relevant_ranks(queries, gallery, query_identities, gallery_identities)
            assert as_lists(ranks) == brute_ranks(queries, gallery, query_identities, gallery_identities)

    def test_collapsed_space_scores_worst(self) -> None:
        rng = np.random.default_rng(0)
        vector = unit_vectors(rng, 1, 37)
        num_rows = 997
        identities = [f"p{row}" for row in range(num_rows)]
        ranks = relevant_ranks(np.repeat(vector, 53, 0), np.repeat(vector, num_rows, 0), identities[:53], identities)
        assert (ranks.ranks == num_rows).all()

    def test_column_order_does_not_matter(self) -> None:
        rng = np.random.default_rng(1)
        queries, gallery = unit_vectors(rng, 9, 16), unit_vectors(rng, 200, 16)
        query_identities = np.array([f"p{row % 5}" for row in range(9)])
        gallery_identities = np.array([f"p{row % 7}" for row in range(200)], dtype=object)
        order = rng.permutation(200)
        left = relevant_ranks(queries, gallery, query_identities, gallery_identities)
        right = relevant_ranks(queries, gallery[order], query_identities, gallery_identities[order])
        assert as_lists(left) == as_lists(right)

    def test_unknown_identities_match_nothing(self) -> None:
        vectors = np.eye(4, dtype=np.float32)
        ranks = relevant_ranks(vectors[:3], vectors, ["", None, "a"], ["", None, "a", "a"])  # type: ignore[list-item]
        assert as_lists(ranks) == [[], [], [1, 4]]
        assert ranks.first().tolist() == [0, 0, 1]

    def test_own_item_is_known_by_id_and_not_by_label(self) -> None:
        vectors = np.eye(3, dtype=np.float32)
        ranks = relevant_ranks(vectors[:1], vectors, ["a"], ["a", "a", "b"], ["x"], ["x", "y", "z"])
        assert as_lists(ranks) == [[2]]  # x itself is left out; z ties with y and counts as before it

    def test_classification_is_retrieval_over_rows(self) -> None:
        rows = np.eye(3, dtype=np.float32)
        queries = np.array([[1, 0.5, 0], [0.5, 1, 0.75]], dtype=np.float32)
        ranks = relevant_ranks(queries, rows, ["cat", "bird"], ["cat", "dog", "bird"])
        assert ranks.first().tolist() == [1, 2]

    def test_read_only_and_empty_input(self) -> None:
        gallery = np.eye(2, dtype=np.float32)
        gallery.flags.writeable = False
        assert as_lists(relevant_ranks(gallery, gallery, ["a", "b"], ["a", "b"])) == [[1], [1]]
        empty = np.zeros((0, 2), dtype=np.float32)
        assert as_lists(relevant_ranks(gallery, empty, ["a", "b"], [])) == [[], []]
        assert as_lists(relevant_ranks(empty, gallery, [], ["a", "b"])) == []

    def test_non_finite_rows_are_named(self) -> None:
        vectors = np.eye(4, dtype=np.float32)
        broken = vectors.copy()
        broken[2, 1] = np.nan
        with pytest.raises(NonFiniteEmbeddingError, match="gallery vectors of gallery, found NaN or infinity in row 2"):
            relevant_ranks(vectors, broken, list("abcd"), list("abcd"))
        with pytest.raises(NonFiniteEmbeddingError, match="query vectors"):
            top_k(broken, vectors, 1)

    def test_contradicting_arguments_are_refused(self) -> None:
        vectors = np.eye(2, dtype=np.float32)
        with pytest.raises(ValueError, match="of neither"):
            relevant_ranks(vectors, vectors, ["a", "b"], ["a", "b"], ["x", "y"])
        with pytest.raises(ValueError, match="expected 3 gallery vectors"):
            relevant_ranks(vectors, vectors, ["a", "b"], ["a", "b", "c"])


class TestWidths:
    def test_prefix_is_cut_and_normalised_only_where_declared(self) -> None:
        queries = np.array([[0.6, 0.0, 0.8]], dtype=np.float32)
        gallery = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
        with pytest.raises(WidthMismatchError, match="width 3, found 2"):
            top_k(queries, gallery, 1)
        scores, indices = top_k(queries, gallery, 1, prefix_widths=[2])
        assert indices.tolist() == [[1]]
        np.testing.assert_allclose(scores, 1.0)
        ranks = relevant_ranks(queries, gallery, ["a"], ["b", "a"], prefix_widths=[2])
        assert as_lists(ranks) == [[1]]

    def test_a_wider_gallery_is_never_searched(self) -> None:
        with pytest.raises(WidthMismatchError, match="width 2, found 3"):
            top_k(np.eye(2, dtype=np.float32), np.eye(3, dtype=np.float32), 1, prefix_widths=[3])

    def test_error_survives_pickling(self) -> None:
        assert "x" in str(pickle.loads(pickle.dumps(WidthMismatchError("x"))))


class TestStates:
    @settings(max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 40), block_rows=st.integers(1, 6))
    def test_every_state_equals_its_own_brute_force(self, seed: int, num_rows: int, block_rows: int) -> None:
        rng = np.random.default_rng(seed)
        queries = {name: grid_vectors(rng, 6, 4) for name in ("g1", "g2")}
        galleries = {name: grid_vectors(rng, num_rows, 4) for name in ("g1", "g2", "g3")}
        mixes = {f"mix{number}": rng.integers(0, 3, num_rows) for number in range(3)}
        query_identities = [f"p{code}" for code in rng.integers(0, 4, 6)]
        gallery_identities = [f"p{code}" for code in rng.integers(0, 4, num_rows)]
        pairs = [(query, state) for query in queries for state in [*galleries, *mixes] if rng.random() < 0.6]
        ranked = rank_states(
            queries, galleries, pairs, query_identities, gallery_identities, mixes=mixes, block_rows=block_rows
        )
        assert list(ranked) == pairs
        for query, state in pairs:
            gallery = galleries[state] if state in galleries else mixed(galleries, mixes[state])
            expected = brute_ranks(queries[query], gallery, query_identities, gallery_identities)
            assert as_lists(ranked[query, state]) == expected

    def test_a_mix_may_hold_several_widths(self) -> None:
        queries = {"new": np.array([[0.6, 0.0, 0.8]], dtype=np.float32)}
        galleries = {
            "old": np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32),
            "new": np.array([[0, 0, 1], [0, 0, 1]], dtype=np.float32),
        }
        ranked = rank_states(
            queries,
            galleries,
            [("new", "mix")],
            ["a"],
            ["b", "a"],
            mixes={"mix": ["old", "new"]},
            prefix_widths={"new": [2]},
        )
        assert as_lists(ranked["new", "mix"]) == [[2]]

    def test_unknown_names_are_listed(self) -> None:
        vectors = {"g1": np.eye(2, dtype=np.float32)}
        with pytest.raises(ValueError, match=r"\['g1'\].*found \('g1', 'g2'\)"):
            rank_states(vectors, vectors, [("g1", "g2")], ["a", "b"], ["a", "b"])
        with pytest.raises(ValueError, match=r"expected owners among \['g1'\], found \['g9'\]"):
            rank_states(vectors, vectors, [("g1", "mix")], ["a", "b"], ["a", "b"], mixes={"mix": ["g1", "g9"]})


class TestTopK:
    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_rows=st.integers(0, 400),
        k=st.integers(1, 8),
        chunk=st.sampled_from([2, 8, 64]),
        with_exclude=st.booleans(),
    )
    def test_equals_a_stable_sort(self, seed: int, num_rows: int, k: int, chunk: int, with_exclude: bool) -> None:
        rng = np.random.default_rng(seed)
        queries, gallery = grid_vectors(rng, 5, 3), grid_vectors(rng, num_rows, 3)
        exclude = rng.integers(-1, num_rows, 5) if with_exclude and num_rows else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exact, "CHUNK", chunk)
            scores, indices = top_k(queries, gallery, k, exclude=exclude, block_rows=2)
        for row, query in enumerate(queries):
            columns = [c for c in range(num_rows) if exclude is None or c != exclude[row]]
            columns.sort(key=lambda c: (-float(query @ gallery[c]), c))
            expected = columns[:k]
            assert indices[row].tolist() == expected + [-1] * (k - len(expected))
            assert scores[row, : len(expected)].tolist() == [float(query @ gallery[c]) for c in expected]
            assert np.isnan(scores[row, len(expected) :]).all()

    def test_k_below_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="k >= 1, found 0"):
            top_k(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 0)


class TestTiles:
    """The same ranks however the products are cut, and whichever way they are counted."""

    @pytest.fixture(
        params=[
            {"LOOK_UP_NS": 0},
            {"LOOK_UP_NS": 10**9, "COMPARE_NS": 0},
            {"LOOK_UP_NS": 10**9, "SORT_NS": 0, "FIND_NS": 0, "ROW_NS": 0},
        ],
        ids=["looked up", "compared", "sorted"],
    )
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        small = {"TILE_COLUMNS": 7, "SORTED_COLUMNS": 11, "SPAN_COLUMNS": 14, "STRIP_ROWS": 3, "STRIP_COLUMNS": 5}
        for name, value in {**small, **request.param}.items():
            monkeypatch.setattr(ranking, name, value)

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize(("num_identities", "block_rows"), [(1, 4), (3, 9), (12, 50), (60, 50)])
    def test_ranks_are_those_of_brute_force(self, num_identities: int, block_rows: int) -> None:
        rng = np.random.default_rng(num_identities)
        queries, gallery = grid_vectors(rng, 40, 4), grid_vectors(rng, 83, 4)
        names = [f"id{number}" for number in range(num_identities)]
        asked, shown = rng.choice(names, 40).tolist(), rng.choice(names, 83).tolist()
        items, rows = [f"i{number}" for number in range(40)], [f"i{number}" for number in range(83)]
        found = relevant_ranks(queries, gallery, asked, shown, items, rows, block_rows=block_rows)
        assert as_lists(found) == brute_ranks(queries, gallery, asked, shown, items, rows)

    @pytest.mark.parametrize("width", [24, 128, 700])
    @pytest.mark.parametrize(("num_queries", "num_rows"), [(5, 3000), (400, 900), (400, 3000), (1300, 1100)])
    def test_equal_vectors_are_ranked_last_in_products_of_any_size(
        self, num_queries: int, num_rows: int, width: int
    ) -> None:
        vector = unit_vectors(np.random.default_rng(width), 1, width)
        queries, gallery = np.repeat(vector, num_queries, axis=0), np.repeat(vector, num_rows, axis=0)
        asked = [str(number) for number in range(num_queries)]
        shown = [str(number % 450) for number in range(num_rows)]
        found = relevant_ranks(queries, gallery, asked, shown)
        num_relevant = np.diff(found.offsets)
        measured = num_relevant > 0
        np.testing.assert_array_equal(found.first()[measured], (num_rows - num_relevant + 1)[measured])

    def test_blas_has_its_threads_back_afterwards(self) -> None:
        before = [entry["num_threads"] for entry in threadpool_info()]
        rng = np.random.default_rng(0)
        relevant_ranks(unit_vectors(rng, 5, 8), unit_vectors(rng, 9, 8), ["a"] * 5, ["a"] * 9)
        assert [entry["num_threads"] for entry in threadpool_info()] == before

    @pytest.mark.parametrize(("below", "rank"), [(2**-22, 2), (2**-20, 1)])
    def test_scores_within_the_tolerance_are_ties(self, below: float, rank: int) -> None:
        gallery = np.array([[0.5, 0], [0.5 - below, 0]], np.float32)
        found = relevant_ranks(np.array([[1, 0]], np.float32), gallery, ["a"], ["a", "b"])
        assert found.first().tolist() == [rank]
