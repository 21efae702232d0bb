"""The head of a report: plain words, and the figures of the states that users really live through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graceful.evaluation import report, ways
from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import OVERALL, Evidence
from graceful.evaluation.headline import Headline, headline
from graceful.evaluation.matrix import CompatibilityMatrix
from graceful.evaluation.outcomes import Outcomes, fraction_state
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import FRACTIONS, gather, with_states

Plant = Callable[..., Outcomes]
POLICY = RolloutPolicy(num_resamples=200)
MATRIX = CompatibilityMatrix(("g1", "g2"), np.array([[0.6, np.nan], [0.58, 0.7]]))
JARGON = ("wave zero", "wave 0", "power", "fraction/", "NFR", "guard", "bound", "certificate", "alpha")
FALLING = {0.0: 30, 0.05: 40, 0.1: 20, 0.25: 10, 0.5: 8, 0.75: 6, 1.0: 4}


def told(outcomes: Outcomes, policy: RolloutPolicy = POLICY, **kwargs: object) -> tuple[Headline, Evidence, Decision]:
    evidence = gather(outcomes, policy, **kwargs)
    decision = decide(evidence, policy)
    return headline(evidence, decision, policy, outcomes), evidence, decision


def few_with_hope(planted: Plant) -> Outcomes:
    """Too few queries for a certificate; the states in which it is given were measured, and lose one query."""
    bare = planted(num_queries=100)
    hoped = planted(num_queries=100, losses=1, wins=5)
    states = {
        fraction_state(f, []): (hoped.first_rank[fraction_state(f)], hoped.average_precision[fraction_state(f)])
        for f in FRACTIONS
        if f < 1
    }
    return with_states(bare, states)


def test_the_head_of_a_rollout_shows_the_worst_state_on_the_way_beside_the_last(planted: Plant) -> None:
    policy = RolloutPolicy(num_resamples=200, max_nfr=0.05)
    dear = CostInputs(
        rows_per_s=100, num_rows=1000, bytes_per_row=4, fixed_worker_hours=0, price_per_worker_hour=1,
        price_per_gib_month=0, value_per_point_day=100, days_until_next_generation=100,
    )  # fmt: skip
    outcomes = planted(losses=FALLING, wins={f: 100 + round(100 * f) for f in FRACTIONS})
    head, _, decision = told(outcomes, policy, cost=dear)
    assert (decision.outcome, decision.fraction) == ("COMPATIBLE_ROLLOUT", 1.0)
    worst, last = head.stages
    assert (worst.state.fraction, worst.lost, worst.won) == (0.05, 100, 262)
    assert (last.state.fraction, last.lost, last.won) == (1.0, 10, 500)
    assert worst.lost < (worst.lost_at_most or 0) < 200
    assert 200 < (worst.won_at_least or 0) < worst.won
    assert not head.would_be


def test_a_full_backfill_is_lived_through_in_its_last_state_alone(planted: Plant) -> None:
    mixed = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300)
    head, _, decision = told(planted(losses=mixed, wins=100))
    assert decision.outcome == "FULL_BACKFILL"
    assert [(stage.state.fraction, stage.lost) for stage in head.stages] == [(1.0, 0)]
    assert "recall@1 falls by at least 4.06 points with nothing re-embedded yet, 0.5 points may be lost." in head.why


def test_an_open_decision_shows_the_states_of_the_way_that_is_hoped_for(planted: Plant) -> None:
    head, evidence, decision = told(few_with_hope(planted), wave_zero=["g1"])
    assert decision.outcome == "INCONCLUSIVE"
    assert evidence.hoped_states
    assert [stage.state.state for stage in head.stages] == ["fraction/0/after/nothing"]
    assert head.stages[0].lost == 100
    assert head.would_be
    assert "100 queries of 100 identities are too few to tell" in head.why


def test_a_held_candidate_shows_what_would_be_lost_with_everything_re_embedded(planted: Plant) -> None:
    head, _, decision = told(planted(losses=300))
    assert decision.outcome == "HOLD"
    assert [(stage.state.fraction, stage.lost) for stage in head.stages] == [(1.0, 750)]
    assert head.would_be
    assert head.cost == "Nothing: nothing moves."
    assert [step.command.split()[1] for step in head.next_steps] == ["flips", "accept"]


def test_no_head_needs_a_dictionary(planted: Plant) -> None:
    mixed = dict.fromkeys((0.0, 0.05, 0.1, 0.25, 0.5, 0.75), 300)
    cases: list[tuple[Outcomes, dict[str, object]]] = [
        (planted(num_queries=20), {"champion": None, "live_owners": {}}),
        (planted(losses=5, wins=100), {}),
        (planted(losses=mixed, wins=100), {}),
        (planted(losses=300), {}),
        (planted(num_queries=100), {}),
        (few_with_hope(planted), {"wave_zero": ["g1"]}),
        (planted(losses=5, wins=100, owners={"g1": (900, 0)}), {"wave_zero": ["g1"]}),
    ]
    outcomes = set()
    for found, fields in cases:
        head, _, decision = told(found, **fields)
        outcomes.add(decision.outcome)
        said = " ".join([head.title, head.why, head.cost, *(f"{stage.title} {stage.when}" for stage in head.stages)])
        assert not [word for word in JARGON if word in said], said
        assert head.why.endswith(".")
        assert head.next_steps
    assert len(outcomes) == 5


def test_where_everything_is_re_embedded_first_no_backfill_curve_is_claimed(planted: Plant) -> None:
    outcomes = few_with_hope(planted)
    _, evidence, decision = told(outcomes, wave_zero=["g1"])
    assert ways.is_whole_gallery(evidence)
    (curve,) = ways.curves(evidence, outcomes, POLICY)
    assert curve.title == "if the open certificates pass"
    assert [point.nfr for point in curve.points] == pytest.approx([0.01] * 6 + [0.0])
    page = report.render_report(evidence, decision, POLICY, matrix=MATRIX, outcomes=outcomes)
    assert "This is no backfill curve of the gallery as it is" in page
    assert "At 0 % re-embedded the view changes" not in page


def test_the_old_gallery_is_drawn_where_it_was_measured_although_its_certificate_failed(planted: Plant) -> None:
    lost = planted(losses=1000, wins=100, owners={"g1": (900, 0)})
    old = {
        fraction_state(f, []): (lost.first_rank[fraction_state(f)], lost.average_precision[fraction_state(f)])
        for f in FRACTIONS
        if f < 1
    }
    outcomes = with_states(planted(losses=5, wins=100, owners={"g1": (900, 0)}), old)
    _, evidence, decision = told(outcomes, wave_zero=["g1"])
    assert decision.outcome == "FULL_BACKFILL"
    (curve,) = ways.curves(evidence, outcomes, POLICY)
    assert curve.title == "the old vectors, as they are"
    assert curve.points[0].nfr == pytest.approx(0.25)
    assert curve.points[-1].nfr == pytest.approx(5 / 4000)


def test_no_band_leaves_what_a_share_can_be(planted: Plant) -> None:
    outcomes = planted(num_queries=60, baseline_right=0.97, losses=1, wins=1)
    evidence = gather(outcomes, POLICY)
    states = [state for state in evidence.states if state.scope == OVERALL]
    assert max((s.baseline or 0) + (s.difference_upper or 0) for s in states) > 1  # as the bootstrap says it
    curve = ways.curves(evidence, outcomes, POLICY)[0]
    assert all(0 <= (p.lower or 0) <= (p.upper or 0) <= 1 for p in curve.points)


def test_slices_come_with_intervals_the_most_lost_first(planted: Plant) -> None:
    outcomes = planted(losses=100, wins=100, slices={"camera": np.repeat(["day", "night"], [2700, 1300])})
    evidence = gather(outcomes, POLICY)
    state = next(s for s in evidence.states if s.scope == OVERALL)
    night, day = report.slice_rows(evidence, POLICY, outcomes, state)
    assert (night["slice"], night["nfr"]) == ("camera=night", pytest.approx(100 / 1300))
    assert night["nfr_lower"] < night["nfr"] < night["nfr_upper"]
    assert day["nfr"] == day["nfr_lower"] == 0 < day["nfr_upper"]
    assert night["effective_n"] == night["n"] == 1300


def test_the_page_counts_guards_and_says_the_open_ones_in_words(planted: Plant) -> None:
    outcomes = planted(losses=300)
    _, evidence, decision = told(outcomes)
    page = report.render_report(evidence, decision, POLICY, matrix=MATRIX, outcomes=outcomes)
    passed = sum(reason.verdict == "PASS" for reason in decision.reasons)
    assert f"{passed} of {len(decision.reasons)} guards pass" in page
    assert "of the searches that work now fail with everything re-embedded, 2 % may." in page
    assert "with confidence 97.5 %, because an update can go wrong in two ways" in page
    assert "4,000 (4,000)" in page  # n, and the effective n beside it
