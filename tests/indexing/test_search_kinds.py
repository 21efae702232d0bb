"""Approximate kinds: recall is measured on held-out rows, promised by K, kept after changes, or search stays exact."""

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from graceful.indexing.index_choice import COMPRESSED_FROM_ROWS, FLAT_BELOW_ROWS, IndexReport, SearchConfig
from graceful.indexing.kinds import build_index, choose_index, num_lists_for
from graceful.indexing.parts import AddedRows
from graceful.indexing.search import IndexState, build_state, open_snapshot
from graceful.indexing.snapshots import SegmentRows, SnapshotSource, publish_snapshot

KINDS = ["ivf", "ivf_sq8", "ivf_pq", "hnsw"]


def clustered(num: int, width: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Rows in clusters of about 100, unit length."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((max(2, num // 100), width))
    rows = centres[rng.integers(0, len(centres), num)] + 0.4 * rng.standard_normal((num, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def state_of(vectors: NDArray[np.float32], config: SearchConfig) -> IndexState:
    rows = [SegmentRows("g1", np.arange(len(vectors)), lambda positions: vectors[positions])]
    return build_state("s", "g1", rows, config=config)


def recall(state: IndexState, vectors: NDArray[np.float32], live: NDArray[np.bool_], k: int) -> float:
    queries = clustered(200, seed=5)
    found = state.search(queries, k)
    scores = np.where(live, queries @ vectors.T, -np.inf)
    exact = np.argsort(-scores, axis=1)[:, :k]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found.revisions, exact, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_reaches_the_recall_that_it_reports_and_scores_exactly(kind: str) -> None:
    vectors = clustered(8_000)
    state = state_of(vectors, SearchConfig(index=kind, recall_target=0.9))
    report = state.reports[32]
    assert isinstance(report, IndexReport)
    assert (report.kind, report.num_queries) == (kind, 800)
    assert report.oracle.startswith("exact")
    assert all(entry.recall >= 0.9 for entry in report.measured)
    everything = np.ones(len(vectors), bool)
    assert recall(state, vectors, everything, 10) > 0.85
    queries = clustered(5, seed=6)
    found = state.search(queries, 10)
    exact = np.einsum("qd,qkd->qk", queries, vectors[found.revisions])
    assert found.scores.tolist() == exact.tolist()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    # More than was measured is answered exactly.
    assert recall(state, vectors, everything, 150) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_dead_rows_are_never_found_and_fresh_ones_are(kind: str) -> None:
    vectors = clustered(8_000)
    state = state_of(vectors, SearchConfig(index=kind, recall_target=0.9))
    live = np.random.default_rng(1).random(len(vectors)) > 0.3
    fresh = clustered(3, seed=9)
    changed = state.changed("t", np.flatnonzero(~live), [AddedRows("g2", np.arange(9_000, 9_003), fresh)])
    found = changed.search(clustered(200, seed=5), 10).revisions
    assert live[found[found < 9_000]].all()
    assert recall(changed, vectors, live, 10) > 0.8
    assert changed.search(fresh, 1).revisions[:, 0].tolist() == [9_000, 9_001, 9_002]
    # The first state shares the index and finds what it found.
    assert recall(state, vectors, np.ones(len(vectors), bool), 10) > 0.85


def test_a_query_among_dead_rows_is_answered_exactly() -> None:
    vectors = clustered(4_000)
    state = state_of(vectors, SearchConfig(index="ivf", recall_target=0.9))
    query = vectors[:1]
    order = np.argsort(-(vectors @ query[0]))
    changed = state.changed("t", np.sort(order[:3_990]))
    assert changed.search(query, 10).revisions[0].tolist() == order[3_990:].tolist()


def test_a_target_that_no_breadth_reaches_leaves_search_exact_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((6_000, 64)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        state = state_of(noise, SearchConfig(index="ivf", recall_target=1.0))
    assert state.reports == {64: None}
    assert len(caplog.records) == 1
    assert "recall@10 of 1.000" in caplog.text


def test_too_few_rows_leave_search_exact(caplog: pytest.LogCaptureFixture) -> None:
    assert state_of(clustered(20), SearchConfig(index="ivf")).reports == {32: None}
    assert len(caplog.records) == 1
    assert choose_index("ivf_pq", clustered(5_000, width=30), 0.5) is None


def test_auto_chooses_by_size() -> None:
    config = SearchConfig()
    assert config.kind_for(FLAT_BELOW_ROWS - 1) == "flat"
    assert config.kind_for(FLAT_BELOW_ROWS) == "ivf"
    assert config.kind_for(COMPRESSED_FROM_ROWS) == "ivf_sq8"
    assert SearchConfig(index="hnsw").kind_for(10) == "hnsw"
    assert [num_lists_for(rows) for rows in (10, 1_000, 1_000_000)] == [1, 31, 4_096]
    with pytest.raises(ValueError, match="approximate kind"):
        build_index("flat", clustered(1_000), np.arange(9))


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_index_says_what_was_measured_and_is_used_again(tmp_path: Path, kind: str) -> None:
    vectors = clustered(8_000)
    config = SearchConfig(index=kind, recall_target=0.9)

    def publish(name: str, num: int, reuse: object = None) -> object:
        more = np.concatenate([vectors, clustered(num - len(vectors), seed=2)]) if num > len(vectors) else vectors
        rows = [SegmentRows("g1", np.arange(num), lambda positions: more[positions])]
        source = SnapshotSource("g1", {"items": 1, "vectors": 1}, ["g1"], rows)
        return publish_snapshot(tmp_path, name, source, reuse, config=config)

    first = publish("s1", 8_000)
    state = open_snapshot(tmp_path / "s1")
    assert state.reports[32] == first.indexes[0].report
    assert recall(state, vectors, np.ones(len(vectors), bool), 10) > 0.85
    second = publish("s2", 8_100, first)
    assert second.indexes == first.indexes
    assert [entry.segment.num_rows for entry in second.segments] == [8_000, 100]
    again = open_snapshot(tmp_path / "s2")
    assert again.num_rows == 8_100
    assert again.search(clustered(100, seed=2), 1).revisions[:, 0].tolist() == list(range(8_000, 8_100))
    third = publish("s3", 9_000, second)
    assert third.indexes[0].index_id != first.indexes[0].index_id
