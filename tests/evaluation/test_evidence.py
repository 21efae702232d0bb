"""Evidence: what is measured, what is missing, and that nothing is invented."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from graceful.evaluation.certificates import certify, wave_zero_generations
from graceful.evaluation.cost import CostInputs
from graceful.evaluation.decision import certificates_to_issue
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state
from graceful.evaluation.policy import RolloutPolicy
from tests.evaluation.conftest import QUICK, gather, with_states

Plant = Callable[..., Outcomes]


def test_policy_defaults_are_the_ones_written_down() -> None:
    policy = RolloutPolicy()
    assert (policy.alpha, policy.metric, policy.k) == (0.05, "recall@k", 1)
    assert (policy.quality_margin_points, policy.max_nfr, policy.max_dip_points) == (0.5, 0.02, 1.0)
    assert (policy.max_wave_zero_share, policy.required_slices, policy.num_resamples) == (0.10, (), 2000)
    assert policy.fractions == (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    with pytest.raises(ValidationError, match="rise from 0 to 1"):
        RolloutPolicy(fractions=(0.1, 1.0))
    with pytest.raises(ValidationError, match="extra"):
        RolloutPolicy(max_nrf=0.1)  # type: ignore[call-arg]


def test_numbers_are_those_that_were_planted(planted: Plant) -> None:
    evidence = gather(planted(losses={0.0: 40, 1.0: 4}, wins={0.0: 80, 1.0: 400}))
    first, last = evidence.states[0], evidence.states[-1]
    assert (first.fraction, last.fraction) == (0.0, 1.0)
    assert (first.num_queries, first.nfr, first.pfr) == (4000, 0.01, 0.02)
    assert first.difference == pytest.approx(0.01)
    assert first.pfr is not None
    assert first.nfr is not None
    assert first.difference == pytest.approx(first.pfr - first.nfr)
    assert last.difference == pytest.approx(0.099)
    assert last.difference_lower is not None
    assert 0.08 < last.difference_lower < 0.099
    assert last.mcnemar_p is not None
    assert last.mcnemar_p < 1e-9
    assert evidence.missing == ()


def test_evidence_survives_json_and_is_reproducible(planted: Plant) -> None:
    outcomes = planted(losses=12, wins=30, slices={"camera": np.resize(["day", "night"], 4000)})
    policy = QUICK.model_copy(update={"required_slices": ("camera",)})
    cost = CostInputs(rows_per_s=10, num_rows=1000)
    evidence = gather(outcomes, policy, cost=cost)
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence
    assert gather(outcomes, policy, cost=cost).model_dump_json() == evidence.model_dump_json()


def test_evidence_without_any_bound_survives_json(planted: Plant) -> None:
    evidence = gather(planted(num_queries=10, queries_per_cluster=10))
    assert evidence.states[0].difference_lower is None
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_query_order_does_not_matter_for_exact_numbers(planted: Plant) -> None:
    outcomes = planted(num_queries=600, queries_per_cluster=3, losses=9, wins=20)
    order = np.random.default_rng(0).permutation(600)
    shuffled = Outcomes(
        outcomes.query_ids[order],
        outcomes.identities[order],
        outcomes.clusters[order],
        {},
        {state: rank[order] for state, rank in outcomes.first_rank.items()},
        {state: precision[order] for state, precision in outcomes.average_precision.items()},
    )
    for first, second in zip(gather(shuffled).states, gather(outcomes).states, strict=True):
        for field in ("difference", "difference_lower", "difference_sd", "nfr_upper", "nfr_design_effect"):
            assert getattr(first, field) == pytest.approx(getattr(second, field), rel=1e-9)


def test_a_lost_query_is_a_loss_and_is_counted(planted: Plant) -> None:
    outcomes = planted(num_queries=1000)
    state = fraction_state(0.5)
    rank, precision = dict(outcomes.first_rank), dict(outcomes.average_precision)
    rank[state] = np.where(np.arange(1000) < 10, 0, rank[state])
    precision[state] = np.where(np.arange(1000) < 10, np.nan, precision[state])
    rank[SERVED] = np.where(np.arange(1000) >= 995, 0, rank[SERVED])
    precision[SERVED] = np.where(np.arange(1000) >= 995, np.nan, precision[SERVED])
    lossy = Outcomes(outcomes.query_ids, outcomes.identities, outcomes.clusters, {}, rank, precision)
    found = next(item for item in gather(lossy).states if item.state == state)
    assert (found.num_lost, found.num_without_baseline, found.num_queries) == (10, 5, 995)
    assert found.nfr == pytest.approx(10 / 995)


def test_slices_are_guarded_by_value_or_all_at_once(planted: Plant) -> None:
    outcomes = planted(slices={"camera": np.resize(["day", "night"], 4000)})
    both = gather(outcomes, QUICK.model_copy(update={"required_slices": ("camera",)}))
    assert {item.scope for item in both.states} == {"overall", "camera=day", "camera=night"}
    one = gather(outcomes, QUICK.model_copy(update={"required_slices": ("camera=night",)}))
    assert {item.scope for item in one.states} == {"overall", "camera=night"}
    assert next(item for item in one.states if item.scope != "overall").num_queries == 2000


def test_missing_things_are_named(planted: Plant) -> None:
    outcomes = planted(num_queries=200)
    bare = Outcomes(outcomes.query_ids, outcomes.identities, outcomes.clusters, {}, {}, {})
    policy = QUICK.model_copy(update={"required_slices": ("camera", "size=small")})
    missing = " | ".join(gather(bare, policy).missing)
    for piece in (
        "self-test",
        "'served'",
        "'fraction/0.25'",
        "'live/g2/g1'",
        "'live/g1/g1'",
        "'camera'",
        "'size=small'",
    ):
        assert piece in missing
    assert "live owners" in " | ".join(gather(outcomes, live_owners={}).missing)


def test_the_first_generation_needs_only_its_self_test(planted: Plant) -> None:
    evidence = gather(planted(), champion=None, live_owners={})
    assert evidence.missing == ()
    assert evidence.self_test == pytest.approx(0.7)
    assert evidence.states == ()


def test_certificates_pass_fail_or_stay_unknown(planted: Plant) -> None:
    outcomes = planted(owners={"g0": (400, 0), "g1": (2, 60), "gx": (40, 30)})
    shares = {"g0": 0.05, "g1": 0.85, "gx": 0.06, "g2": 0.01}
    evidence = gather(outcomes, live_owners=shares)
    verdicts = {item.gallery_generation: item.verdict for item in evidence.certificates}
    assert verdicts == {"g0": "FAIL", "g1": "PASS", "gx": "UNKNOWN"}
    assert evidence.wave_zero_generations == ("g0", "gx")
    assert evidence.wave_zero_share == pytest.approx(0.11)
    assert evidence.unreadable_share == pytest.approx(0.03)
    alone = certify(outcomes, QUICK, live_owners=shares, candidate="g2", champion="g1")
    assert alone == evidence.certificates
    assert wave_zero_generations(alone) == evidence.wave_zero_generations


def test_an_old_client_is_compared_with_its_own_vectors_and_gets_a_certificate_of_its_own(planted: Plant) -> None:
    own = np.where(np.arange(4000) < 2800, 1, 7).astype(np.int32)
    better, worse = own.copy(), own.copy()
    better[2800:2900] = 1
    worse[2500:2800] = 7

    def state(rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rank, (1 / rank).astype(np.float32)

    states = {f"pair/{name}/{name}": state(own) for name in ("g0", "gx")}
    states |= {"pair/g0/g2": state(better), "pair/gx/g2": state(worse)}
    evidence = gather(with_states(planted(), states), clients=["g0", "gx", "unmeasured"])
    found = {item.query_generation: (item.gallery_generation, item.verdict) for item in evidence.clients}
    assert found == {"g0": ("g2", "PASS"), "gx": ("g2", "FAIL"), "unmeasured": ("g2", "UNKNOWN")}
    assert evidence.clients[0].difference == pytest.approx(0.025)
    # No option depends on a client: neither wave 0 nor the rest of the evidence changes.
    assert evidence.model_copy(update={"clients": ()}) == gather(with_states(planted(), states))
    issued = {(item.query_generation, item.gallery_generation) for item in certificates_to_issue(evidence)}
    assert issued == {("g2", "g2"), ("g2", "g1"), ("g0", "g2")}


def test_an_owner_without_any_relevant_row_is_unknown_not_missing(planted: Plant) -> None:
    outcomes = planted(num_queries=1000, owners={"g1": (0, 0), "g0": (0, 0)})
    rank, precision = dict(outcomes.first_rank), dict(outcomes.average_precision)
    for state in ("live/g1/g0", "live/g2/g0"):
        rank[state], precision[state] = np.zeros(1000, np.int32), np.full(1000, np.nan, np.float32)
    evidence = gather(
        Outcomes(outcomes.query_ids, outcomes.identities, outcomes.clusters, {}, rank, precision),
        live_owners={"g1": 0.99, "g0": 0.01},
    )
    assert evidence.missing == ()
    assert evidence.wave_zero_generations == ("g0",)


def test_impossible_shares_are_refused(planted: Plant) -> None:
    with pytest.raises(ValueError, match="sum of at most 1"):
        gather(planted(num_queries=50), live_owners={"g1": 0.9, "g0": 0.2})
