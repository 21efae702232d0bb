"""What a search tries next: within the limits, never twice, and better than chance where something can be learned."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from graceful.training.architecture import Architecture, Candidate, Cost, SearchConfig, Space, best, propose

SMALL = {"block_widths": ((4, 8), (8, 16)), "depths": (1, 2), "kernels": (3,), "image_sizes": (8,)}
WIDE = {"block_widths": ((4, 8, 12, 16),) * 4, "depths": (1, 2, 3), "kernels": (3, 5, 7), "image_sizes": (16, 20, 24)}


def config_of(space: dict, **changes: object) -> SearchConfig:
    return SearchConfig.model_validate({**space, "max_parameters": 10**9, **changes})


def measured(architecture: Architecture, reward: float) -> Candidate:
    cost = Cost(multiply_adds=1, num_parameters=1)
    return Candidate(architecture=architecture, cost=cost, self_test=reward, cross_test=1.0, seconds=0.0)


def everyone(architecture: Architecture) -> bool:
    return True


def run(config: SearchConfig, reward_of, number: int, seed: int) -> list[Candidate]:
    found: list[Candidate] = []
    for _ in range(number):
        architecture = propose(config, config, found, (), everyone, seed)
        if architecture is None:
            break
        found.append(measured(architecture, reward_of(architecture)))
    return found


def test_every_network_of_a_space_is_tried_once_and_then_nothing_is_left():
    config = config_of(SMALL, population=3, evaluations=100)
    tried = [candidate.architecture for candidate in run(config, lambda _: 0.5, 100, seed=1)]
    assert len(tried) == len(set(tried)) == 16
    assert {a.block_widths for a in tried} == set(itertools.product((4, 8), (8, 16)))


@pytest.mark.parametrize("population", [1, 8, 64])
def test_what_exceeds_a_limit_is_made_smaller_until_it_does_not(population):
    config = config_of(WIDE, population=population)

    def is_within(architecture: Architecture) -> bool:
        return sum(architecture.block_widths) <= 24

    found: list[Candidate] = []
    for number in range(64):
        architecture = propose(config, config, found, (), is_within, seed=0)
        assert architecture is not None
        assert is_within(architecture)
        found.append(measured(architecture, number / 64))
    assert propose(config, config, found, (), lambda a: False, seed=0) is None


def test_what_is_pending_is_not_tried_beside():
    config = config_of(SMALL)
    pending: list[Architecture] = []
    while (architecture := propose(config, config, (), pending, everyone, seed=0)) is not None:
        assert architecture not in pending
        pending.append(architecture)
    assert len(pending) == 16


def test_the_same_history_has_the_same_continuation_and_another_seed_another():
    config = config_of(WIDE, population=4)
    history = run(config, lambda a: 1 / sum(a.block_widths), 12, seed=3)
    assert propose(config, config, history, (), everyone, 3) == propose(config, config, history, (), everyone, 3)
    assert [c.architecture for c in history] != [c.architecture for c in run(config, lambda a: 0.5, 12, seed=4)]


def test_evolution_finds_better_networks_than_as_many_drawn_ones():
    def reward(architecture: Architecture) -> float:  # every place counts for itself; the best is in a corner
        a = architecture
        return (sum(a.block_widths) / 64 + sum(a.depths) / 12 + sum(a.kernels) / 28 + a.image_size / 24) / 4

    evolved, drawn = (
        np.mean([best(run(config_of(WIDE, population=size), reward, 80, seed)).reward for seed in range(8)])
        for size in (12, 80)
    )
    assert evolved > drawn + 0.05


def test_old_networks_are_forgotten_however_good_they_were():
    config = config_of(WIDE, population=3, tournament=3)
    first = config.smallest
    rng = np.random.default_rng(0)
    youngest = [config.largest, config.mutate(config.largest, rng), config.mutate(config.largest, rng)]
    history = [measured(first, 1.0), *(measured(architecture, 0.1) for architecture in youngest)]
    child = propose(config, config, history, (), everyone, seed=0)
    assert child is not None
    assert sum(child.block_widths) > 40, "it is a child of the young ones"


def test_a_mutation_differs_in_one_place_and_shrinking_ends_at_the_smallest():
    space, rng = Space.model_validate(WIDE), np.random.default_rng(0)
    for _ in range(50):
        parent = space.draw(rng)
        one, other = (
            (*a.block_widths, *a.depths, *a.kernels, a.image_size) for a in (parent, space.mutate(parent, rng))
        )
        assert sum(mine != theirs for mine, theirs in zip(one, other, strict=True)) == 1
    smaller, steps = space.largest, 0
    while (found := space.shrink(smaller, rng)) is not None:
        smaller, steps = found, steps + 1
    assert smaller == space.smallest
    assert steps == 4 * 3 + 4 * 2 + 4 * 2 + 2


def test_the_size_of_the_input_is_the_variants_where_the_space_says_none():
    space = Space.model_validate({**SMALL, "image_sizes": ()})
    assert space.at(20).largest.image_size == 20
    assert Space.model_validate(SMALL).at(20).image_sizes == (8,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": (3, 4)}, "odd sizes"),
        ({"max_parameters": None}, "expected a limit"),
        ({"block_widths": ()}, "block_widths"),
        ({"block_widths": ((8,), ())}, "block_widths"),
        ({"depths": (0,)}, "depths"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        config_of(SMALL, **changes)


def test_a_limit_says_what_there_is_too_much_of():
    config = config_of(SMALL, max_multiply_adds=1000, max_latency_ms=2.0)
    assert config.excess(Cost(multiply_adds=1000, num_parameters=5, latency_ms=2.0)) == ""
    over = config.excess(Cost(multiply_adds=1001, num_parameters=5, latency_ms=2.5))
    assert over == "1,001 multiply-adds (at most 1,000), 2.5 ms for an image (at most 2.0)"


def test_a_draw_near_a_limit_is_within_it_and_takes_the_nearest_there_is():
    space, rng = Space.model_validate(SMALL), np.random.default_rng(0)

    def share_of(limit: float):
        return lambda architecture: sum(architecture.block_widths) / limit

    assert {sum(space.draw_near(share_of(16), rng).block_widths) for _ in range(20)} == {12, 16}
    assert {sum(space.draw_near(share_of(100), rng).block_widths) for _ in range(5)} == {24}  # nothing is so near
    assert space.draw_near(share_of(1), rng) == space.smallest  # nothing is within
