"""Sample sizes: golden numbers and their agreement with simulation."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.intervals import clopper_pearson, share_bounds
from graceful.evaluation.power import (
    identities_for_nfr,
    minimal_detectable_difference,
    nfr_power,
    queries_for_margin,
    queries_for_nfr,
)


@pytest.mark.parametrize(("n", "one_sided", "points"), [(10_000, False, 1.25), (1000, False, 3.96), (1000, True, 3.52)])
def test_minimal_detectable_difference_golden_numbers(n: int, one_sided: bool, points: float) -> None:
    assert 100 * minimal_detectable_difference(0.2, n, one_sided=one_sided) == pytest.approx(points, abs=0.01)


def test_queries_for_an_nfr_bound_golden_numbers() -> None:
    assert queries_for_nfr(0.01, 0.005, stable=False) == 1941
    assert queries_for_nfr(0.01, 0.005) == 2185
    assert nfr_power(2000, 0.01, 0.005) == pytest.approx(0.792, abs=0.0005)
    assert queries_for_nfr(0.001, 0.0) == 2995


def test_power_of_the_nfr_bound_is_that_of_clopper_pearson() -> None:
    passes = [x for x in range(60) if clopper_pearson(x, 1500)[1] <= 0.02]
    rng = np.random.default_rng(0)
    drawn = rng.binomial(1500, 0.012, 20_000)
    assert nfr_power(1500, 0.02, 0.012) == pytest.approx(np.isin(drawn, passes).mean(), abs=0.01)


def test_design_effect_multiplies_and_unreachable_is_none() -> None:
    assert queries_for_nfr(0.001, 0.0, design_effect=2.5) == pytest.approx(2995 * 2.5, abs=1)
    assert queries_for_nfr(0.02, 0.02) is None
    assert queries_for_nfr(0.02, 0.02000001) is None
    assert queries_for_margin(-0.005, 0.4, 0.005) is None
    assert queries_for_margin(0.0, 0.4, 0.005, design_effect=2) == pytest.approx(2 * 39_570, rel=0.001)


def test_more_queries_are_needed_closer_to_the_limit_on_either_side() -> None:
    sizes = [queries_for_nfr(0.02, true) for true in (0.0, 0.01, 0.015, 0.018, 0.0195)]
    assert all(isinstance(n, int) for n in sizes)
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    above = [queries_for_nfr(0.02, true) for true in (0.05, 0.03, 0.022)]
    assert above == sorted(above)  # type: ignore[type-var]


def test_margin_sizes_have_the_power_they_promise() -> None:
    n = queries_for_margin(0.0, np.sqrt(0.1), 0.02)
    assert n is not None
    rng = np.random.default_rng(0)
    flips = rng.multinomial(n, [0.05, 0.05, 0.9], 4000)
    mean = (flips[:, 1] - flips[:, 0]) / n
    assert np.mean(mean - 1.645 * np.sqrt(0.1 / n) >= -0.02) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("limit", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("alpha", [0.05, 0.025])
@pytest.mark.parametrize("sizes", [[1], [2], [5], [20], [100], [1, 1, 1, 37], [3, 4]])
def test_identities_are_the_fewest_with_which_no_flip_at_all_passes(
    limit: float, alpha: float, sizes: list[int]
) -> None:
    def upper(identities: int) -> float:
        clusters = np.repeat(np.arange(identities), np.resize(sizes, identities))
        return share_bounds(np.zeros(len(clusters), bool), clusters, alpha).upper

    fewest = identities_for_nfr(limit, sizes, alpha)
    assert fewest is not None
    whole = len(sizes) * -(-fewest // len(sizes))  # whole rounds of the pattern: the same mean sizes
    assert upper(whole) <= limit < upper(whole - len(sizes))
    if len(sizes) == 1:
        assert identities_for_nfr(limit, float(sizes[0]), alpha) == fewest == whole


def test_identities_golden_numbers_and_refusals() -> None:
    assert identities_for_nfr(0.02, 1, 0.025) == 183
    assert identities_for_nfr(0.02, 60, 0.025) == 185  # queries of the same identities hardly count
    assert identities_for_nfr(0.5, 1, 0.05) == 5
    assert identities_for_nfr(1e-9) is None
    for limit, per in ((0.0, 1), (1.0, 1), (0.02, 0), (0.02, [])):
        with pytest.raises(ValueError, match="planning identities"):
            identities_for_nfr(limit, per)
