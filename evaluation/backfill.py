"""The backfill curve: the metric of the served view against the fraction that is re-embedded.

AUC is the plain mean of the metric at evenly spaced fractions from 0 to 1 (as the authors of FCT, CVPR 2022, and
FastFill, ICLR 2023, compute it), not a trapezoid. When the measured fractions are not even, the curve is interpolated
linearly onto an even grid first. The dip is how far the lowest point lies below what is served now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.outcomes import SERVED, Metric, Outcomes, fraction_state, parse_state
from graceful.evaluation.retrieval import metric_of

GRID_STEPS = 20  # the grid 0, 0.05, ..., 1 holds all default fractions


@dataclass(frozen=True)
class BackfillCurve:
    """Metric (F,) at rising fractions (F,), and of what is served now. NaN = not measured."""

    fractions: NDArray[np.float64]
    values: NDArray[np.float64]
    served: float

    @property
    def auc(self) -> float:
        """`area_under_curve` of it."""
        return area_under_curve(self.fractions, self.values)

    @property
    def dip(self) -> float:
        """`dip` of it."""
        return dip(self.values, self.served)


def curve_from_outcomes(
    outcomes: Outcomes, fractions: Sequence[float] | None = None, *, metric: Metric = "recall@k", k: int = 1
) -> BackfillCurve:
    """Collect the fraction states, all that there are unless `fractions` names them; see `arrays.backfill_curve`."""
    if fractions is None:
        parsed = [parse_state(state) for state in outcomes.states]
        fractions = sorted(s.fraction for s in parsed if s.fraction is not None and s.wave_zero is None)
    values = [metric_of(outcomes, fraction_state(fraction), metric, k) for fraction in fractions]
    return BackfillCurve(
        np.array(fractions, np.float64), np.array(values, np.float64), metric_of(outcomes, SERVED, metric, k)
    )


def area_under_curve(fractions: NDArray[Any] | Sequence[float], values: NDArray[Any] | Sequence[float]) -> float:
    """Mean of the metric at evenly spaced fractions including 0 and 1. NaN unless both ends were measured.

    >>> round(area_under_curve([0, 0.5, 1], [0.2, 0.3, 0.7]), 3)  # (0.2 + 0.3 + 0.7) / 3
    0.4
    >>> round(area_under_curve([0, 0.25, 1], [0.0, 0.25, 1.0]), 3)  # a straight line, interpolated
    0.5
    """
    x, y = np.asarray(fractions, np.float64), np.asarray(values, np.float64)
    if not len(x) or x[0] != 0 or x[-1] != 1 or np.isnan(y).any():
        return np.nan
    if (np.diff(x) <= 0).any():
        raise ValueError(f"computing a backfill AUC: expected rising fractions, found {x.tolist()}")
    if np.allclose(np.diff(x), 1 / (len(x) - 1)):
        return float(y.mean())
    return float(np.interp(np.arange(GRID_STEPS + 1) / GRID_STEPS, x, y).mean())


def dip(values: NDArray[Any] | Sequence[float], served: float) -> float:
    """How far the lowest point lies below what is served now; 0 when it does not. Lower is better.

    >>> round(dip([0.48, 0.52, 0.6], 0.5), 3), dip([0.51, 0.52], 0.5)
    (0.02, 0.0)
    """
    y = np.asarray(values, np.float64)
    if not len(y) or np.isnan(y).any() or np.isnan(served):
        return np.nan
    return max(float(served - y.min()), 0.0)


def smallest_sufficient_fraction(
    fractions: NDArray[Any] | Sequence[float], values: NDArray[Any] | Sequence[float], target: float
) -> float:
    """The smallest measured fraction whose metric is at least `target`; NaN when none is.

    >>> smallest_sufficient_fraction([0, 0.5, 1], [0.2, 0.3, 0.7], 0.3)
    0.5
    """
    x, y = np.asarray(fractions, np.float64), np.asarray(values, np.float64)
    enough = x[y >= target]
    return float(enough.min()) if len(enough) else np.nan
