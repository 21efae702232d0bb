"""The rule that trades quality against flips: against plain enumeration, and where its ends lie."""

import itertools

import pytest

from graceful.errors import UsageError
from graceful.training.choosing import Option, choose


def options(*triples: tuple[float, float, float]) -> list[Option]:
    return [Option(value=value, self_test=self_test, flips=flips) for value, self_test, flips in triples]


def better(one: Option, other: Option, limit: float) -> bool:
    """Written down once more, pair by pair: whether the rule prefers `one`."""
    one_fits, other_fits = one.flips <= limit, other.flips <= limit
    if one_fits != other_fits:
        return one_fits
    if one_fits and one.self_test != other.self_test:
        return one.self_test > other.self_test
    if one.flips != other.flips:
        return one.flips < other.flips
    if one.self_test != other.self_test:
        return one.self_test > other.self_test
    return one.value < other.value


def test_the_choice_beats_every_other_option_whatever_their_order():
    levels = (0.1, 0.2, 0.3)
    for tests in itertools.product(levels, repeat=3):
        for flips in itertools.product(levels, repeat=3):
            tried = options(*zip((0.0, 0.1, 0.2), tests, flips, strict=True))
            for limit in (0.05, 0.1, 0.2, 0.5):
                found = choose(tried, limit)
                assert choose(tried[::-1], limit) == found
                assert all(better(found, other, limit) for other in tried if other != found), (tried, limit)


def test_a_limit_that_is_met_exactly_is_met_and_without_a_limit_the_best_self_test_wins():
    tried = options((0.0, 0.9, 0.05), (0.3, 0.8, 0.02), (0.5, 0.7, 0.01))
    assert choose(tried, 0.02).value == 0.3
    assert choose(tried, 0.019).value == 0.5
    assert choose(tried, 0.001).value == 0.5
    assert choose(tried, None).value == 0.0


@pytest.mark.parametrize("tried", [[], options((0.0, float("nan"), 0.1)), options((0.0, 0.5, float("nan")))])
def test_nothing_measured_is_no_choice(tried):
    with pytest.raises(UsageError, match="expected measured options"):
        choose(tried, 0.1)
