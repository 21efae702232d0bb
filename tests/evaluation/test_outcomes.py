"""The per-query record: states, ranks, pairing and the long format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graceful.evaluation.outcomes import (
    SERVED,
    Outcomes,
    State,
    classify_state,
    compare,
    fraction_state,
    from_columns,
    live_state,
    measured,
    metric_values,
    outcome_from_ranks,
    pair_state,
    parse_state,
    to_columns,
)


def small(first_rank: dict[str, list[int]], **kwargs: object) -> Outcomes:
    count = len(next(iter(first_rank.values())))
    fields: dict[str, object] = {
        "query_ids": [f"q{i}" for i in range(count)],
        "identities": ["a"] * count,
        "clusters": ["a"] * count,
        "slices": {},
        "first_rank": first_rank,
        "average_precision": {
            state: [1 / rank if rank else np.nan for rank in ranks] for state, ranks in first_rank.items()
        },
    }
    return Outcomes(**{**fields, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("served", State("served")),
        (fraction_state(0.05), State("fraction", fraction=0.05)),
        (fraction_state(1), State("fraction", fraction=1.0)),
        (pair_state("g2", "g1"), State("pair", None, "g2", "g1")),
        (live_state("g2", "g1"), State("live", None, "g2", "g1")),
        (classify_state("g2"), State("classify", None, "g2")),
    ],
)
def test_state_names_are_parsed_back(name: str, state: State) -> None:
    assert parse_state(name) == state


@pytest.mark.parametrize(
    "name", ["", "server", "fraction/1.0", "fraction/2", "fraction/x", "pair/g1", "live/g1/", "a/b"]
)
def test_other_state_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected served, fraction"):
        parse_state(name)


@given(st.lists(st.sets(st.integers(1, 30), max_size=6), max_size=12))
def test_outcome_from_ranks_agrees_with_a_loop(rank_sets: list[set[int]]) -> None:
    per_query = [sorted(ranks) for ranks in rank_sets]
    offsets = np.cumsum([0, *map(len, per_query)])
    first, precision = outcome_from_ranks(offsets, np.array([rank for ranks in per_query for rank in ranks], np.int32))
    for ranks, got_first, got_precision in zip(per_query, first, precision, strict=True):
        if ranks:
            assert got_first == ranks[0]
            assert got_precision == pytest.approx(np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]), rel=1e-6)
        else:
            assert got_first == 0
            assert np.isnan(got_precision)


@pytest.mark.parametrize(
    ("offsets", "ranks"), [([0, 2], [1]), ([], []), ([0, 2], [2, 1]), ([0, 1], [0]), ([0, 2], [3, 3])]
)
def test_ranks_that_are_not_ranks_are_refused(offsets: list[int], ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="reading ranks"):
        outcome_from_ranks(np.array(offsets, np.int64), np.array(ranks, np.int64))


def test_a_query_that_loses_its_relevant_rows_counts_as_wrong_and_one_without_baseline_stays_out() -> None:
    outcomes = small({SERVED: [1, 1, 0, 3], "fraction/0": [1, 0, 1, 1]})
    pair = compare(outcomes, SERVED, "fraction/0")
    assert pair.counted.tolist() == [True, True, False, True]
    assert pair.after.tolist() == [1, 0, 1]
    assert (pair.right_before & ~pair.right_after).tolist() == [False, True, False]
    assert pair.num_lost == 1
    assert compare(outcomes, SERVED, "fraction/0", metric="mAP").after.tolist() == [1, 0, 1]


def test_metrics_are_nan_where_nothing_is_relevant() -> None:
    outcomes = small({SERVED: [1, 0, 2]})
    np.testing.assert_array_equal(metric_values(outcomes, SERVED, "recall@k", 1), [1, np.nan, 0])
    np.testing.assert_array_equal(metric_values(outcomes, SERVED, "recall@k", 2), [1, np.nan, 1])
    np.testing.assert_array_equal(metric_values(outcomes, SERVED, "mAP"), [1, np.nan, 0.5])
    assert not measured(outcomes, "fraction/0").any()


def test_columns_come_back_in_any_row_order() -> None:
    outcomes = small({SERVED: [1, 2, 0], "pair/g1/g1": [0, 1, 9]}, slices={"camera": ["x", "y", "x"]})
    columns = to_columns(outcomes)
    assert list(columns) == [
        "state", "query_id", "identity", "cluster", "slice_camera", "first_rank", "average_precision",
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(6)
    back = from_columns({name: values[order] for name, values in columns.items()})
    assert set(back.states) == set(outcomes.states)
    sorter = np.argsort(back.query_ids)
    for state in outcomes.states:
        np.testing.assert_array_equal(back.first_rank[state][sorter], outcomes.first_rank[state])
        np.testing.assert_array_equal(back.average_precision[state][sorter], outcomes.average_precision[state])
    assert back.slices["camera"][sorter].tolist() == ["x", "y", "x"]
    np.testing.assert_array_equal(from_columns(columns).query_ids, outcomes.query_ids)


def test_columns_with_a_missing_or_repeated_query_are_refused() -> None:
    columns = to_columns(small({SERVED: [1, 2], "fraction/0": [1, 1]}))
    with pytest.raises(ValueError, match="every state holds every query once"):
        from_columns({name: values[:-1] for name, values in columns.items()})
    columns["query_id"] = np.array(["q0", "q1", "q0", "q0"])
    with pytest.raises(ValueError, match="'q1' missing"):
        from_columns(columns)


def test_no_queries_round_trip() -> None:
    empty = from_columns(to_columns(small({SERVED: []})))
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": ["a"]}, "identities of shape"),
        ({"query_ids": ["q0", "q0"]}, "repetitions"),
        ({"average_precision": {}}, "same states"),
        ({"average_precision": {SERVED: [1.0, np.nan]}}, "NaN exactly where first_rank is 0"),
    ],
)
def test_inconsistent_outcomes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small({SERVED: [1, 2]}, **change)
