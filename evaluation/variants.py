"""The gate of a variant that only queries: may a small model search the rows that its generation serves?

Compatible heterogeneous visual search (Duggal et al., CVPR 2021, 2105.06047): a query model is worth having where
M(edge, cloud), its queries on the cloud model's vectors, is no worse than M(edge, edge), on a gallery of its own; the
gallery is then embedded by the cloud model alone. Here by the paired non-inferiority test of `evidence`, at the
policy's margin and level. What finds nothing anywhere is no worse than itself, so the bound of M(edge, cloud) must
lie above chance, too. Older generations' rows are judged as a candidate's are: against the cloud's queries on them.

A text tower has no gallery of its own, and its queries are not the cloud's: it is judged by its own labelled texts.
Three questions: does the lower bound of M(text, cloud) lie above chance; does it reach the least that the configuration
asks for, where it does; and is M(text, cloud) not inferior to what the tower that it takes the place of found with the
same texts, on the same items as the generation that it was made for had embedded them. An older generation's vectors
are judged by its own queries: on a gallery that this generation embedded, against the same items embedded by the cloud.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.certificates import certify, certify_clients, certify_pairs
from graceful.evaluation.evidence import CertificateEvidence
from graceful.evaluation.gathering import metric_lower
from graceful.evaluation.outcomes import Outcomes, measured, metric_values, pair_state
from graceful.evaluation.policy import RolloutPolicy


class VariantVerdict(BaseModel):
    """What was found about a variant. Not approved, it answers no queries; `reason` says why, in a sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    approved: bool
    reason: str
    cloud: str = Field(description="The generation that it queries for.")
    gate: CertificateEvidence | None = Field(
        description="Its queries on its generation's vectors, against those on its own; of a text tower against the "
        "tower that it takes the place of, None where there is none."
    )
    rows: tuple[CertificateEvidence, ...] = Field(
        description="Its queries on the rows that each other generation owns now, against its generation's on the "
        "same; of a text tower against its own on its generation's vectors of the same items."
    )

    @property
    def readable(self) -> tuple[str, ...]:
        """Generations whose vectors it may be scored against; none where it is not approved."""
        if not self.approved:
            return ()
        return (self.cloud, *(row.gallery_generation for row in self.rows if row.verdict == "PASS"))


def judge_variant(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    *,
    variant: str,
    cloud: str,
    live_owners: Mapping[str, float],
    chance: float | None,
) -> VariantVerdict:
    """Judge a variant of the generation `cloud` by the states pair/... and live/... of both.

    Args:
        outcomes: Those of every query; a state that is missing is judged UNKNOWN, which is not approved.
        policy: Margin, level and metric.
        variant: Who is judged.
        cloud: The generation that serves.
        live_owners: Share of the gallery that each generation owns in the cloud's view.
        chance: The metric of a model that knows nothing; None where it is not known.
    """
    (gate,) = certify_clients(outcomes, policy, [variant], candidate=cloud)
    others = {owner: share for owner, share in live_owners.items() if owner != cloud}
    rows = certify(outcomes, policy, live_owners=others, candidate=variant, champion=cloud)
    lower = metric_lower(outcomes, policy, pair_state(variant, cloud))
    least = gate.value if lower is None else lower  # mAP has no bound of its own
    found = (
        f"{_percent(gate.value)} on the vectors of {cloud}, {_percent(gate.baseline)} on its own: "
        f"{_points(gate.difference)} points, at least {_points(gate.difference_lower)}"
    )
    margin = policy.quality_margin_points
    if margin is None:
        why = "the policy states no quality_margin_points"
    elif gate.num_clusters < policy.min_identities:
        why = f"the queries come from {gate.num_clusters} identities, at least {policy.min_identities} are needed"
    elif gate.verdict != "PASS":
        word = "is" if gate.verdict == "FAIL" else "may be"
        why = f"it {word} worse by more than the margin of {margin:g} points"
    elif least is None or (chance is not None and least <= chance):
        why = f"at least {_percent(least)} is not above the {_percent(chance)} of a model that knows nothing"
    else:
        reason = f"approved: {found} (margin {margin:g})"
        return VariantVerdict(approved=True, reason=reason, cloud=cloud, gate=gate, rows=rows)
    return VariantVerdict(approved=False, reason=f"not approved: {found}; {why}", cloud=cloud, gate=gate, rows=rows)


def judge_text_tower(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    *,
    variant: str,
    cloud: str,
    live_owners: Mapping[str, float],
    chance: float | None,
    min_quality_points: float | None = None,
    replaced: tuple[str, str] | None = None,
) -> VariantVerdict:
    """Judge a text tower of the generation `cloud` by the states pair/... of its labelled texts.

    Args:
        outcomes: Those of every labelled text; a state that is missing is judged UNKNOWN, which is not approved.
        policy: Margin, level and metric.
        variant: Who is judged.
        cloud: The generation that serves.
        live_owners: Share of the gallery that each generation owns in the cloud's view.
        chance: The metric of a model that knows nothing; None where it is not known.
        min_quality_points: What the lower bound must reach besides, in points.
        replaced: The tower that answers now and the generation that it is of; None where there is none.
    """
    state = pair_state(variant, cloud)
    rows = _rows_of_text(outcomes, policy, variant, cloud, live_owners, chance)
    value = metrics_on(outcomes, policy, variant, [cloud]).get(cloud)
    least = _least(outcomes, policy, state)
    found = f"{_percent(value)} of the texts on the vectors of {cloud}, at least {_percent(least)}"
    gate, why, margin = None, None, policy.quality_margin_points
    if replaced is not None:
        (gate,) = certify_pairs(outcomes, policy, [(variant, cloud, 1.0)], [(pair_state(*replaced), state)])
        found += (
            f"; {replaced[0]}, which it takes the place of, found {_percent(gate.baseline)}: "
            f"{_points(gate.difference)} points, at least {_points(gate.difference_lower)}"
        )
    counted = measured(outcomes, state)
    num_clusters = len(set(outcomes.clusters[counted].tolist()))
    if not counted.all():
        found += f" ({int((~counted).sum()):,} of {len(outcomes):,} texts have no item of their label to find)"
    if num_clusters < policy.min_identities:
        why = f"the texts come from {num_clusters} identities, at least {policy.min_identities} are needed"
    elif least is None or chance is None or least <= chance:
        why = f"at least {_percent(least)} is not above the {_percent(chance)} of a model that knows nothing"
    elif min_quality_points is not None and 100 * least < min_quality_points:
        why = f"at least {_percent(least)} is below the {min_quality_points:g} % that are asked for"
    elif gate is not None and margin is None:
        why = "the policy states no quality_margin_points"
    elif gate is not None and gate.verdict != "PASS":
        why = f"it {'is' if gate.verdict == 'FAIL' else 'may be'} worse by more than the margin of {margin:g} points"
    reason = f"approved: {found}" if why is None else f"not approved: {found}; {why}"
    return VariantVerdict(approved=why is None, reason=reason, cloud=cloud, gate=gate, rows=rows)


def _rows_of_text(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    variant: str,
    cloud: str,
    live_owners: Mapping[str, float],
    chance: float | None,
) -> tuple[CertificateEvidence, ...]:
    """Each other owner's vectors against the cloud's of the same items. What is no better than chance does not pass."""
    owners = [owner for owner in live_owners if owner != cloud]
    own = pair_state(variant, cloud)
    found = certify_pairs(
        outcomes,
        policy,
        [(variant, owner, float(live_owners[owner])) for owner in owners],
        [(own, pair_state(variant, owner)) for owner in owners],
    )

    def is_above_chance(owner: str) -> bool:
        least = _least(outcomes, policy, pair_state(variant, owner))
        return least is not None and chance is not None and least > chance

    return tuple(
        row if row.verdict != "PASS" or is_above_chance(row.gallery_generation)
        else row.model_copy(update={"verdict": "UNKNOWN"})
        for row in found
    )  # fmt: skip


def _least(outcomes: Outcomes, policy: RolloutPolicy, state: str) -> float | None:
    """The lower bound of the metric in a state; under mAP, which has none of its own, its value."""
    if not measured(outcomes, state).any():
        return None
    lower = metric_lower(outcomes, policy, state)
    return float(np.nanmean(metric_values(outcomes, state, policy.metric, policy.k))) if lower is None else lower


def metrics_on(outcomes: Outcomes, policy: RolloutPolicy, query: str, galleries: list[str]) -> dict[str, float]:
    """Metric of a query generation on a gallery of each generation's vectors, as far as it was measured."""
    found = {}
    for gallery in galleries:
        state = pair_state(query, gallery)
        if state in outcomes.first_rank:
            values = metric_values(outcomes, state, policy.metric, policy.k)
            if np.isfinite(values).any():
                found[gallery] = round(float(np.nanmean(values)), 6)
    return found


def _percent(value: float | None) -> str:
    return "nothing measurable" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:+.2f}"
