"""The gate of a variant: what it reads is no worse than what it would have for itself, and better than chance."""

import numpy as np
import pytest

from graceful.evaluation.outcomes import Outcomes, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.variants import judge_variant, metrics_on

EDGE, CLOUD, OLD = "g002.edge-cccccc", "g002-bbbbbb", "g001-aaaaaa"
POLICY = RolloutPolicy(quality_margin_points=3.0, num_resamples=400)
N = 2_000
SHARES = {CLOUD: 0.4, OLD: 0.6}


def outcomes(**shares_right: float) -> Outcomes:
    """Queries of which a share is right in each state; the same ones are right first."""
    names = {
        "own": pair_state(EDGE, EDGE),
        "cloud": pair_state(EDGE, CLOUD),
        "old": live_state(EDGE, OLD),
        "cloud_on_old": live_state(CLOUD, OLD),
    }
    ranks = {
        names[name]: np.where(np.arange(N) < share * N, 1, 2).astype(np.int32) for name, share in shares_right.items()
    }
    order = np.random.default_rng(0).permutation(N)
    return Outcomes(
        query_ids=np.array([f"q{row}" for row in range(N)]),
        identities=np.array([f"i{row // 4}" for row in range(N)]),
        clusters=np.array([f"i{row // 4}" for row in range(N)]),
        slices={},
        first_rank={name: values[order] for name, values in ranks.items()},
        average_precision={name: (1.0 / values[order]).astype(np.float32) for name, values in ranks.items()},
    )


def judge(found: Outcomes, chance: float | None = 0.01):
    return judge_variant(found, POLICY, variant=EDGE, cloud=CLOUD, live_owners=SHARES, chance=chance)


@pytest.mark.parametrize(
    ("own", "cloud", "approved", "why"),
    [
        (0.80, 0.80, True, "approved: 80.0 % on the vectors"),
        (0.80, 0.90, True, "+10.00 points"),
        (0.80, 0.70, False, "it is worse by more than the margin of 3 points"),
        (0.80, 0.775, False, "it may be worse by more than the margin"),
        (0.01, 0.01, False, "is not above the 1.0 % of a model that knows nothing"),
    ],
)
def test_a_variant_is_approved_where_the_clouds_vectors_serve_it_as_well_as_its_own(own, cloud, approved, why):
    verdict = judge(outcomes(own=own, cloud=cloud))
    assert verdict.approved == approved
    assert why in verdict.reason
    assert verdict.readable == ((CLOUD,) if approved else ())


@pytest.mark.parametrize(("old", "cloud_on_old", "reads"), [(0.7, 0.7, True), (0.6, 0.7, False)])
def test_an_older_generations_rows_are_read_where_the_cloud_reads_them_no_better(old, cloud_on_old, reads):
    verdict = judge(outcomes(own=0.8, cloud=0.8, old=old, cloud_on_old=cloud_on_old))
    assert verdict.readable == ((CLOUD, OLD) if reads else (CLOUD,))


def test_what_was_not_measured_is_not_approved():
    verdict = judge(outcomes(own=0.8))
    assert not verdict.approved
    assert "nothing measurable" in verdict.reason
    assert judge(outcomes(own=0.8, cloud=0.8)).readable == (CLOUD,), "no certificate for rows without a measurement"


def test_no_margin_and_too_few_identities_are_reasons():
    found = outcomes(own=0.8, cloud=0.8)
    for changes, why in (
        ({"quality_margin_points": None}, "states no quality_margin_points"),
        ({"min_identities": 501}, "500 identities, at least 501"),
    ):
        policy = POLICY.model_copy(update=changes)
        verdict = judge_variant(found, policy, variant=EDGE, cloud=CLOUD, live_owners=SHARES, chance=None)
        assert not verdict.approved
        assert why in verdict.reason


def test_a_row_of_the_matrix_has_what_was_measured():
    assert metrics_on(outcomes(own=0.8, cloud=0.7), POLICY, EDGE, [OLD, CLOUD, EDGE]) == {CLOUD: 0.7, EDGE: 0.8}
