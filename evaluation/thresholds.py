"""False accepts and false rejects of a score threshold, with bounds, and the threshold that keeps a limit.

A pair (query, gallery row) is accepted when its score is at least the threshold. FAR is the share of impostor pairs
(different identities) that are accepted, FRR the share of genuine pairs that are not. Scores do not transfer between
generations: the same threshold is another FAR in another one.

Pairs are not independent: all pairs of a query identity share the query side, all pairs of a gallery identity the other
one. Both are respected: 1 / n* = 1 / n_query + 1 / n_row - 1 / n, where n_query and n_row are the effective samples of
`share_bounds` by one side alone (variances of two-way clusters add; Cameron, Gelbach and Miller, JBES 29, 2011). So the
number of identities limits what can be shown, however many pairs there are: without an accepted impostor, 3,000
identities are needed to show a FAR of 1e-3 (rule of three), 30,000 for 1e-4. Where accepted pairs spread over many
identities (20 or more), their measured correlation counts instead, and a few hundred identities reach 1e-3.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.intervals import clopper_pearson, share_bounds

ErrorKind = Literal["FAR", "FRR"]
STEPS_PER_UNIT = 1024
"""Thresholds are recalibrated to multiples of 1 / 1,024: a grid that no data has chosen."""


@dataclass(frozen=True)
class ErrorRate:
    """A share of pairs with one-sided bounds, each at level alpha. NaN, 0 and 1 where there is no pair."""

    num_pairs: int
    num_errors: int
    value: float
    lower: float
    upper: float
    effective_n: float


@dataclass(frozen=True)
class Pairs:
    """Scores (P,) of one kind of pairs, with the group of each pair's query and row as whole numbers (P,)."""

    scores: NDArray[np.float32]
    query_groups: NDArray[np.int64]
    row_groups: NDArray[np.int64]

    def __post_init__(self) -> None:
        shapes = {np.shape(values) for values in (self.scores, self.query_groups, self.row_groups)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"pairing scores: expected one group of both sides for each score, found shapes {shapes}")

    def __len__(self) -> int:
        return len(self.scores)


def error_rate(
    errors: NDArray[np.bool_], query_groups: NDArray[Any], row_groups: NDArray[Any], alpha: float = 0.05
) -> ErrorRate:
    """Bound a share of pairs that are alike by query and by row.

    >>> alone = np.arange(3000)
    >>> rate = error_rate(np.zeros(3000, bool), alone, alone)  # 3,000 pairs that share nothing: the rule of three
    >>> round(rate.upper, 5), rate.effective_n
    (0.001, 3000.0)
    >>> round(error_rate(np.zeros(3000, bool), alone // 30, alone).upper, 4)  # of a hundred identities
    0.03
    """
    n = len(errors)
    if not n:
        return ErrorRate(0, 0, np.nan, 0.0, 1.0, 0.0)
    by_query, by_row = (share_bounds(errors, groups, alpha) for groups in (query_groups, row_groups))
    effective = min(1 / max(1 / by_query.effective_n + 1 / by_row.effective_n - 1 / n, 1 / n), float(n))
    value = float(np.mean(errors))
    lower, upper = clopper_pearson(min(value * effective, effective), effective, alpha)
    return ErrorRate(n, int(np.sum(errors)), value, lower, upper, effective)


def false_accepts(impostors: Pairs, threshold: float | NDArray[np.float64], alpha: float = 0.05) -> ErrorRate:
    """FAR of a threshold, one for all pairs or one for each (P,).

    >>> pairs = Pairs(np.array([0.1, 0.5, 0.7, 0.2], np.float32), np.arange(4), np.arange(4))
    >>> false_accepts(pairs, 0.5).value  # a score at the threshold is accepted
    0.5
    """
    return error_rate(
        impostors.scores >= np.asarray(threshold, np.float64), impostors.query_groups, impostors.row_groups, alpha
    )


def false_rejects(genuine: Pairs, threshold: float | NDArray[np.float64], alpha: float = 0.05) -> ErrorRate:
    """FRR of a threshold, one for all pairs or one for each (P,)."""
    return error_rate(
        genuine.scores < np.asarray(threshold, np.float64), genuine.query_groups, genuine.row_groups, alpha
    )


def recalibrate(pairs: Pairs, kind: ErrorKind, limit: float, alpha: float = 0.05) -> float | None:
    """The threshold that keeps a limit by its bound, and rejects (FAR) or accepts (FRR) no more than that needs.

    For FAR, with impostor pairs: a threshold on the grid whose upper bound is at most the limit, while that of the one
    below is not; for FRR, with genuine pairs, the other way round. Errors only fall with the threshold (FAR), so that
    what holds at one holds at all beyond. One-sided and conservative: the true rate is above the limit with probability
    alpha at most, as far as the bound holds. None where no threshold in [-1, 1] can be shown to keep it: too few
    identities, or a limit above what there is to see.

    >>> rng = np.random.default_rng(0)
    >>> pairs = Pairs(rng.normal(0, 0.2, 20000).astype(np.float32), np.arange(20000), np.arange(20000))
    >>> threshold = recalibrate(pairs, "FAR", 0.01)  # 1 % lies at 0.2 x 2.326
    >>> bool(0.465 < threshold < 0.5), false_accepts(pairs, threshold).upper <= 0.01
    (True, True)
    """
    if not 0 < limit < 1:
        raise ValueError(f"recalibrating: expected a limit between 0 and 1, found {limit}")
    if not len(pairs):
        return None

    def keeps(step: int) -> bool:
        threshold = step / STEPS_PER_UNIT
        rate = false_accepts(pairs, threshold, alpha) if kind == "FAR" else false_rejects(pairs, threshold, alpha)
        return rate.upper <= limit

    # No bound lies below what was measured: the search starts where that is at the limit.
    quantile = float(np.quantile(pairs.scores, 1 - limit if kind == "FAR" else limit))
    start = int(np.clip(np.floor(quantile * STEPS_PER_UNIT), -STEPS_PER_UNIT, STEPS_PER_UNIT))
    away = 1 if kind == "FAR" else -1
    found = _first(keeps, start - away, away * STEPS_PER_UNIT, away)
    return None if found is None else found / STEPS_PER_UNIT


def _first(keeps: Callable[[int], bool], start: int, end: int, away: int) -> int | None:
    """A step that keeps the limit next to one that does not, between start and end: growing strides, then halving."""
    fails, stride = start, 1
    while True:
        step = fails + away * stride
        if away * (step - end) > 0:
            step = end
        if keeps(step):
            break
        if step == end:
            return None
        fails, stride = step, 2 * stride
    while abs(step - fails) > 1:
        middle = (step + fails) // 2
        if keeps(middle):
            step = middle
        else:
            fails = middle
    return step
