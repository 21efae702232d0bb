"""The error level is spent over candidates, and never beyond alpha."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.decision import decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import Look, at_level, next_share, told
from tests.evaluation.conftest import QUICK, gather


def look(share: float = 0.2, spent: float = 0.0, number: int = 1) -> Look:
    return Look(evaluation_set="set", number=number, fresh=1.0, spent=spent, share=share, planned_updates=4)


@pytest.mark.parametrize("planned", [1, 4, 12, 52])
def test_after_i_looks_i_of_i_plus_the_planned_ones_are_spent(planned: int) -> None:
    spent = 0.0
    for i in range(1, 200):
        spent += next_share(spent, planned)
        assert spent == pytest.approx(i / (i + planned))


def test_no_plan_that_changes_on_the_way_spends_more_than_there_is() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        spent = 0.0
        for planned in rng.integers(1, 100, 300).tolist():
            share = next_share(spent, planned)
            assert 0 < share < 1 - spent
            spent += share
    assert next_share(1.0, 4) == next_share(1.5, 4) == 0.0


def test_a_look_lowers_the_level_of_every_bound(planted) -> None:
    outcomes = planted(losses=20, wins=60)
    whole, part = gather(outcomes), gather(outcomes, look=look())
    assert (whole.alpha, part.alpha) == (0.05, pytest.approx(0.01))
    for one, other in zip(whole.states, part.states, strict=True):
        assert one.nfr_upper is not None
        assert other.nfr_upper is not None
        assert other.nfr_upper > one.nfr_upper
        assert one.difference_lower is not None
        assert other.difference_lower is not None
        assert other.difference_lower < one.difference_lower
    lower, lower_part = whole.certificates[0].difference_lower, part.certificates[0].difference_lower
    assert lower is not None
    assert lower_part is not None
    assert lower_part <= lower
    assert part.look == look()
    assert Evidence.model_validate_json(part.model_dump_json()) == part


def test_without_a_plan_every_look_has_the_whole_level(planted) -> None:
    policy = QUICK.model_copy(update={"alpha_spending": "none"})
    assert gather(planted(losses=5), policy, look=look()).alpha == 0.05
    assert at_level(policy, look()) is policy
    assert "bad candidates add up" in told(look(share=1.0), policy)


def test_the_decision_says_what_was_spent_and_what_brings_it_back(planted) -> None:
    outcomes = planted(num_queries=300, losses=3, wins=9)
    decision = decide(gather(outcomes, look=look(share=0.1, spent=0.4, number=4)), QUICK)
    assert decision.outcome == "INCONCLUSIVE"
    for words in ("judgement 4", "10 % of the error level, 0.5 %", "40 % were spent", "fresh evaluation identities"):
        assert words in decision.summary
    reason = next(reason for reason in decision.reasons if reason.guard == "error level")
    assert reason.text in decision.summary
    assert "error level" not in decide(gather(outcomes), QUICK).summary


def test_a_set_whose_level_is_spent_decides_nothing_and_says_what_to_bring(planted) -> None:
    decision = decide(gather(planted(losses=5, wins=100), look=look(share=0.0, spent=1.0, number=3)), QUICK)
    assert decision.outcome == "HOLD"
    assert "the 2 judgements before had all of it; bring fresh evaluation identities" in decision.summary


def test_the_defaults_are_the_ones_written_down() -> None:
    policy = RolloutPolicy()
    assert (policy.alpha_spending, policy.planned_updates) == ("group_sequential", 4)
    assert (policy.max_cumulative_nfr, policy.max_flips_per_repair, policy.max_nfr_over_noise) == (None, None, None)
