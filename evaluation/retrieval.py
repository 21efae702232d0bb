"""Retrieval metrics from ranks: recall@k, CMC curve, mAP, mAP@R. All in [0, 1], higher is better.

Ranks are 1-based and come from `outcome_from_ranks`; queries without a relevant row (first rank 0, average precision
NaN) take no part. The mean over no query is NaN, never 0. Ties were settled, pessimistically, where the ranks were
made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from graceful.evaluation.outcomes import Metric, Outcomes, check_ranks, measured, metric_values


def recall_at_k(first_rank: NDArray[np.integer[Any]], k: int = 1) -> float:
    """Share of queries with a relevant item among the first k.

    >>> recall_at_k(np.array([1, 3, 0]), k=1), recall_at_k(np.array([1, 3, 0]), k=3)
    (0.5, 1.0)
    """
    return float(cmc_curve(first_rank, k)[-1])


def cmc_curve(first_rank: NDArray[np.integer[Any]], max_rank: int = 50) -> NDArray[np.float64]:
    """Cumulative match characteristic (max_rank,): entry r - 1 is recall@r, from the first match alone.

    >>> cmc_curve(np.array([1, 3, 0]), 3).tolist()
    [0.5, 0.5, 1.0]
    """
    if max_rank < 1:
        raise ValueError(f"computing a CMC curve: expected max_rank >= 1, found {max_rank}")
    ranks = np.asarray(first_rank)
    found = ranks[ranks > 0]
    if not len(found):
        return np.full(max_rank, np.nan)
    return np.cumsum(np.bincount(found[found <= max_rank], minlength=max_rank + 1)[1:]) / len(found)


def mean_average_precision(average_precision: NDArray[np.floating[Any]]) -> float:
    """Mean of the queries' average precision over the full ranking.

    >>> mean_average_precision(np.array([0.75, np.nan, 0.25]))
    0.5
    """
    known = np.asarray(average_precision, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else np.nan


def average_precision_at_r(offsets: NDArray[np.integer[Any]], ranks: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """AP@R per query (Q,): 1/R sum over the relevant rows ranked within R of i / r_i, R = number of relevant rows.

    Musgrave et al., ECCV 2020 (arXiv 2003.08505), section 3.2. NaN for a query without relevant rows.

    >>> average_precision_at_r(np.array([0, 2, 2]), np.array([1, 3])).tolist()  # R = 2: only rank 1 is within
    [0.5, nan]
    """
    starts, values = check_ranks(offsets, ranks)
    counts = np.diff(starts)
    per_row = np.repeat(counts, counts)
    position = np.arange(1, len(values) + 1) - np.repeat(starts[:-1], counts)
    precision = np.where(values <= per_row, position / np.maximum(values, 1), 0.0)
    sums = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=precision, minlength=len(counts))
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def mean_average_precision_at_r(offsets: NDArray[np.integer[Any]], ranks: NDArray[np.integer[Any]]) -> float:
    """Mean of AP@R over the queries that have relevant rows."""
    return mean_average_precision(average_precision_at_r(offsets, ranks))


def chance(
    num_relevant: NDArray[np.int64], num_rows: NDArray[np.int64], metric: Metric = "recall@k", k: int = 1
) -> float | None:
    """Expected metric of a random ranking; None where no query has a relevant row.

    `num_relevant` and `num_rows` (Q,) count what each query searches, its own item left out. recall@k: one of R is
    among k of N rows, 1 - C(N - R, k) / C(N, k). mAP: the exact expectation ((R - 1) / (N - 1) (N - H) + H) / N with H
    the N-th harmonic number (Y. Bestgen, "Exact expected average precision of the random baseline", 2015).

    >>> round(chance(np.array([1, 1]), np.array([4, 10])), 3)  # (1/4 + 1/10) / 2
    0.175
    >>> round(chance(np.array([1]), np.array([2]), "mAP"), 3)  # first or second: (1 + 1/2) / 2
    0.75
    """
    has = num_relevant > 0
    relevant, rows = num_relevant[has].astype(np.float64), num_rows[has].astype(np.float64)
    if not len(rows):
        return None
    if metric == "mAP":
        harmonic = special.digamma(rows + 1) + np.euler_gamma
        return float(np.mean(((relevant - 1) / np.maximum(rows - 1, 1) * (rows - harmonic) + harmonic) / rows))
    missed = np.ones(len(rows))
    for drawn in range(k):
        missed *= np.maximum(rows - relevant - drawn, 0) / np.maximum(rows - drawn, 1)
    return float(np.mean(1 - missed))


def metric_of(outcomes: Outcomes, state: str, metric: Metric = "recall@k", k: int = 1) -> float:
    """The metric of one state over its measurable queries; NaN when the state was not evaluated or has none."""
    if not measured(outcomes, state).any():
        return np.nan
    return mean_average_precision(metric_values(outcomes, state, metric, k))
