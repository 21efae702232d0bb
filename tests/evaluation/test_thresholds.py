"""FAR and FRR with bounds, and recalibrated thresholds, against loops, scans of the whole grid, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from graceful.evaluation.intervals import clopper_pearson, share_bounds
from graceful.evaluation.thresholds import (
    STEPS_PER_UNIT,
    Pairs,
    error_rate,
    false_accepts,
    false_rejects,
    recalibrate,
)


def pairs_of(
    num_identities: int = 60, each: int = 40, *, query_sd: float = 0.05, row_sd: float = 0.05, seed: int = 0
) -> Pairs:
    """Impostor scores with an effect of either side."""
    rng = np.random.default_rng(seed)
    queries = np.repeat(np.arange(num_identities), each)
    rows = rng.integers(0, num_identities, len(queries))
    effects = rng.normal(0, query_sd, num_identities)[queries] + rng.normal(0, row_sd, num_identities)[rows]
    return Pairs((effects + rng.normal(0, 0.15, len(queries))).astype(np.float32), queries, rows)


@pytest.mark.parametrize("threshold", [-1.0, -0.1, 0.0, 0.25, 0.9])
def test_rates_are_those_of_a_loop_and_a_score_at_the_threshold_is_accepted(threshold: float) -> None:
    pairs = pairs_of(20, 10)
    scores = pairs.scores.copy()
    scores[3] = np.float32(threshold)
    threshold = float(scores[3])  # as a search compares: in double precision
    pairs = Pairs(scores, pairs.query_groups, pairs.row_groups)
    accepted = sum(float(score) >= threshold for score in scores)
    far, frr = false_accepts(pairs, threshold), false_rejects(pairs, threshold)
    assert (far.num_errors, far.value) == (accepted, accepted / 200)
    assert (frr.num_errors, frr.num_pairs) == (200 - accepted, 200)
    each = np.full(200, threshold)
    assert false_accepts(pairs, each) == far


def test_effective_sample_is_that_of_both_sides_together() -> None:
    pairs = pairs_of()
    errors = pairs.scores >= 0.1
    rate = error_rate(errors, pairs.query_groups, pairs.row_groups, 0.025)
    by_query = share_bounds(errors, pairs.query_groups, 0.025).effective_n
    by_row = share_bounds(errors, pairs.row_groups, 0.025).effective_n
    expected = 1 / (1 / by_query + 1 / by_row - 1 / len(errors))
    assert rate.effective_n == pytest.approx(expected)
    assert rate.effective_n < min(by_query, by_row)
    bounds = clopper_pearson(rate.value * expected, expected, 0.025)
    assert (rate.lower, rate.upper) == pytest.approx(bounds)


def test_the_rule_of_three_counts_identities_and_not_pairs() -> None:
    none = np.zeros(100_000, bool)
    for num_identities in (100, 1000):
        groups = np.arange(100_000) % num_identities
        rate = error_rate(none, groups, np.arange(100_000))
        assert rate.upper == pytest.approx(3 / num_identities, rel=0.05)
    assert error_rate(none, np.arange(100_000), np.arange(100_000)).upper == pytest.approx(3e-5, rel=0.01)


def test_nothing_is_known_of_no_pair() -> None:
    nothing = Pairs(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    rate = false_accepts(nothing, 0.5)
    assert math.isnan(rate.value)
    assert (rate.lower, rate.upper, rate.effective_n) == (0, 1, 0)
    assert recalibrate(nothing, "FAR", 0.1) is None


@pytest.mark.parametrize("kind", ["FAR", "FRR"])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.4])
def test_recalibrated_threshold_is_next_to_one_that_does_not_keep_the_limit(kind: str, limit: float) -> None:
    pairs = pairs_of(200, 20, seed=1)
    found = recalibrate(pairs, kind, limit, 0.05)  # type: ignore[arg-type]
    assert found is not None
    measure, away = (false_accepts, 1) if kind == "FAR" else (false_rejects, -1)
    keeps = {
        step: measure(pairs, step / STEPS_PER_UNIT).upper <= limit
        for step in range(-STEPS_PER_UNIT, STEPS_PER_UNIT + 1)
    }
    step = round(found * STEPS_PER_UNIT)
    assert step == found * STEPS_PER_UNIT
    assert keeps[step]
    assert not keeps[step - away]
    # No threshold far on the wanting side keeps it either: what was found is what a scan of the whole grid finds.
    first = min((s for s, kept in keeps.items() if kept), key=lambda s: away * s)
    assert abs(step - first) <= 3


def test_what_cannot_be_shown_has_no_threshold() -> None:
    few = pairs_of(10, 500)  # ten identities: at most 26 % can be shown, however many pairs
    assert recalibrate(few, "FAR", 0.01) is None
    assert recalibrate(few, "FRR", 0.01) is None
    assert recalibrate(few, "FAR", 0.9) is not None
    same = Pairs(np.ones(5000, np.float32), np.arange(5000), np.arange(5000))
    assert recalibrate(same, "FAR", 0.1) is None  # every score is 1, and 1 is accepted at every threshold
    assert recalibrate(same, "FRR", 0.1) == 1.0


def test_a_shift_of_all_scores_shifts_the_threshold() -> None:
    pairs = pairs_of(200, 20)
    moved = Pairs(pairs.scores + np.float32(0.25), pairs.query_groups, pairs.row_groups)
    first, second = recalibrate(pairs, "FAR", 0.05), recalibrate(moved, "FAR", 0.05)
    assert first is not None
    assert second == pytest.approx(first + 0.25, abs=1 / STEPS_PER_UNIT)


@pytest.mark.parametrize(("query_sd", "row_sd"), [(0.0, 0.0), (0.08, 0.08)])
def test_true_rate_is_seldom_above_the_limit(query_sd: float, row_sd: float) -> None:
    """20 runs at nominal 5 %: more than 4 above would happen three times in a thousand if the level held exactly."""
    sd, above = math.sqrt(query_sd**2 + row_sd**2 + 0.15**2), 0
    for seed in range(20):
        found = recalibrate(pairs_of(150, 60, query_sd=query_sd, row_sd=row_sd, seed=seed), "FAR", 0.02, 0.05)
        assert found is not None
        above += bool(stats.norm.sf(found, 0, sd) > 0.02)
    assert above <= 4


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="limit between 0 and 1, found 0"):
        recalibrate(pairs_of(2, 2), "FAR", 0)
    with pytest.raises(ValueError, match="one group of both sides for each score"):
        Pairs(np.zeros(3, np.float32), np.zeros(2, np.int64), np.zeros(3, np.int64))
