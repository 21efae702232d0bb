"""What an update needs before anything about it can be judged: each lack holds it, in a sentence of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from graceful.evaluation.decision import decide
from graceful.evaluation.outcomes import SERVED
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import QUICK, gather


def held(evidence, policy=QUICK) -> str:
    decision = decide(evidence, policy)
    assert decision.outcome == "HOLD", decision.summary
    return " | ".join(reason.text for reason in decision.reasons[: decision.num_decisive])


def test_queries_without_a_baseline_are_no_evidence_for_a_rollout(planted) -> None:
    outcomes = planted(losses=5, wins=100)
    rank, precision = dict(outcomes.first_rank), dict(outcomes.average_precision)
    for state in (SERVED, "live/g1/g1"):
        rank[state] = np.where(np.arange(4000) >= 3000, 0, rank[state])
        precision[state] = np.where(np.arange(4000) >= 3000, np.nan, precision[state])
    found = gather(replace(outcomes, first_rank=rank, average_precision=precision))
    assert "only 3,000 of 4,000 queries" in held(found)


def test_an_unreadable_gallery_few_identities_and_a_useless_model_are_held(planted) -> None:
    good = planted(losses=5, wins=100)
    assert "50.00 % of the gallery cannot be read" in held(gather(good, live_owners={"g1": 0.5}))
    assert "from 4 identities" in held(gather(planted(queries_per_cluster=1000, wins=100)))
    useless = planted(baseline_right=0.0)
    assert "self-test is 0" in held(gather(useless, champion=None, live_owners={}))


def test_a_candidate_that_serves_already_is_not_judged_against_itself(planted) -> None:
    same = planted(candidate="g1", champion="g1")
    assert "serves already" in held(gather(same, candidate="g1", live_owners={"g1": 1.0}))
    second = gather(planted(losses=5, wins=100)).model_copy(update={"is_first_generation": True})
    assert "not the first generation" in held(second)


def test_every_query_of_a_guarded_slice_is_tagged(planted) -> None:
    camera = np.where(np.arange(4000) % 2 == 0, "day", "")
    policy = QUICK.model_copy(update={"required_slices": ("camera",)})
    assert "2000 of 4000 queries have no value" in held(
        gather(planted(wins=100, slices={"camera": camera}), policy), policy
    )


@pytest.mark.parametrize("limit", ["quality_margin_points", "max_dip_points"])
def test_a_margin_is_finite(limit: str) -> None:
    with pytest.raises(ValidationError):
        RolloutPolicy.model_validate({limit: float("inf")})


def test_a_first_generation_has_to_be_better_than_a_model_that_knows_nothing(planted) -> None:
    tenth = planted(num_queries=600, baseline_right=0.1)
    first = {"champion": None, "live_owners": {}}
    assert "not above the 10.00 % of a model that knows nothing" in held(gather(tenth, chance=0.1, **first))
    assert decide(gather(tenth, chance=0.05, **first), QUICK).outcome == "BOOTSTRAP"
    assert decide(gather(tenth, **first), QUICK).outcome == "BOOTSTRAP"  # chance not known


def test_copies_of_the_queries_in_the_gallery_prove_nothing(planted) -> None:
    good = planted(losses=5, wins=100)
    assert "a near copy of 30.00 % of the queries" in held(gather(good, near_copy_share=0.3))
    assert decide(gather(good, near_copy_share=0.1), QUICK).outcome == "COMPATIBLE_ROLLOUT"


def test_an_average_precision_above_one_is_refused(planted) -> None:
    outcomes = planted()
    precision = {state: np.full(4000, 5.0) for state in outcomes.states}
    with pytest.raises(ValueError, match=r"average precisions in \[0, 1\], found 5"):
        replace(outcomes, average_precision=precision)
