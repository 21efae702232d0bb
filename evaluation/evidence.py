"""What the decision is made from: bounds for every state that would really be served, against what is served now.

`Question` is what is asked of per-query outcomes, `Evidence` what they answer (`evaluation.gathering`): JSON that holds
all that `evaluation.decision.decide` reads; a number that was not measured is None, never 0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.consumers import ConsumerEvidence
from graceful.evaluation.cost import CostInputs, OptionCost
from graceful.evaluation.outcomes import Metric
from graceful.evaluation.policy import Verdict
from graceful.evaluation.spending import Look

OVERALL = "overall"
NFR_FAMILIES = 2  # ways to be wrong that share alpha: a rollout along its way, and a full backfill


class PairedDifference(BaseModel):
    """A metric against a baseline, query by query, with one-sided bounds that respect clusters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_queries: int = Field(
        description="Queries compared: those measurable in the baseline, and the settled beginning of a query log."
    )
    num_clusters: int = Field(description="Clusters among them.")
    num_log_queries: int = Field(default=0, description="Those of a query log among them.")
    value: float | None = Field(description="Metric of what is judged, over the queries with an identity.")
    baseline: float | None = Field(description="Metric of what it is compared with, over the same.")
    difference: float | None = Field(
        description="Mean paired difference of all queries compared; without a query log it is value - baseline."
    )
    difference_lower: float | None = Field(description="Lower bound, simultaneous over the fractions; None: no bound.")
    difference_upper: float | None = Field(description="Upper bound, simultaneous over the fractions; None: no bound.")
    difference_sd: float | None = Field(description="Standard deviation of the paired difference of one query.")
    difference_design_effect: float | None = Field(description="Variance of the difference against no clusters.")


class StateEvidence(PairedDifference):
    """One state that would be served, against what is served now, within one scope (overall or a slice)."""

    scope: str = Field(description="'overall' or 'slice=value'.")
    fraction: float = Field(description="Fraction of the gallery re-embedded.")
    state: str = Field(description="Name of the state.")
    num_lost: int = Field(description="Queries whose relevant rows cannot be read in this state: counted as wrong.")
    num_without_baseline: int = Field(description="Queries measurable in this state alone: left out.")
    band_critical: float | None = Field(description="Critical value of the simultaneous band.")
    nfr: float | None = Field(description="Share of queries right now and wrong in this state.")
    nfr_lower: float | None = Field(description="Exact lower bound of the NFR, clusters respected.")
    nfr_upper: float | None = Field(description="Exact upper bound of the NFR, clusters respected.")
    nfr_design_effect: float | None = Field(description="num_queries / effective sample of the NFR bounds.")
    nfr_icc: float | None = Field(description="Intra-cluster correlation of the flips as estimated, with no floor.")
    num_flipped_clusters: int = Field(description="Clusters that hold a flip.")
    cluster_square: float | None = Field(description="Mean of the squared number of queries per cluster.")
    pfr: float | None = Field(description="Share of queries wrong now and right in this state.")
    flips_per_repair: float | None = Field(
        default=None, description="Queries that break for each one that is repaired, NFR / PFR; None: none is repaired."
    )
    flips_per_repair_lower: float | None = Field(default=None, description="Its lower bound, clusters respected.")
    flips_per_repair_upper: float | None = Field(default=None, description="Its upper bound; None: no bound.")
    nfr_over_noise: float | None = Field(
        default=None, description="NFR as a multiple of the policy's noise_floor; None: that was not given."
    )
    cumulative_nfr: float | None = Field(
        default=None,
        description="Share of queries that the anchor had right in a gallery of its own and that are wrong in this "
        "state; None: no anchor.",
    )
    cumulative_nfr_lower: float | None = Field(default=None, description="Its exact lower bound, clusters respected.")
    cumulative_nfr_upper: float | None = Field(default=None, description="Its exact upper bound, clusters respected.")
    mcnemar_p: float | None = Field(description="Exact McNemar p-value: any systematic change. Reported, no guard.")


class CertificateEvidence(PairedDifference):
    """Whether queries of one generation may be scored against vectors of another.

    For the candidate: live/<candidate>/<owner> not inferior to live/<champion>/<owner>, on the rows that the owner owns
    now. For an old client: pair/<client>/<candidate> not inferior to pair/<client>/<client>.
    """

    query_generation: str = Field(description="The candidate, or an old client's.")
    gallery_generation: str = Field(description="The generation whose vectors are read.")
    share: float = Field(description="Share of the gallery's rows that it owns; 1 for an old client.")
    verdict: Verdict = Field(description="UNKNOWN counts as not issued, like FAIL.")


class Evidence(BaseModel):
    """Everything that the decision reads. The policy stands beside it; bounds hold for the stated alpha, metric, k."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    candidate: str = Field(description="The generation that is judged.")
    champion: str | None = Field(description="The generation that serves now; None for the first.")
    is_first_generation: bool = Field(description="Whether the lineage is empty: nothing to compare with.")
    order: str = Field(description="Order in which the gallery would be re-embedded.")
    alpha: float = Field(description="Error level for which the bounds were taken: the policy's, or this look's part.")
    look: Look | None = Field(default=None, description="What part of the error level this judgement uses; None: all.")
    anchor: str | None = Field(default=None, description="The generation that cumulative flips are counted from.")
    metric: Metric = Field(description="Metric of values and differences.")
    k: int = Field(description="Depth at which a query is right.")
    quality_margin_points: float | None = Field(description="Margin by which the certificates were judged.")
    num_queries: int = Field(description="Queries of the evaluation set.")
    self_test: float | None = Field(description="Metric of the candidate on its own gallery; None = not measured.")
    states: tuple[StateEvidence, ...] = Field(default=(), description="One per scope and fraction.")
    certificates: tuple[CertificateEvidence, ...] = Field(default=(), description="One per live owner.")
    clients: tuple[CertificateEvidence, ...] = Field(
        default=(), description="One per older generation whose clients still query: may it read the candidate's rows?"
    )
    live_owners: dict[str, float] = Field(default_factory=dict, description="Share of rows per live generation.")
    wave_zero_generations: tuple[str, ...] = Field(default=(), description="Live owners without a certificate.")
    wave_zero_share: float = Field(default=0.0, description="Share of the gallery that they own.")
    hoped_wave_zero: tuple[str, ...] | None = Field(
        default=None, description="The same if every certificate that is still open passes; None: nothing is open."
    )
    hoped_states: tuple[StateEvidence, ...] = Field(
        default=(), description="The states of that way, where they were measured. No rollout is decided from them."
    )
    unreadable_share: float = Field(default=0.0, description="Share of the gallery nobody can read now.")
    near_copy_share: float | None = Field(
        default=None, description="Share of the queries with a near copy in the gallery; None: not known."
    )
    self_test_lower: float | None = Field(
        default=None, description="Lower bound of the self-test at alpha, clusters respected; None under mAP."
    )
    chance: float | None = Field(default=None, description="Self-test that a model which knows nothing would reach.")
    cost_inputs: CostInputs | None = Field(default=None, description="What is known about cost; None = nothing.")
    costs: tuple[OptionCost, ...] = Field(default=(), description="Cost of each fraction.")
    consumers: ConsumerEvidence = Field(
        default=ConsumerEvidence(), description="What users of scores and clusters would see, where it is judged."
    )
    missing: tuple[str, ...] = Field(default=(), description="What should have been measured and was not.")


class Question(BaseModel):
    """What is asked of the outcomes: who is judged against whom, and what the gallery looked like.

    Stored beside the outcomes, so that the same question can be put to them again under another policy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    candidate: str = Field(description="The generation that is judged.")
    champion: str | None = Field(description="The generation that serves; None in an empty lineage.")
    order: str = Field(description="Order in which a partial re-index would embed.")
    live_owners: dict[str, float] = Field(
        default={}, description="Each generation that owns rows of today's view, with its share of the gallery."
    )
    unreadable_share: float | None = Field(
        default=None, description="Share that nobody can read; by default what the live owners leave to 1."
    )
    clients: tuple[str, ...] = Field(default=(), description="Older generations that still query.")
    near_copy_share: float | None = Field(
        default=None, description="Share of the queries with a near copy in the gallery; None: not known."
    )
    chance: float | None = Field(default=None, description="Self-test that a model which knows nothing would reach.")
    wave_zero: tuple[str, ...] | None = Field(
        default=None,
        description="Owners whose rows are re-embedded already in the states fraction/<f>; None: those that the policy "
        "decides.",
    )
    cost: CostInputs | None = Field(default=None, description="What a backfill would take, where it was measured.")
    thresholds: dict[str, dict[str, float]] = Field(
        default={}, description="Thresholds that are served now: consumer, then generation of the hit's vector."
    )
    anchor: str | None = Field(
        default=None, description="The older generation that flips are counted from as well, in a gallery of its own."
    )
    look: Look | None = Field(
        default=None, description="What part of the policy's error level may be used; None: all of it."
    )
