"""Bounds: exact ones for rare flips, bootstrap ones for differences. Both know that queries come in clusters.

Queries that share an identity succeed and fail together. Every bound here therefore counts clusters, not queries:

* Shares of flips: one-sided Clopper-Pearson on the *effective* sample n / design effect, design effect 1 + (m - 1) ICC
  with the ANOVA estimate of the intra-cluster correlation (ICC) and the degrees of freedom corrected (Korn and
  Graubard, Survey Methodology 24, 1998), never above n.
* Differences of a metric: paired bootstrap over clusters, with bands that hold for all compared states at once (max-t).

In a simulation at the threshold (ICC 0.3, 659 clusters of 10, nominal 5 %) the uncorrected bound passes 19 % of the
time, the corrected one 5 %. Every random act takes a seed. Shapes: Q queries, C clusters, S states, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# With few clusters, or few clusters that hold a flip, the ICC estimate is mostly noise, and its low values let a
# bound pass that should not. Then the ICC is taken as at least ICC_FLOOR. Chosen by simulation at NFR = tau, nominal
# 5 %, ICC 0.3: without the floor 40 clusters of 30 pass 15 % of the time and 100 clusters of 10 at tau = 1 % pass 11
# %; with it 2 % and 1 %, while designs with enough flips stay between 4 and 7 %.
FEW_CLUSTERS = 50
FEW_FLIPPED_CLUSTERS = 10
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
        return ShareBounds(0, 0, 0, np.nan, 0.0, 1.0, np.nan, np.nan, 0.0, False)
    sizes, sums = _per_cluster(hits.astype(np.float64), clusters)
    num_clusters = len(sizes)
    icc = intra_cluster_correlation(hits, clusters)
    few = num_clusters < FEW_CLUSTERS or int((sums > 0).sum()) < FEW_FLIPPED_CLUSTERS
    floored = few and icc < ICC_FLOOR
    icc = ICC_FLOOR if floored else icc
    design_effect = 1 + ((sizes**2).sum() / n - 1) * icc
    if num_clusters > 1:
        freedom = (stats.t.ppf(1 - alpha, n - 1) / stats.t.ppf(1 - alpha, num_clusters - 1)) ** 2
        effective = min(n / design_effect * freedom, float(n))
    else:
        effective = 1.0
    value = float(hits.mean())
    lower, upper = clopper_pearson(min(value * effective, effective), effective, alpha)
    return ShareBounds(
        n, num_clusters, int(hits.sum()), value, lower, upper, icc, float(design_effect), float(effective), floored
    )


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
    stacked = np.hstack([sums, sizes])
    num_clusters, width = stacked.shape
    rng = np.random.default_rng(seed)
    block = max(1, MAX_COUNTS_PER_BLOCK // max(num_clusters, 1))
    totals = np.concatenate(
        [
            resample_counts(num_clusters, min(block, num_resamples - start), rng) @ stacked
            for start in range(0, num_resamples if num_clusters else 0, block)
        ]
        or [np.zeros((num_resamples, width))]
    )
    total, count = np.split(totals, 2, axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def difference_bands(
    differences: NDArray[np.float64],
    clusters: NDArray[Any],
    *,
    alpha: float = 0.05,
    num_resamples: int = 2000,
    seed: int = 0,
) -> DifferenceBands:
    """Simultaneous bands for the means of S paired differences (Q, S), NaN = the query takes no part.

    value -+ c se, with c the 1 - alpha quantile over resamples of max_s (resampled - value) / se: one c for all
    states, so that the best of them may be chosen afterwards. Widened by sqrt(C / (C - 1)) and by t_{C-1} / z for few
    clusters. Entries must lie in [-1, 1]: where fewer than FEW_CHANGED_CLUSTERS clusters changed at all, an exact
    bound replaces an optimistic one.
    """
    differences = np.asarray(differences, np.float64)
    means = bootstrap_means(differences, clusters, num_resamples=num_resamples, seed=seed)
    return bands_from_means(differences, clusters, means, alpha=alpha)


def bands_from_means(
    differences: NDArray[np.float64], clusters: NDArray[Any], means: NDArray[np.float64], *, alpha: float = 0.05
) -> DifferenceBands:
    """`difference_bands` from resampled means (B, S) that exist already: several families can share one product."""
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
        scaled = _studentised(means[:, known] - value[known], error[known])
        below, above = (float(np.quantile(np.max(side, axis=1), 1 - alpha)) for side in (scaled, -scaled))
        critical = max(below, above, 0.0)
        few = stats.t.ppf(1 - alpha, num_clusters[known] - 1) / stats.norm.ppf(1 - alpha)
        lower[known] = value[known] - max(below, 0.0) * few * error[known]
        upper[known] = value[known] + max(above, 0.0) * few * error[known]
        for s in np.flatnonzero(known & (((sums != 0) & (sizes > 0)).sum(axis=0) < FEW_CHANGED_CLUSTERS)):
            losses, wins = _losses_and_wins(differences[:, s], clusters, alpha / int(known.sum()))
            lower[s], upper[s] = min(lower[s], -losses.upper), max(upper[s], wins.upper)
            design_effect[s] = losses.num_queries / losses.effective_n
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
    scaled = np.divide(deviation, error, out=np.zeros_like(deviation), where=error > 0)
    return np.nan_to_num(scaled, nan=0.0)


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
