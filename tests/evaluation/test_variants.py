"""The gate of a variant: what it reads is no worse than what it would have for itself, and better than chance."""

import numpy as np
import pytest

from graceful.evaluation.outcomes import Outcomes, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.variants import judge_text_tower, judge_variant, metrics_on

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


# Text towers ----------------------------------------------------------------------------------------------------------

WORDS, BEFORE = "g002.words-dddddd", "g001.words-eeeeee"


def text_outcomes(
    cloud: float, *, old: float | None = None, before: float | None = None, num_lost: int = 0
) -> Outcomes:
    """Texts of which a share finds what it names: on the cloud's vectors, on an older one's, and by an older tower."""
    shares = {pair_state(WORDS, CLOUD): cloud, pair_state(WORDS, OLD): old, pair_state(BEFORE, OLD): before}
    order = np.random.default_rng(0).permutation(N)
    ranks = {
        state: np.where(np.arange(N) < share * N, 1, 2).astype(np.int32)[order]
        for state, share in shares.items()
        if share is not None
    }
    for values in ranks.values():
        values[:num_lost] = 0
    groups = np.array([f"i{row // 4}" for row in range(N)])
    return Outcomes(
        query_ids=np.array([f"q{row}" for row in range(N)]),
        identities=groups,
        clusters=groups,
        slices={},
        first_rank=ranks,
        average_precision={
            state: np.where(values > 0, 1.0 / np.maximum(values, 1), np.nan).astype(np.float32)
            for state, values in ranks.items()
        },
    )


def judge_words(found: Outcomes, policy: RolloutPolicy = POLICY, **changes):
    asked = {"variant": WORDS, "cloud": CLOUD, "live_owners": SHARES, "chance": 0.05, **changes}
    return judge_text_tower(found, policy, **asked)


@pytest.mark.parametrize(
    ("cloud", "asked", "why"),
    [
        (0.50, {}, None),
        (0.50, {"min_quality_points": 45.0}, None),
        (0.50, {"min_quality_points": 49.9}, "is below the 49.9 % that are asked for"),
        (0.055, {}, "is not above the 5.0 % of a model that knows nothing"),
        (0.50, {"chance": None}, "is not above"),
        (0.50, {"chance": 0.50}, "is not above"),
    ],
)
def test_a_text_tower_is_approved_where_its_bound_is_above_chance_and_what_is_asked_for(cloud, asked, why):
    verdict = judge_words(text_outcomes(cloud), **asked)
    assert verdict.approved == (why is None)
    assert (why or "approved: 50.0 % of the texts on the vectors of g002-bbbbbb, at least 4") in verdict.reason
    assert verdict.readable == (() if why else (CLOUD,))
    assert verdict.gate is None, "there is none that it takes the place of"


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (0.50, None),
        (0.40, None),
        (0.60, "it is worse by more than the margin of 3 points"),
        (0.525, "it may be worse by more than the margin of 3 points"),
        (None, "it may be worse by more than the margin of 3 points"),
    ],
)
def test_a_text_tower_is_not_inferior_to_the_one_that_it_takes_the_place_of(before, why):
    verdict = judge_words(text_outcomes(0.50, before=before), replaced=(BEFORE, OLD))
    assert verdict.approved == (why is None)
    assert f"; {BEFORE}, which it takes the place of, found" in verdict.reason
    assert why is None or why in verdict.reason
    assert verdict.gate.baseline == before


def test_without_a_margin_a_successor_is_refused_and_a_first_tower_is_not():
    policy = POLICY.model_copy(update={"quality_margin_points": None})
    found = text_outcomes(0.50, before=0.50)
    assert judge_words(found, policy).approved
    assert "states no quality_margin_points" in judge_words(found, policy, replaced=(BEFORE, OLD)).reason


@pytest.mark.parametrize(
    ("cloud", "old", "reads"),
    [(0.50, 0.50, True), (0.50, 0.60, True), (0.50, 0.40, False), (0.50, None, False), (0.07, 0.055, False)],
)
def test_a_text_tower_reads_older_vectors_that_serve_it_as_well_as_its_own_and_better_than_chance(cloud, old, reads):
    verdict = judge_words(text_outcomes(cloud, old=old))
    assert verdict.approved
    assert verdict.readable == ((CLOUD, OLD) if reads else (CLOUD,))


def test_texts_that_could_find_nothing_are_counted_and_too_few_identities_refused():
    verdict = judge_words(text_outcomes(0.5, num_lost=400))
    assert verdict.approved
    assert "(400 of 2,000 texts have no item of their label to find)" in verdict.reason
    verdict = judge_words(text_outcomes(0.5, num_lost=N - 16))
    assert "come from 4 identities, at least 5 are needed" in verdict.reason
    assert not verdict.approved
    assert "come from 0 identities" in judge_words(text_outcomes(0.5, num_lost=N)).reason


def test_under_map_the_value_takes_the_place_of_the_bound():
    policy = POLICY.model_copy(update={"metric": "mAP"})
    verdict = judge_words(text_outcomes(0.5), policy, min_quality_points=75.0)
    assert verdict.approved, "a mean of 1 and 1/2"
    assert not judge_words(text_outcomes(0.5), policy, min_quality_points=75.1).approved
