"""Bounds: exact ones for rare flips, bootstrap ones for differences. Both know that queries come in clusters.

Queries that share an identity succeed and fail together. Every bound here therefore counts clusters, not queries:

* Shares of flips: one-sided Clopper-Pearson on the *effective* sample n / design effect, design effect 1 + (m - 1) ICC
  with the ANOVA estimate of the intra-cluster correlation (ICC) and the degrees of freedom corrected (Korn and
  Graubard, Survey Methodology 24, 1998), never above n.
* Differences of a metric: studentised paired bootstrap over clusters, with bands that hold for all compared states at
  once (max-t); exact bounds of wins and losses where few clusters lost.

In a simulation at the threshold (ICC 0.3, 659 clusters of 10, nominal 5 %) the uncorrected bound passes 19 % of the
time, the corrected one 5 %. Every random act takes a seed. Shapes: Q queries, C clusters, S states, B resamples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# With few clusters, or few clusters that hold a flip, the ICC estimate is mostly noise, and its low values let a
# bound pass that should not. Then the ICC is taken as at least ICC_FLOOR. With fewer than CLUSTERS_COUNT_ONCE that hold
# a flip, nothing tells a rate from a few identities that are lost as a whole and were not drawn: every cluster then
# counts as one query (ICC 1). Chosen by simulation at NFR = limit, nominal 2.5 %, see docs/statistics.md: with the
# floor alone (below 10) 5,000 queries of 50 identities, of which 2 % are lost whole, pass 38 % of the time.
FEW_CLUSTERS = 50
FEW_FLIPPED_CLUSTERS = 20
CLUSTERS_COUNT_ONCE = 8
ICC_FLOOR = 0.2

# Below this many clusters with a change, resampling cannot show the losses that were not drawn (with 0 changes its
# bound is 0 whatever n is). The lower bound is then never above minus the exact bound of the share of losses; the
# upper alike.
FEW_CHANGED_CLUSTERS = 10

# Resamples are drawn in blocks of at most this many counts: one matrix product for up to 4,000 clusters, and flat
# memory for any number of them.
MAX_COUNTS_PER_BLOCK = 8_000_000


@dataclass(frozen=True)
class ShareBounds:
    """A share (of flips) with one-sided bounds, each at level alpha. NaN value and bounds (0, 1) when n is 0."""

    num_queries: int
    num_clusters: int
    num_hits: int
    value: float
    lower: float
    upper: float
    icc: float
    design_effect: float
    effective_n: float
    icc_floored: bool
    estimated_icc: float
    num_hit_clusters: int


@dataclass(frozen=True)
class DifferenceBands:
    """S mean differences with bands that hold for all S at once, one-sided each: P(any true < lower) <= alpha.

    `lower` is -inf and `upper` +inf where nothing can be said (no query, one cluster).
    """

    value: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    design_effect: NDArray[np.float64]
    num_queries: NDArray[np.int64]
    num_clusters: NDArray[np.int64]
    critical: float


@functools.lru_cache(maxsize=1024)
def _t_quantile(level: float, freedom: float) -> float:
    return float(stats.t.ppf(level, freedom))


@functools.lru_cache(maxsize=4096)  # many states share their numbers
def clopper_pearson(hits: float, n: float, alpha: float = 0.05) -> tuple[float, float]:
    """One-sided exact lower and upper bounds of a share, each at level alpha. Real-valued hits and n are allowed.

    upper = Beta(hits + 1, n - hits) quantile 1 - alpha; 0 of n gives 1 - alpha^(1/n). (0, 1) when n is 0.

    >>> [round(100 * clopper_pearson(hits, n)[1], 2) for hits, n in ((0, 300), (0, 1000), (30, 1000))]
    [0.99, 0.3, 4.05]
    """
    if not 0 <= hits <= n:
        raise ValueError(f"bounding a share: expected 0 <= hits <= n, found {hits} of {n}")
    lower = float(stats.beta.ppf(alpha, hits, n - hits + 1)) if hits > 0 else 0.0
    upper = float(stats.beta.ppf(1 - alpha, hits + 1, n - hits)) if hits < n else 1.0
    return lower, upper


def intra_cluster_correlation(hits: NDArray[np.bool_], clusters: NDArray[Any]) -> float:
    """ANOVA estimate of the ICC of a yes/no outcome, clipped to [0, 1].

    ICC = (MSB - MSW) / (MSB + (m0 - 1) MSW), m0 = (n - sum m^2 / n) / (C - 1). 0 where it is undefined: one cluster,
    only clusters of one, or no variation; `share_bounds` puts a floor under it then.

    >>> hits = np.array([True, True, False, False])
    >>> intra_cluster_correlation(hits, np.array(["a", "a", "b", "b"]))
    1.0
    >>> intra_cluster_correlation(hits, np.array(["a", "b", "a", "b"]))  # no agreement within clusters
    0.0
    """
    sizes, sums = _per_cluster(np.asarray(hits, np.float64), clusters)
    n, num_clusters = sizes.sum(), len(sizes)
    if num_clusters < 2 or n == num_clusters:
        return 0.0
    between = (sizes * (sums / sizes - sums.sum() / n) ** 2).sum() / (num_clusters - 1)
    within = (sums - sums**2 / sizes).sum() / (n - num_clusters)
    typical = (n - (sizes**2).sum() / n) / (num_clusters - 1)
    total = between + (typical - 1) * within
    return float(np.clip((between - within) / total, 0, 1)) if total > 0 else 0.0


def share_bounds(hits: NDArray[np.bool_], clusters: NDArray[Any], alpha: float = 0.05) -> ShareBounds:
    """Exact one-sided bounds of a share of queries (NFR, PFR) that respect clusters.

    Clopper-Pearson on p n*, n* with n* = n / design effect x (t_{n-1} / t_{C-1})^2 <= n; see the constants above for
    the floor under the ICC.

    >>> bounds = share_bounds(np.zeros(300, bool), np.arange(300))
    >>> round(bounds.upper, 4), bounds.effective_n
    (0.0099, 300.0)
    """
    hits = np.asarray(hits, np.bool_)
    n = len(hits)
    if n == 0:
        return ShareBounds(0, 0, 0, np.nan, 0.0, 1.0, np.nan, np.nan, 0.0, False, np.nan, 0)
    sizes, sums = _per_cluster(hits.astype(np.float64), clusters)
    num_clusters = len(sizes)
    estimated = intra_cluster_correlation(hits, clusters)
    num_flipped = int((sums > 0).sum())
    floor = icc_floor(num_clusters, num_flipped)
    icc = max(estimated, floor)
    design_effect, effective = effective_sample(n, num_clusters, float((sizes**2).sum()), icc, alpha)
    value = float(hits.mean())
    lower, upper = clopper_pearson(min(value * effective, effective), effective, alpha)
    return ShareBounds(
        n, num_clusters, int(hits.sum()), value, lower, upper, icc, design_effect, effective, estimated < floor,
        estimated, num_flipped,
    )  # fmt: skip


def icc_floor(num_clusters: int, num_flipped: int) -> float:
    """Least intra-cluster correlation that `share_bounds` assumes when `num_flipped` of the clusters hold a hit."""
    if num_flipped < CLUSTERS_COUNT_ONCE:
        return 1.0
    return ICC_FLOOR if num_clusters < FEW_CLUSTERS or num_flipped < FEW_FLIPPED_CLUSTERS else 0.0


def effective_sample(
    n: float, num_clusters: int, sum_of_squares: float, icc: float, alpha: float
) -> tuple[float, float]:
    """Design effect, and the independent queries that n queries in clusters are worth.

    `sum_of_squares` is the sum of the squared cluster sizes: design effect 1 + (sum m^2 / n - 1) ICC.
    """
    design_effect = 1 + (sum_of_squares / n - 1) * icc
    if num_clusters < 2:
        return float(design_effect), 1.0
    freedom = (_t_quantile(1 - alpha, n - 1) / _t_quantile(1 - alpha, num_clusters - 1)) ** 2
    return float(design_effect), float(min(n / design_effect * freedom, n))


def nfr_bound(
    right_before: ArrayLike, right_after: ArrayLike, clusters: ArrayLike | None = None, alpha: float = 0.05
) -> ShareBounds:
    """Bound the negative flip rate (NFR): the share of queries that are right before an update and wrong after it.

    Args:
        right_before: (Q,) booleans, whether each query finds a relevant item now.
        right_after: (Q,) booleans over the same queries, after the update.
        clusters: (Q,) what queries are alike in, usually the identity; by default every query is independent.
        alpha: error level of each side: the true rate lies above `upper` with at most this probability.

    Returns:
        Counted value, one-sided `lower` and `upper` in [0, 1], and the sample that the bound is worth (`effective_n`).

    Raises:
        ValueError: the arrays are not over the same queries.

    Source: NFR, Yan et al., CVPR 2021 (arXiv 2011.09161), eq. 1; bounds, see `share_bounds`.

    >>> before, after = np.ones(1000, bool), np.ones(1000, bool)
    >>> after[:30] = False
    >>> bound = nfr_bound(before, after)
    >>> bound.value, round(bound.upper, 4)
    (0.03, 0.0405)
    >>> round(nfr_bound(before, after, np.arange(1000) // 10).upper, 4)  # the 30 flips are three identities
    0.0763
    """
    before, after = np.asarray(right_before, np.bool_), np.asarray(right_after, np.bool_)
    groups = np.arange(len(before)) if clusters is None else np.asarray(clusters)
    if not before.shape == after.shape == groups.shape or before.ndim != 1:
        raise ValueError(
            f"bounding the NFR: expected the same queries before, after and in clusters, found shapes {before.shape}, "
            f"{after.shape} and {groups.shape}"
        )
    return share_bounds(before & ~after, groups, alpha)


def resample_counts(num_clusters: int, num_resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each cluster is drawn (B, C) when C clusters are drawn with replacement, B times."""
    drawn = rng.integers(0, num_clusters, (num_resamples, num_clusters))
    drawn += np.arange(num_resamples)[:, None] * num_clusters
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_clusters)
    return counts.reshape(num_resamples, num_clusters).astype(np.float64)


def bootstrap_means(
    values: NDArray[np.float64], clusters: NDArray[Any], *, num_resamples: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Means (B, S) of the columns of `values` (Q, S) over resampled clusters. NaN entries take no part.

    counts (B, C) @ per-cluster sums (C, 2 S): one matrix product for all columns, sums and sizes alike, so that all
    columns share the same resamples. NaN where a resample holds no query of a column.
    """
    sums, sizes = _column_sums(values, clusters)
    total, count = np.split(_resampled(np.hstack([sums, sizes]), num_resamples, seed), 2, axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def bootstrap_means_and_errors(
    values: NDArray[np.float64], clusters: NDArray[Any], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`bootstrap_means`, and the standard error (B, S) that each resample would give itself (linearised)."""
    sums, sizes = _column_sums(values, clusters)
    stacked = np.hstack([sums, sizes, sums**2, sums * sizes, sizes**2])
    total, count, squares, products, weights = np.split(_resampled(stacked, num_resamples, seed), 5, axis=1)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    spread = np.maximum(squares - 2 * mean * products + mean**2 * weights, 0)
    error = np.divide(np.sqrt(spread), count, out=np.full_like(total, np.nan), where=count > 0)
    return mean, np.where(spread > 1e-9 * np.maximum(squares, 1e-12), error, 0.0)


def _resampled(stacked: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Totals (B, W) of per-cluster numbers (C, W) over resampled clusters."""
    num_clusters, width = stacked.shape
    rng = np.random.default_rng(seed)
    block = max(1, MAX_COUNTS_PER_BLOCK // max(num_clusters, 1))
    return np.concatenate(
        [
            resample_counts(num_clusters, min(block, num_resamples - start), rng) @ stacked
            for start in range(0, num_resamples if num_clusters else 0, block)
        ]
        or [np.zeros((num_resamples, width))]
    )


def difference_bands(
    differences: NDArray[np.float64],
    clusters: NDArray[Any],
    *,
    alpha: float = 0.05,
    num_resamples: int = 2000,
    seed: int = 0,
) -> DifferenceBands:
    """Simultaneous bands for the means of S paired differences (Q, S), NaN = the query takes no part.

    value -+ c se, with c the 1 - alpha quantile over resamples of max_s (resampled - value) / its own se: one c for all
    states, so that the best of them may be chosen afterwards. A resample that drew few of the rare losses has a small
    error of its own, so that c is large where losses are rare (bootstrap-t). Entries must lie in [-1, 1]: where fewer
    than FEW_CHANGED_CLUSTERS clusters lost anything, the exact bounds of wins and losses replace an optimistic one.
    """
    differences = np.asarray(differences, np.float64)
    resampled = bootstrap_means_and_errors(differences, clusters, num_resamples=num_resamples, seed=seed)
    return bands_from_means(differences, clusters, resampled, alpha=alpha)


def bands_from_means(
    differences: NDArray[np.float64],
    clusters: NDArray[Any],
    resampled: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    alpha: float = 0.05,
) -> DifferenceBands:
    """`difference_bands` from resampled means and errors (B, S) that exist already: families share one product."""
    means, errors = resampled
    sums, sizes = _column_sums(differences, clusters)
    num_queries = sizes.sum(axis=0)
    num_clusters = (sizes > 0).sum(axis=0)
    value = np.divide(sums.sum(axis=0), num_queries, out=np.full(len(num_queries), np.nan), where=num_queries > 0)
    known = num_clusters > 1
    error = np.full(len(value), np.nan)
    lower, upper = np.full(len(value), -np.inf), np.full(len(value), np.inf)
    critical, design_effect = np.nan, np.ones(len(value))
    if known.any():
        small = np.sqrt(num_clusters[known] / (num_clusters[known] - 1))
        error[known] = np.nanstd(means[:, known], axis=0) * small
        lost, won = _changed_clusters(differences, clusters)
        scaled = _studentised(means - value, errors * np.sqrt(num_clusters / np.maximum(num_clusters - 1, 1)))
        below, above = known & (lost >= FEW_CHANGED_CLUSTERS), known & (won >= FEW_CHANGED_CLUSTERS)
        num = int(known.sum())
        # Each state has alpha / S; those whose quantile is common pool theirs.
        c_below = _common_quantile(scaled[:, below], alpha * below.sum() / num)
        c_above = _common_quantile(-scaled[:, above], alpha * above.sum() / num)
        critical = max(c_below, c_above) or np.nan
        lower[below] = value[below] - c_below * error[below]
        upper[above] = value[above] + c_above * error[above]
        for s in np.flatnonzero(known & ~(below & above)):
            both = 2 if lost[s] and won[s] else 1
            losses, wins = _losses_and_wins(differences[:, s], clusters, alpha / num / both)
            if not below[s]:
                lower[s] = wins.lower - losses.upper
                design_effect[s] = losses.num_queries / losses.effective_n
            if not above[s]:
                upper[s] = wins.upper - losses.lower
    independent = np.full(len(value), np.nan)
    for s in np.flatnonzero(known):
        column = differences[~np.isnan(differences[:, s]), s]
        independent[s] = column.std() / np.sqrt(len(column))
    ratio = np.divide(error, independent, out=np.ones(len(value)), where=independent > 0)
    return DifferenceBands(
        value=value,
        lower=lower,
        upper=upper,
        standard_error=error,
        design_effect=np.maximum(ratio**2, design_effect),
        num_queries=num_queries.astype(np.int64),
        num_clusters=num_clusters.astype(np.int64),
        critical=critical,
    )


def mcnemar_exact(num_losses: int, num_wins: int) -> float:
    """Two-sided exact McNemar p-value: is there any systematic change? Reported, never a gate: balanced flips pass it.

    >>> mcnemar_exact(0, 5)  # 2 x 0.5^5
    0.0625
    """
    if num_losses + num_wins == 0:
        return 1.0
    return float(stats.binomtest(num_losses, num_losses + num_wins, 0.5).pvalue)


def _studentised(deviation: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.float64]:
    """A resample without any error of its own, but with another mean, is infinitely far away."""
    away = np.where(deviation == 0, 0.0, np.copysign(np.inf, deviation))
    scaled = np.divide(deviation, error, out=away, where=error > 0)
    return np.nan_to_num(scaled, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _common_quantile(scaled: NDArray[np.float64], alpha: float) -> float:
    """The 1 - alpha quantile of the largest of the columns (B, S), at least 0; 0 where there is none."""
    if not scaled.shape[1]:
        return 0.0
    return max(float(np.quantile(scaled.max(axis=1), 1 - alpha, method="higher")), 0.0)


def _changed_clusters(
    differences: NDArray[np.float64], clusters: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many clusters (S,) hold a loss, and how many a win."""
    names, code = np.unique(np.asarray(clusters), return_inverse=True)
    sides = []
    for hit in (differences < 0, differences > 0):
        pairs = [np.bincount(code[hit[:, s]], minlength=len(names)) for s in range(hit.shape[1])]
        sides.append(np.array([int((count > 0).sum()) for count in pairs], np.int64))
    return sides[0], sides[1]


def _losses_and_wins(
    column: NDArray[np.float64], clusters: NDArray[Any], alpha: float
) -> tuple[ShareBounds, ShareBounds]:
    """Shares of the queries that lost and won anything: no mean is below -losses or above wins, entries being <= 1."""
    counted = ~np.isnan(column)
    inside = np.asarray(clusters)[counted]
    return share_bounds(column[counted] < 0, inside, alpha), share_bounds(column[counted] > 0, inside, alpha)


def _per_cluster(values: NDArray[np.float64], clusters: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sizes and sums of the clusters, (C,) float64 each."""
    _, code = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(code).astype(np.float64), np.bincount(code, weights=values)


def _column_sums(
    values: NDArray[np.float64], clusters: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and numbers of the entries that are not NaN, per cluster and column: (C, S) each."""
    values = np.asarray(values, np.float64)
    names, code = np.unique(np.asarray(clusters), return_inverse=True)
    counted = ~np.isnan(values)
    sums, sizes = np.zeros((len(names), values.shape[1])), np.zeros((len(names), values.shape[1]))
    for column in range(values.shape[1]):
        present = counted[:, column]
        sums[:, column] = np.bincount(code[present], weights=values[present, column], minlength=len(names))
        sizes[:, column] = np.bincount(code[present], minlength=len(names))
    return sums, sizes
