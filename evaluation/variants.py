"""The gate of a variant that only queries: may a small model search the rows that its generation serves?

Compatible heterogeneous visual search (Duggal et al., CVPR 2021, 2105.06047): a query model is worth having where
M(edge, cloud), its queries on the cloud model's vectors, is no worse than M(edge, edge), on a gallery of its own; the
gallery is then embedded by the cloud model alone. Here by the paired non-inferiority test of `evidence`, at the
policy's margin and level. What finds nothing anywhere is no worse than itself, so the bound of M(edge, cloud) must
lie above chance, too. Older generations' rows are judged as a candidate's are: against the cloud's queries on them.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.evidence import CertificateEvidence, certify, certify_clients, metric_lower
from graceful.evaluation.outcomes import Outcomes, metric_values, pair_state
from graceful.evaluation.policy import RolloutPolicy


class VariantVerdict(BaseModel):
    """What was found about a variant. Not approved, it answers no queries; `reason` says why, in a sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    approved: bool
    reason: str
    gate: CertificateEvidence = Field(description="Its queries on its generation's vectors, against those on its own.")
    rows: tuple[CertificateEvidence, ...] = Field(
        description="Its queries on the rows that each other generation owns now, against its generation's on the same."
    )

    @property
    def readable(self) -> tuple[str, ...]:
        """Generations whose vectors it may be scored against; none where it is not approved."""
        if not self.approved:
            return ()
        return (self.gate.gallery_generation, *(row.gallery_generation for row in self.rows if row.verdict == "PASS"))


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
        return VariantVerdict(approved=True, reason=f"approved: {found} (margin {margin:g})", gate=gate, rows=rows)
    return VariantVerdict(approved=False, reason=f"not approved: {found}; {why}", gate=gate, rows=rows)


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
