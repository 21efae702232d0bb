"""What an inconclusive decision asks for: identities, how sure that is, and whether any number can do."""

from __future__ import annotations

import re

import numpy as np
import pytest

from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.power import identities_for_rate, queries_for_nfr
from tests.evaluation.conftest import QUICK, gather, plant

LENIENT = QUICK.model_copy(update={"quality_margin_points": 60.0, "max_dip_points": 60.0})


def judged(outcomes: Outcomes, policy: RolloutPolicy = LENIENT) -> Decision:
    return decide(gather(outcomes, policy), policy)


@pytest.mark.parametrize("queries_each", [60, 6_000])
def test_queries_of_the_same_ten_identities_are_never_asked_for(queries_each: int) -> None:
    decision = judged(plant(num_queries=10 * queries_each, queries_per_cluster=queries_each))
    assert decision.outcome == "INCONCLUSIVE"
    assert "10 identities cannot show that fewer than 2 % break, however many queries each has" in decision.summary
    assert re.search(r"at least 18[56] are needed", decision.summary)
    assert decision.identities_needed is not None
    assert decision.queries_needed == decision.identities_needed * queries_each
    enough = 10 + decision.identities_needed
    assert judged(plant(num_queries=5 * enough, queries_per_cluster=5)).outcome == "COMPATIBLE_ROLLOUT"


def test_the_sentence_needs_no_dictionary_and_names_a_range() -> None:
    decision = judged(plant(num_queries=300, losses=3))
    for jargon in ("power", "fraction/", "wave zero", "NFR", "COMPATIBLE_ROLLOUT"):
        assert jargon not in decision.summary
    assert decision.identities_range is not None
    least, most = decision.identities_range
    assert least is not None
    assert decision.identities_needed is not None
    assert least <= decision.identities_needed <= (most or np.inf)
    assert "for what else may well be true" in decision.summary


def test_a_rate_on_its_limit_is_settled_by_no_number() -> None:
    decision = judged(plant(num_queries=1_000, losses=20))
    assert decision.outcome == "INCONCLUSIVE"
    assert decision.queries_needed is decision.identities_needed is None
    assert "lies on the limit itself" in decision.summary


@pytest.mark.parametrize(("rate", "icc", "each"), [(0.005, 0.0, 1), (0.005, 0.1, 5), (0.01, 0.3, 20), (0.04, 0.1, 5)])
def test_the_number_of_identities_settles_as_often_as_promised(rate: float, icc: float, each: int) -> None:
    """Flips drawn anew, through the bound that the gate takes: 80 % promised, and not twice as many as that takes."""
    number = identities_for_rate(0.02, rate, queries_per_identity=each, icc=icc, alpha=0.025, power=0.8)
    assert number is not None

    def settled(identities: int) -> float:
        rng = np.random.default_rng(0)
        clusters, runs = np.repeat(np.arange(identities), each), 120
        a = rate * (1 - icc) / icc if icc else 0.0
        hits = 0
        for _ in range(runs):
            own = rng.beta(a, a * (1 - rate) / rate, identities) if icc else np.full(identities, rate)
            bounds = share_bounds(rng.random(len(clusters)) < own[clusters], clusters, 0.025)
            hits += bounds.upper <= 0.02 if rate < 0.02 else bounds.lower > 0.02
        return hits / runs

    assert settled(number) >= 0.7
    assert settled(number // 4) < 0.8


def test_identities_of_one_query_are_queries() -> None:
    asked = queries_for_nfr(0.02, 0.005, alpha=0.025)
    assert asked is not None
    assert asked <= (identities_for_rate(0.02, 0.005, alpha=0.025) or 0) <= 1.01 * asked + 1
