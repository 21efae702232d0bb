"""Metrics from ranks against loops over full rankings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graceful.evaluation.outcomes import outcome_from_ranks
from graceful.evaluation.retrieval import (
    average_precision_at_r,
    chance,
    cmc_curve,
    mean_average_precision,
    mean_average_precision_at_r,
    metric_of,
    recall_at_k,
)

RANKINGS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=8)


def as_ranks(rankings: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    per_query = [np.flatnonzero(ranking) + 1 for ranking in rankings]
    offsets = np.cumsum([0, *map(len, per_query)])
    return offsets, np.concatenate([np.zeros(0, np.int64), *per_query])


@given(RANKINGS)
def test_metrics_agree_with_loops_over_the_rankings(rankings: list[list[bool]]) -> None:
    offsets, ranks = as_ranks(rankings)
    first, precision = outcome_from_ranks(offsets, ranks)
    relevant = [ranking for ranking in rankings if any(ranking)]
    if not relevant:
        assert np.isnan(recall_at_k(first, 3))
        assert np.isnan(mean_average_precision(precision))
        assert np.isnan(mean_average_precision_at_r(offsets, ranks))
        return
    assert recall_at_k(first, 3) == pytest.approx(np.mean([any(ranking[:3]) for ranking in relevant]))
    assert mean_average_precision(precision) == pytest.approx(np.mean([ap(r, len(r)) for r in relevant]), rel=1e-5)
    assert mean_average_precision_at_r(offsets, ranks) == pytest.approx(np.mean([ap(r, sum(r)) for r in relevant]))


def ap(ranking: list[bool], depth: int) -> float:
    total = sum(sum(ranking[: i + 1]) / (i + 1) for i in range(depth) if ranking[i])
    return total / sum(ranking)


def test_cmc_rises_to_one_and_ignores_queries_without_relevant_rows() -> None:
    curve = cmc_curve(np.array([1, 4, 2, 0, 9]), 10)
    assert (np.diff(curve) >= 0).all()
    assert (curve[0], curve[-1]) == (0.25, 1.0)
    with pytest.raises(ValueError, match="max_rank"):
        cmc_curve(np.array([1]), 0)


def test_one_query_none_and_a_perfect_ranking() -> None:
    assert recall_at_k(np.array([1])) == 1.0
    assert np.isnan(recall_at_k(np.zeros(0, np.int32)))
    assert average_precision_at_r(np.array([0, 3]), np.array([1, 2, 3])).tolist() == [1.0]


def test_a_state_that_was_not_evaluated_is_nan(planted) -> None:
    outcomes = planted(num_queries=10)
    assert np.isnan(metric_of(outcomes, "pair/g9/g9"))
    assert metric_of(outcomes, "served") == 0.7


@pytest.mark.parametrize(("metric", "k"), [("recall@k", 1), ("recall@k", 5), ("mAP", 1)])
def test_chance_is_what_random_rankings_reach(metric, k) -> None:
    rng = np.random.default_rng(0)
    relevant, rows = np.array([1, 3, 10, 0]), np.array([30, 30, 12, 30])
    found = []
    for num_relevant, num_rows in zip(relevant[:3], rows[:3], strict=True):
        ranks = np.array([np.sort(rng.permutation(num_rows)[:num_relevant]) + 1 for _ in range(20_000)])
        precision = (np.arange(1, num_relevant + 1) / ranks).mean()
        found.append(precision if metric == "mAP" else (ranks[:, 0] <= k).mean())
    assert chance(relevant, rows, metric, k) == pytest.approx(np.mean(found), abs=0.005)
    assert chance(np.array([0]), np.array([5]), metric, k) is None
