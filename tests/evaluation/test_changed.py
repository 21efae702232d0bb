"""Only changed answers need a label: what is known from them is what labelling everything would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from graceful.evaluation.changed import (
    NOTHING_SHOWN,
    RIGHT,
    UNCLEAR,
    UNKNOWN,
    WRONG,
    ChangedAnswersError,
    LogAnswers,
    beginning,
    changed,
    labels_needed,
    log_columns,
    log_differences,
    log_from_columns,
    next_to_label,
    unsettled,
)
from graceful.evaluation.decision import decide
from graceful.evaluation.evidence import Evidence
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state
from tests.evaluation.conftest import QUICK, gather

Plant = Callable[..., Outcomes]
AFTER = fraction_state(0)
PAIR = (SERVED, AFTER)
RECALL = {"metric": "recall@k", "k": 1}


def drawn_log(rng: np.random.Generator, num: int = 60, unlabelled: float = 0.2) -> LogAnswers:
    """Random answers of three identities and nothing, with random labels."""
    answers = {state: rng.choice(["is:a", "is:b", "is:c", NOTHING_SHOWN], num) for state in PAIR}
    verdicts = {}
    for state, shown in answers.items():
        said = rng.choice([WRONG, RIGHT, UNCLEAR], num, p=[0.5, 0.4, 0.1]).astype(np.int8)
        said[rng.random(num) < unlabelled] = UNKNOWN
        said[shown == NOTHING_SHOWN] = WRONG
        verdicts[state] = said
    ids = np.array([f"q{i}" for i in range(num)])
    return LogAnswers(ids, rng.choice(["x", "y", "z"], num), 1, {}, answers, verdicts)


@pytest.mark.parametrize("seed", range(20))
def test_differences_are_those_of_a_loop_over_queries(seed: int) -> None:
    log = drawn_log(np.random.default_rng(seed), unlabelled=0.02)
    expected, open_yet = [], False
    for place in range(len(log)):
        before, after = (str(log.answers[state][place]) for state in PAIR)
        said = [int(log.verdicts[state][place]) for state in PAIR]
        if before == after:
            value = 0.0
        else:
            open_yet |= any(s == UNKNOWN and a for s, a in zip(said, (before, after), strict=True))
            value = (said[1] == RIGHT) - (said[0] in (RIGHT, UNCLEAR))
        expected.append(np.nan if open_yet else float(value))
    np.testing.assert_array_equal(log_differences(log, PAIR, **RECALL), expected)
    assert beginning(log, [PAIR]) == int((~np.isnan(expected)).sum())


def as_log(
    outcomes: Outcomes, rows: np.ndarray, *, labelled: int | None = None, rng: np.random.Generator
) -> LogAnswers:
    """Queries of `outcomes` as a log: a right query is answered with its identity, a wrong one with another.

    Some of the wrong ones change from one wrong answer to another. `labelled`: so many of the changed have a label.
    """
    wrong_twice = rng.random(len(outcomes)) < 0.5
    answers, verdicts = {}, {}
    for state in outcomes.states:
        right = outcomes.first_rank[state][rows] == 1
        other = np.where(wrong_twice[rows] & (state != SERVED), "is:wrong2", "is:wrong1")
        answers[state] = np.where(right, np.char.add("is:", outcomes.identities[rows]), other)
        verdicts[state] = np.where(right, RIGHT, WRONG).astype(np.int8)
    log = LogAnswers(outcomes.query_ids[rows], outcomes.clusters[rows], 1, {}, answers, verdicts)
    if labelled is not None:
        moved = np.flatnonzero(np.logical_or.reduce([changed(log, (SERVED, state)) for state in outcomes.states]))
        for state in outcomes.states:
            verdicts[state][moved[labelled:]] = UNKNOWN
            verdicts[state][np.setdiff1d(np.arange(len(rows)), moved)] = UNKNOWN  # nobody labels what did not change
    return log


def take(outcomes: Outcomes, rows: np.ndarray, log: LogAnswers | None = None) -> Outcomes:
    return replace(
        outcomes,
        query_ids=outcomes.query_ids[rows],
        identities=outcomes.identities[rows],
        clusters=outcomes.clusters[rows],
        slices={name: values[rows] for name, values in outcomes.slices.items()},
        first_rank={state: values[rows] for state, values in outcomes.first_rank.items()},
        average_precision={state: values[rows] for state, values in outcomes.average_precision.items()},
        log=log,
    )


def judged(evidence: Evidence) -> list[tuple[object, ...]]:
    """Everything that a guard reads."""
    states = [
        (s.num_queries, s.num_clusters, s.difference, s.difference_lower, s.difference_upper, s.nfr, s.nfr_lower,
         s.nfr_upper, s.pfr, s.mcnemar_p, s.difference_sd)
        for s in evidence.states
    ]  # fmt: skip
    return [*states, *((c.difference_lower, c.difference_upper, c.verdict) for c in evidence.certificates)]


@pytest.mark.parametrize(("size", "losses", "wins"), [(1, 40, 90), (10, 40, 90), (4, 0, 0)])
def test_labels_of_changed_answers_say_what_labelling_everything_says(
    planted: Plant, size: int, losses: int, wins: int
) -> None:
    outcomes = planted(num_queries=4000, queries_per_cluster=size, losses=losses, wins=wins)
    rng = np.random.default_rng(1)
    order = rng.permutation(4000)
    base, rest = order[:500], order[500:]
    log = as_log(outcomes, rest, labelled=4000, rng=rng)
    with_log, everything = gather(take(outcomes, base, log)), gather(take(outcomes, np.concatenate([base, rest])))
    assert with_log.states[0].num_log_queries == 3500
    for one, other in zip(judged(with_log), judged(everything), strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def test_what_lies_behind_the_first_open_query_does_not_count(planted: Plant) -> None:
    outcomes = planted(num_queries=2000, losses=100, wins=100)
    rng = np.random.default_rng(2)
    order = rng.permutation(2000)
    base, rest = order[:500], order[500:]
    log = as_log(outcomes, rest, labelled=30, rng=rng)
    pairs = [(SERVED, state) for state in outcomes.states if state.startswith("fraction")]
    settled = beginning(log, pairs)
    assert 0 < settled < 1500
    cut = take(outcomes, np.concatenate([base, rest[:settled]]))
    assert judged(gather(take(outcomes, base, log)))[0] == pytest.approx(judged(gather(cut))[0], abs=1e-12)


def test_nothing_changed_needs_no_label_and_shows_no_flip(planted: Plant) -> None:
    outcomes = planted(num_queries=1000)
    same = {state: np.full(3000, "is:a") for state in outcomes.states}
    unknown = {state: np.full(3000, UNKNOWN, np.int8) for state in same}
    log = LogAnswers(np.arange(3000).astype(str), np.arange(3000).astype(str), 1, {}, same, unknown)
    pairs = [(SERVED, state) for state in outcomes.states]
    assert (next_to_label(log, pairs, 3000), beginning(log, pairs)) == ([], 3000)
    evidence = gather(replace(outcomes, log=log))
    assert (evidence.states[0].num_queries, evidence.states[0].nfr) == (4000, 0.0)
    clusters = np.concatenate([outcomes.clusters, log.clusters])
    assert evidence.states[0].nfr_upper == share_bounds(np.zeros(4000, bool), clusters, QUICK.alpha / 2).upper


def test_everything_changed_and_nobody_labelled_counts_nothing(planted: Plant) -> None:
    outcomes = planted(num_queries=1000, losses=5)
    answers = {state: np.full(50, f"is:{state}") for state in outcomes.states}
    unknown = {state: np.full(50, UNKNOWN, np.int8) for state in answers}
    log = LogAnswers(np.arange(50).astype(str), np.full(50, "one"), 1, {}, answers, unknown)
    assert judged(gather(replace(outcomes, log=log))) == judged(gather(outcomes))
    wanted = next_to_label(log, [PAIR], 10)
    assert wanted == [(place, f"is:{SERVED}", f"is:{AFTER}") for place in range(10)]
    assert labels_needed(log, [PAIR], 400) == (400, 400, 400)


def test_an_unclear_answer_counts_as_a_loss() -> None:
    answers = {SERVED: np.array(["is:a", "is:a"]), AFTER: np.array(["is:b", NOTHING_SHOWN])}
    verdicts = {SERVED: np.array([UNCLEAR, RIGHT], np.int8), AFTER: np.array([UNCLEAR, UNKNOWN], np.int8)}
    log = LogAnswers(np.array(["q", "r"]), np.array(["x", "y"]), 1, {}, answers, verdicts)
    # What shows nothing needs no label: it is not right.
    assert unsettled(log, PAIR).tolist() == [False, False]
    assert log_differences(log, PAIR, **RECALL).tolist() == [-1.0, -1.0]


def test_each_pair_of_answers_is_asked_once() -> None:
    answers = {"served": np.array(["is:a"]), "fraction/0": np.array(["is:b"]), "fraction/0.5": np.array(["is:b"])}
    answers["fraction/1"] = np.array(["is:c"])
    verdicts = {state: np.array([UNKNOWN], np.int8) for state in answers}
    log = LogAnswers(np.array(["q"]), np.array(["x"]), 1, {}, answers, verdicts)
    pairs = [(SERVED, state) for state in answers if state != SERVED]
    assert next_to_label(log, pairs, 1) == [(0, "is:a", "is:b"), (0, "is:a", "is:c")]


def test_mean_average_precision_is_refused_by_name(planted: Plant) -> None:
    outcomes = planted(num_queries=600)
    log = as_log(outcomes, np.arange(100), rng=np.random.default_rng(0))
    with pytest.raises(ChangedAnswersError, match="expected the metric recall@k, found mAP"):
        gather(take(outcomes, np.arange(100, 600), log), QUICK.model_copy(update={"metric": "mAP"}))
    with pytest.raises(ChangedAnswersError, match="expected answers of depth 5, found those of depth 1"):
        gather(take(outcomes, np.arange(100, 600), log), QUICK.model_copy(update={"k": 5}))


def test_a_log_without_a_guarded_slice_is_missing_it(planted: Plant) -> None:
    outcomes = planted(num_queries=600, slices={"camera": np.resize(["day", "night"], 600)})
    log = as_log(outcomes, np.arange(100), rng=np.random.default_rng(0))
    policy = QUICK.model_copy(update={"required_slices": ("camera",)})
    assert gather(take(outcomes, np.arange(100, 600), log), policy).missing
    tagged = replace(log, slices={"camera": outcomes.slices["camera"][:100]})
    evidence = gather(take(outcomes, np.arange(100, 600), tagged), policy)
    assert evidence.missing == ()
    day = next(s for s in evidence.states if s.scope == "camera=day")
    assert (day.num_queries, day.num_log_queries) == (300, 50)


def test_answers_survive_their_columns() -> None:
    log = replace(drawn_log(np.random.default_rng(3)), slices={"camera": np.resize(["day", "night"], 60)}, k=5)
    back = log_from_columns(log_columns(log))
    assert back.k == 5
    for name, values in log_columns(log).items():
        np.testing.assert_array_equal(log_columns(back)[name], values)


@pytest.mark.parametrize("shape", ["alone", "alike", "lost whole"])
def test_a_bad_update_passes_the_flip_limit_at_most_as_often_as_it_says(shape: str) -> None:
    """NFR exactly at its limit, 30 % of the answers changed, labelled until 150 labels are spent."""
    limit, alpha, runs, passed = 0.02, 0.05, 400, 0
    rng = np.random.default_rng(11)
    for _ in range(runs):
        num, size = 3000, 1 if shape == "alone" else 10
        cluster = rng.permutation(num) // size
        if shape == "alone":
            lost = rng.random(num) < limit
        elif shape == "alike":
            lost = rng.random(num) < rng.beta(limit / 0.3 * 0.7, (1 - limit) / 0.3 * 0.7, num // size)[cluster]
        else:
            lost = (rng.random(num // size) < limit)[cluster]
        moved = lost | (rng.random(num) < 0.28)
        answers = {SERVED: np.where(lost, "is:a", "is:b"), AFTER: np.where(moved, "is:c", np.where(lost, "", "is:b"))}
        told = np.cumsum(moved) <= 150
        before = np.where(told & moved, np.where(lost, RIGHT, WRONG), UNKNOWN).astype(np.int8)
        after = np.where(told & moved, WRONG, UNKNOWN).astype(np.int8)
        log = LogAnswers(np.arange(num), cluster, 1, {}, answers, {SERVED: before, AFTER: after})
        difference = log_differences(log, PAIR, **RECALL)
        counted = ~np.isnan(difference)
        passed += share_bounds(difference[counted] < 0, cluster[counted], alpha).upper <= limit
    assert passed / runs <= alpha + 2 * np.sqrt(alpha * (1 - alpha) / runs)


def test_a_log_does_not_cover_for_queries_that_were_not_judged(planted: Plant) -> None:
    outcomes = planted(num_queries=1000)
    rng = np.random.default_rng(0)
    log = as_log(outcomes, np.arange(100, 1000), rng=rng)
    few = take(outcomes, np.arange(100), log)
    hidden = replace(
        few,
        first_rank={name: np.where(np.arange(100) < 50, 0, rank) for name, rank in few.first_rank.items()},
        average_precision={
            name: np.where(np.arange(100) < 50, np.nan, value) for name, value in few.average_precision.items()
        },
    )
    assert decide(gather(few), QUICK).outcome != "HOLD"
    decision = decide(gather(hidden), QUICK)
    assert decision.outcome == "HOLD"
    assert "only 50 of 100 queries find a relevant row" in decision.summary
