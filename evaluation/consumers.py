"""What users of the scores and of the clusters see of an update, beside the ranks: measured per state, bounded.

Arrays come in (`Consumed`), stored beside the outcomes, so that the same evaluation can be judged under other limits.
No embedding comes here.

Shapes: N items of the evaluation gallery.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from graceful.evaluation.policy import RolloutPolicy


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


class ConsumerEvidence(BaseModel):
    """All that consumers' guards read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clusters: tuple[ClusterEvidence, ...] = Field(default=(), description="One per fraction that was clustered.")
    missing: tuple[str, ...] = Field(default=(), description="What the policy asks for and was not measured.")


def gather_consumers(
    consumed: Consumed, policy: RolloutPolicy, way: Mapping[float, str], *, alpha: float
) -> ConsumerEvidence:
    """Bounds for every state on the way (fraction -> state), each side at `alpha`. Pure."""
    clusters = _clusters(consumed.clusterings, way, alpha)
    missing = []
    if policy.max_cluster_churn is not None:
        found = {item.fraction for item in clusters}
        missing += [f"clusters: state {way[fraction]!r}" for fraction in way if fraction not in found]
    return ConsumerEvidence(clusters=clusters, missing=tuple(missing))


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
