"""Flip metrics: identities and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graceful.evaluation.flips import (
    flip_rates,
    flips_against,
    negative_flip_rate,
    nfr_matrix,
    positive_flip_rate,
    state_flips,
)
from graceful.evaluation.outcomes import Outcomes, fraction_state, pair_state
from tests.evaluation.conftest import with_states

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(PAIRS)
def test_pfr_minus_nfr_is_the_difference_of_accuracies(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs).T
    rates = flip_rates(before, after)
    assert rates.pfr - rates.nfr == pytest.approx(rates.accuracy_after - rates.accuracy_before)
    assert rates.accuracy_before - rates.nfr == pytest.approx(np.mean(before & after))


@given(PAIRS, st.randoms())
def test_order_and_repetition_of_queries_do_not_matter(pairs: list[tuple[bool, bool]], random) -> None:
    before, after = np.array(pairs).T
    order = list(range(len(pairs)))
    random.shuffle(order)
    expected = flip_rates(before, after)
    for other in (flip_rates(before[order], after[order]), flip_rates(np.repeat(before, 3), np.repeat(after, 3))):
        for name in ("nfr", "pfr", "nfi", "relative_nfr", "btc", "bec"):
            np.testing.assert_allclose(getattr(other, name), getattr(expected, name))


def test_empty_sets_are_nan_and_never_zero() -> None:
    nothing = flip_rates(np.zeros(0, bool), np.zeros(0, bool))
    assert all(np.isnan(getattr(nothing, name)) for name in ("nfr", "pfr", "nfi", "relative_nfr", "btc", "bec"))
    perfect = flip_rates(np.ones(3, bool), np.ones(3, bool))
    assert (perfect.nfr, perfect.btc) == (0.0, 1.0)
    assert np.isnan([perfect.nfi, perfect.relative_nfr, perfect.bec]).all()
    assert np.isnan(flip_rates(np.zeros(3, bool), np.ones(3, bool)).btc)


def test_independent_errors_have_a_relative_nfr_of_one() -> None:
    rng = np.random.default_rng(0)
    rates = flip_rates(rng.random(200_000) < 0.7, rng.random(200_000) < 0.8)
    assert rates.relative_nfr == pytest.approx(1, abs=0.02)


def test_weights_count_queries_by_frequency() -> None:
    before, after = np.array([True, True, False]), np.array([False, True, True])
    assert negative_flip_rate(before, after, np.array([3.0, 1.0, 0.0])) == 0.75
    assert positive_flip_rate(before, after, np.array([3.0, 1.0, 0.0])) == 0.0
    assert np.isnan(negative_flip_rate(before, after, np.zeros(3)))


def test_the_matrix_of_all_pairs_is_the_double_loop(planted) -> None:
    outcomes = planted(num_queries=500, losses={0.0: 9, 0.5: 3}, wins={0.0: 2, 1.0: 40})
    states = ["served", "fraction/0", "fraction/0.5", "fraction/1"]
    matrix = nfr_matrix(outcomes, states)
    for i, before in enumerate(states):
        for j, after in enumerate(states):
            assert matrix[i, j] == pytest.approx(state_flips(outcomes, before, after).nfr)
    assert (matrix.diagonal() == 0).all()


def test_a_query_lost_afterwards_is_a_negative_flip() -> None:
    rank = {"served": np.array([1, 1, 0]), "fraction/0": np.array([1, 0, 1])}
    precision = {state: np.where(values > 0, 1.0, np.nan) for state, values in rank.items()}
    outcomes = Outcomes(*(np.array(["a", "b", "c"]),) * 3, {}, rank, precision)
    assert state_flips(outcomes, "served", "fraction/0").nfr == 0.5
    assert nfr_matrix(outcomes, ["served", "fraction/0"])[0, 1] == 0.5


def test_different_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        flip_rates(np.ones(2, bool), np.ones(3, bool))


def test_flips_against_an_older_generation_are_those_of_its_own_answers(planted) -> None:
    """g0 was right where the champion is wrong: nothing flips against today, and everything against g0."""
    outcomes = planted(num_queries=100, baseline_right=0.5, owners={"g0": (0, 0), "g1": (0, 0)})
    swapped = np.where(np.arange(100) < 50, 7, 1).astype(np.int32)
    with_old = with_states(outcomes, {pair_state("g0", "g0"): (swapped, (1 / swapped).astype(np.float32))})
    found = flips_against(with_old, ["g0", "g1"], [fraction_state(0), fraction_state(1)])
    assert [(row.generation, row.num_queries, row.nfr, row.pfr) for row in found] == [("g0", 100, 0.5, 0.5)]
    assert found[0].upper > 0.5  # g1 was not measured on a gallery of its own
    assert flips_against(with_old, ["g0"], []) == []
