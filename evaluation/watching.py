"""Watching answers come in: bounds of a share that hold at every moment, however often they are looked at.

A bound of `intervals` holds for a number of queries that was fixed beforehand. Whoever looks after every query, and
ends as soon as a bound is crossed, crosses it by chance sooner or later. The bounds here hold for all numbers of
queries at once: the chance that any of them is ever wrong is at most alpha.

A bet of one unit on every query, at odds that are fair where the share is p, has after n queries with s hits grown to

    K(p) = integral over q in (p, 1] of (q / p)^s ((1 - q) / (1 - p))^(n - s) dq

which for every true share of at most p, also one that changes from query to query, is on average at most 1, and exceeds
1 / alpha at any time with probability alpha at most (Ville, 1939). The lower bound is the largest p with K(p) >= 1 /
alpha. Sources: Robbins, Annals of Mathematical Statistics 41, 1970; Howard, Ramdas, McAuliffe and Sekhon, Annals of
Statistics 49, 2021; betting: Waudby-Smith and Ramdas, JRSS B 86, 2024. The uniform mixture over shares above p is the
beta(1, 1) one, cut at p, which makes it one-sided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

_HALVINGS = 60

Verdict = Literal["goes on", "changed", "failing", "flipping"]

_CHANGED_PART, _FAILED_PART, _FLIPS_PART = 1 / 2, 1 / 4, 1 / 4
"""What each limit has of the error level."""


@dataclass(frozen=True)
class Counts:
    """What was seen of a candidate beside its reference. Plain sums: those of several processes add up.

    `compared` answers of which `changed` differ in their first; `overlap` is the sum of the shares that two answers
    have in common; `attempted` counts the candidate's answers, `failed` those that failed or came too late. Of
    `labelled` queries, whose right answer is known, the reference alone was right in `negative_flips`, the candidate
    alone in `positive_flips`.
    """

    compared: int = 0
    changed: int = 0
    overlap: float = 0.0
    attempted: int = 0
    failed: int = 0
    labelled: int = 0
    negative_flips: int = 0
    positive_flips: int = 0


@dataclass(frozen=True)
class Limits:
    """What a candidate may do: shares in [0, 1], and the error level of all bounds together.

    `max_nfr`: share of the labelled queries that may flip negatively.
    """

    max_changed: float
    max_failed: float
    alpha: float
    max_nfr: float = 1.0


@dataclass(frozen=True)
class Watched:
    """How a candidate stands: the shares, their bounds that hold at every moment, and what follows."""

    changed: float | None
    changed_lower: float
    changed_upper: float
    failed: float | None
    failed_lower: float
    overlap: float | None
    nfr: float | None
    nfr_lower: float
    nfr_upper: float
    verdict: Verdict


def log_capital(hits: ArrayLike, n: ArrayLike, share: float) -> NDArray[np.float64]:
    """Logarithm of what a bet against a share of at most `share` has grown to; any shape.

    >>> log_capital([0, 3], [0, 3], 0.5).round(3).tolist()  # 3 of 3: the integral of (2 q)^3 from 1/2 to 1
    [-0.693, 0.629]
    """
    s, f = np.asarray(hits, np.float64), np.asarray(n, np.float64) - np.asarray(hits, np.float64)
    with np.errstate(divide="ignore"):
        above = np.log(special.betaincc(s + 1, f + 1, share))
        expected = special.xlogy(s, share) + special.xlog1py(f, -share)
    grown: NDArray[np.float64] = special.betaln(s + 1, f + 1) + above - expected
    return grown


def lower_bound(hits: int, n: int, alpha: float = 0.05) -> float:
    """Lower bound of a share that holds at every moment: P(it is ever above the true share) <= alpha. 0 when n is 0.

    >>> [round(lower_bound(hits, 100), 3) for hits in (0, 5, 20)]
    [0.0, 0.007, 0.093]

    Raises:
        ValueError: not a number of hits among n.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"bounding a share: expected 0 <= hits <= n, found {hits} of {n}")
    if hits == 0:
        return 0.0
    low, high, enough = 0.0, hits / n, math.log(1 / alpha)
    for _ in range(_HALVINGS):  # the capital falls as the share rises to hits / n, where it is at most 1
        middle = (low + high) / 2
        if float(log_capital(hits, n, middle)) >= enough:
            low = middle
        else:
            high = middle
    return low


def upper_bound(hits: int, n: int, alpha: float = 0.05) -> float:
    """Upper bound of a share that holds at every moment; 1 when n is 0."""
    return 1 - lower_bound(n - hits, n, alpha)


def watch(counts: Counts, limits: Limits) -> Watched:
    """Say how a candidate stands. It is worse than it may be where a lower bound is above its limit.

    The limit of changed answers has half of the error level, each of the others a quarter. Pure: no clock, no I/O.

    >>> watch(Counts(200, 10, 150.0, 200, 0), Limits(0.1, 0.01, 0.05)).verdict
    'goes on'
    >>> watch(Counts(200, 60, 150.0, 200, 0), Limits(0.1, 0.01, 0.05)).verdict
    'changed'
    >>> watch(Counts(labelled=200, negative_flips=30), Limits(0.1, 0.01, 0.05, max_nfr=0.05)).verdict
    'flipping'
    """
    for_changed, for_flips = limits.alpha * _CHANGED_PART, limits.alpha * _FLIPS_PART
    changed_lower = lower_bound(counts.changed, counts.compared, for_changed)
    failed_lower = lower_bound(counts.failed, counts.attempted, limits.alpha * _FAILED_PART)
    nfr_lower = lower_bound(counts.negative_flips, counts.labelled, for_flips)
    verdict: Verdict = "goes on"
    if changed_lower > limits.max_changed:
        verdict = "changed"
    elif failed_lower > limits.max_failed:
        verdict = "failing"
    elif nfr_lower > limits.max_nfr:
        verdict = "flipping"
    return Watched(
        changed=counts.changed / counts.compared if counts.compared else None,
        changed_lower=changed_lower,
        changed_upper=upper_bound(counts.changed, counts.compared, for_changed),
        failed=counts.failed / counts.attempted if counts.attempted else None,
        failed_lower=failed_lower,
        overlap=counts.overlap / counts.compared if counts.compared else None,
        nfr=counts.negative_flips / counts.labelled if counts.labelled else None,
        nfr_lower=nfr_lower,
        nfr_upper=upper_bound(counts.negative_flips, counts.labelled, for_flips),
        verdict=verdict,
    )
