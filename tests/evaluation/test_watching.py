"""Bounds that hold at every moment: against an integral, in simulation under optional stopping, and what follows."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate

from graceful.evaluation.intervals import clopper_pearson
from graceful.evaluation.watching import Counts, Limits, log_capital, lower_bound, upper_bound, watch

ALPHA = 0.05
STREAMS = 1_000
# Of 1,000 streams at a true level of 5 %, more than this many err with probability 1e-4.
MOST = STREAMS * ALPHA + 3.8 * (STREAMS * ALPHA * (1 - ALPHA)) ** 0.5


def ever_above(is_hit: NDArray[np.bool_], share: float) -> int:
    """Of how many streams the bound was ever above a share. It rises with a hit only: other moments need no look."""
    stream, moment = np.nonzero(is_hit)
    crossed = log_capital(is_hit.cumsum(axis=1)[is_hit], moment + 1, share) >= np.log(1 / ALPHA)
    return len(set(stream[crossed].tolist()))


@pytest.mark.parametrize(("hits", "n", "share"), [(0, 5, 0.2), (3, 3, 0.5), (7, 40, 0.1), (40, 50, 0.3)])
def test_the_capital_is_the_integral_that_it_is_said_to_be(hits: int, n: int, share: float) -> None:
    def bet(q: float) -> float:
        return float((q / share) ** hits * ((1 - q) / (1 - share)) ** (n - hits))

    expected = integrate.quad(bet, share, 1)[0]
    assert float(np.exp(log_capital(hits, n, share))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("most", [200, 1_000, 5_000])
def test_who_looks_after_every_query_is_wrong_at_most_at_the_level(share: float, most: int) -> None:
    """The stream ends as soon as the bound is above the true share: the worst way to stop."""
    assert ever_above(np.random.default_rng(most).random((STREAMS, most)) < share, share) <= MOST


def test_a_share_that_wanders_below_the_limit_ends_nothing_more_often() -> None:
    draw = np.random.default_rng(1)
    shares = np.where(np.arange(2_000) % 400 < 200, 0.1, 0.02)
    assert ever_above(draw.random((STREAMS, 2_000)) < shares, 0.1) <= MOST


def test_a_bound_for_one_moment_is_wrong_far_more_often_when_it_is_looked_at_all_the_time() -> None:
    """What the bound is for: the simulation sees the mistake that it avoids."""
    hits = (np.random.default_rng(2).random((100, 500)) < 0.1).cumsum(axis=1)
    ever = [any(clopper_pearson(int(row[n - 1]), n, ALPHA)[0] > 0.1 for n in range(1, 501, 5)) for row in hits]
    assert sum(ever) > 3 * ALPHA * len(ever)


def test_what_is_far_above_the_limit_is_found_and_soon() -> None:
    hits = (np.random.default_rng(3).random((STREAMS, 400)) < 0.3).cumsum(axis=1)
    found = log_capital(hits, np.arange(1, 401), 0.1) >= np.log(1 / ALPHA)
    assert found.any(axis=1).mean() > 0.999
    assert np.median(found.argmax(axis=1)) < 60


@pytest.mark.parametrize(("hits", "n"), [(1, 1), (1, 50), (30, 60), (60, 60), (5, 5_000), (4_000, 5_000)])
def test_the_lower_bound_is_where_the_capital_reaches_its_limit(hits: int, n: int) -> None:
    bound = lower_bound(hits, n, ALPHA)
    assert 0 < bound < hits / n
    assert float(log_capital(hits, n, bound)) == pytest.approx(np.log(1 / ALPHA), abs=1e-6)
    assert lower_bound(hits, n, 0.01) < bound <= clopper_pearson(hits, n, ALPHA)[0]
    assert upper_bound(n - hits, n, ALPHA) == 1 - bound


def test_nothing_seen_says_nothing() -> None:
    assert (lower_bound(0, 0), upper_bound(0, 0)) == (0.0, 1.0)
    found = watch(Counts(), Limits(0.0, 0.0, ALPHA))
    assert (found.verdict, found.changed, found.overlap, found.failed) == ("goes on", None, None, None)
    with pytest.raises(ValueError, match="expected 0 <= hits <= n"):
        lower_bound(2, 1)


def test_a_limit_is_crossed_by_a_bound_and_not_by_a_share() -> None:
    limits = Limits(max_changed=0.1, max_failed=0.02, alpha=ALPHA)
    assert watch(Counts(20, 4, 10.0, 20, 0), limits).verdict == "goes on"
    assert watch(Counts(200, 40, 100.0, 200, 0), limits).verdict == "changed"
    assert watch(Counts(200, 5, 190.0, 200, 20), limits).verdict == "failing"
    assert watch(Counts(0, 0, 0.0, 50, 50), limits).verdict == "failing"
    labelled = Counts(labelled=200, negative_flips=40, positive_flips=160)
    assert watch(labelled, limits).verdict == "goes on", "without a limit of flips"
    assert watch(labelled, replace(limits, max_nfr=0.1)).verdict == "flipping"
    assert watch(Counts(labelled=20, negative_flips=4), replace(limits, max_nfr=0.1)).verdict == "goes on"


def test_the_bounds_of_all_limits_share_the_error_level() -> None:
    found = watch(Counts(100, 20, 80.0, 100, 20, 100, 20), Limits(0.5, 0.5, ALPHA, 0.5))
    assert found.changed_lower == lower_bound(20, 100, ALPHA / 2)
    assert (found.failed_lower, found.nfr_lower) == (lower_bound(20, 100, ALPHA / 4),) * 2
    assert (found.changed_upper, found.nfr_upper) == (upper_bound(20, 100, ALPHA / 2), upper_bound(20, 100, ALPHA / 4))
