"""What users of the scores and of the clusters see of an update, beside the ranks: measured per state, bounded.

Arrays come in (`Consumed`), stored beside the outcomes, so that the same evaluation can be judged under other limits.
No embedding comes here.

Shapes: N items of the evaluation gallery.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.clustering import (
    NOBODY,
    b_cubed,
    changed_person,
    churn,
    keep_names,
    pairwise_agreement,
    renamed,
    variation_of_information,
)
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import SERVED
from graceful.evaluation.policy import Consumer, RolloutPolicy
from graceful.evaluation.slices import DiscoveredSlice
from graceful.evaluation.thresholds import Pairs, false_accepts, false_rejects, recalibrate

UNREADABLE = ""
"""Owner of a row that cannot be read."""


@dataclass(frozen=True)
class Clusterings:
    """Clusters of the evaluation gallery in each state: `labels` maps a state to (N,) text, "" for nobody.

    `identities` (N,): who is really on the photo, "" where that is not known.
    """

    item_ids: NDArray[Any]
    identities: NDArray[Any]
    labels: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        for name, values in {"identities": self.identities, **self.labels}.items():
            if np.shape(values) != np.shape(self.item_ids):
                raise ValueError(
                    f"building clusterings: expected {name} of shape {np.shape(self.item_ids)} like item_ids, found "
                    f"{np.shape(values)}; one entry per item"
                )


@dataclass(frozen=True)
class Consumed:
    """What was measured for consumers; None: was not asked for."""

    clusterings: Clusterings | None = None
    scores: ScoreSample | None = None


@dataclass(frozen=True)
class ScoreSample:
    """Scores of P pairs of a query and a row of the evaluation gallery, the same pairs in every generation.

    `genuine` (P,): of one identity. All genuine pairs and equally many impostors of each query are in it, drawn at
    random. `query_groups`, `row_groups` (P,) int: what pairs are alike in. `rows` (P,): place of the row in `owners`.
    `scores` maps (query generation, gallery generation) to (P,); `owners` a mixed state to (N,) text, "" unreadable.
    """

    genuine: NDArray[np.bool_]
    query_groups: NDArray[np.int64]
    row_groups: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: Mapping[tuple[str, str], NDArray[np.float32]]
    owners: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        columns: dict[str, NDArray[Any]] = {
            "query_groups": self.query_groups,
            "row_groups": self.row_groups,
            "rows": self.rows,
        }
        columns |= {f"scores[{pair!r}]": values for pair, values in self.scores.items()}
        for name, values in columns.items():
            if np.shape(values) != np.shape(self.genuine):
                raise ValueError(
                    f"building a sample of scores: expected {name} of shape {np.shape(self.genuine)} like genuine, "
                    f"found {np.shape(values)}; one entry per pair"
                )

    def pairs(self, scores: NDArray[np.float32], chosen: NDArray[np.bool_]) -> Pairs:
        """Some of the pairs with the scores (P,) that they have somewhere."""
        return Pairs(scores[chosen], self.query_groups[chosen], self.row_groups[chosen])


class ThresholdEvidence(BaseModel):
    """One consumer's threshold with queries of one generation: on the rows of one generation, or in a mixed state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consumer: str = Field(description="Who uses it.")
    query_generation: str = Field(description="Whose queries.")
    gallery_generation: str | None = Field(default=None, description="Whose vectors; None: those of a mixed state.")
    state: str | None = Field(default=None, description="Name of the mixed state; None: rows of one generation alone.")
    fraction: float | None = Field(default=None, description="Fraction of the gallery re-embedded in it.")
    thresholds: dict[str, float | None] = Field(
        description="Threshold by the generation whose vector is read; None: none can be shown to keep the limit."
    )
    far: float | None = Field(description="Share of the impostor pairs that are accepted.")
    far_lower: float | None = Field(description="Lower bound; identities of both sides respected.")
    far_upper: float | None = Field(description="Upper bound.")
    frr: float | None = Field(description="Share of the genuine pairs that are not accepted.")
    frr_lower: float | None = Field(description="Lower bound.")
    frr_upper: float | None = Field(description="Upper bound.")
    num_impostors: int = Field(description="Impostor pairs.")
    num_genuine: int = Field(description="Genuine pairs.")


class ThresholdToServe(BaseModel):
    """The threshold of a consumer for hits of queries of one generation that were found by vectors of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consumer: str = Field(description="Who uses it.")
    query_generation: str = Field(description="Whose queries.")
    gallery_generation: str = Field(description="Whose vectors.")
    threshold: float = Field(description="Accepted is a score of at least so much.")


@dataclass(frozen=True)
class Reads:
    """Who would query and whose vectors may be read, as the certificates have it.

    `before`: who serves now and the owners of its rows; `served` maps a consumer to the thresholds in use now, by
    owner. `after`: the candidate and the owners that it may read, itself among them. `clients`: pairs of older clients
    with the candidate.
    """

    candidate: str
    after: tuple[str, ...]
    champion: str | None = None
    before: tuple[str, ...] = ()
    clients: tuple[tuple[str, str], ...] = ()
    served: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class ClusterEvidence(BaseModel):
    """The clusters of one state against those of what is served now, and against who is really on the photos.

    A photo changes person when it has a person now and another one, or none, in the state, names being kept as
    `clustering.keep_names` keeps them. A repaired cluster changes persons too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(description="Fraction of the gallery re-embedded.")
    state: str = Field(description="Name of the state.")
    num_items: int = Field(description="Photos that have a person in what is served now.")
    changed: float | None = Field(description="Share of them that changes person.")
    changed_lower: float | None = Field(description="Lower bound, identities respected.")
    changed_upper: float | None = Field(description="Upper bound, identities respected.")
    design_effect: float | None = Field(description="num_items / effective sample of the bounds.")
    num_split: int = Field(description="People whose photos lie in several clusters, at least two photos in each.")
    num_merged: int = Field(description="Clusters that hold photos of several people, at least two of each.")
    num_gone: int = Field(description="Names that nobody bears any more.")
    variation_of_information: float = Field(description="Distance of both clusterings in nats.")
    pairwise_f_served: float | None = Field(description="Pairwise F of what is served now against the identities.")
    pairwise_f: float | None = Field(description="The same of the state.")
    b_cubed_f_served: float | None = Field(description="B-cubed F of what is served now against the identities.")
    b_cubed_f: float | None = Field(description="The same of the state.")


class GoldenEvidence(BaseModel):
    """Golden queries in one state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(description="Fraction of the gallery re-embedded.")
    state: str = Field(description="Name of the state.")
    num_right: int = Field(description="Golden queries that are right now.")
    flips: tuple[str, ...] = Field(description="Those of them that are wrong in the state, by name.")


class ConsumerEvidence(BaseModel):
    """All that consumers' guards read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: tuple[ClusterEvidence, ...] = Field(default=(), description="One per fraction that was clustered.")
    thresholds: tuple[ThresholdEvidence, ...] = Field(
        default=(), description="Per consumer: every certified pair of generations, what is served now, each fraction."
    )
    golden: tuple[GoldenEvidence, ...] = Field(default=(), description="One per fraction, where there are any.")
    discovered: tuple[DiscoveredSlice, ...] = Field(
        default=(), description="Slices that lose more than the rest; a warning, which decides nothing."
    )
    slices_tested: int = Field(default=0, description="Slices that were tested for it, in each state.")
    slices_left_out: int = Field(default=0, description="Pairs of slice values that were too many to look at.")
    missing: tuple[str, ...] = Field(default=(), description="What the policy asks for and was not measured.")


def gather_consumers(
    consumed: Consumed, policy: RolloutPolicy, reads: Reads, way: Mapping[float, str], *, alpha: float
) -> ConsumerEvidence:
    """Bounds for every state on the way (fraction -> state), each side at `alpha`. Pure."""
    clusters = _clusters(consumed.clusterings, way, alpha)
    missing = []
    if policy.max_cluster_churn is not None:
        found = {item.fraction for item in clusters}
        missing += [f"clusters: state {way[fraction]!r}" for fraction in way if fraction not in found]
    thresholds: list[ThresholdEvidence] = []
    if policy.thresholds and consumed.scores is None:
        missing.append(f"scores for the thresholds of {', '.join(policy.thresholds)}")
    elif consumed.scores is not None:
        for name, consumer in policy.thresholds.items():
            found_here = _thresholds(consumed.scores, name, consumer, reads, way, alpha)
            states = {item.state for item in found_here}
            missing += [f"threshold {name}: state {state!r}" for state in way.values() if state not in states]
            thresholds += found_here
    return ConsumerEvidence(clusters=clusters, thresholds=tuple(thresholds), missing=tuple(missing))


def thresholds_to_serve(evidence: ConsumerEvidence, queries: Collection[str]) -> tuple[ThresholdToServe, ...]:
    """Thresholds of the certified pairs of these query generations, where there is one."""
    return tuple(
        ThresholdToServe(
            consumer=item.consumer,
            query_generation=item.query_generation,
            gallery_generation=owner,
            threshold=threshold,
        )
        for item in evidence.thresholds
        if item.state is None and item.query_generation in queries
        for owner, threshold in item.thresholds.items()
        if threshold is not None
    )


def _thresholds(
    sample: ScoreSample, name: str, consumer: Consumer, reads: Reads, way: Mapping[float, str], alpha: float
) -> list[ThresholdEvidence]:
    """One consumer: the pairs of generations first, then what is served now, then each state on the way."""
    now = {owner: reads.served.get(name, {}).get(owner, consumer.threshold) for owner in reads.before}
    then = {owner: _threshold_for(sample, consumer, (reads.candidate, owner), alpha) for owner in reads.after}
    pairs: list[tuple[str, str, float | None]] = []
    if reads.champion is not None:
        pairs += [(reads.champion, owner, threshold) for owner, threshold in now.items()]
    pairs += [(reads.candidate, owner, threshold) for owner, threshold in then.items()]
    pairs += [(query, owner, _threshold_for(sample, consumer, (query, owner), alpha)) for query, owner in reads.clients]
    found = [
        _pair_rates(sample, name, query, owner, threshold, alpha)
        for query, owner, threshold in pairs
        if (query, owner) in sample.scores
    ]
    states: list[tuple[float | None, str, str, Mapping[str, float | None]]] = []
    if reads.champion is not None:
        states.append((None, SERVED, reads.champion, now))
    states += [(fraction, state, reads.candidate, then) for fraction, state in way.items()]
    for fraction, state, query, thresholds in states:
        item = _state_rates(sample, name, query, state, fraction, thresholds, alpha)
        found += [] if item is None else [item]
    return found


def _threshold_for(sample: ScoreSample, consumer: Consumer, pair: tuple[str, str], alpha: float) -> float | None:
    """What would be served for a pair of generations: the threshold as it is, or the one that keeps the limit."""
    if consumer.on_shift == "fail":
        return consumer.threshold
    if pair not in sample.scores:
        return None
    chosen = sample.genuine if consumer.guards == "FRR" else ~sample.genuine
    return recalibrate(sample.pairs(sample.scores[pair], chosen), consumer.guards, consumer.limit, alpha)


def _pair_rates(
    sample: ScoreSample, name: str, query: str, owner: str, threshold: float | None, alpha: float
) -> ThresholdEvidence:
    scores = sample.scores[query, owner]
    each = None if threshold is None else np.full(len(scores), threshold)
    everywhere = np.ones(len(scores), np.bool_)
    return ThresholdEvidence(
        consumer=name,
        query_generation=query,
        gallery_generation=owner,
        thresholds={owner: threshold},
        **_rates(sample, scores, each, everywhere, alpha),
    )


def _state_rates(
    sample: ScoreSample,
    name: str,
    query: str,
    state: str,
    fraction: float | None,
    thresholds: Mapping[str, float | None],
    alpha: float,
) -> ThresholdEvidence | None:
    """Rates in a mixed state, every pair at the threshold of the generation that owns its row; None: not measured.

    A row that cannot be read is no pair: it is neither accepted nor rejected.
    """
    if state not in sample.owners:
        return None
    owner_of = _text(sample.owners[state])[sample.rows]
    owning = sorted(set(_text(sample.owners[state]).tolist()) - {UNREADABLE})
    if any((query, owner) not in sample.scores for owner in owning):
        return None
    scores, each = np.full(len(owner_of), np.nan, np.float32), np.full(len(owner_of), np.nan)
    for owner in owning:
        mine, threshold = owner_of == owner, thresholds.get(owner)
        scores[mine] = sample.scores[query, owner][mine]
        each[mine] = np.nan if threshold is None else threshold
    readable = owner_of != UNREADABLE
    known = not np.isnan(each[readable]).any()
    return ThresholdEvidence(
        consumer=name,
        query_generation=query,
        state=state,
        fraction=fraction,
        thresholds={owner: thresholds.get(owner) for owner in owning},
        **_rates(sample, scores, each if known else None, readable, alpha),
    )


def _rates(
    sample: ScoreSample,
    scores: NDArray[np.float32],
    thresholds: NDArray[np.float64] | None,
    chosen: NDArray[np.bool_],
    alpha: float,
) -> dict[str, Any]:
    """FAR and FRR of the chosen pairs (P,), each at its own threshold; None where there is no threshold or no pair."""
    numbers: dict[str, Any] = {}
    for key, inside, count in (
        ("far", chosen & ~sample.genuine, "num_impostors"),
        ("frr", chosen & sample.genuine, "num_genuine"),
    ):
        numbers[count] = int(inside.sum())
        rate = None
        if thresholds is not None and inside.any():
            measure = false_accepts if key == "far" else false_rejects
            rate = measure(sample.pairs(scores, inside), thresholds[inside], alpha)
        numbers[key] = None if rate is None else rate.value
        numbers[f"{key}_lower"] = None if rate is None else rate.lower
        numbers[f"{key}_upper"] = None if rate is None else rate.upper
    return numbers


def compare_clusters(clusterings: Clusterings, fraction: float, state: str, alpha: float) -> ClusterEvidence:
    """One state's clusters against those of what is served now.

    The share of photos that change person is bounded by identity (`share_bounds`): photos of one person move together.
    A photo of unknown identity is a group of its own, and takes no part in the agreement with the identities.
    """
    served = _text(clusterings.labels[SERVED])
    names = keep_names(served, clusterings.labels[state], new_names=_new_names(served, clusterings.labels[state]))
    after = renamed(clusterings.labels[state], names)
    had = served != NOBODY
    identities = _text(clusterings.identities)
    groups = np.where(identities == "", np.char.add("item ", _text(clusterings.item_ids)), identities)
    bounds = share_bounds(changed_person(served, after)[had], groups[had], alpha)
    seen, known = churn(served, after), identities != ""
    return ClusterEvidence(
        fraction=fraction,
        state=state,
        num_items=seen.num_items,
        changed=_finite(bounds.value),
        changed_lower=bounds.lower if seen.num_items else None,
        changed_upper=bounds.upper if seen.num_items else None,
        design_effect=bounds.num_queries / bounds.effective_n if seen.num_items else None,
        num_split=len(seen.split),
        num_merged=len(seen.merged),
        num_gone=len(seen.gone),
        variation_of_information=variation_of_information(served, after),
        pairwise_f_served=_finite(pairwise_agreement(identities[known], served[known]).f),
        pairwise_f=_finite(pairwise_agreement(identities[known], after[known]).f),
        b_cubed_f_served=_finite(b_cubed(identities[known], served[known]).f),
        b_cubed_f=_finite(b_cubed(identities[known], after[known]).f),
    )


def _clusters(clusterings: Clusterings | None, way: Mapping[float, str], alpha: float) -> tuple[ClusterEvidence, ...]:
    if clusterings is None or SERVED not in clusterings.labels:
        return ()
    found: list[ClusterEvidence] = []
    for fraction, state in way.items():
        if state in clusterings.labels:
            found.append(compare_clusters(clusterings, fraction, state, alpha))
    return tuple(found)


def _new_names(before: NDArray[Any], after: NDArray[Any]) -> Sequence[str]:
    """Names that nobody bears yet, enough for every cluster."""
    taken, wanted = set(before.tolist()), len(set(np.asarray(after).tolist()))
    fresh = (f"new {number}" for number in range(1, wanted + len(taken) + 1))
    return [name for name in fresh if name not in taken][:wanted]


def _text(values: Any) -> NDArray[Any]:
    return np.asarray(values).astype(np.str_)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
