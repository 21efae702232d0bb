"""Orders and waves: permutations that are the same everywhere, wave 0 first, never a row twice."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from graceful.indexing.planner import (
    ORDERS,
    MissingOrderInputError,
    OrderInputs,
    nearest_mean_distance,
    num_chosen,
    plan_waves,
    random_key,
    random_key_of,
    rank_items,
)


def ids(count, prefix="item"):
    return np.array([f"{prefix}-{number:04d}" for number in range(count)], object)


def inputs(count, seed=0):
    generator = np.random.default_rng(seed)
    return OrderInputs(
        random_key(ids(count), seed), generator.integers(-1, 4, count), generator.random(count).astype(np.float32)
    )  # fmt: skip


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(count=st.integers(0, 40), seed=st.integers(0, 5))
def test_every_order_is_a_permutation_and_the_same_every_time(order, count, seed):
    found = rank_items(order, inputs(count, seed))
    assert sorted(found.tolist()) == list(range(count))
    np.testing.assert_array_equal(found, rank_items(order, inputs(count, seed)))


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(seed=st.integers(0, 20))
def test_order_does_not_depend_on_how_the_items_are_listed(order, seed):
    given_ = inputs(25, 3)
    shuffle = np.random.default_rng(seed).permutation(25)
    other = OrderInputs(
        given_.keys[shuffle], given_.owner_age[shuffle], given_.class_distance[shuffle]
    )  # fmt: skip
    np.testing.assert_array_equal(given_.keys[rank_items(order, given_)], other.keys[rank_items(order, other)])


@pytest.mark.parametrize("order", sorted(ORDERS))
@given(seed=st.integers(0, 20), share=st.floats(0, 1))
def test_marked_items_come_first_and_keep_their_order(order, seed, share):
    given_ = inputs(30, seed)
    first = np.random.default_rng(seed).random(30) < share
    plain, marked = rank_items(order, given_), rank_items(order, given_, first)
    assert first[marked][: first.sum()].all()
    np.testing.assert_array_equal(marked[: first.sum()], plain[first[plain]])
    np.testing.assert_array_equal(marked[first.sum() :], plain[~first[plain]])


def test_random_order_gives_an_item_the_same_place_in_every_set_that_holds_it():
    """The evaluation gallery is ranked by the same keys as production: what is judged is what is served."""
    all_ids = ids(200)
    some = all_ids[::3]
    np.testing.assert_array_equal(random_key(some, 7), random_key(all_ids, 7)[::3])
    assert (random_key(some, 7) != random_key(some, 8)).all()


def test_random_keys_of_revisions_are_uniform_distinct_and_the_same_in_every_set():
    revisions = np.concatenate([np.arange(2_000), (7 << 40) + np.arange(2_000)])
    keys = random_key_of(revisions, 3)
    assert len(np.unique(keys)) == len(keys)
    np.testing.assert_array_equal(random_key_of(revisions[::7], 3), keys[::7])
    assert (random_key_of(revisions, 4) != keys).all()
    assert scipy.stats.kstest(keys / 2.0**64, "uniform").pvalue > 0.001


def test_random_order_is_not_the_order_of_the_ids_and_is_uniform():
    first_half = np.mean([
        np.mean(rank_items("random", OrderInputs(random_key(ids(400), seed), np.zeros(400, np.int64)))[:100] < 200)
        for seed in range(20)
    ])  # fmt: skip
    assert 0.4 < first_half < 0.6


def test_oldest_generation_comes_first_and_unreadable_items_before_it():
    found = rank_items("oldest_generation", OrderInputs(random_key(ids(6), 0), np.array([2, 0, 1, -1, 0, 2])))
    assert [int(np.array([2, 0, 1, -1, 0, 2])[place]) for place in found] == [-1, 0, 0, 1, 2, 2]


def test_farthest_from_every_class_mean_comes_first_and_what_has_no_vector_before_it():
    distance = np.array([0.1, 0.9, np.nan, 0.5], np.float32)
    found = rank_items("class_distance", OrderInputs(random_key(ids(4), 0), np.zeros(4, np.int64), distance))
    assert found.tolist() == [2, 1, 3, 0]


def test_class_distance_without_class_means_names_what_is_missing_and_what_works():
    with pytest.raises(MissingOrderInputError, match=r"expected class means .* choose 'random' or 'oldest_generation'"):
        rank_items("class_distance", OrderInputs(random_key(ids(3), 0), np.zeros(3, np.int64)))


def test_unknown_order_lists_those_that_exist():
    with pytest.raises(ValueError, match="expected one of class_distance, oldest_generation, random, found 'newest'"):
        rank_items("newest", inputs(3))


def test_nearest_mean_distance_is_that_to_the_nearest_mean():
    vectors = np.array([[1, 0], [0, 1], [np.sqrt(0.5), np.sqrt(0.5)]], np.float32)
    means = np.array([[1, 0], [0, -1]], np.float32)
    np.testing.assert_allclose(nearest_mean_distance(vectors, means), [0, 1, 1 - np.sqrt(0.5)], atol=1e-6)


@given(
    count=st.integers(0, 60), first=st.integers(0, 10), fraction=st.floats(0, 1), wave_rows=st.integers(1, 20)
)  # fmt: skip
def test_waves_cover_the_first_part_of_the_ranking_exactly_once(count, first, fraction, wave_rows):
    num_first = min(first, count)
    ranking = np.random.default_rng(count).permutation(count)
    revisions = np.arange(count) << 40
    plan = plan_waves(revisions, ranking, num_first, fraction, wave_rows)
    chosen = num_chosen(count, num_first, fraction)
    np.testing.assert_array_equal(plan["revision"].to_numpy(), revisions[ranking[:chosen]])
    assert plan["position"].to_pylist() == list(range(chosen))
    waves = plan["wave"].to_numpy()
    assert (np.diff(waves) >= 0).all()
    assert int((waves == 0).sum()) == num_first
    sizes = np.bincount(waves)[1:] if len(waves) else np.array([], int)
    assert (sizes <= wave_rows).all()
    assert (sizes[:-1] == wave_rows).all()


@pytest.mark.parametrize(
    ("num_items", "num_first", "fraction", "expected"),
    [(100, 0, 0.0, 0), (100, 0, 0.05, 5), (100, 0, 0.051, 6), (100, 30, 0.1, 30), (3, 0, 0.1, 1), (7, 0, 1.0, 7),
     (1000, 0, 0.7, 700), (10, 0, 0.3, 3), (0, 0, 1.0, 0)],
)  # fmt: skip
def test_share_of_all_items_is_chosen_and_never_less_than_wave_zero(num_items, num_first, fraction, expected):
    assert num_chosen(num_items, num_first, fraction) == expected


@pytest.mark.parametrize(("fraction", "wave_rows"), [(-0.1, 5), (1.1, 5), (0.5, 0)])
def test_plan_of_an_impossible_size_is_refused(fraction, wave_rows):
    with pytest.raises(ValueError, match="planning a re-index: expected"):
        plan_waves(np.arange(5), np.arange(5), 0, fraction, wave_rows)
