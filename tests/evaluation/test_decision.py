"""The decision: evidence that leads to each outcome, every missing piece, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import QUICK, gather

PRICES = CostInputs(
    rows_per_s=1000,
    num_rows=3_600_000,
    bytes_per_row=512,
    fixed_worker_hours=0,
    price_per_worker_hour=10,
    price_per_gib_month=0,
    value_per_point_day=1,
    days_until_next_generation=30,
)


def judge(outcomes: Outcomes, policy: RolloutPolicy = QUICK, **kwargs: object) -> Decision:
    return decide(gather(outcomes, policy, **kwargs), policy)


@pytest.fixture
def good(planted) -> Evidence:
    return gather(planted(losses=5, wins=100))


def test_an_empty_lineage_bootstraps(planted) -> None:
    decision = judge(planted(num_queries=20), champion=None, live_owners={})
    assert decision.outcome == "BOOTSTRAP"
    assert [(c.query_generation, c.gallery_generation) for c in decision.certificates] == [("g2", "g2")]


def test_a_first_generation_without_self_test_is_held(planted) -> None:
    decision = judge(planted(num_queries=20, candidate="other"), champion=None, live_owners={})
    assert decision.outcome == "HOLD"
    assert "self-test" in decision.summary


def test_a_better_and_compatible_candidate_is_rolled_out_at_the_smallest_fraction(good: Evidence) -> None:
    decision = decide(good, QUICK)
    assert decision.outcome == "COMPATIBLE_ROLLOUT"
    assert (decision.fraction, decision.order) == (0.0, "farthest")
    assert [(c.query_generation, c.gallery_generation) for c in decision.certificates] == [("g2", "g2"), ("g2", "g1")]
    assert decision.queries_needed is None
    assert "no prices given" in decision.summary


def test_reasons_name_threshold_value_bound_and_n(good: Evidence) -> None:
    reasons = decide(good, QUICK).reasons
    quality = next(reason for reason in reasons if reason.guard == "quality")
    assert (quality.threshold, quality.n, quality.verdict) == (-0.005, 4000, "PASS")
    assert quality.value == pytest.approx(95 / 4000)
    nfr = next(reason for reason in reasons if reason.guard == "NFR")
    assert nfr.value == pytest.approx(5 / 4000)
    assert nfr.bound is not None
    assert nfr.bound < 0.02
    assert {reason.guard for reason in reasons} >= {"quality", "NFR", "dip", "wave zero", "certificate", "self-test"}


def test_the_fraction_of_best_net_value_is_chosen_with_prices(planted) -> None:
    wins = {0.0: 40, 0.05: 100, 0.1: 160, 0.25: 300, 0.5: 310, 0.75: 315, 1.0: 320}
    outcomes = planted(losses=5, wins=wins)
    dear = judge(outcomes, cost=PRICES.model_copy(update={"price_per_worker_hour": 300, "value_per_point_day": 2}))
    assert (dear.outcome, dear.fraction) == ("COMPATIBLE_ROLLOUT", 0.25)
    assert "best net value" in dear.summary
    assert judge(outcomes, cost=PRICES.model_copy(update={"price_per_worker_hour": 30_000})).fraction == 0.0
    assert judge(outcomes, cost=PRICES.model_copy(update={"price_per_worker_hour": None})).fraction == 0.0


def test_a_bad_state_on_the_way_forbids_every_fraction_behind_it(planted) -> None:
    """0.5 alone is bad: what lies behind it is not reachable by waves, and the smallest fraction still passes."""
    decision = judge(planted(losses={0.5: 200}, wins=100), cost=PRICES.model_copy(update={"value_per_point_day": 1000}))
    assert decision.outcome == "COMPATIBLE_ROLLOUT"
    assert decision.fraction is not None
    assert decision.fraction < 0.5


def test_only_a_full_backfill_passes(planted) -> None:
    mixed = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300)
    decision = judge(planted(losses=mixed, wins=100))
    assert (decision.outcome, decision.fraction) == ("FULL_BACKFILL", 1.0)
    assert "no prices given" in decision.summary
    assert decision.wave_zero_generations == ()
    priced = judge(planted(losses=mixed, wins=100), cost=PRICES)
    assert priced.outcome == "FULL_BACKFILL"
    cost = next(reason for reason in priced.reasons if reason.guard == "cost")
    assert cost.value == pytest.approx(10 / 2.5)


def test_a_full_backfill_that_does_not_pay_or_is_not_allowed_is_held(planted) -> None:
    outcomes = planted(losses=dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300), wins=100)
    poor = judge(outcomes, cost=PRICES.model_copy(update={"price_per_worker_hour": 10_000}))
    assert poor.outcome == "HOLD"
    assert "paid for itself" in poor.summary
    forbidden = judge(outcomes, QUICK.model_copy(update={"allow_full_backfill": False}))
    assert forbidden.outcome == "HOLD"
    assert "does not allow" in forbidden.summary


def test_a_candidate_that_fails_even_fully_backfilled_is_held(planted) -> None:
    decision = judge(planted(losses={1.0: 300}, wins=50))
    assert decision.outcome == "HOLD"
    assert decision.reasons[0].verdict == "FAIL"
    assert decision.reasons[0].state == "fraction/1"
    assert decision.certificates == ()


def test_balanced_flips_are_held_although_accuracy_is_equal(planted) -> None:
    decision = judge(planted(losses=400, wins=400))
    assert decision.outcome == "HOLD"
    assert decision.reasons[0].guard == "NFR"


def test_few_queries_are_inconclusive_and_the_number_needed_would_do(planted) -> None:
    decision = judge(planted(num_queries=150, wins=15, owners={"g1": (0, 15)}))
    assert decision.outcome == "INCONCLUSIVE"
    assert decision.queries_needed is not None
    assert 0 < decision.queries_needed < 20_000
    assert decision.queries_needed_for is not None
    assert "COMPATIBLE_ROLLOUT(0)" in decision.queries_needed_for
    more = 150 + decision.queries_needed
    enough = planted(num_queries=more, wins=more // 10, owners={"g1": (0, more // 10)})
    assert judge(enough).outcome == "COMPATIBLE_ROLLOUT"


def test_a_rollout_that_is_only_undecided_gives_way_to_a_backfill_that_passes(planted) -> None:
    """No change at all on the live rows bounds the loss by 3/n, not by 0: the certificate stays open at n = 200."""
    decision = judge(planted(num_queries=200, wins=20))
    assert decision.outcome == "FULL_BACKFILL"
    assert "g1" in decision.summary


def test_inconclusive_points_at_the_full_backfill_when_nothing_cheaper_can_pass(planted) -> None:
    mixed = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 60)
    decision = judge(planted(num_queries=150, losses=mixed, wins=15))
    assert decision.outcome == "INCONCLUSIVE"
    assert "FULL_BACKFILL" in str(decision.queries_needed_for)


def test_a_small_failed_owner_becomes_wave_zero_and_a_large_one_stops_the_rollout(planted) -> None:
    outcomes = planted(losses=5, wins=100, owners={"g0": (500, 0), "g1": (0, 60)})
    small = judge(outcomes, live_owners={"g0": 0.10, "g1": 0.90})
    assert small.outcome == "COMPATIBLE_ROLLOUT"
    assert small.wave_zero_generations == ("g0",)
    assert "g0" in small.summary
    assert [c.gallery_generation for c in small.certificates] == ["g2", "g1"]
    large = judge(outcomes, live_owners={"g0": 0.11, "g1": 0.89})
    assert large.outcome == "FULL_BACKFILL"
    assert "11.00 %" in large.summary


def test_an_undecided_owner_leaves_the_rollout_inconclusive_when_a_backfill_is_not_allowed(planted) -> None:
    outcomes = planted(losses=5, wins=100, owners={"g0": (40, 30), "g1": (0, 60)})
    policy = QUICK.model_copy(update={"allow_full_backfill": False})
    decision = judge(outcomes, policy, live_owners={"g0": 0.3, "g1": 0.7})
    assert decision.outcome == "INCONCLUSIVE"
    assert "wave zero" in str(decision.queries_needed_for)
    assert decision.queries_needed is not None


def test_a_required_slice_is_guarded_like_the_whole(planted) -> None:
    night = np.where(np.arange(4000) >= 2300, "night", "day")  # losses are planted just below query 2800
    outcomes = planted(losses=60, wins=100, slices={"camera": night})
    assert judge(outcomes).outcome == "COMPATIBLE_ROLLOUT"
    decision = judge(outcomes, QUICK.model_copy(update={"required_slices": ("camera",)}))
    assert decision.outcome == "HOLD"
    assert decision.reasons[0].scope == "camera=night"
    assert decision.reasons[0].verdict == "FAIL"


@pytest.mark.parametrize("limit", ["quality_margin_points", "max_nfr", "max_dip_points", "max_wave_zero_share"])
def test_a_missing_threshold_holds_and_is_named(planted, limit: str) -> None:
    decision = judge(planted(losses=5, wins=100), QUICK.model_copy(update={limit: None}))
    assert decision.outcome == "HOLD"
    assert limit in decision.summary


@pytest.mark.parametrize("state", ["served", "fraction/0.05", "fraction/1", "live/g2/g1", "live/g1/g1", "pair/g2/g2"])
def test_a_missing_state_holds_and_is_named(planted, state: str) -> None:
    outcomes = planted(losses=5, wins=100)
    cut = Outcomes(
        outcomes.query_ids,
        outcomes.identities,
        outcomes.clusters,
        {},
        {name: rank for name, rank in outcomes.first_rank.items() if name != state},
        {name: precision for name, precision in outcomes.average_precision.items() if name != state},
    )
    decision = judge(cut)
    assert decision.outcome == "HOLD"
    assert any(state in reason.text for reason in decision.reasons)


def test_a_missing_slice_holds_and_is_named(planted) -> None:
    policy = QUICK.model_copy(update={"required_slices": ("camera",)})
    decision = judge(planted(losses=5, wins=100), policy)
    assert decision.outcome == "HOLD"
    assert "camera" in decision.summary


def test_evidence_for_another_policy_is_refused(good: Evidence) -> None:
    for change in ({"alpha": 0.01}, {"k": 5}, {"metric": "mAP"}, {"quality_margin_points": 1.0}):
        decision = decide(good, QUICK.model_copy(update=change))
        assert decision.outcome == "HOLD"
        assert next(iter(change)) in decision.summary
    other = QUICK.model_copy(update={"fractions": (0.0, 0.3, 1.0)})
    assert "fraction/0.3" in decide(good, other).reasons[0].text
    assert decide(good, QUICK.model_copy(update={"required_slices": ("camera",)})).outcome == "HOLD"


def test_numbers_taken_out_of_the_evidence_never_pass(good: Evidence) -> None:
    for field in ("difference", "nfr"):
        states = (*good.states[:-1], good.states[-1].model_copy(update={field: None}))
        assert decide(good.model_copy(update={"states": states}), QUICK).outcome == "HOLD"
    for field in ("difference_lower", "nfr_upper"):
        states = (good.states[0].model_copy(update={field: None}), *good.states[1:])
        assert decide(good.model_copy(update={"states": states}), QUICK).outcome == "FULL_BACKFILL"
        states = tuple(state.model_copy(update={field: float("nan")}) for state in good.states)
        assert decide(good.model_copy(update={"states": states}), QUICK).outcome == "INCONCLUSIVE"
    assert decide(good.model_copy(update={"certificates": ()}), QUICK).outcome == "HOLD"
    assert decide(good.model_copy(update={"champion": None}), QUICK).outcome == "HOLD"


def test_decisions_survive_json(good: Evidence) -> None:
    decision = decide(good, QUICK)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_mean_average_precision_can_be_the_metric(planted) -> None:
    policy = QUICK.model_copy(update={"metric": "mAP"})
    decision = judge(planted(losses=5, wins=100), policy)
    assert decision.outcome == "COMPATIBLE_ROLLOUT"
    assert any("mAP" in reason.text for reason in decision.reasons)


@pytest.mark.parametrize("planted_problem", ["nfr", "quality"])
def test_false_rollouts_are_about_as_rare_as_alpha(planted_problem: str) -> None:
    """A candidate exactly at a limit in every state: a rollout or backfill is a mistake, wanted in at most 5 %.

    200 clusters of 5 with ICC 0.2; 120 evaluations, so that the standard error is 2 points.
    """
    policy = RolloutPolicy(num_resamples=200, fractions=(0.0, 0.5, 1.0), quality_margin_points=0.5, max_nfr=0.03)
    loss, win = (0.03, 0.10) if planted_problem == "nfr" else (0.012, 0.007)
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(120):
        outcomes = clustered(rng, loss=loss, win=win)
        wrong += judge(outcomes, policy).outcome in ("COMPATIBLE_ROLLOUT", "FULL_BACKFILL")
    assert wrong / 120 <= 0.05 + 2 * 0.02


def test_a_good_candidate_is_mostly_rolled_out() -> None:
    policy = RolloutPolicy(num_resamples=200, fractions=(0.0, 0.5, 1.0))
    rng = np.random.default_rng(1)
    outcomes = [judge(clustered(rng, loss=0.004, win=0.05, num_clusters=800), policy).outcome for _ in range(30)]
    assert outcomes.count("COMPATIBLE_ROLLOUT") >= 20


def clustered(rng: np.random.Generator, *, loss: float, win: float, num_clusters: int = 200, size: int = 5) -> Outcomes:
    """Right and wrong answers that flip with cluster-wise rates of the given means over all queries."""
    n, right_share, icc = num_clusters * size, 0.5, 0.2
    scale = (1 - icc) / icc
    cluster = np.repeat(np.arange(num_clusters), size)
    before = rng.random(n) < right_share
    rates = [np.repeat(rng.beta(p * 2 * scale, (1 - p * 2) * scale, num_clusters), size) for p in (loss, win)]
    states = {"served": before, "pair/g2/g2": before, "live/g1/g1": before}
    draw = rng.random(n)
    after = np.where(before, draw >= rates[0], draw < rates[1])
    states |= dict.fromkeys(("fraction/0", "fraction/0.5", "fraction/1", "live/g2/g1"), after)
    ranks = {state: np.where(right, 1, 9).astype(np.int32) for state, right in states.items()}
    precision = {state: (1 / rank).astype(np.float32) for state, rank in ranks.items()}
    return Outcomes(np.arange(n), cluster, cluster, {}, ranks, precision)
