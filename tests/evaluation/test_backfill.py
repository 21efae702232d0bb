"""Backfill curves by hand."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.backfill import area_under_curve, curve_from_outcomes, dip, smallest_sufficient_fraction


def test_auc_is_the_plain_mean_and_not_a_trapezoid() -> None:
    fractions, values = np.linspace(0, 1, 11), np.linspace(0.3, 0.5, 11) ** 2
    assert area_under_curve(fractions, values) == pytest.approx(values.mean())
    assert area_under_curve(fractions, values) != pytest.approx(np.trapezoid(values, fractions), abs=1e-5)


def test_uneven_fractions_are_interpolated_onto_an_even_grid() -> None:
    uneven = [0, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    assert area_under_curve(uneven, [0.4] * 7) == pytest.approx(0.4)
    assert area_under_curve(uneven, uneven) == pytest.approx(0.5)


@pytest.mark.parametrize(("fractions", "values"), [([0, 0.5], [1, 1]), ([0, 1], [1, np.nan]), ([], [])])
def test_a_curve_without_its_ends_or_with_holes_has_no_auc(fractions: list[float], values: list[float]) -> None:
    assert np.isnan(area_under_curve(fractions, values))


def test_fractions_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="rising"):
        area_under_curve([0, 0.7, 0.5, 1], [1, 1, 1, 1])


def test_dip_and_sufficient_fraction_are_nan_when_unknown() -> None:
    assert np.isnan(dip([0.5, np.nan], 0.5))
    assert np.isnan(dip([], 0.5))
    assert np.isnan(smallest_sufficient_fraction([0, 1], [0.1, 0.2], 0.3))
    assert smallest_sufficient_fraction([0, 0.5, 1], [0.3, np.nan, 0.4], 0.35) == 1


def test_the_curve_is_collected_from_the_fraction_states(planted) -> None:
    curve = curve_from_outcomes(planted(num_queries=100, losses={0.0: 10}, wins={1.0: 20}))
    assert curve.fractions.tolist() == [0, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    assert (curve.values[0], curve.values[-1], curve.served) == (0.6, 0.9, 0.7)
    assert curve.dip == pytest.approx(0.1)
    assert 0.6 < curve.auc < 0.9
