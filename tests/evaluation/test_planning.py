"""Simulated updates: what they are made of, what they must come to, and what a set of queries can show at best."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation import planning
from graceful.evaluation.cost import CostInputs, option_costs
from graceful.evaluation.evidence import StateEvidence
from graceful.evaluation.intervals import intra_cluster_correlation, share_bounds
from graceful.evaluation.outcomes import SERVED, fraction_state
from graceful.evaluation.planning import (
    Queries,
    Truth,
    best_fraction,
    detectable,
    expected_truth,
    joint_power,
    truths,
)
from graceful.evaluation.policy import RolloutPolicy

POLICY = RolloutPolicy(fractions=(0.0, 0.5, 1.0))


def queries(num_queries: int, num_identities: int) -> Queries:
    return Queries(clusters=(np.arange(num_queries) % num_identities).astype(np.str_))


def test_ten_identities_show_nothing_however_many_queries_they_have() -> None:
    found = detectable(queries(600, 10), POLICY)
    assert (found.num_queries, found.num_identities, found.identities_needed) == (600, 10, 185)
    assert not found.can_pass
    assert not detectable(queries(60_000, 10), POLICY).can_pass
    assert detectable(queries(600, 600), POLICY).can_pass
    assert detectable(queries(400, 200), POLICY).smallest_nfr <= 0.02


@pytest.mark.parametrize(("num_queries", "num_identities"), [(600, 10), (2000, 150), (300, 300)])
def test_no_flips_of_any_kind_are_bounded_lower_than_the_smallest(num_queries: int, num_identities: int) -> None:
    chosen = queries(num_queries, num_identities)
    smallest = detectable(chosen, POLICY).smallest_nfr
    rng = np.random.default_rng(0)
    for share in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05):
        for _ in range(10):
            flips = rng.random(num_queries) < share
            assert share_bounds(flips, chosen.clusters, POLICY.alpha / 2).upper >= smallest - 1e-12


def test_a_simulated_update_is_as_it_is_said_to_be() -> None:
    truth, rng = Truth(name="", nfr=0.04, pfr=0.1), np.random.default_rng(0)
    drawn = [planning._drawn(queries(2000, 200), POLICY, truth, 0.3, 0.7, rng) for _ in range(30)]
    before, after = (np.stack([d.first_rank[state] == 1 for d in drawn]) for state in (SERVED, fraction_state(1)))
    assert before.mean() == pytest.approx(0.7, abs=0.01)
    assert (before & ~after).mean() == pytest.approx(0.04, abs=0.005)
    assert (~before & after).mean() == pytest.approx(0.1, abs=0.01)
    half = np.stack([d.first_rank[fraction_state(0.5)] == 1 for d in drawn])
    assert 0.5 < np.corrcoef((before & ~half).ravel(), (before & ~after).ravel())[0, 1] < 1
    losing = [
        intra_cluster_correlation((~right)[was], d.clusters[was])
        for d, was, right in zip(drawn, before, after, strict=True)
    ]
    assert np.mean(losing) == pytest.approx(0.3, abs=0.06)


def test_power_is_certain_at_the_ends_and_grows_between_them() -> None:
    def joint(num_queries: int, truth: Truth) -> float:
        return joint_power(queries(num_queries, num_queries), POLICY, truth, num_draws=20).joint

    bad, good = Truth(name="", nfr=0.05, pfr=0.05), expected_truth(POLICY, 3.0)
    assert good.gain_points == pytest.approx(3.0)
    assert joint(3000, bad) == 0
    assert joint(100, good) == 0
    assert joint(400, good) < joint(3000, good) == 1


def test_a_loss_at_the_margin_passes_at_most_as_often_as_alpha_allows() -> None:
    at_the_limit = Truth(name="", nfr=0.02, pfr=0.05)
    found = joint_power(queries(1000, 1000), POLICY, at_the_limit, num_draws=100)
    assert found.guards["NFR"] <= 0.025 + 3 * 0.016
    assert sum(found.outcomes.values()) == pytest.approx(1)


def test_the_same_seed_draws_the_same_and_the_bottleneck_is_named() -> None:
    equal = truths(POLICY, 2.0, None)[1]
    one, two = (joint_power(queries(1500, 1500), POLICY, equal, num_draws=10, seed=3) for _ in range(2))
    assert one == two
    assert one.bottleneck == "quality"
    assert one.shown_loss_points > 0.5


def test_an_equally_good_update_is_hard_to_prove_and_a_gain_is_not() -> None:
    few = queries(1000, 1000)
    nothing, equal, gain = (joint_power(few, POLICY, truth, num_draws=20).joint for truth in truths(POLICY, 2.0, None))
    assert equal < 0.5 < gain
    assert nothing == 1  # nothing is lost, and nobody is left to be lost


def state(fraction: float, lower: float, upper: float) -> StateEvidence:
    return StateEvidence.model_construct(
        scope="overall", fraction=fraction, difference_lower=lower, difference=(lower + upper) / 2,
        difference_upper=upper,
    )  # fmt: skip


def test_the_best_fraction_has_an_interval_and_needs_every_price() -> None:
    inputs = CostInputs(
        rows_per_s=100, num_rows=360_000, bytes_per_row=1, fixed_worker_hours=0, price_per_worker_hour=1,
        price_per_gib_month=0, value_per_point_day=1, days_until_next_generation=10,
    )  # fmt: skip
    states = [state(0.0, 0.010, 0.012), state(0.5, 0.012, 0.02), state(1.0, 0.0115, 0.016)]
    costs = option_costs(inputs, (0.0, 0.5, 1.0))
    # Net value at the bounds: 10 to 12; 12 to 20 less some hours and half a worker hour; 11.5 to 16 less one.
    found = best_fraction(states, costs, inputs)
    assert found is not None
    assert (found.fraction, found.lowest, found.highest) == (0.5, 0.0, 1.0)
    sure = best_fraction([state(0.0, 0.0, 0.001), *states[1:]], costs, inputs)
    assert sure is not None
    assert sure.lowest == 0.5
    assert best_fraction(states, costs, inputs.model_copy(update={"value_per_point_day": None})) is None
    assert best_fraction(states[:2], costs, inputs) is None
