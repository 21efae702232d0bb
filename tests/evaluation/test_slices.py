"""Golden queries, severity classes and discovered slices: planted, counted, judged, and quiet where nothing is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from graceful.evaluation import slices
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.slices import IDENTITY_SIZE, discover_slices, golden_flips
from tests.evaluation.conftest import QUICK, gather

Plant = Callable[..., Outcomes]
ZERO, FULL = fraction_state(0), fraction_state(1)


def decided(outcomes: Outcomes, policy: RolloutPolicy = QUICK) -> tuple[Evidence, Decision]:
    evidence = gather(outcomes, policy)
    return evidence, decide(evidence, policy)


# Golden queries -------------------------------------------------------------------------------------------------------


def test_one_lost_golden_query_fails_by_name_whatever_the_rest_wins(planted: Plant) -> None:
    golden = np.full(4000, "", object)
    golden[[2799, 10, 3999]] = ["true", "TRUE", "1"]  # the last right one, one that stays, one that is wrong anyway
    outcomes = planted(losses=1, wins=200, slices={"golden": golden})
    assert golden_flips(outcomes, SERVED, FULL) == (2, ("q2799",))
    evidence, decision = decided(outcomes)
    assert decision.outcome == "HOLD"
    assert "golden queries, fraction/1: 1 of 2 right now and wrong afterwards (q2799), none may be" in decision.summary
    assert [item.flips for item in evidence.consumers.golden] == [("q2799",)] * len(QUICK.fractions)


def test_golden_queries_that_stay_right_pass_and_others_may_be_lost(planted: Plant) -> None:
    golden = np.full(4000, "false", object)
    golden[:5] = "yes"
    _, decision = decided(planted(losses=3, wins=200, slices={"golden": golden}))
    assert decision.outcome == "COMPATIBLE_ROLLOUT", decision.summary
    assert {r.verdict for r in decision.reasons if r.guard == "golden"} == {"PASS"}
    _, without = decided(planted(losses=3, wins=200))
    assert not any(r.guard == "golden" for r in without.reasons)


def test_golden_query_whose_rows_are_gone_is_lost(planted: Plant) -> None:
    golden = np.full(4000, "", object)
    golden[0] = "true"
    outcomes = planted(wins=200, slices={"golden": golden})
    outcomes.first_rank[FULL][0] = 0
    outcomes.average_precision[FULL][0] = np.nan
    assert golden_flips(outcomes, SERVED, FULL) == (1, ("q0",))
    assert golden_flips(outcomes, SERVED, ZERO) == (1, ())


def test_a_rollout_must_keep_golden_queries_in_every_state_on_the_way(planted: Plant) -> None:
    golden = np.full(4000, "", object)
    golden[2799] = "true"
    only_first = {0.0: 1}
    _, decision = decided(planted(losses=only_first, wins=200, slices={"golden": golden}))
    assert decision.outcome == "FULL_BACKFILL"  # what is lost on the unchanged gallery is right when all is re-embedded
    assert "golden" in decision.summary


def test_many_lost_golden_queries_are_cut_in_the_reason_and_not_in_the_evidence(planted: Plant) -> None:
    golden = np.full(4000, "true", object)
    evidence, decision = decided(planted(losses=12, wins=200, slices={"golden": golden}))
    assert len(evidence.consumers.golden[-1].flips) == 12
    reason = next(r for r in decision.reasons if r.guard == "golden")
    assert reason.text.count("q27") == 10
    assert ", ..." in reason.text


# Severity classes -----------------------------------------------------------------------------------------------------

SEVERE = QUICK.model_copy(update={"max_nfr_by_severity": {"critical": 0.01}})


def severity(num_critical_lost: int) -> np.ndarray:
    column = np.full(4000, "minor", object)
    column[:1000] = "critical"
    column[2800 - num_critical_lost : 2800] = "critical"
    return column


def test_a_severity_class_is_held_to_its_own_limit_and_to_that_alone(planted: Plant) -> None:
    lost = {"losses": 30, "wins": 200}
    _, fine = decided(planted(**lost, slices={"severity": severity(0)}), SEVERE)
    assert fine.outcome == "COMPATIBLE_ROLLOUT", fine.summary
    mine = [r for r in fine.reasons if r.scope == "severity=critical"]
    assert {r.guard for r in mine} == {"NFR"}
    assert {r.threshold for r in mine} == {0.01}
    _, broken = decided(planted(**lost, slices={"severity": severity(30)}), SEVERE)
    assert broken.outcome == "HOLD"
    assert "severity=critical, fraction/1: 2.91 % of queries right now and wrong afterwards" in broken.summary
    required = SEVERE.model_copy(update={"required_slices": ("severity",)})
    _, both = decided(planted(**lost, slices={"severity": severity(0)}), required)
    assert {r.guard for r in both.reasons if r.scope == "severity=critical"} == {"NFR", "quality", "dip"}
    assert {r.threshold for r in both.reasons if r.scope == "severity=minor" and r.guard == "NFR"} == {QUICK.max_nfr}


def test_a_severity_class_that_nobody_tagged_is_missing(planted: Plant) -> None:
    _, without = decided(planted(wins=200), SEVERE)
    assert without.outcome == "HOLD"
    assert "slice 'severity=critical': no such slice" in without.summary
    _, empty = decided(planted(wins=200, slices={"severity": np.full(4000, "minor")}), SEVERE)
    assert "no query of it is measurable" in empty.summary


# Discovered slices ----------------------------------------------------------------------------------------------------


def columns(num: int = 4000, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "camera": rng.choice(["a", "b", "c"], num),
        "light": rng.choice(["day", "night"], num),
        "age": rng.choice(["young", "old", ""], num),
    }


def lose(outcomes: Outcomes, where: np.ndarray, share: float, base: float, seed: int = 1) -> Outcomes:
    """Turn queries that are right now wrong in the full state: a share of those in `where`, another of the rest."""
    chance = np.random.default_rng(seed).random(len(outcomes))
    lost = (outcomes.first_rank[SERVED] == 1) & (chance < np.where(where, share, base))
    outcomes.first_rank[FULL][:] = np.where(lost, 7, outcomes.first_rank[SERVED])
    outcomes.average_precision[FULL][:] = 1 / outcomes.first_rank[FULL]
    return outcomes


def test_a_planted_pair_of_values_is_found_and_comes_first(planted: Plant) -> None:
    outcomes = planted(baseline_right=1.0, slices=columns())
    where = (outcomes.slices["camera"] == "a") & (outcomes.slices["light"] == "night")
    found = discover_slices(lose(outcomes, where, 0.12, 0.005), SERVED, FULL)
    assert found.found[0].scope == "camera=a & light=night"
    assert found.found[0].num_queries == where.sum()
    assert found.found[0].num_lost == (where & (outcomes.first_rank[FULL] == 7)).sum()
    assert found.found[0].nfr_elsewhere < 0.01 < found.found[0].nfr_lower
    assert found.num_left_out == 0
    # 3 + 2 + 2 values, 16 pairs of them; all identities have one query: that slice is everything.
    assert found.num_tested == 23


@pytest.mark.parametrize(("per_cluster", "by_count"), [(4, False), (10, True)])
def test_p_values_are_the_larger_of_two_tests_and_corrected_for_all_that_were_tested(
    planted: Plant, per_cluster: int, by_count: bool
) -> None:
    """With ten queries an identity, and twelve losses, the count says less than the difference."""
    cameras = {"camera": np.repeat(["a", "b"], [1200, 2800])}
    outcomes = planted(baseline_right=1.0, queries_per_cluster=per_cluster, slices=cameras if by_count else columns())
    if by_count:
        where = np.isin(np.arange(4000), [*np.linspace(0, 1199, 12).astype(int), 3999])
        lose(outcomes, where, 1.0, 0.0)
    else:
        lose(outcomes, (outcomes.slices["camera"] == "a") & (outcomes.slices["light"] == "night"), 0.05, 0.002)
    found, num_tested, _ = discover_slices(outcomes, SERVED, FULL, false_share=0.5 if by_count else 0.1)
    assert found
    lost, clusters = outcomes.first_rank[FULL] == 7, outcomes.clusters
    larger = set()
    for item in found:
        inside = np.ones(4000, bool)
        for part in item.scope.split(" & "):
            name, _, value = part.partition("=")
            inside &= outcomes.slices[name] == value
        rates = [lost[side].mean() for side in (inside, ~inside)]
        total = 0.0
        for cluster in set(clusters.tolist()):
            mine = clusters == cluster
            here = ((lost - rates[0]) * inside * mine).sum() / inside.sum()
            total += (here - ((lost - rates[1]) * ~inside * mine).sum() / (~inside).sum()) ** 2
        error = np.sqrt(total * 1000 / 999)
        freedom = min(len(set(clusters[side].tolist())) for side in (inside, ~inside)) - 1
        difference = stats.t.sf((rates[0] - rates[1]) / error, freedom)
        sizes = [share_bounds(lost[side], clusters[side]).effective_n for side in (inside, ~inside)]
        typical = stats.beta.ppf(0.5, rates[1] * sizes[1] + 1, sizes[1] * (1 - rates[1]))
        count = stats.beta.cdf(typical, rates[0] * sizes[0], sizes[0] * (1 - rates[0]) + 1)
        assert item.p_value == pytest.approx(max(difference, count), rel=1e-6)
        larger.add(bool(count > difference))
    assert by_count in larger
    harmonic = sum(1 / rank for rank in range(1, num_tested + 1))
    corrected = [item.p_value * num_tested * harmonic / rank for rank, item in enumerate(found, 1)]
    assert [item.q_value for item in found] == pytest.approx([min(corrected[place:]) for place in range(len(found))])


def test_identities_of_many_queries_are_a_slice_too(planted: Plant) -> None:
    sizes = np.concatenate([np.repeat(np.arange(100), 12), 1000 + np.arange(2800)])
    outcomes = planted(baseline_right=1.0)
    object.__setattr__(outcomes, "identities", sizes.astype(np.str_))
    found = discover_slices(lose(outcomes, np.arange(4000) < 1200, 0.1, 0.005), SERVED, FULL).found
    assert found[0].scope == f"{IDENTITY_SIZE}=10+"


def test_an_identity_that_is_lost_whole_is_no_slice(planted: Plant) -> None:
    """One identity of forty queries, all in one camera: forty losses that are one."""
    cameras = {"camera": np.repeat(["a", "b"], [1200, 2800])}
    outcomes = planted(baseline_right=1.0, queries_per_cluster=40, slices=cameras)
    assert discover_slices(lose(outcomes, np.arange(4000) < 40, 1.0, 0.0), SERVED, FULL).found == ()
    alone = planted(baseline_right=1.0, slices=cameras)
    assert discover_slices(lose(alone, np.arange(4000) < 40, 1.0, 0.0), SERVED, FULL).found != ()


@pytest.mark.parametrize("per_cluster", [1, 10])
def test_nothing_is_discovered_where_nothing_is(planted: Plant, per_cluster: int) -> None:
    """Ten worlds without a slice: at 10 % more than three with a discovery would happen once in a hundred."""
    loud = 0
    for seed in range(10):
        outcomes = planted(baseline_right=1.0, queries_per_cluster=per_cluster, slices=columns(seed=seed))
        everywhere = np.ones(4000, bool)
        loud += bool(discover_slices(lose(outcomes, everywhere, 0.02, 0.02, seed), SERVED, FULL).found)
    assert loud <= 3


def test_discoveries_warn_and_decide_nothing(planted: Plant) -> None:
    outcomes = planted(losses=30, wins=400, slices={"camera": np.where(np.arange(4000) // 30 == 92, "a", "b")})
    evidence, decision = decided(outcomes)
    assert [item.scope for item in evidence.consumers.discovered[:1]] == ["camera=a"]
    assert {item.state for item in evidence.consumers.discovered} == {fraction_state(f) for f in QUICK.fractions}
    assert decision.outcome == "COMPATIBLE_ROLLOUT", decision.summary
    assert not any("camera" in reason.scope for reason in decision.reasons)


def test_too_many_pairs_are_counted_and_small_slices_left_out(planted: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = planted(baseline_right=1.0, slices=columns() | {"rare": np.where(np.arange(4000) < 19, "x", "y")})
    everything = discover_slices(outcomes, SERVED, FULL)
    monkeypatch.setattr(slices, "MAX_LOOKED", 3)
    few = discover_slices(outcomes, SERVED, FULL)
    assert (few.num_tested, few.num_left_out) == (10, len(pairs_of_large(outcomes)) - 3)
    assert everything.num_left_out == 0
    assert discover_slices(planted(), SERVED, FULL) == ((), 0, 0)
    with pytest.raises(ValueError, match="between 0 and 1, found 0"):
        discover_slices(outcomes, SERVED, FULL, false_share=0)


def pairs_of_large(outcomes: Outcomes) -> list[tuple[str, str]]:
    """Pairs of values of two columns, each of 20 queries at least; the size of identities is one value here."""
    large = {
        name: [value for value in set(values.tolist()) - {""} if (values == value).sum() >= 20]
        for name, values in {**outcomes.slices, IDENTITY_SIZE: np.full(len(outcomes), "1")}.items()
    }
    names = sorted(large)
    return [(a, b) for i, one in enumerate(names) for other in names[i + 1 :] for a in large[one] for b in large[other]]
