"""The limits of an update, written down before it is measured, and how a bound is judged against a limit.

A guard is PASS when its bound is on the good side of the limit, FAIL when the opposite bound is on the bad side, and
UNKNOWN otherwise. A number that was not measured is never PASS.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from graceful.evaluation.outcomes import Metric

Verdict = Literal["PASS", "FAIL", "UNKNOWN"]


def _rising_from_0_to_1(fractions: tuple[float, ...]) -> tuple[float, ...]:
    if len(fractions) < 2 or fractions[0] != 0 or fractions[-1] != 1 or any(np.diff(fractions) <= 0):
        raise ValueError(f"expected fractions that rise from 0 to 1, found {fractions}")
    return fractions


class Consumer(BaseModel):
    """Somebody who accepts a pair of images when its score is at least a threshold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(ge=-1, le=1, description="The threshold in use, of the generation that serves.")
    guards: Literal["FAR", "FRR"] = Field(
        description="What it is to keep: FAR, the share of pairs of different identities that are accepted; FRR, the "
        "share of pairs of one identity that are not."
    )
    limit: float = Field(gt=0, lt=1, description="Largest share of it.")
    other_limit: float | None = Field(
        default=None, gt=0, lt=1, description="Largest share of the other one, at the threshold that is served then."
    )
    on_shift: Literal["recalibrate", "fail"] = Field(
        default="recalibrate",
        description="recalibrate: an update serves the threshold that keeps the limit, one for each generation whose "
        "vectors are read; fail: the threshold stays, and the limit must hold with it.",
    )


class RolloutPolicy(BaseModel):
    """The limits of an update, written down before it is measured. A limit of None is missing: the decision holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="One-sided error level of every guard, over all candidates judged on the same identities.",
    )
    alpha_spending: Literal["group_sequential", "none"] = Field(
        default="group_sequential",
        description="group_sequential: candidates judged on the same evaluation identities share alpha; none: each has "
        "the whole, and bad ones add up.",
    )
    planned_updates: int = Field(
        default=4,
        ge=1,
        description="Candidates over which half of alpha is spent; the next as many have a sixth, and it never ends.",
    )
    metric: Metric = Field(default="recall@k", description="Metric of the quality and dip guards.")
    k: int = Field(default=1, ge=1, description="A query is right when a relevant item is among the first k.")
    quality_margin_points: float | None = Field(
        default=0.5,
        ge=0,
        le=100,
        description="Points of the metric that a served state may lose against what is served now.",
    )
    max_nfr: float | None = Field(
        default=0.02, gt=0, lt=1, description="Largest share of queries that may be right now and wrong afterwards."
    )
    max_nfr_by_severity: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default={},
        description="Limits of the same share for classes of the query attribute `severity`, such as `{critical = "
        "0.005}`; the attribute has to be among `evaluation.slices`.",
    )
    max_false_discoveries: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Largest share of false ones among the slices that are reported to lose more than the rest; they "
        "decide nothing.",
    )
    noise_floor: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="NFR between two trainings of one recipe that differ in the seed alone, as you measured it.",
    )
    max_nfr_over_noise: float | None = Field(
        default=None, gt=0, description="Largest NFR as a multiple of noise_floor; the smaller limit counts."
    )
    max_flips_per_repair: float | None = Field(
        default=None, gt=0, description="Largest number of queries that may break for each one that is repaired."
    )
    max_cumulative_nfr: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Largest share of queries that the first generation that served, or that of cumulative_updates "
        "ago, had right and that may be wrong afterwards.",
    )
    cumulative_updates: int | None = Field(
        default=None, ge=1, description="How many generations max_cumulative_nfr reaches back; by default all."
    )
    max_dip_points: float | None = Field(
        default=1.0,
        ge=0,
        le=100,
        description="Points that the lowest state on the way may lie below what is served now.",
    )
    max_wave_zero_share: float | None = Field(
        default=0.10, ge=0, le=1, description="Largest share of the gallery to re-embed before the serving state moves."
    )
    min_coverage: float = Field(
        default=0.95, ge=0, le=1, description="Least share of the queries that find a relevant row in what serves now."
    )
    max_unreadable_share: float = Field(
        default=0.05, ge=0, le=1, description="Largest share of the gallery that nobody can read now."
    )
    max_near_copy_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Largest share of the queries of which the gallery holds a near copy, which any model finds.",
    )
    min_identities: int = Field(
        default=5, ge=2, description="Fewest groups of queries (usually identities) that an update is judged on."
    )
    required_slices: tuple[str, ...] = Field(
        default=(),
        description="Slices guarded with the same limits: 'name' for all values of a slice, 'name=value' for one.",
    )
    max_cluster_churn: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Largest share of the photos that may change person when the gallery is clustered again, as "
        "`[clusters]` says. By default clusters are not judged.",
    )
    thresholds: dict[str, Consumer] = Field(
        default={},
        description="Consumers of scores by name, each a table `[policy.thresholds.<name>]` with `threshold`, `guards` "
        "(FAR or FRR), `limit`, `other_limit` and `on_shift` (recalibrate or fail).",
    )
    fractions: Annotated[tuple[float, ...], AfterValidator(_rising_from_0_to_1)] = Field(
        default=(0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0), description="Fractions of the gallery that are judged."
    )
    allow_full_backfill: bool = Field(default=True, description="Whether a full backfill may be decided at all.")
    num_resamples: int = Field(
        default=2000,
        ge=100,
        description="Random draws, at least, for the quantile that holds for all fractions at once.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of these draws.")
    power: float = Field(default=0.8, gt=0, lt=1, description="Power for which further queries are planned.")
    expected_gain_points: float = Field(
        default=2.0, ge=0, le=100, description="What a new generation is trained to win; read before a training alone."
    )
    min_power: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Least chance that an update of the expected gain, with half of the allowed flips, passes every "
        "guard; 0: never asked.",
    )
    when_underpowered: Literal["warn", "refuse"] = Field(
        default="warn", description="What 'graceful update' does before a training whose chance is less than that."
    )

    @model_validator(mode="after")
    def _noise_is_measured(self) -> RolloutPolicy:
        if self.max_nfr_over_noise is not None and self.noise_floor is None:
            raise ValueError("max_nfr_over_noise: expected noise_floor beside it, the NFR between two seeds")
        return self

    @property
    def nfr_limit(self) -> float | None:
        """The smallest of the limits given for the NFR: `max_nfr`, and `max_nfr_over_noise` x `noise_floor`."""
        relative = None
        if self.max_nfr_over_noise is not None and self.noise_floor is not None:
            relative = self.max_nfr_over_noise * self.noise_floor
        return min((limit for limit in (self.max_nfr, relative) if limit is not None), default=None)


def severity_scopes(policy: RolloutPolicy) -> tuple[str, ...]:
    """Scopes of the severity classes that have a limit of their own."""
    return tuple(f"severity={name}" for name in policy.max_nfr_by_severity)


def max_nfr_in(policy: RolloutPolicy, scope: str) -> float | None:
    """The limit of negative flips in a scope: that of its severity class, where it is one.

    >>> policy = RolloutPolicy(max_nfr_by_severity={"critical": 0.005})
    >>> max_nfr_in(policy, "severity=critical"), max_nfr_in(policy, "overall")
    (0.005, 0.02)
    """
    return policy.max_nfr_by_severity.get(scope.removeprefix("severity="), policy.nfr_limit)


def verdict_not_below(lower: float | None, upper: float | None, threshold: float) -> Verdict:
    """PASS when the lower bound is at least the threshold, FAIL when the upper bound is below it, otherwise UNKNOWN.

    >>> verdict_not_below(-0.004, 0.01, -0.005), verdict_not_below(-0.02, -0.01, -0.005)
    ('PASS', 'FAIL')
    >>> verdict_not_below(-0.02, 0.01, -0.005), verdict_not_below(None, float("nan"), -0.005)
    ('UNKNOWN', 'UNKNOWN')
    """
    if lower is not None and lower >= threshold:
        return "PASS"
    return "FAIL" if upper is not None and upper < threshold else "UNKNOWN"


def verdict_not_above(lower: float | None, upper: float | None, threshold: float) -> Verdict:
    """PASS when the upper bound is at most the threshold, FAIL when the lower bound is above it, otherwise UNKNOWN."""
    if upper is not None and upper <= threshold:
        return "PASS"
    return "FAIL" if lower is not None and lower > threshold else "UNKNOWN"
