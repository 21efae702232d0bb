"""Bounds of differences of a metric that hold for several states at once, and know that queries come in clusters.

A difference is what was won less what was lost. Each of the two is a mean of numbers in [0, 1] and has exact bounds on
the effective sample (`evaluation.intervals`); a bound of the difference is recovered from them (square-and-add:
Newcombe, Statistics in Medicine 17, 1998; Zou and Donner, Statistics in Medicine 27, 2008):

    lower = value - sqrt(a^2 + b^2 - 2 r a b)       a = upper bound of the losses - losses
                                                    b = wins - lower bound of the wins

r is the correlation of losses and wins over clusters where it is negative, else 0. All states hold at once: each is
bounded at the level of the largest of S normal variables that correlate as the states do over clusters (max-t).

Where losses are rare this is their exact bound, where there are many it is the normal one. A bootstrap over clusters
cannot show the losses that were not drawn: where few clusters hold most of them it lets 8 to 12 % pass at a nominal 5 %
(docs/error_rates.md). Shapes: Q queries, C clusters, S states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from graceful.evaluation.intervals import bounds_of_clusters

MAX_DRAWS = 1_000_000


@dataclass(frozen=True)
class DifferenceBands:
    """S mean differences with bands that hold for all S at once, one-sided each: P(any true < lower) <= alpha.

    `lower` is -inf and `upper` +inf where nothing can be said (no query, one cluster). `critical` is the quantile of
    the largest of the S, in standard errors.
    """

    value: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    design_effect: NDArray[np.float64]
    num_queries: NDArray[np.int64]
    num_clusters: NDArray[np.int64]
    critical: float


def difference_bands(
    differences: NDArray[np.float64],
    clusters: NDArray[Any],
    *,
    alpha: float = 0.05,
    num_resamples: int = 2000,
    seed: int = 0,
) -> DifferenceBands:
    """Simultaneous bands for the means of S paired differences (Q, S) in [-1, 1], NaN = the query takes no part.

    `num_resamples`: normal draws for the quantile of the largest, at least; more for small levels.

    >>> lost = np.zeros((1000, 1))
    >>> lost[:10] = -1
    >>> round(difference_bands(lost, np.arange(1000)).lower[0], 4)  # Clopper-Pearson of 10 of 1,000
    np.float64(-0.0169)
    """
    differences = np.asarray(differences, np.float64)
    code = np.unique(np.asarray(clusters), return_inverse=True)[1]
    columns = [_column(differences[:, s], code) for s in range(differences.shape[1])]
    known = [column for column in columns if column.num_clusters > 1]
    critical = _largest_of([column.residuals for column in known], alpha, num_resamples, seed)
    level = max(float(stats.norm.sf(critical)), alpha / max(len(known), 1))
    bounds = [column.bounds(level) for column in columns]
    return DifferenceBands(
        value=np.array([column.value for column in columns]),
        lower=np.array([lower for lower, _, _ in bounds]),
        upper=np.array([upper for _, upper, _ in bounds]),
        standard_error=np.array([column.error for column in columns]),
        design_effect=np.array(
            [max(c.design_effect, effect) for c, (_, _, effect) in zip(columns, bounds, strict=True)]
        ),
        num_queries=np.array([column.num_queries for column in columns], np.int64),
        num_clusters=np.array([column.num_clusters for column in columns], np.int64),
        critical=critical,
    )


@dataclass(frozen=True)
class _Side:
    """What was lost, or won: numbers in [0, 1] summed by cluster (C,), and their squares where some are not 0 or 1."""

    sums: NDArray[np.float64]
    squares: float | None


@dataclass(frozen=True)
class _Column:
    """One state's differences by cluster. `residuals` has an entry for every cluster, 0 where it takes no part."""

    num_queries: int
    num_clusters: int
    value: float
    error: float
    design_effect: float
    residuals: NDArray[np.float64]
    sizes: NDArray[np.float64]
    losses: _Side
    wins: _Side

    def bounds(self, alpha: float) -> tuple[float, float, float]:
        """Lower and upper bound, each at level alpha, and the design effect of what was lost."""
        if self.num_clusters < 2:
            return -np.inf, np.inf, 1.0
        lost = bounds_of_clusters(self.sizes, self.losses.sums, alpha, squares=self.losses.squares)
        won = bounds_of_clusters(self.sizes, self.wins.sums, alpha, squares=self.wins.squares)
        together = min(
            _correlation(self.losses.sums - lost.value * self.sizes, self.wins.sums - won.value * self.sizes), 0.0
        )

        def distance(a: float, b: float) -> float:
            return math.sqrt(a**2 + b**2 - 2 * together * a * b)

        lower = self.value - distance(lost.upper - lost.value, won.value - won.lower)
        upper = self.value + distance(lost.value - lost.lower, won.upper - won.value)
        return lower, upper, lost.num_queries / lost.effective_n


def _column(differences: NDArray[np.float64], code: NDArray[np.int64]) -> _Column:
    """Collect one column (Q,) by cluster; `code` (Q,) numbers the clusters."""
    counted = ~np.isnan(differences)
    values, inside = differences[counted], code[counted]
    width = int(code.max()) + 1 if len(code) else 0
    every = np.bincount(inside, minlength=width).astype(np.float64)
    part = every > 0
    n, num = len(values), int(part.sum())
    value = float(values.mean()) if n else np.nan
    sums = np.bincount(inside, weights=values, minlength=width).astype(np.float64)
    residuals = sums - value * every if n else sums
    error = math.sqrt(num / (num - 1) * float((residuals**2).sum())) / n if num > 1 else np.nan
    alone = float(values.std()) / math.sqrt(n) if n else 0.0
    effect = (error / alone) ** 2 if alone > 0 and num > 1 else 1.0
    losses, wins = (_side(np.clip(side, 0, None), inside, part) for side in (-values, values))
    return _Column(n, num, value, error, effect, residuals, every[part], losses, wins)


def _side(values: NDArray[np.float64], inside: NDArray[np.int64], part: NDArray[np.bool_]) -> _Side:
    graded = bool(((values > 0) & (values < 1)).any())
    sums = np.bincount(inside, weights=values, minlength=len(part))[part].astype(np.float64)
    return _Side(sums, float((values**2).sum()) if graded else None)


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    spread = math.sqrt(float((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / spread if spread > 0 else 0.0


def _largest_of(residuals: Sequence[NDArray[np.float64]], alpha: float, num_draws: int, seed: int) -> float:
    """The 1 - alpha quantile of the largest of S standard normal variables that correlate as the residuals (C,) do."""
    if not residuals:
        return np.nan
    if len(residuals) == 1:
        return float(stats.norm.ppf(1 - alpha))
    correlation = np.array([[_correlation(one, other) for other in residuals] for one in residuals])
    np.fill_diagonal(correlation, 1.0)
    num_draws = min(max(num_draws, math.ceil(200 / alpha)), MAX_DRAWS)
    values, vectors = np.linalg.eigh(correlation)
    normal = np.random.default_rng(seed).standard_normal((num_draws, len(residuals)))
    largest = (normal @ (vectors * np.sqrt(np.maximum(values, 0))).T).max(axis=1)
    return float(np.quantile(largest, 1 - alpha))
