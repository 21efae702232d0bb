"""What an update loses where it matters: golden queries, and slices that nobody thought of.

* A query with `golden` = true may never go from right to wrong: no statistics, each is named.
* Discovered slices are those that lose more than the rest of the queries: every value of every slice, every pair of
  values of two of them, and how many queries the identity has. So many are looked at that some lose more by chance:
  their p-values are corrected for all that were tested, dependent as they are (Benjamini and Yekutieli, Annals of
  Statistics 29, 2001). They warn, and decide nothing.

Shapes: Q queries.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import special, stats

from graceful.evaluation.intervals import clopper_pearson, share_bounds
from graceful.evaluation.outcomes import Outcomes, compare

GOLDEN = "golden"
"""Name of the slice that marks queries which may never be lost."""
TRUE = ("true", "1", "yes")
IDENTITY_SIZE = "queries of the identity"
_SIZES = ((1, "1"), (4, "2-4"), (9, "5-9"), (np.inf, "10+"))
MIN_QUERIES, MIN_CLUSTERS = 20, 5
"""Smaller slices are not tested: they could not tell anything."""
MAX_LOOKED = 5_000
"""Pairs of values that are looked at; what is left out is counted."""


class Discovery(NamedTuple):
    """Slices that lose more than the rest, the surest first; how many were tested; how many pairs were left out."""

    found: tuple[DiscoveredSlice, ...]
    num_tested: int
    num_left_out: int


class DiscoveredSlice(BaseModel):
    """A slice that loses more than the other queries, after correction for all that were tested."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: str = Field(description="Name of the state.")
    scope: str = Field(description="'slice=value', or two of them joined by ' & '.")
    num_queries: int = Field(description="Queries of the slice that are measurable now.")
    num_lost: int = Field(description="Of these right now and wrong in the state.")
    nfr: float = Field(description="Their share.")
    nfr_lower: float = Field(description="Lower bound, clusters respected, of this slice by itself.")
    nfr_elsewhere: float = Field(description="The same share of all other queries.")
    p_value: float = Field(description="Of this slice by itself.")
    q_value: float = Field(description="Corrected for all slices that were tested.")


def golden_queries(outcomes: Outcomes) -> NDArray[np.bool_]:
    """Which queries (Q,) are golden; none where the slice is not there."""
    column = outcomes.slices.get(GOLDEN)
    if column is None:
        return np.zeros(len(outcomes), np.bool_)
    return np.isin(np.char.lower(column), TRUE)


def golden_flips(outcomes: Outcomes, before: str, after: str, *, k: int = 1) -> tuple[int, tuple[str, ...]]:
    """How many golden queries are right before, and the names of those that are wrong after."""
    pair = compare(outcomes, before, after, k=k, within=golden_queries(outcomes))
    names = outcomes.query_ids[pair.counted]
    return int(pair.right_before.sum()), tuple(str(name) for name in names[pair.right_before & ~pair.right_after])


def discover_slices(
    outcomes: Outcomes, before: str, after: str, *, k: int = 1, false_share: float = 0.1, alpha: float = 0.05
) -> Discovery:
    """Slices that lose more than the rest; at most `false_share` of them are false on average.

    Of slices with the same queries one is tested. Each is compared with all other queries by two tests, and the larger
    p-value counts: the difference of both rates with its error over clusters (t, with one degree of freedom less than
    the smaller side has clusters), and the binomial tail at the effective sample (`share_bounds`) against the rate
    elsewhere, which is honest where few are lost.
    """
    if not 0 < false_share < 1:
        raise ValueError(f"discovering slices: expected a share of false ones between 0 and 1, found {false_share}")
    pair = compare(outcomes, before, after, k=k)
    lost = pair.right_before & ~pair.right_after
    clusters = np.unique(outcomes.clusters[pair.counted], return_inverse=True)[1].astype(np.int64)
    columns = {name: values[pair.counted] for name, values in outcomes.slices.items()}
    columns[IDENTITY_SIZE] = _identity_sizes(outcomes.identities)[pair.counted]
    singles = [_large_values(name, values, clusters) for name, values in sorted(columns.items())]
    pairs = [product for both in itertools.combinations(singles, 2) for product in itertools.product(*both)]
    candidates = [single for column in singles for single in column]
    candidates += [(f"{one} & {other}", inside & also) for (one, inside), (other, also) in pairs[:MAX_LOOKED]]
    tested: list[tuple[str, NDArray[np.bool_], float]] = []
    seen: set[bytes] = set()
    for scope, inside in candidates:
        key = np.packbits(inside).tobytes()
        if key not in seen and not _too_small(inside, clusters):
            seen.add(key)
            tested.append((scope, inside, _p_value(lost, inside, clusters)))
    num_left_out = max(0, len(pairs) - MAX_LOOKED)
    if not tested:
        return Discovery((), 0, num_left_out)
    q_values = stats.false_discovery_control([p for _, _, p in tested], method="by")
    found = []
    for (scope, inside, p_value), q_value in zip(tested, q_values, strict=True):
        if q_value <= false_share:
            bounds = share_bounds(lost[inside], clusters[inside], alpha)
            found.append(
                DiscoveredSlice(
                    state=after,
                    scope=scope,
                    num_queries=int(inside.sum()),
                    num_lost=int(lost[inside].sum()),
                    nfr=bounds.value,
                    nfr_lower=bounds.lower,
                    nfr_elsewhere=float(lost[~inside].mean()),
                    p_value=p_value,
                    q_value=float(q_value),
                )
            )
    surest = sorted(found, key=lambda item: (item.q_value, item.p_value, item.scope))
    return Discovery(tuple(surest), len(tested), num_left_out)


def _large_values(name: str, values: NDArray[Any], clusters: NDArray[np.int64]) -> list[tuple[str, NDArray[np.bool_]]]:
    """The values of one slice that enough queries have; "" is no value. A pair of values has no more than each."""
    names, counts = np.unique(values, return_counts=True)
    large = [value for value, count in zip(names.tolist(), counts, strict=True) if value and count >= MIN_QUERIES]
    return [(f"{name}={value}", values == value) for value in large if len(np.unique(clusters[values == value])) > 1]


def _identity_sizes(identities: NDArray[Any]) -> NDArray[Any]:
    _, code, counts = np.unique(identities, return_inverse=True, return_counts=True)
    limits = np.array([limit for limit, _ in _SIZES])
    names = np.array([name for _, name in _SIZES])
    return names[np.searchsorted(limits, counts[code])]


def _too_small(inside: NDArray[np.bool_], clusters: NDArray[np.int64]) -> bool:
    num = int(inside.sum())
    if num < MIN_QUERIES or len(inside) - num < MIN_QUERIES:
        return True
    return min(len(np.unique(clusters[side])) for side in (inside, ~inside)) < MIN_CLUSTERS


def _p_value(lost: NDArray[np.bool_], inside: NDArray[np.bool_], clusters: NDArray[np.int64]) -> float:
    """Probability of so many losses inside if it lost no more than the rest."""
    here, elsewhere = lost[inside], lost[~inside]
    rate, base = float(here.mean()), float(elsewhere.mean())
    if rate <= base:
        return 1.0
    weights = np.where(inside, (lost - rate) / len(here), -(lost - base) / len(elsewhere))
    sums = np.bincount(clusters, weights=weights)
    error = float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)))
    freedom = min(len(np.unique(clusters[side])) for side in (inside, ~inside)) - 1
    by_difference = float(stats.t.sf((rate - base) / error, freedom)) if error > 0 else 0.0
    effective = share_bounds(here, clusters[inside]).effective_n
    # P(X >= rate n*) of a binomial with the upper bound of the rate elsewhere at one half: its median.
    others = share_bounds(elsewhere, clusters[~inside]).effective_n
    typical = clopper_pearson(min(base * others, others), others, 0.5)[1]
    by_count = float(special.betainc(rate * effective, effective * (1 - rate) + 1, typical))
    return max(by_difference, by_count)
