"""What would settle an open guard: how many further identities and queries, how sure that is, or why no number would.

Queries of one identity succeed and fail together, so that what counts is identities. Further ones are taken to be like
those that were measured: as many queries each, flips as much alike. What was observed is itself uncertain: the range
is that of 80 % of the truths that fit what was observed, each settled at the power of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from graceful.evaluation.consumers import ClusterEvidence
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, PairedDifference, StateEvidence
from graceful.evaluation.guards import Option, Reason, limit_of, percent
from graceful.evaluation.intervals import FEW_FLIPPED_CLUSTERS, ICC_FLOOR
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.power import (
    identities_for_nfr,
    identities_for_rate,
    queries_for_margin,
    queries_for_nfr,
)

PLAUSIBLE = np.linspace(0.1, 0.9, 9)  # quantiles of what may be true; their smallest and largest need are the range


class Need(NamedTuple):
    """Further queries and identities that would settle a guard; None: no number that anybody could collect.

    `least` and `most` are the range of the identities; None in `most`: no number at its upper end. `why` says in plain
    words what no number of queries can do, where that is so.
    """

    queries: int | None
    identities: int | None
    least: int | None
    most: int | None
    unit: str = "identities"
    why: str = ""


def further(reason: Reason, evidence: Evidence, policy: RolloutPolicy) -> Need:
    """What would settle an UNKNOWN guard, within its scope."""
    if reason.guard == "wave zero":
        margin = limit_of(policy.quality_margin_points) / 100
        items = [item for item in evidence.certificates if item.verdict == "UNKNOWN"]
        return hardest([_for_margin(item, margin, policy, None) for item in items])
    if reason.guard == "threshold":
        return _for_pairs(limit_of(reason.threshold), policy)
    if reason.guard == "clusters":
        found = next((item for item in evidence.consumers.clusters if item.state == reason.state), None)
        return _NOTHING if found is None else _for_photos(found, reason, policy)
    state = next((s for s in evidence.states if s.scope == reason.scope and s.state == reason.state), None)
    if state is None or state.nfr is None:
        return _NOTHING
    if reason.guard == "NFR":
        return _for_flips(state, limit_of(reason.threshold), policy)
    if reason.guard == "cumulative NFR" and state.cumulative_nfr is not None:
        since = state.model_copy(update={"nfr": state.cumulative_nfr})  # as much alike as those of this update
        return _for_flips(since, limit_of(reason.threshold), policy)
    if reason.guard == "flips per repair" and state.pfr is not None:
        return _for_ratio(state, state.pfr, limit_of(reason.threshold), policy)
    if reason.guard == "cost":
        cost, inputs = evidence.costs[-1], evidence.cost_inputs
        if inputs is None or not inputs.value_per_point_day or not reason.threshold or cost.total_price is None:
            return _NOTHING
        gain = cost.total_price / (inputs.value_per_point_day * reason.threshold) / 100
        return _for_margin(state, -gain, policy, state.band_critical)
    return _for_margin(state, -(reason.threshold or 0.0), policy, state.band_critical)


def hardest(needs: Sequence[Need]) -> Need:
    """The need that contains the others: none at all before any number, then the most queries."""
    return max(needs, key=lambda need: math.inf if need.queries is None else need.queries, default=_NOTHING)


def as_question(option: Option, reason: Reason, policy: RolloutPolicy) -> str:
    """What is open, as a sentence for somebody who knows no statistics."""
    metric = f"recall@{policy.k}" if policy.metric == "recall@k" else policy.metric
    limit = {
        "NFR": f"at most {percent(reason.threshold)} of the queries would go from right to wrong",
        "flips per repair": f"at most {reason.threshold} queries would break for each one that is repaired",
        "cumulative NFR": f"at most {percent(reason.threshold)} of what an older generation had right would be wrong",
        "quality": f"{metric} would stay within {limit_of(policy.quality_margin_points):g} points of today's",
        "dip": f"{metric} would never fall by more than {limit_of(policy.max_dip_points):g} points on the way",
        "wave zero": "the vectors that are stored can still be searched",
        "cost": "re-embedding everything would pay before the next generation",
        "clusters": f"at most {percent(reason.threshold)} of the photos would change person",
        "threshold": f"at most {percent(reason.threshold)} of the pairs of images would be judged wrong",
    }[reason.guard]
    where = "" if reason.scope == OVERALL else f" in {reason.scope}"
    way = {0.0: "on the gallery as it is", 1.0: "with everything re-embedded"}.get(
        option.fraction, f"with {100 * option.fraction:g} % of the gallery re-embedded"
    )
    return f"{limit}{where} {way}"


def in_words(need: Need, policy: RolloutPolicy) -> str:
    """How much more would settle it, with its range, or why nothing would."""
    why = f" {need.why[0].upper()}{need.why[1:]}." if need.why else ""
    if need.identities is None or need.queries is None:
        return f"No number of further queries is known to settle it.{why}"
    counted = f"{need.identities:,} further {need.unit}"
    if need.unit == "identities":
        counted += f" ({need.queries:,} queries, if each has as many as these)"
    least = "the same" if need.least is None else f"{need.least:,}"
    most = "more than anybody could collect" if need.most is None else f"{need.most:,}"
    likely = "" if need.least == need.most else f"; between {least} and {most} for what else may well be true"
    return f"About {counted} would settle it {100 * policy.power:g} times in 100 if the rest is alike{likely}.{why}"


_NOTHING = Need(None, None, None, None, why="nothing was measured that could be extended")
_ON_THE_LIMIT = "what was measured lies on the limit itself, which no number of queries that can be collected settles"


def _for_flips(state: StateEvidence, limit: float, policy: RolloutPolicy) -> Need:
    """Identities until the bound of the flips passes or fails its limit."""
    rate, n, num_clusters = state.nfr or 0.0, state.num_queries, state.num_clusters
    alpha = policy.alpha / NFR_FAMILIES
    mean, square = n / num_clusters, state.cluster_square or (n / num_clusters) ** 2
    icc = state.nfr_icc or 0.0
    if state.num_flipped_clusters < FEW_FLIPPED_CLUSTERS:
        icc = max(icc, ICC_FLOOR)  # so few tell little about how much alike the others would be

    def solve(true: float) -> int | None:
        return identities_for_rate(
            limit, true, queries_per_identity=mean, mean_square=square, icc=icc, alpha=alpha, power=policy.power
        )

    effective = n / (state.nfr_design_effect or 1.0)
    rates = stats.beta.ppf(PLAUSIBLE, rate * effective + 0.5, (1 - rate) * effective + 0.5)
    least_of_all = identities_for_nfr(limit, max(mean, 1.0), alpha)
    why = ""
    if least_of_all is not None and num_clusters < least_of_all:
        why = (
            f"{num_clusters:,} identities cannot show that fewer than {100 * limit:g} % break, however many queries "
            f"each has: at least {least_of_all:,} are needed"
        )
    return _need(solve, rate, rates, num_clusters, mean, why)


def _for_ratio(state: StateEvidence, pfr: float, limit: float, policy: RolloutPolicy) -> Need:
    """Identities until flips per repair clear their limit, limit x PFR - NFR being above or below 0."""
    nfr, mean, effect = state.nfr or 0.0, state.num_queries / state.num_clusters, state.nfr_design_effect or 1.0
    spare = limit * pfr - nfr
    sd = math.sqrt(max(limit**2 * pfr + nfr - spare**2, 0.0))

    def solve(true: float) -> int | None:
        alpha = policy.alpha / NFR_FAMILIES / 2  # each of the two shares has half
        queries = queries_for_margin(true, sd, 0.0, alpha=alpha, power=policy.power, design_effect=effect)
        return None if queries is None else math.ceil(queries / mean)

    plausible = spare + stats.norm.ppf(PLAUSIBLE) * sd * math.sqrt(effect / state.num_queries)
    return _need(solve, spare, plausible, state.num_clusters, mean, "")


def _for_photos(item: ClusterEvidence, reason: Reason, policy: RolloutPolicy) -> Need:
    """Photos until the share that changes person clears its limit."""
    if item.changed is None or reason.threshold is None:
        return _NOTHING
    limit, effect = reason.threshold, item.design_effect or 1.0

    def solve(rate: float) -> int | None:
        alpha = policy.alpha / NFR_FAMILIES
        return queries_for_nfr(limit, rate, alpha=alpha, power=policy.power, design_effect=effect)

    effective = item.num_items / effect
    rates = stats.beta.ppf(PLAUSIBLE, item.changed * effective + 0.5, (1 - item.changed) * effective + 0.5)
    return _need(solve, item.changed, rates, item.num_items, 1.0, "")._replace(unit="photos")


def _for_pairs(limit: float, policy: RolloutPolicy) -> Need:
    """How much alike the pairs of further identities would be is not known: only the least number of them is."""
    least = math.ceil(math.log(policy.alpha / NFR_FAMILIES) / math.log1p(-limit))
    why = f"identities count and not pairs: while no pair is judged wrong, {least:,} of them show it"
    return Need(None, None, None, None, why=why)


def _for_margin(item: PairedDifference, margin: float, policy: RolloutPolicy, critical: float | None) -> Need:
    """Identities until the difference's bound clears `-margin` (a share; a negative margin asks for a gain)."""
    if item.difference is None or item.difference_sd is None or not item.num_clusters:
        return _NOTHING
    effect, mean = item.difference_design_effect or 1.0, item.num_queries / item.num_clusters
    if item.difference_sd == 0:  # nothing changed: the exact bound of losses is what has to get below the margin
        alpha = policy.alpha / len(policy.fractions)
        total = None if not 0 < margin < 1 else identities_for_nfr(margin, max(mean, 1.0), alpha)
        number = None if total is None else max(1, total - item.num_clusters)
        queries = None if number is None else math.ceil(number * mean)
        return Need(queries, number, number, number, why="" if number else _ON_THE_LIMIT)

    def solve(difference: float) -> int | None:
        queries = queries_for_margin(
            difference,
            item.difference_sd or 0.0,
            margin,
            alpha=policy.alpha,
            power=policy.power,
            design_effect=effect,
            critical=critical,
        )
        return None if queries is None else math.ceil(queries / mean)

    error = item.difference_sd * math.sqrt(effect / item.num_queries)
    plausible = item.difference + stats.norm.ppf(PLAUSIBLE) * error
    return _need(solve, item.difference, plausible, item.num_clusters, mean, "")


def _need(
    solve: Callable[[float], int | None], observed: float, plausible: np.ndarray, have: int, mean: float, why: str
) -> Need:
    def more(total: int | None) -> int | None:
        return None if total is None else max(1, total - have)

    range_of = sorted((more(solve(float(value))) for value in plausible), key=lambda n: math.inf if n is None else n)
    number = more(solve(observed))
    queries = None if number is None else math.ceil(number * mean)
    return Need(queries, number, range_of[0], range_of[-1], why=why or ("" if number else _ON_THE_LIMIT))
