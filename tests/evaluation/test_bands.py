"""Bands of differences: golden numbers, laws, and coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.bands import difference_bands
from graceful.evaluation.intervals import share_bounds


def test_the_standard_error_is_the_textbook_one_and_clusters_widen_it() -> None:
    values = np.random.default_rng(4).normal(size=(2000, 1)) * 0.1
    alone = difference_bands(values, np.arange(2000))
    assert alone.standard_error[0] == pytest.approx(0.1 / np.sqrt(2000), rel=0.08)
    assert alone.lower[0] == pytest.approx(alone.value[0] - 1.645 * alone.standard_error[0], abs=2e-4)
    repeated = difference_bands(np.repeat(values[:200], 10, axis=0), np.repeat(np.arange(200), 10))
    assert repeated.design_effect[0] == pytest.approx(10, rel=0.15)


def test_a_simultaneous_band_is_wider_and_holds_for_all_states_at_once() -> None:
    rng = np.random.default_rng(5)
    below = []
    for seed in range(200):
        values = rng.normal(size=(300, 6)) * 0.1
        bands = difference_bands(values, np.arange(300), num_resamples=400, seed=seed)
        below.append((bands.lower > 0).any())
    assert np.mean(below) <= 0.09
    assert bands.critical > 2.0  # pointwise: 1.645


def test_a_difference_at_minus_the_margin_passes_about_as_often_as_alpha_allows() -> None:
    """Paired 0/1 outcomes, clustered: the lower bound may be at or above the truth in about 5 % of the runs."""
    rng = np.random.default_rng(6)
    clusters = np.repeat(np.arange(150), 4)
    passed = []
    for seed in range(300):
        lean = np.repeat(rng.random(150) < 0.5, 4)  # half of the clusters flip towards losses
        chance = rng.random(600)
        values = np.where(chance < 0.12, np.where(lean, -1.0, 0.5), 0.0)[:, None]
        passed.append(difference_bands(values, clusters, num_resamples=400, seed=seed).lower[0] >= 0.12 * (-0.25))
    assert 0.01 <= np.mean(passed) <= 0.09


def test_no_change_at_all_is_bounded_by_the_exact_bound_and_not_by_zero() -> None:
    bands = difference_bands(np.zeros((300, 1)), np.arange(300))
    assert bands.lower[0] == pytest.approx(-0.00994, abs=1e-4)
    assert bands.upper[0] == pytest.approx(0.00994, abs=1e-4)


def test_bands_say_nothing_about_no_query_or_one_cluster() -> None:
    values = np.array([[np.nan, 0.1], [np.nan, 0.1]])
    bands = difference_bands(values, np.array([0, 0]), num_resamples=100)
    assert np.isneginf(bands.lower).all()
    assert np.isposinf(bands.upper).all()
    assert np.isnan(bands.value[0])
    empty = difference_bands(np.zeros((0, 2)), np.zeros(0, int), num_resamples=100)
    assert np.isneginf(empty.lower).all()


def test_the_same_seed_gives_the_same_band() -> None:
    values, clusters = np.random.default_rng(0).normal(size=(100, 3)), np.arange(100)
    first, second = (difference_bands(values, clusters, seed=7, num_resamples=200) for _ in range(2))
    np.testing.assert_array_equal(first.lower, second.lower)


def test_losses_alone_have_their_own_exact_bound() -> None:
    rng = np.random.default_rng(8)
    lost, clusters = rng.random(3000) < 0.02, np.arange(3000) // 5
    bands = difference_bands(-lost.astype(float)[:, None], clusters)
    exact = share_bounds(lost, clusters)
    assert bands.upper[0] > -exact.value > bands.lower[0]
    wins = share_bounds(np.zeros(3000, bool), clusters)  # that nothing was won is known no better
    assert bands.lower[0] == pytest.approx(-exact.upper)
    assert bands.upper[0] == pytest.approx(-exact.value + np.hypot(exact.value - exact.lower, wins.upper))


def test_many_losses_and_wins_have_the_normal_bound() -> None:
    values = np.random.default_rng(9).choice([-1.0, 0.0, 1.0], (20_000, 1), p=[0.2, 0.55, 0.25])
    bands = difference_bands(values, np.arange(20_000))
    assert bands.lower[0] == pytest.approx(bands.value[0] - 1.645 * bands.standard_error[0], abs=3e-4)


def test_small_wins_are_not_taken_for_whole_ones() -> None:
    """Five queries lose all, five hundred win a hundredth: on average nothing is won."""
    values = np.zeros((1000, 1))
    values[:5], values[5:505] = -1.0, 0.01
    bands = difference_bands(values, np.arange(1000))
    assert bands.value[0] == pytest.approx(0.0)
    assert bands.lower[0] < -0.004


def test_losses_where_nothing_can_be_won_add_to_the_distance() -> None:
    """Identities are lost whole or won whole: the difference varies more than its parts on their own."""
    whole = np.repeat(np.random.default_rng(3).choice([-1.0, 1.0], 200), 5)[:, None]
    one, other = (difference_bands(values, np.arange(1000) // 5) for values in (whole, np.abs(whole) - 1))
    assert whole.mean() - one.lower[0] > 1.645 * one.standard_error[0]
    assert other.lower[0] < 0


def test_states_that_are_alike_cost_no_more_than_one() -> None:
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], (4000, 1), p=[0.03, 0.93, 0.04])
    alone, seven = (difference_bands(np.repeat(values, count, axis=1), np.arange(4000)) for count in (1, 7))
    assert seven.critical == pytest.approx(alone.critical, abs=0.05)
    assert seven.lower == pytest.approx(np.full(7, alone.lower[0]), abs=2e-4)
