"""What an evaluation set can show, before anything is trained: by simulation through the gate itself.

An update is drawn (who loses, who wins, how alike the queries of an identity are), its outcomes are laid out as a real
evaluation would, and `gather_evidence` and `decide` judge them: the bounds, the guards and the order of the rules are
those of an update, and not a formula beside them. Pure; every draw is seeded.

Shapes: Q queries, C clusters, F fractions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from graceful.evaluation.cost import CostInputs, OptionCost, net_value
from graceful.evaluation.decision import decide
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, Question, StateEvidence
from graceful.evaluation.gathering import gather_evidence
from graceful.evaluation.guards import full_option
from graceful.evaluation.intervals import CLUSTERS_COUNT_ONCE, FEW_FLIPPED_CLUSTERS, ICC_FLOOR, share_bounds
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.power import identities_for_nfr

ASSUMED_RIGHT = 0.8
"""Share of the queries that are right today, where no evaluation has measured it."""

NUM_RESAMPLES = 200  # of the bootstrap inside a simulated judgement; a real one takes the policy's
LIKENESS = 0.8  # correlation of what one query does in two states of one way
GUARDS = ("quality", "NFR", "dip")


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Queries(_Plain):
    """The queries of an evaluation set, as far as bounds care."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    clusters: NDArray[Any] = Field(description="(Q,) what a bootstrap resamples, usually the identity.")
    slices: Mapping[str, NDArray[Any]] = Field(default={}, description="(Q,) values of each slice.")


class Detectable(_Plain):
    """What these queries can show at best: when nothing flips and nothing changes."""

    num_queries: int = Field(description="Queries with something to find.")
    num_identities: int = Field(description="Identities (clusters) among them.")
    smallest_cluster: int = Field(description="Queries of the smallest cluster.")
    largest_cluster: int = Field(description="Queries of the largest cluster.")
    shown_without_flips: float = Field(description="Bound of the NFR when nothing flips.")
    smallest_nfr: float = Field(
        description="Lowest bound of the NFR that any flips give: none, or so few and so scattered that they prove "
        "that identities are not lost as a whole. No lower limit can be shown."
    )
    smallest_loss_points: float = Field(description="Loss that is not excluded when nothing changes, in points.")
    identities_needed: int | None = Field(
        description="Fewest identities, with as many queries each, with which an update without flips passes `max_nfr`."
    )
    can_pass: bool = Field(description="Whether any update at all can pass the NFR guard and `min_identities`.")


class Truth(_Plain):
    """An update as it might truly be: shares of all queries, in every state that it serves."""

    name: str = Field(description="In words.")
    nfr: float = Field(ge=0, le=1, description="Share that is right today and would be wrong.")
    pfr: float = Field(ge=0, le=1, description="Share that is wrong today and would be right.")

    @property
    def gain_points(self) -> float:
        """What it truly wins."""
        return 100 * (self.pfr - self.nfr)


class Power(_Plain):
    """How often a true update would be decided how, and what its guards would come to."""

    truth: Truth = Field(description="What was simulated.")
    icc: float = Field(description="Likeness (intra-cluster correlation) of the queries of one identity.")
    num_draws: int = Field(description="Simulated evaluations.")
    joint: float = Field(description="Share of them in which all guards of some option pass: the update serves.")
    outcomes: dict[str, float] = Field(description="Share of each outcome.")
    guards: dict[str, float] = Field(description="Share in which each guard alone passes when all is re-embedded.")
    shown_nfr: float = Field(description="NFR limit that would be met in 80 % of them (the policy's `power`).")
    shown_loss_points: float = Field(description="Quality margin that would be met in 80 % of them, in points.")

    @property
    def bottleneck(self) -> str:
        """The guard that passes least often."""
        return min(self.guards, key=lambda guard: self.guards[guard])


class BestFraction(_Plain):
    """The fraction of best net value at an earlier update, and those that may be best as well."""

    fraction: float = Field(description="Best by the lower bound of the gain, as the gate chooses.")
    lowest: float = Field(description="Lowest fraction whose value may be as high.")
    highest: float = Field(description="Highest fraction whose value may be as high.")


def detectable(queries: Queries, policy: RolloutPolicy) -> Detectable:
    """What the queries can show at best, by the bounds that the gate takes."""
    clusters = np.asarray(queries.clusters)
    first, sizes = np.unique(clusters, return_index=True, return_counts=True)[1:]
    alpha = policy.alpha / NFR_FAMILIES
    bounds = []
    for flipped in (0, CLUSTERS_COUNT_ONCE, FEW_FLIPPED_CLUSTERS):  # where the likeness that is assumed at least falls
        flips = np.zeros(len(clusters), bool)
        flips[first[:flipped]] = True  # one in each of so many identities
        bounds.append(share_bounds(flips, clusters, alpha).upper)
    # No difference at all: the gate takes minus the exact bound of the losses, shared by all fractions.
    loss = share_bounds(np.zeros(len(clusters), bool), clusters, policy.alpha / len(policy.fractions)).upper
    needed = None
    if policy.nfr_limit is not None and len(sizes):
        needed = identities_for_nfr(policy.nfr_limit, sizes.tolist(), alpha)
    limit = 1.0 if policy.nfr_limit is None else policy.nfr_limit
    return Detectable(
        num_queries=len(clusters),
        num_identities=len(sizes),
        smallest_cluster=int(sizes.min(initial=len(clusters))),
        largest_cluster=int(sizes.max(initial=0)),
        shown_without_flips=bounds[0],
        smallest_nfr=min(bounds),
        smallest_loss_points=100 * loss,
        identities_needed=needed,
        can_pass=min(bounds) <= limit and len(sizes) >= policy.min_identities,
    )


def joint_power(
    queries: Queries,
    policy: RolloutPolicy,
    truth: Truth,
    *,
    icc: float = ICC_FLOOR,
    right: float = ASSUMED_RIGHT,
    num_draws: int | None = None,
    seed: int = 0,
) -> Power:
    """How often all guards would pass if an update were truly like this.

    Args:
        queries: clusters and slices of the evaluation set.
        policy: its limits; the bootstrap inside takes NUM_RESAMPLES at most.
        truth: shares of losses and wins, the same in every state; what a query does in two states is alike.
        icc: likeness of losses, and of wins, within a cluster: rates of clusters follow a beta distribution.
        right: share of the queries that are right today; moved as far as the truth needs it.
        num_draws: simulated evaluations, by default 20 to 60, fewer where there are many queries; the standard error
            of a power is at most 0.5 / sqrt(num_draws).
        seed: of the draws.
    """
    policy = policy.model_copy(update={"num_resamples": min(policy.num_resamples, NUM_RESAMPLES)})
    num_draws = num_draws or int(np.clip(100_000 / max(len(queries.clusters), 1), 20, 60))
    rng = np.random.default_rng(seed)
    right = float(np.clip(right, truth.nfr, 1 - truth.pfr))
    decided: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    uppers, losses = [], []
    for _ in range(num_draws):
        evidence = gather_evidence(_drawn(queries, policy, truth, icc, right, rng), policy, _QUESTION)
        decided[decide(evidence, policy).outcome] += 1
        full = full_option(evidence, policy)
        for guard in GUARDS:
            reasons = [reason for reason in full.reasons if reason.guard == guard]
            passed[guard] += all(reason.verdict == "PASS" for reason in reasons)
        state = _whole(evidence)
        uppers.append(1.0 if state.nfr_upper is None else state.nfr_upper)
        losses.append(math.inf if state.difference_lower is None else -state.difference_lower)
    serves = decided["COMPATIBLE_ROLLOUT"] + decided["FULL_BACKFILL"]
    return Power(
        truth=truth,
        icc=icc,
        num_draws=num_draws,
        joint=serves / num_draws,
        outcomes={name: count / num_draws for name, count in sorted(decided.items())},
        guards={guard: passed[guard] / num_draws for guard in GUARDS},
        shown_nfr=float(np.quantile(uppers, policy.power, method="higher")),
        shown_loss_points=100 * max(float(np.quantile(losses, policy.power, method="higher")), 0.0),
    )


def truths(policy: RolloutPolicy, gain_points: float, last: StateEvidence | None) -> list[Truth]:
    """The updates that are worth asking about; the second last is the one that is expected.

    Flips are half of what the policy allows. `last`: the fully re-embedded state of an earlier evaluation.
    """
    nfr = (policy.nfr_limit or 0.0) / 2
    found = [
        Truth(name="nothing changes at all", nfr=0.0, pfr=0.0),
        Truth(name="as good as today's, half of the allowed flips", nfr=nfr, pfr=nfr),
        expected_truth(policy, gain_points),
    ]
    if last is not None and last.nfr is not None and last.pfr is not None:
        found.append(Truth(name="like the last update that was judged", nfr=last.nfr, pfr=last.pfr))
    return found


def expected_truth(policy: RolloutPolicy, gain_points: float) -> Truth:
    """An update that wins what is expected and flips half of what is allowed."""
    nfr = (policy.nfr_limit or 0.0) / 2
    pfr = min(nfr + gain_points / 100, 1 - nfr)
    return Truth(name=f"{gain_points:g} points better, half of the allowed flips", nfr=nfr, pfr=max(pfr, 0.0))


def best_fraction(
    states: Sequence[StateEvidence], costs: Sequence[OptionCost], inputs: CostInputs
) -> BestFraction | None:
    """The best fraction by net value, with those whose value at the upper bound of the gain reaches its lower one.

    None where a price, a date or a bound is unavailable.
    """
    low: dict[float, float] = {}
    high: dict[float, float] = {}
    for cost in costs:
        state = next((s for s in states if s.scope == OVERALL and s.fraction == cost.fraction), None)
        if state is None or state.difference_lower is None or state.difference_upper is None:
            return None
        worst = net_value(inputs, cost, 100 * state.difference_lower)
        best = net_value(inputs, cost, 100 * state.difference_upper)
        if worst is None or best is None:
            return None
        low[cost.fraction], high[cost.fraction] = worst, best
    if not low:
        return None
    chosen = max(low, key=lambda fraction: low[fraction])
    as_good = [fraction for fraction in high if high[fraction] >= low[chosen]]
    return BestFraction(fraction=chosen, lowest=min(as_good), highest=max(as_good))


_QUESTION = Question(
    candidate="candidate", champion="champion", order="random", live_owners={"champion": 1.0}, wave_zero=()
)


def _whole(evidence: Evidence) -> StateEvidence:
    return next(state for state in evidence.states if state.scope == OVERALL and state.fraction == 1.0)


def _drawn(
    queries: Queries, policy: RolloutPolicy, truth: Truth, icc: float, right: float, rng: np.random.Generator
) -> Outcomes:
    """Outcomes of one evaluation of an update that is truly so: the gallery is the champion's."""
    names, code = np.unique(np.asarray(queries.clusters), return_inverse=True)
    num_queries = len(code)
    now = rng.random(num_queries) < right
    loss = _rates(truth.nfr / right if right else 0.0, icc, len(names), rng)[code]
    win = _rates(truth.pfr / (1 - right) if right < 1 else 0.0, icc, len(names), rng)[code]
    common = rng.standard_normal(num_queries)
    states = {SERVED: now, live_state("champion", "champion"): now}
    for fraction in policy.fractions:
        own = rng.standard_normal(num_queries)
        drawn = stats.norm.cdf(math.sqrt(LIKENESS) * common + math.sqrt(1 - LIKENESS) * own)
        states[fraction_state(fraction)] = np.where(now, drawn >= loss, drawn < win)
    states[live_state("candidate", "champion")] = states[fraction_state(policy.fractions[0])]
    states[pair_state("candidate", "candidate")] = states[fraction_state(policy.fractions[-1])]
    return Outcomes(
        query_ids=np.arange(num_queries).astype(np.str_),
        identities=queries.clusters,
        clusters=queries.clusters,
        slices=queries.slices,
        first_rank={state: np.where(hit, 1, policy.k + 1).astype(np.int32) for state, hit in states.items()},
        average_precision={state: hit.astype(np.float32) for state, hit in states.items()},
    )


def _rates(mean: float, icc: float, num_clusters: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A rate of each cluster, beta distributed about the mean so that queries of one cluster correlate by `icc`."""
    mean = min(mean, 1.0)
    if icc <= 0 or mean in (0.0, 1.0):
        return np.full(num_clusters, mean)
    if icc >= 1:
        return (rng.random(num_clusters) < mean).astype(np.float64)
    concentration = (1 - icc) / icc
    return rng.beta(mean * concentration, (1 - mean) * concentration, num_clusters)
