"""Limits of flips beside the plain one: in proportion to what is repaired, to the noise, and over generations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.outcomes import Outcomes, pair_state
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import QUICK, gather


def judged(outcomes: Outcomes, policy: RolloutPolicy, **kwargs: Any) -> tuple[Evidence, Decision]:
    evidence = gather(outcomes, policy, **kwargs)
    return evidence, decide(evidence, policy)


def with_anchor(outcomes: Outcomes, num_lost_since: int) -> Outcomes:
    """g0 had right what is right now, and as many queries more, which later updates lost."""
    right = outcomes.first_rank["served"] == 1
    right[np.flatnonzero(~right)[-num_lost_since:]] = True
    rank = np.where(right, 1, 7).astype(np.int32)
    state = pair_state("g0", "g0")
    return replace(
        outcomes,
        first_rank={**outcomes.first_rank, state: rank},
        average_precision={**outcomes.average_precision, state: (1 / rank).astype(np.float32)},
    )


def test_both_figures_stand_beside_every_nfr_and_in_its_text(planted) -> None:
    policy = QUICK.model_copy(update={"noise_floor": 0.004})
    evidence, decision = judged(planted(losses=8, wins=80), policy)
    state = evidence.states[0]
    assert state.flips_per_repair == pytest.approx(0.1)
    assert state.flips_per_repair_lower is not None
    assert state.flips_per_repair_upper is not None
    assert state.flips_per_repair_lower < 0.1 < state.flips_per_repair_upper
    assert state.nfr_over_noise == pytest.approx(0.5)
    text = next(reason.text for reason in decision.reasons if reason.guard == "NFR")
    assert "0.10 flips per repaired query, 0.5 times the noise floor" in text


def test_nothing_repaired_has_no_ratio_and_never_passes_its_limit(planted) -> None:
    policy = QUICK.model_copy(update={"max_flips_per_repair": 5.0, "quality_margin_points": 5.0})
    evidence, decision = judged(planted(losses=2, wins=0), policy)
    assert evidence.states[0].flips_per_repair is None
    assert evidence.states[0].flips_per_repair_upper is None
    assert decision.outcome == "INCONCLUSIVE"


@pytest.mark.parametrize(("wins", "outcome"), [(400, "COMPATIBLE_ROLLOUT"), (75, "INCONCLUSIVE"), (40, "HOLD")])
def test_a_limit_of_flips_per_repair_is_judged_by_its_bound(planted, wins: int, outcome: str) -> None:
    policy = QUICK.model_copy(update={"max_flips_per_repair": 0.5, "max_nfr": 0.05, "quality_margin_points": 5.0})
    losses = 60 if wins == 40 else 30
    _, decision = judged(planted(losses=losses, wins=wins), policy)
    assert decision.outcome == outcome, decision.summary
    if outcome == "INCONCLUSIVE":
        assert decision.queries_needed


def test_the_smaller_of_the_limits_of_the_nfr_counts_and_one_must_be_given(planted) -> None:
    relative = QUICK.model_copy(update={"noise_floor": 0.004, "max_nfr_over_noise": 2.0})
    assert relative.nfr_limit == pytest.approx(0.008)
    assert judged(planted(losses=5, wins=100), relative)[1].outcome == "COMPATIBLE_ROLLOUT"
    assert judged(planted(losses=70, wins=300), relative)[1].outcome == "HOLD"  # 1.75 %, under 2 %
    alone = relative.model_copy(update={"max_nfr": None})
    assert judged(planted(losses=5, wins=100), alone)[1].outcome == "COMPATIBLE_ROLLOUT"
    ratio = QUICK.model_copy(update={"max_nfr": None, "max_flips_per_repair": 0.5})
    assert judged(planted(losses=5, wins=100), ratio)[1].outcome == "COMPATIBLE_ROLLOUT"
    assert "max_nfr" in judged(planted(losses=5, wins=100), QUICK.model_copy(update={"max_nfr": None}))[1].summary
    with pytest.raises(ValidationError, match="noise_floor"):
        RolloutPolicy(max_nfr_over_noise=2.0)


def test_flips_add_up_over_generations_although_each_update_passes(planted) -> None:
    outcomes = with_anchor(planted(losses=5, wins=100), 240)
    evidence, free = judged(outcomes, QUICK, anchor="g0")
    assert free.outcome == "COMPATIBLE_ROLLOUT"
    state = evidence.states[0]
    right = outcomes.first_rank[pair_state("g0", "g0")] == 1
    after = outcomes.first_rank[state.state] == 1
    assert state.cumulative_nfr == pytest.approx((right & ~after).mean())
    policy = QUICK.model_copy(update={"max_cumulative_nfr": 0.05})
    _, held = judged(outcomes, policy, anchor="g0")
    assert held.outcome == "HOLD"
    assert held.reasons[0].guard == "cumulative NFR"
    assert "right with g0 and wrong afterwards" in held.reasons[0].text
    wide = QUICK.model_copy(update={"max_cumulative_nfr": 0.1})
    assert judged(outcomes, wide, anchor="g0")[1].outcome == "COMPATIBLE_ROLLOUT"


def test_an_anchor_that_was_not_measured_is_missing_and_without_one_there_is_no_guard(planted) -> None:
    policy = QUICK.model_copy(update={"max_cumulative_nfr": 0.05})
    outcomes = planted(losses=5, wins=100)
    _, decision = judged(outcomes, policy, anchor="g0")
    assert decision.outcome == "HOLD"
    assert "pair/g0/g0" in decision.summary
    assert judged(outcomes, policy)[1].outcome == "COMPATIBLE_ROLLOUT"
