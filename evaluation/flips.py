"""Flips: what an update breaks (negative) and repairs (positive), query by query.

Yan et al., "Positive-congruent training", CVPR 2021 (arXiv 2011.09161); BTC and BEC: Srivastava et al., KDD 2020
(arXiv 2008.04572). `right_before` and `right_after` are (Q,) booleans over the same queries. Every rate is NaN when its
set of queries is empty, never 0. A low NFR alone is won by not changing at all: show it beside the gain.

Identity: PFR - NFR = accuracy after - accuracy before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import Outcomes, compare, measured, pair_state, right


@dataclass(frozen=True)
class FlipRates:
    """Flips between two states. Lower is better for nfr, nfi and relative_nfr; higher for the others.

    nfr = #(right before, wrong after) / N          pfr = #(wrong before, right after) / N
    nfi = nfr / error_after                         relative_nfr = nfr / (accuracy_before x error_after)
    btc = 1 - nfr / accuracy_before                 bec = 1 - pfr / error_before
    """

    num_queries: int
    accuracy_before: float
    accuracy_after: float
    nfr: float
    pfr: float
    nfi: float
    relative_nfr: float
    btc: float
    bec: float


def negative_flip_rate(
    right_before: NDArray[np.bool_], right_after: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
) -> float:
    """Share of queries right before and wrong after. Weights (Q,), for instance query frequencies, are optional.

    >>> negative_flip_rate(np.array([True, True, False, False]), np.array([False, True, True, False]))
    0.25
    """
    return _share(np.asarray(right_before, np.bool_) & ~np.asarray(right_after, np.bool_), weights)


def positive_flip_rate(
    right_before: NDArray[np.bool_], right_after: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
) -> float:
    """Share of queries wrong before and right after."""
    return negative_flip_rate(right_after, right_before, weights)


def flip_rates(
    right_before: NDArray[np.bool_], right_after: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
) -> FlipRates:
    """All flip metrics at once.

    >>> rates = flip_rates(np.array([True, True, False, False]), np.array([False, True, True, False]))
    >>> rates.nfr, rates.pfr, rates.nfi, rates.relative_nfr, rates.btc, rates.bec
    (0.25, 0.25, 0.5, 1.0, 0.5, 0.5)
    """
    before, after = np.asarray(right_before, np.bool_), np.asarray(right_after, np.bool_)
    if before.shape != after.shape:
        raise ValueError(f"computing flips: expected the same queries twice, found {before.shape} and {after.shape}")
    nfr, pfr = negative_flip_rate(before, after, weights), positive_flip_rate(before, after, weights)
    accuracy_before, accuracy_after = _share(before, weights), _share(after, weights)
    return FlipRates(
        num_queries=len(before),
        accuracy_before=accuracy_before,
        accuracy_after=accuracy_after,
        nfr=nfr,
        pfr=pfr,
        nfi=_ratio(nfr, 1 - accuracy_after),
        relative_nfr=_ratio(nfr, accuracy_before * (1 - accuracy_after)),
        btc=1 - _ratio(nfr, accuracy_before),
        bec=1 - _ratio(pfr, 1 - accuracy_before),
    )


def state_flips(
    outcomes: Outcomes, before: str, after: str, *, k: int = 1, within: NDArray[np.bool_] | None = None
) -> FlipRates:
    """Flips at k between two states, paired as in `evaluation.outcomes.compare`."""
    pair = compare(outcomes, before, after, k=k, within=within)
    return flip_rates(pair.right_before, pair.right_after)


@dataclass(frozen=True)
class FlipsAgainst:
    """What would be wrong of what one generation got right on a gallery of its own; `upper` bounds `nfr` one-sided."""

    generation: str
    state: str
    num_queries: int
    nfr: float
    upper: float
    pfr: float


def flips_against(
    outcomes: Outcomes, generations: Sequence[str], states: Sequence[str], *, k: int = 1, alpha: float = 0.05
) -> list[FlipsAgainst]:
    """For each generation the worst of the states, against its own answers: pair/<g>/<g> before, the state after.

    An update that is fine against today's answers may have lost what an older generation found. Those that were not
    measured on their own gallery are left out. `alpha` is the error level of each bound.
    """
    found = []
    for generation in generations:
        own = pair_state(generation, generation)
        if own not in outcomes.first_rank:
            continue
        rows = []
        for state in states:
            pair = compare(outcomes, own, state, k=k)
            lost, won = pair.right_before & ~pair.right_after, ~pair.right_before & pair.right_after
            bounds = share_bounds(lost, outcomes.clusters[pair.counted], alpha)
            if bounds.num_queries:
                pfr = float(won.mean())
                rows.append(FlipsAgainst(generation, state, len(lost), bounds.value, bounds.upper, pfr))
        found += sorted(rows, key=lambda row: -row.nfr)[:1]
    return found


def nfr_matrix(outcomes: Outcomes, states: Sequence[str], *, k: int = 1) -> NDArray[np.float64]:
    """NFR for all pairs of S states (S, S): row = before, column = after. One product of hit matrices.

    Queries measurable before take part; what is not measurable after is wrong after. NaN for a state without any.
    """
    hits = np.array([right(outcomes, state, k) for state in states], np.float64).reshape(len(states), len(outcomes))
    counts = np.array([measured(outcomes, state).sum() for state in states], np.float64)[:, None]
    lost = hits @ (1 - hits).T
    return np.divide(lost, counts, out=np.full_like(lost, np.nan), where=counts > 0)


def _share(flags: NDArray[np.bool_], weights: NDArray[Any] | None) -> float:
    if not len(flags):
        return np.nan
    if weights is None:
        return float(flags.mean())
    total = float(np.sum(weights))
    return float(np.sum(np.asarray(weights)[flags]) / total) if total > 0 else np.nan


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0 else np.nan
