"""Two states compared query by query: what became better or worse, which queries flipped, and how surely.

Queries with an identity and those of a query log stand side by side; clusters are respected in every bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.bands import DifferenceBands, difference_bands
from graceful.evaluation.changed import log_differences
from graceful.evaluation.intervals import mcnemar_exact, share_bounds
from graceful.evaluation.outcomes import Comparison, Outcomes, compare, measured, pair_state
from graceful.evaluation.policy import RolloutPolicy


class Pair(NamedTuple):
    """Two states query by query: queries with an identity, and those of the log by what changed (NaN: not settled)."""

    known: Comparison
    log: NDArray[np.float64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """After less before, of all queries compared."""
        return np.concatenate([self.known.after - self.known.before, self.log[~np.isnan(self.log)]])


def paired(
    outcomes: Outcomes, policy: RolloutPolicy, before: str, after: str, within: NDArray[np.bool_] | None = None
) -> Pair:
    """Compare two states; `within` is over the queries with an identity and then those of the log."""
    num = len(outcomes)
    known = compare(
        outcomes, before, after, metric=policy.metric, k=policy.k, within=None if within is None else within[:num]
    )
    if outcomes.log is None:
        return Pair(known, np.zeros(0))
    inside = None if within is None else within[num:]
    return Pair(known, log_differences(outcomes.log, (before, after), metric=policy.metric, k=policy.k, within=inside))


def bands_of(
    clusters: NDArray[np.int64],
    policy: RolloutPolicy,
    pairs: Sequence[Pair | None],
    families: Sequence[list[int]],
) -> list[DifferenceBands]:
    """One band per family of comparisons."""
    columns = np.full((len(clusters), len(pairs)), np.nan)
    for index, pair in enumerate(pairs):
        if pair is not None:
            num = len(pair.known.counted)
            columns[:num, index][pair.known.counted] = pair.known.after - pair.known.before
            columns[num:, index] = pair.log
    return [
        difference_bands(
            columns[:, family], clusters, alpha=policy.alpha, num_resamples=policy.num_resamples, seed=policy.seed
        )
        for family in families
    ]


def difference_numbers(pair: Pair | None, band: DifferenceBands, column: int) -> dict[str, Any]:
    """What `PairedDifference` holds of one comparison, a column of its band; None: not measured."""
    known = pair is not None and len(pair.known.before) > 0
    return {
        "num_queries": int(band.num_queries[column]),
        "num_clusters": int(band.num_clusters[column]),
        "num_log_queries": 0 if pair is None else int((~np.isnan(pair.log)).sum()),
        "value": finite(pair.known.after.mean()) if pair is not None and known else None,
        "baseline": finite(pair.known.before.mean()) if pair is not None and known else None,
        "difference": finite(band.value[column]),
        "difference_lower": finite(band.lower[column]),
        "difference_upper": finite(band.upper[column]),
        "difference_sd": finite(pair.differences.std()) if pair is not None and known else None,
        "difference_design_effect": finite(band.design_effect[column]) if known else None,
    }


def flip_numbers(pair: Pair, clusters: NDArray[Any], alpha: float, noise_floor: float | None) -> dict[str, Any]:
    """What `StateEvidence` holds of flips and repairs, every bound at `alpha`, clusters respected."""
    before, after = pair.known.right_before, pair.known.right_after
    settled = ~np.isnan(pair.log)
    losses = np.concatenate([before & ~after, pair.log[settled] < 0])
    wins = np.concatenate([~before & after, pair.log[settled] > 0])
    inside = clusters[np.concatenate([pair.known.counted, settled])]
    bounds = share_bounds(losses, inside, alpha)
    if bounds.num_queries == 0:
        unknown = (
            "nfr",
            "nfr_lower",
            "nfr_upper",
            "nfr_design_effect",
            "nfr_icc",
            "cluster_square",
            "pfr",
            "mcnemar_p",
        )
        return {**dict.fromkeys(unknown), "num_flipped_clusters": 0}
    # A ratio of two shares: each of its two bounds takes half.
    broken, repaired = share_bounds(losses, inside, alpha / 2), share_bounds(wins, inside, alpha / 2)
    return {
        "nfr": bounds.value,
        "nfr_lower": bounds.lower,
        "nfr_upper": bounds.upper,
        "nfr_design_effect": bounds.num_queries / bounds.effective_n,
        "nfr_icc": bounds.estimated_icc,
        "num_flipped_clusters": bounds.num_hit_clusters,
        "cluster_square": float((np.unique(clusters, return_counts=True)[1].astype(np.float64) ** 2).mean()),
        "pfr": repaired.value,
        "flips_per_repair": _ratio(broken.value, repaired.value),
        "flips_per_repair_lower": _ratio(broken.lower, repaired.upper),
        "flips_per_repair_upper": _ratio(broken.upper, repaired.lower),
        "nfr_over_noise": None if noise_floor is None else bounds.value / noise_floor,
        "mcnemar_p": mcnemar_exact(int(losses.sum()), int(wins.sum())),
    }


def flips_since(
    outcomes: Outcomes,
    anchor: str | None,
    state: str,
    k: int,
    within: NDArray[np.bool_],
    clusters: NDArray[np.int64],
    alpha: float,
) -> dict[str, Any]:
    """Flips of a state against an older generation on a gallery of its own: what the updates since have added up to."""
    within, clusters = within[: len(outcomes)], clusters[: len(outcomes)]  # the anchor's answers to a log are not kept
    if anchor is None or not (measured(outcomes, pair_state(anchor, anchor)) & within).any():
        return {}
    pair = compare(outcomes, pair_state(anchor, anchor), state, k=k, within=within)
    bounds = share_bounds(pair.right_before & ~pair.right_after, clusters[pair.counted], alpha)
    return {
        "cumulative_nfr": bounds.value,
        "cumulative_nfr_lower": bounds.lower,
        "cumulative_nfr_upper": bounds.upper,
    }


def cluster_codes(outcomes: Outcomes) -> NDArray[np.int64]:
    """Clusters as small integers, made once: text is slow to sort. Those of the log come last."""
    log = outcomes.log
    names = outcomes.clusters if log is None else np.concatenate([outcomes.clusters, log.clusters.astype(np.str_)])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def finite(value: float | np.floating[Any]) -> float | None:
    """The number, None where it is none: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _ratio(value: float, base: float) -> float | None:
    return value / base if base > 0 else None
