"""The guards: each one judges one bound against one limit of the policy and says so in plain words.

An `Option` is a way of carrying the update out, with the guards of every state that it would really serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.consumers import ClusterEvidence, GoldenEvidence, ThresholdEvidence
from graceful.evaluation.cost import break_even_days
from graceful.evaluation.evidence import OVERALL, Evidence, StateEvidence
from graceful.evaluation.outcomes import pair_state
from graceful.evaluation.policy import (
    Consumer,
    RolloutPolicy,
    Verdict,
    max_nfr_in,
    severity_scopes,
    verdict_not_above,
    verdict_not_below,
)
from graceful.evaluation.spending import told

Guard = Literal[
    "missing",
    "self-test",
    "error level",
    "certificate",
    "wave zero",
    "quality",
    "NFR",
    "flips per repair",
    "cumulative NFR",
    "dip",
    "cost",
    "clusters",
    "threshold",
    "golden",
]
MAX_NAMED = 10
"""Golden queries that a reason names; the evidence names all."""
SHARE_TOLERANCE = 1e-9  # shares are sums of floats


class Reason(BaseModel):
    """One guard, judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guard: Guard = Field(description="What was judged.")
    scope: str = Field(default=OVERALL, description="'overall', 'slice=value', or the generation of a certificate.")
    state: str | None = Field(default=None, description="State that was judged; for a dip the worst one on the way.")
    threshold: float | None = Field(
        default=None, description="The limit, as a share (cost: days; flips per repair: a ratio)."
    )
    value: float | None = Field(default=None, description="What was measured, in the threshold's unit.")
    bound: float | None = Field(default=None, description="The bound that was compared with the threshold.")
    n: int | None = Field(default=None, description="Queries it rests on.")
    verdict: Verdict = Field(description="PASS, FAIL or UNKNOWN.")
    text: str = Field(description="The same in plain words.")


@dataclass(frozen=True)
class Option:
    """One way to carry the update out, with every guard that it has to pass."""

    name: str
    fraction: float
    reasons: tuple[Reason, ...]

    @property
    def verdict(self) -> Verdict:
        verdicts = {reason.verdict for reason in self.reasons}
        return "FAIL" if "FAIL" in verdicts else "UNKNOWN" if "UNKNOWN" in verdicts else "PASS"

    def with_verdict(self, verdict: Verdict) -> tuple[Reason, ...]:
        return tuple(reason for reason in self.reasons if reason.verdict == verdict)


def rollout_options(evidence: Evidence, policy: RolloutPolicy) -> list[Option]:
    """One option per fraction, cheapest first; each must pass in every state on its way."""
    wave_zero = _judge_wave_zero(evidence, policy)
    per_state = {fraction: _judge_state(evidence, policy, fraction) for fraction in policy.fractions}
    options = []
    for fraction in policy.fractions:
        way = [step for step in policy.fractions if step <= fraction]
        reasons = [wave_zero, *(reason for step in way for reason in per_state[step])]
        reasons += _judge_dip(evidence, policy, way)
        options.append(Option(f"COMPATIBLE_ROLLOUT({fraction:g})", fraction, tuple(reasons)))
    return options


def full_option(evidence: Evidence, policy: RolloutPolicy) -> Option:
    """Full backfill before the pointer moves: only state 1.0 is served."""
    reasons = (*_judge_state(evidence, policy, 1.0), *_judge_dip(evidence, policy, [1.0]))
    return Option("FULL_BACKFILL", 1.0, reasons)


def pays(evidence: Evidence, policy: RolloutPolicy) -> Reason:
    """Whether a full backfill has paid for itself before the next generation is due."""
    if not policy.allow_full_backfill:
        return Reason(guard="cost", verdict="FAIL", text="the policy does not allow a full backfill")
    state = state_of(evidence, OVERALL, 1.0)
    inputs = evidence.cost_inputs
    cost = next((cost for cost in evidence.costs if cost.fraction == 1.0), None)
    if inputs is None or cost is None or cost.total_price is None or inputs.value_per_point_day is None:
        unknown = "" if cost is None or not cost.unavailable else f" (unavailable: {', '.join(cost.unavailable)})"
        text = f"no prices given{unknown}: whether the full backfill pays was not judged, and it is allowed"
        return Reason(guard="cost", state=state.state, n=state.num_queries, verdict="PASS", text=text)
    due = inputs.days_until_next_generation
    if due is None:
        text = "no date of the next generation given: whether the full backfill pays was not judged, and it is allowed"
        return Reason(guard="cost", state=state.state, n=state.num_queries, verdict="PASS", text=text)
    latest, likely, earliest = (
        break_even_days(cost.total_price, inputs.value_per_point_day, 100 * (gain if gain is not None else worst))
        for gain, worst in (
            (state.difference_lower, -1.0),
            (state.difference, -1.0),
            (state.difference_upper, 1.0),
        )
    )
    verdict = verdict_not_above(earliest, latest, due)
    text = (
        f"full backfill has paid for itself after {_days(likely)} days (at the latest {_days(latest)}), the next "
        f"generation is due in {due:g}: {verdict}"
    )
    return Reason(
        guard="cost", state=state.state, threshold=due, value=likely, bound=latest, n=state.num_queries,
        verdict=verdict, text=text,
    )  # fmt: skip


def as_hoped(evidence: Evidence) -> Evidence:
    """The evidence with the states that come once all open certificates pass, where those were measured.

    A rollout that waits for certificates would serve these and not those of today's wave 0.
    """
    return evidence.model_copy(update={"states": evidence.hoped_states}) if evidence.hoped_states else evidence


def most_hopeful(undecided: Sequence[Option]) -> Option:
    """The cheapest open option of which every open guard is on its good side; else the cheapest."""
    hopeful = [option for option in undecided if all(map(_on_good_side, option.with_verdict("UNKNOWN")))]
    return (hopeful or list(undecided))[0]


def state_of(evidence: Evidence, scope: str, fraction: float) -> StateEvidence:
    """The evidence about one state; it must exist (missing states are found before anything is judged)."""
    return next(state for state in evidence.states if state.scope == scope and state.fraction == fraction)


def standing(evidence: Evidence, policy: RolloutPolicy) -> list[Reason]:
    """Self-test, error level and certificates: they shape bounds and options (wave 0) and are no guards themselves."""
    own = pair_state(evidence.candidate, evidence.candidate)
    reasons = [
        Reason(
            guard="self-test", state=own, value=evidence.self_test, verdict="PASS" if evidence.self_test is not None
            else "UNKNOWN", text=f"self-test of {evidence.candidate}: {percent(evidence.self_test)}",
        )
    ]  # fmt: skip
    if evidence.look is not None:
        text, share = told(evidence.look, policy), evidence.look.share
        reasons.append(Reason(guard="error level", state=own, value=share, verdict="PASS", text=text))
    for item in (*evidence.certificates, *evidence.clients):
        is_client = item.gallery_generation == evidence.candidate
        against = "its own vectors" if is_client else evidence.champion
        rows = "a gallery of" if is_client else "the rows of"
        threshold = -limit_of(evidence.quality_margin_points) / 100
        bound = item.difference_upper if item.verdict == "FAIL" else item.difference_lower
        text = (
            f"queries of {item.query_generation} on {rows} {item.gallery_generation} ({percent(item.share)} of "
            f"the gallery): {_points(item.difference)} points against {against}, {_side(item.verdict)} "
            f"{_points(bound)}, limit {_points(threshold)}, n {item.num_queries}: {item.verdict}"
        )
        reasons.append(
            Reason(
                guard="certificate", scope=item.query_generation if is_client else item.gallery_generation,
                threshold=threshold, value=item.difference, bound=bound, n=item.num_queries,
                verdict=item.verdict, text=text,
            )
        )  # fmt: skip
    return reasons


def limit_of(value: float | None) -> float:
    """A limit that is known to be given."""
    assert value is not None, "missing limits are found before anything is judged"
    return value


def percent(share: float | None) -> str:
    """A share as text."""
    return "not measured" if share is None else f"{100 * share:.2f} %"


def _on_good_side(reason: Reason) -> bool:
    """Whether the guard would pass if more queries gave the same numbers. Wave 0: its certificates may still pass."""
    if reason.guard == "wave zero":
        return True
    if reason.value is None or reason.threshold is None:
        return False
    return reason.value >= reason.threshold if reason.guard in ("quality", "dip") else reason.value <= reason.threshold


def _lost_only(policy: RolloutPolicy) -> set[str]:
    """Scopes in which flips are judged and nothing else: severity classes that are no required slices."""
    required = policy.required_slices
    return set() if "severity" in required else {scope for scope in severity_scopes(policy) if scope not in required}


def _scopes(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(state.scope for state in evidence.states))


def _judge_state(evidence: Evidence, policy: RolloutPolicy, fraction: float) -> tuple[Reason, ...]:
    only = _lost_only(policy)
    reasons: list[Reason] = []
    for state in (state_of(evidence, scope, fraction) for scope in _scopes(evidence)):
        whole = state.scope not in only
        if whole:
            reasons.append(_judge_quality(state, policy))
        if max_nfr_in(policy, state.scope) is not None:
            reasons.append(_judge_nfr(state, policy))
        if whole and policy.max_flips_per_repair is not None:
            reasons.append(_judge_flips_per_repair(state, policy))
        if whole and policy.max_cumulative_nfr is not None and evidence.anchor is not None:
            reasons.append(_judge_cumulative_nfr(state, policy, evidence.anchor))
    return (*reasons, *_judge_consumers(evidence, policy, fraction))


def _judge_quality(state: StateEvidence, policy: RolloutPolicy) -> Reason:
    threshold = -limit_of(policy.quality_margin_points) / 100
    verdict = verdict_not_below(state.difference_lower, state.difference_upper, threshold)
    bound = state.difference_upper if verdict == "FAIL" else state.difference_lower
    text = (
        f"{state.scope}, {state.state}: {_metric_name(policy)} {_points(state.difference)} points against what is "
        f"served now, {_side(verdict)} {_points(bound)}, limit {_points(threshold)}, n {state.num_queries}: {verdict}"
    )
    return Reason(
        guard="quality", scope=state.scope, state=state.state, threshold=threshold, value=state.difference, bound=bound,
        n=state.num_queries, verdict=verdict, text=text,
    )  # fmt: skip


def _judge_nfr(state: StateEvidence, policy: RolloutPolicy) -> Reason:
    threshold = limit_of(max_nfr_in(policy, state.scope))
    verdict = verdict_not_above(state.nfr_lower, state.nfr_upper, threshold)
    bound = state.nfr_lower if verdict == "FAIL" else state.nfr_upper
    noise = "" if state.nfr_over_noise is None else f", {state.nfr_over_noise:.2g} times the noise floor"
    text = (
        f"{state.scope}, {state.state}: {percent(state.nfr)} of queries right now and wrong afterwards, "
        f"{_most(verdict)} {percent(bound)}, limit {percent(threshold)}; {_per_repair(state.flips_per_repair)}{noise}; "
        f"n {state.num_queries}: {verdict}"
    )
    return Reason(
        guard="NFR", scope=state.scope, state=state.state, threshold=threshold, value=state.nfr, bound=bound,
        n=state.num_queries, verdict=verdict, text=text,
    )  # fmt: skip


def _judge_flips_per_repair(state: StateEvidence, policy: RolloutPolicy) -> Reason:
    threshold = limit_of(policy.max_flips_per_repair)
    verdict = verdict_not_above(state.flips_per_repair_lower, state.flips_per_repair_upper, threshold)
    bound = state.flips_per_repair_lower if verdict == "FAIL" else state.flips_per_repair_upper
    text = (
        f"{state.scope}, {state.state}: {_per_repair(state.flips_per_repair)}, {_most(verdict)} "
        f"{'unbounded' if bound is None else format(bound, '.2f')}, limit {threshold:g}, n {state.num_queries}: "
        f"{verdict}"
    )
    return Reason(
        guard="flips per repair", scope=state.scope, state=state.state, threshold=threshold,
        value=state.flips_per_repair, bound=bound, n=state.num_queries, verdict=verdict, text=text,
    )  # fmt: skip


def _judge_cumulative_nfr(state: StateEvidence, policy: RolloutPolicy, anchor: str) -> Reason:
    threshold = limit_of(policy.max_cumulative_nfr)
    verdict = verdict_not_above(state.cumulative_nfr_lower, state.cumulative_nfr_upper, threshold)
    bound = state.cumulative_nfr_lower if verdict == "FAIL" else state.cumulative_nfr_upper
    text = (
        f"{state.scope}, {state.state}: {percent(state.cumulative_nfr)} of queries right with {anchor} and wrong "
        f"afterwards, {_most(verdict)} {percent(bound)}, limit {percent(threshold)}, n {state.num_queries}: {verdict}"
    )
    return Reason(
        guard="cumulative NFR", scope=state.scope, state=state.state, threshold=threshold, value=state.cumulative_nfr,
        bound=bound, n=state.num_queries, verdict=verdict, text=text,
    )  # fmt: skip


def _judge_dip(evidence: Evidence, policy: RolloutPolicy, way: Sequence[float]) -> list[Reason]:
    """The lowest bound over the states that are passed; one reason per scope, about the worst state."""
    reasons = []
    threshold = -limit_of(policy.max_dip_points) / 100
    for scope in (scope for scope in _scopes(evidence) if scope not in _lost_only(policy)):
        states = [state_of(evidence, scope, fraction) for fraction in way]
        worst = min(states, key=lambda s: float("-inf") if s.difference_lower is None else s.difference_lower)
        uppers = [state.difference_upper for state in states if state.difference_upper is not None]
        lowest_upper = min(uppers, default=None)
        verdict = verdict_not_below(worst.difference_lower, lowest_upper, threshold)
        bound = lowest_upper if verdict == "FAIL" else worst.difference_lower
        text = (
            f"{scope}, way to {way[-1]:g}: lowest at {worst.state}, {_points(worst.difference)} points against "
            f"what is served now, {_side(verdict)} {_points(bound)}, limit {_points(threshold)}, "
            f"n {worst.num_queries}: {verdict}"
        )
        reasons.append(
            Reason(
                guard="dip", scope=scope, state=worst.state, threshold=threshold, value=worst.difference, bound=bound,
                n=worst.num_queries, verdict=verdict, text=text,
            )
        )  # fmt: skip
    return reasons


def _judge_wave_zero(evidence: Evidence, policy: RolloutPolicy) -> Reason:
    """PASS when the rows to re-embed first are few; UNKNOWN when certificates still undecided could make them few."""
    limit = limit_of(policy.max_wave_zero_share) + SHARE_TOLERANCE
    failed = sum(item.share for item in evidence.certificates if item.verdict == "FAIL")
    verdict = verdict_not_above(failed, evidence.wave_zero_share, limit)
    owners = ", ".join(evidence.wave_zero_generations) or "none"
    text = (
        f"rows to re-embed before the serving state moves (owners without a certificate: {owners}): "
        f"{percent(evidence.wave_zero_share)} of the gallery, limit {percent(policy.max_wave_zero_share)}: {verdict}"
    )
    return Reason(
        guard="wave zero", threshold=policy.max_wave_zero_share, value=evidence.wave_zero_share,
        bound=failed if verdict == "FAIL" else evidence.wave_zero_share, verdict=verdict, text=text,
    )  # fmt: skip


def _judge_consumers(evidence: Evidence, policy: RolloutPolicy, fraction: float) -> tuple[Reason, ...]:
    """What users of scores and clusters would lose in one state; nothing where the policy has no limit for it."""
    clusters = [item for item in evidence.consumers.clusters if item.fraction == fraction]
    reasons = [_judge_clusters(item, limit) for item in clusters if (limit := policy.max_cluster_churn) is not None]
    for item in evidence.consumers.thresholds:
        if item.fraction == fraction and item.consumer in policy.thresholds:
            reasons += _judge_threshold(item, policy.thresholds[item.consumer])
    reasons += [_judge_golden(item) for item in evidence.consumers.golden if item.fraction == fraction]
    return tuple(reasons)


def _judge_golden(item: GoldenEvidence) -> Reason:
    """No golden query that is right now may be wrong: known without any bound."""
    names = ", ".join(item.flips[:MAX_NAMED]) + (", ..." if len(item.flips) > MAX_NAMED else "")
    verdict: Verdict = "FAIL" if item.flips else "PASS"
    which = f" ({names})" if names else ""
    text = (
        f"golden queries, {item.state}: {len(item.flips)} of {item.num_right} right now and wrong afterwards{which}, "
        f"none may be: {verdict}"
    )
    share = len(item.flips) / item.num_right if item.num_right else 0.0
    return Reason(
        guard="golden", state=item.state, threshold=0.0, value=share, bound=share, n=item.num_right, verdict=verdict,
        text=text,
    )  # fmt: skip


def _judge_threshold(item: ThresholdEvidence, consumer: Consumer) -> list[Reason]:
    """The guarded rate, and the other one where it has a limit.

    A recalibrated threshold keeps its limit by the bound of each pair of generations; a mixture of them, whose bound
    lies around the limit, fails only where it is shown to be above.
    """
    reasons = []
    limits = {consumer.guards: consumer.limit}
    if consumer.other_limit is not None:
        limits["FRR" if consumer.guards == "FAR" else "FAR"] = consumer.other_limit
    without = [owner for owner, threshold in item.thresholds.items() if threshold is None]
    for kind, limit in limits.items():
        key = kind.lower()
        value, lower, upper = (getattr(item, name) for name in (key, f"{key}_lower", f"{key}_upper"))
        verdict = verdict_not_above(lower, upper, limit)
        if kind == consumer.guards and consumer.on_shift == "recalibrate" and not without and verdict == "UNKNOWN":
            verdict = "PASS" if value is not None else "UNKNOWN"
        bound = lower if verdict == "FAIL" else upper
        at = ", ".join(
            f"{threshold:.4f} on {owner}" for owner, threshold in item.thresholds.items() if threshold is not None
        )
        said = f"at {at}, {percent(value)}, {'at least' if verdict == 'FAIL' else 'at most'} {percent(bound)}"
        if without:
            said = f"no threshold can be shown to keep it on {', '.join(without)}"
        text = (
            f"threshold {item.consumer}, {item.state}: {kind} {said}, limit {percent(limit)}, n {item.num_impostors:,} "
            f"impostor and {item.num_genuine:,} genuine pairs: {verdict}"
        )
        reasons.append(
            Reason(
                guard="threshold", scope=f"{item.consumer} {kind}", state=item.state, threshold=limit, value=value,
                bound=bound, n=item.num_impostors if kind == "FAR" else item.num_genuine, verdict=verdict, text=text,
            )
        )  # fmt: skip
    return reasons


def _judge_clusters(item: ClusterEvidence, limit: float) -> Reason:
    verdict = verdict_not_above(item.changed_lower, item.changed_upper, limit)
    bound = item.changed_lower if verdict == "FAIL" else item.changed_upper
    text = (
        f"clusters, {item.state}: {percent(item.changed)} of the photos change person, "
        f"{_most(verdict)} {percent(bound)}, limit {percent(limit)}; {item.num_split} "
        f"people split, {item.num_merged} merged, n {item.num_items}: {verdict}"
    )
    return Reason(
        guard="clusters", state=item.state, threshold=limit, value=item.changed, bound=bound, n=item.num_items,
        verdict=verdict, text=text,
    )  # fmt: skip


def _metric_name(policy: RolloutPolicy) -> str:
    return f"recall@{policy.k}" if policy.metric == "recall@k" else policy.metric


def _side(verdict: Verdict) -> str:
    return "at most" if verdict == "FAIL" else "at least"


def _most(verdict: Verdict) -> str:
    return "at least" if verdict == "FAIL" else "at most"


def _per_repair(ratio: float | None) -> str:
    return "no query repaired" if ratio is None else f"{ratio:.2f} flips per repaired query"


def _points(share: float | None) -> str:
    return "unbounded" if share is None else f"{100 * share:+.2f}"


def _days(days: float | None) -> str:
    return "unknown" if days is None else f"{days:,.1f}"
