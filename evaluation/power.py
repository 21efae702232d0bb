"""How many queries an answer needs, and what a given number of them can detect.

Sample sizes assume independent queries; for clustered ones multiply by the design effect that was measured (the
functions take it as an argument). The size for an NFR bound uses the exact power of the Clopper-Pearson test, which
saws: it falls with every query until one more flip is allowed. The size for a quality margin uses the normal
approximation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from graceful.evaluation.intervals import clopper_pearson, effective_sample, icc_floor

MAX_QUERIES = 10_000_000  # more than this is answered with None: "no number of queries that anyone could collect"
MAX_EXACT_QUERIES = 50_000  # above it the normal approximation is within a few per cent, and the exact search slow


def minimal_detectable_difference(
    discordant_share: float, n: float, *, alpha: float = 0.05, power: float = 0.8, one_sided: bool = False
) -> float:
    """Smallest true difference of two paired accuracies that n queries detect: (z_alpha + z_power) sqrt(pi / n).

    >>> round(100 * minimal_detectable_difference(0.2, 10_000), 2)
    1.25
    """
    tail = alpha if one_sided else alpha / 2
    return float((stats.norm.ppf(1 - tail) + stats.norm.ppf(power)) * math.sqrt(discordant_share / n))


def nfr_power(n: int, max_nfr: float, true_nfr: float, *, alpha: float = 0.05) -> float:
    """Probability that the upper bound of the NFR on n independent queries is at most `max_nfr`.

    >>> round(nfr_power(2000, 0.01, 0.005), 3)
    0.792
    """
    return float(_nfr_power(np.array([n]), max_nfr, true_nfr, alpha)[0])


@functools.lru_cache(maxsize=1024)  # many states share their numbers
def queries_for_nfr(
    max_nfr: float,
    true_nfr: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    design_effect: float = 1.0,
    stable: bool = True,
) -> int | None:
    """Queries with which an NFR guard passes with the given power, if the rate is really `true_nfr` < `max_nfr`.

    `stable`: from this number on the power stays above; otherwise the first number that reaches it. When `true_nfr` is
    above `max_nfr`: the queries with which it FAILs (normal approximation). None: no reachable number (equal rates).
    """
    if true_nfr == max_nfr or not 0 < max_nfr < 1:
        return None
    approximate = _normal_size(max_nfr, true_nfr, alpha, power)
    if true_nfr > max_nfr or approximate > MAX_EXACT_QUERIES:
        return _ceil(approximate * design_effect)
    limit = int(2 * approximate + 20 / max_nfr)
    sizes = np.arange(1, limit + 1)
    enough = _nfr_power(sizes, max_nfr, true_nfr, alpha) >= power
    if stable:
        short = np.flatnonzero(~enough)
        n = int(short[-1]) + 2 if len(short) else 1
    else:
        n = int(np.argmax(enough)) + 1
    return _ceil(n * design_effect)


def identities_for_nfr(
    max_nfr: float, queries_per_identity: float | Sequence[float] = 1.0, alpha: float = 0.05
) -> int | None:
    """Fewest identities with which the bound of the negative flip rate passes when *nothing* flips.

    With fewer, no update can ever pass the limit, however many queries each identity has: see `share_bounds`, whose
    bound this is for equally many queries per identity.

    Args:
        max_nfr: the limit of the negative flip rate, a share in (0, 1).
        queries_per_identity: one number, or the numbers that were found, one per identity: further identities are
            then taken to be alike, and uneven ones count for less.
        alpha: error level of the bound (the gate takes NFR bounds at half of its own).

    Returns:
        The number of identities, or None when more than MAX_QUERIES queries would be needed.

    >>> identities_for_nfr(0.02, 1, alpha=0.025), identities_for_nfr(0.02, 60, alpha=0.025)
    (183, 185)
    """
    sizes = np.atleast_1d(np.asarray(queries_per_identity, np.float64))
    if not 0 < max_nfr < 1 or not len(sizes) or not (sizes >= 1).all():
        raise ValueError(
            f"planning identities: expected a limit in (0, 1) and at least one query per identity, found {max_nfr} "
            f"and {queries_per_identity}"
        )
    mean, square = float(sizes.mean()), float((sizes**2).mean())

    def passes(identities: int) -> bool:
        n = identities * mean
        _, effective = effective_sample(n, identities, identities * square, icc_floor(identities, 0), alpha)
        return clopper_pearson(0, effective, alpha)[1] <= max_nfr

    most = max(1, int(MAX_QUERIES / mean))
    if not passes(most):
        return None
    least = 0  # the bound falls with every identity
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if passes(middle) else (middle, most)
    return most


def queries_for_margin(
    difference: float,
    standard_deviation: float,
    margin: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    design_effect: float = 1.0,
    critical: float | None = None,
) -> int | None:
    """Queries with which the lower bound of a paired difference is at least -margin, or the upper one below it.

    n = ((c + z_power) sd / (difference + margin))^2 x design effect; sd per query, for paired accuracies about sqrt(pi)
    with pi the discordant share; c = z_{1 - alpha}, or the `critical` value of a simultaneous band. A difference below
    -margin gives the number with which that is shown. None: no reachable number.

    >>> queries_for_margin(0.0, math.sqrt(0.2), 0.02)  # (2.487 x 0.447 / 0.02)^2
    3092
    """
    distance = abs(difference + margin)
    if distance == 0:
        return None
    quantile = float(stats.norm.ppf(1 - alpha)) if critical is None else critical
    return _ceil(((quantile + float(stats.norm.ppf(power))) * standard_deviation / distance) ** 2 * design_effect)


@functools.lru_cache(maxsize=4096)
def identities_for_rate(
    max_nfr: float,
    true_nfr: float,
    *,
    queries_per_identity: float = 1.0,
    mean_square: float | None = None,
    icc: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
) -> int | None:
    """Identities with which the bound of the negative flip rate passes (or fails) its limit at a rate that is true.

    As `share_bounds` will see them. What it assumes about the correlation depends on how many identities hold a flip,
    which is beta-binomial: P(none of m) = B(a, b + m) / B(a, b), a = true_nfr (1 - icc) / icc, b = a (1 - p) / p.

    Args:
        max_nfr: the limit; a `true_nfr` below it has to pass, one above it has to fail (normal approximation).
        true_nfr: the rate, a share.
        queries_per_identity: their mean; `mean_square` is the mean of their squares, by default the mean's square.
        icc: intra-cluster correlation of the flips.
        alpha: error level of the bound.
        power: probability with which it shall happen.

    Returns:
        The number within 1 %, or None when more than MAX_QUERIES queries would be needed.

    >>> identities_for_rate(0.02, 0.005, alpha=0.025), identities_for_rate(0.02, 0.02, alpha=0.025)
    (512, None)
    """
    mean = max(queries_per_identity, 1.0)
    square = mean**2 if mean_square is None else mean_square
    spared = _spared(true_nfr, mean, icc)
    independent = queries_for_nfr(max_nfr, true_nfr, alpha=alpha, power=power)
    if independent is None:
        return None

    def settles(identities: int) -> bool:
        assumed = max(icc, icc_floor(identities, int(identities * (1 - spared))))
        _, effective = effective_sample(identities * mean, identities, identities * square, assumed, alpha)
        return effective >= independent

    most, end = 2, int(MAX_QUERIES / mean)
    while not settles(most):
        if most >= end:
            return None
        most = min(2 * most, end)
    least = most // 2
    while most - least > max(1, most // 100):
        middle = (least + most) // 2
        least, most = (least, middle) if settles(middle) else (middle, most)
    return most


def _spared(rate: float, queries: float, icc: float) -> float:
    """Probability that an identity of so many queries holds no flip."""
    if icc >= 1 or not 0 < rate < 1:
        return 1 - rate
    if icc <= 1e-6:
        return float((1 - rate) ** queries)
    a, b = rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc
    return float(np.exp(special.betaln(a, b + queries) - special.betaln(a, b)))


def _nfr_power(n: np.ndarray, max_nfr: float, true_nfr: float, alpha: float) -> np.ndarray:
    """The largest passing count c has P(X <= c | max_nfr) <= alpha; power is P(X <= c | true_nfr)."""
    allowed = stats.binom.ppf(alpha, n, max_nfr)
    allowed = np.where(special.bdtr(allowed, n, max_nfr) <= alpha, allowed, allowed - 1)
    return np.where(allowed >= 0, special.bdtr(np.maximum(allowed, 0), n, true_nfr), 0.0)


def _normal_size(max_nfr: float, true_nfr: float, alpha: float, power: float) -> float:
    spread = stats.norm.ppf(1 - alpha) * math.sqrt(max_nfr * (1 - max_nfr))
    spread += stats.norm.ppf(power) * math.sqrt(true_nfr * (1 - true_nfr))
    return float((spread / (max_nfr - true_nfr)) ** 2)


def _ceil(n: float) -> int | None:
    return max(1, math.ceil(n - 1e-9)) if n <= MAX_QUERIES else None
