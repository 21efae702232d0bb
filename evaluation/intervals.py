"""Exact bounds of shares of flips that know that queries come in clusters.

Queries that share an identity succeed and fail together. The bound therefore counts clusters, not queries: one-sided
Clopper-Pearson on the *effective* sample n / design effect, design effect 1 + (m - 1) ICC with the ANOVA estimate of
the intra-cluster correlation (ICC) and the degrees of freedom corrected (Korn and Graubard, Survey Methodology 24,
1998), never above n.

How often it lets pass what lies on the limit stands in docs/error_rates.md. Shapes: Q queries, C clusters.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# With few clusters, or few clusters that hold a flip, the ICC estimate is mostly noise, and its low values let a
# bound pass that should not. Then the ICC is taken as at least ICC_FLOOR. With fewer than CLUSTERS_COUNT_ONCE that hold
# a flip, nothing tells a rate from a few identities that are lost as a whole and were not drawn: every cluster then
# counts as one query (ICC 1). Chosen by simulation at NFR = limit, nominal 2.5 %: with the floor alone (below 10) 5,000
# queries of 50 identities, of which 2 % are lost whole, pass 38 % of the time.
# Samples that drew few of the bad clusters have a low rate and a low ICC at once. So the estimate is raised by the
# standard error of a variance that K clusters show, sqrt(2 / K), K being those that hold a flip: by one at a level of
# 5 %, by more at smaller levels, as normal quantiles are.
FEW_CLUSTERS = 50
FEW_FLIPPED_CLUSTERS = 20
CLUSTERS_COUNT_ONCE = 8
ICC_FLOOR = 0.2


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
    return _icc(*_per_cluster(np.asarray(hits, np.float64), clusters))


def share_bounds(hits: NDArray[np.bool_], clusters: NDArray[Any], alpha: float = 0.05) -> ShareBounds:
    """Exact one-sided bounds of a share of queries (NFR, PFR) that respect clusters.

    Clopper-Pearson on p n*, n* with n* = n / design effect x (t_{n-1} / t_{C-1})^2 <= n; see the constants above for
    the floor under the ICC and its standard error.

    >>> bounds = share_bounds(np.zeros(300, bool), np.arange(300))
    >>> round(bounds.upper, 4), bounds.effective_n
    (0.0099, 300.0)
    """
    hits = np.asarray(hits, np.bool_)
    if len(hits) == 0:
        return ShareBounds(0, 0, 0, np.nan, 0.0, 1.0, np.nan, np.nan, 0.0, False, np.nan, 0)
    return bounds_of_clusters(*_per_cluster(hits.astype(np.float64), clusters), alpha)


def bounds_of_clusters(
    sizes: NDArray[np.float64], sums: NDArray[np.float64], alpha: float, *, squares: float | None = None
) -> ShareBounds:
    """`share_bounds` from the queries and hits of each cluster, (C,) each; no cluster is empty.

    With `squares`, the sum of their squares, the hits are any numbers in [0, 1]. They vary less than flips of the same
    mean, and their effective sample is larger by as much; the clusters that count are then those that hold the sum,
    (sum s)^2 / sum s^2. Where these are few, the numbers are taken for flips that count once a cluster.
    """
    n, num_clusters = float(sizes.sum()), len(sizes)
    value, num_hit = float(sums.sum() / n), float((sums > 0).sum())
    if squares is not None and value > 0:
        num_hit = float(sums.sum() ** 2 / (sums**2).sum())
    floor = icc_floor(num_clusters, num_hit)
    whole = squares is None or floor == 1
    raised = 1 + math.sqrt(2 / max(num_hit, 1)) * float(stats.norm.ppf(1 - alpha) / stats.norm.ppf(0.95))
    estimated = _icc(sizes, sums, None if whole else squares)
    icc = min(max(estimated * raised, floor), 1.0)
    design_effect, effective = effective_sample(n, num_clusters, float((sizes**2).sum()), icc, alpha)
    if squares is not None and not whole:
        effective *= value * (1 - value) / (squares / n - value**2)
    lower, upper = clopper_pearson(min(value * effective, effective), effective, alpha)
    return ShareBounds(
        int(n), num_clusters, int((sums > 0).sum() if squares is not None else sums.sum()), value, lower, upper, icc,
        design_effect, effective, estimated * raised < floor, estimated, int((sums > 0).sum()),
    )  # fmt: skip


def icc_floor(num_clusters: int, num_flipped: float) -> float:
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


def mcnemar_exact(num_losses: int, num_wins: int) -> float:
    """Two-sided exact McNemar p-value: is there any systematic change? Reported, never a gate: balanced flips pass it.

    >>> mcnemar_exact(0, 5)  # 2 x 0.5^5
    0.0625
    """
    if num_losses + num_wins == 0:
        return 1.0
    return float(stats.binomtest(num_losses, num_losses + num_wins, 0.5).pvalue)


def _icc(sizes: NDArray[np.float64], sums: NDArray[np.float64], squares: float | None = None) -> float:
    n, num_clusters = sizes.sum(), len(sizes)
    if num_clusters < 2 or n == num_clusters:
        return 0.0
    between = (sizes * (sums / sizes - sums.sum() / n) ** 2).sum() / (num_clusters - 1)
    within = ((sums.sum() if squares is None else squares) - (sums**2 / sizes).sum()) / (n - num_clusters)
    typical = (n - (sizes**2).sum() / n) / (num_clusters - 1)
    total = between + (typical - 1) * within
    return float(np.clip((between - within) / total, 0, 1)) if total > 0 else 0.0


def _per_cluster(values: NDArray[np.float64], clusters: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sizes and sums of the clusters, (C,) float64 each."""
    _, code = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(code).astype(np.float64), np.bincount(code, weights=values)
