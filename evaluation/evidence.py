"""What the decision is made from: bounds for every state that would really be served, against what is served now.

`gather_evidence` turns per-query outcomes into bounds, purely: no I/O, no clock, every random draw seeded. `Evidence`
is JSON and holds all that `evaluation.decision.decide` reads; a number that was not measured is None, never 0.

Multiplicity. All guards must pass, so each one has the whole alpha. The *best* fraction is chosen among several, so:

* Quality and dip use one simultaneous (max-t) band over all fractions of a scope.
* NFR, flips since the anchor and flips per repair need no such correction along the way: a rollout to any fraction must
  pass every earlier state, which is a fixed-sequence test (the first state that is really bad has to pass, at its own
  alpha, before anything goes wrong). A full backfill is a second way to go wrong, so both share alpha: every bound of
  flips is taken at alpha / 2.
* Candidates that are judged on the same evaluation identities share alpha: see `evaluation.spending`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.bands import DifferenceBands, difference_bands
from graceful.evaluation.changed import log_differences
from graceful.evaluation.consumers import Consumed, ConsumerEvidence, GoldenEvidence, Reads, gather_consumers
from graceful.evaluation.cost import CostInputs, OptionCost, option_costs
from graceful.evaluation.intervals import mcnemar_exact, share_bounds
from graceful.evaluation.outcomes import (
    SERVED,
    Comparison,
    Metric,
    Outcomes,
    compare,
    fraction_state,
    live_state,
    measured,
    metric_values,
    pair_state,
    parse_state,
    right,
)
from graceful.evaluation.policy import RolloutPolicy, Verdict, severity_scopes, verdict_not_below
from graceful.evaluation.slices import discover_slices, golden_flips, golden_queries
from graceful.evaluation.spending import Look, at_level

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


def gather_evidence(
    outcomes: Outcomes, policy: RolloutPolicy, question: Question, consumed: Consumed | None = None
) -> Evidence:
    """Bounds for every state and certificate that the policy asks about. Pure: the same arguments give the same bytes.

    Wave 0 (rows of owners without a certificate) is candidate-owned in every fraction state: states that were measured
    for another wave 0 are not used, and those that should have been are named as missing.
    """
    candidate, champion, cost = question.candidate, question.champion, question.cost
    policy = at_level(policy, question.look)
    shares = {owner: float(share) for owner, share in question.live_owners.items()}
    if any(not 0 <= share <= 1 for share in shares.values()) or sum(shares.values()) > 1 + 1e-6:
        raise ValueError(f"gathering evidence: expected shares in [0, 1] with a sum of at most 1, found {shares}")
    self_test = _self_test(outcomes, policy, candidate)
    common: dict[str, Any] = {
        "candidate": candidate,
        "champion": champion,
        "is_first_generation": champion is None,
        "order": question.order,
        "alpha": policy.alpha,
        "look": question.look,
        "anchor": question.anchor,
        "metric": policy.metric,
        "k": policy.k,
        "quality_margin_points": policy.quality_margin_points,
        "num_queries": len(outcomes),
        "self_test": self_test,
        "self_test_lower": metric_lower(outcomes, policy, pair_state(candidate, candidate)),
        "near_copy_share": question.near_copy_share,
        "chance": question.chance,
        "cost_inputs": cost,
        "costs": () if cost is None else option_costs(cost, policy.fractions),
    }
    missing = [] if self_test is not None else [f"self-test: state {pair_state(candidate, candidate)!r}"]
    each_at = policy.alpha / NFR_FAMILIES
    if champion is None:
        reads = Reads(candidate, (candidate,))
        consumers = gather_consumers(consumed or Consumed(), policy, reads, {}, alpha=each_at)
        return Evidence(**common, consumers=consumers, missing=(*missing, *consumers.missing))
    certificates = certify(outcomes, policy, live_owners=shares, candidate=candidate, champion=champion)
    wave_zero = wave_zero_generations(certificates)
    way = _way(outcomes, policy, question, wave_zero)
    missing += _missing_baselines(outcomes, shares, candidate, champion)
    missing += [f"metric: {_named(f, question, wave_zero)}" for f in policy.fractions if f not in way]
    scopes, missing_slices = _scopes(outcomes, policy)
    missing += missing_slices
    clients = certify_clients(outcomes, policy, question.clients, candidate=candidate)
    reads = Reads(
        candidate=candidate,
        after=(*(item.gallery_generation for item in certificates if item.verdict == "PASS"), candidate),
        champion=champion,
        before=tuple(shares),
        clients=tuple((item.query_generation, candidate) for item in clients if item.verdict == "PASS"),
        served=question.thresholds,
    )
    consumers = gather_consumers(consumed or Consumed(), policy, reads, way, alpha=each_at)
    consumers = consumers.model_copy(update=_where_it_matters(outcomes, policy, way))
    missing += consumers.missing
    if question.anchor is not None and not measured(outcomes, pair_state(question.anchor, question.anchor)).any():
        missing.append(f"baseline: state {pair_state(question.anchor, question.anchor)!r}")
    unreadable = question.unreadable_share
    if unreadable is None:
        unreadable = max(0.0, 1 - sum(shares.values()))
    first_share = min(1.0, sum(shares[owner] for owner in wave_zero) + unreadable)
    if cost is not None:
        common["costs"] = option_costs(cost, policy.fractions, first_share=first_share)
    hoped = tuple(item.gallery_generation for item in certificates if item.verdict == "FAIL")
    hoped_way = {} if hoped == wave_zero else _way(outcomes, policy, question, hoped)
    return Evidence(
        **common,
        states=_states(outcomes, policy, scopes, way, question.anchor),
        hoped_wave_zero=None if hoped == wave_zero else hoped,
        hoped_states=_states(outcomes, policy, scopes, hoped_way, question.anchor)
        if len(hoped_way) == len(policy.fractions)
        else (),
        certificates=certificates,
        clients=clients,
        live_owners=shares,
        wave_zero_generations=wave_zero,
        wave_zero_share=sum(shares[owner] for owner in wave_zero),
        unreadable_share=unreadable,
        consumers=consumers,
        missing=tuple(missing),
    )


def _where_it_matters(outcomes: Outcomes, policy: RolloutPolicy, way: Mapping[float, str]) -> dict[str, Any]:
    """Golden queries in every state, and slices that lose more than the rest."""
    if SERVED not in outcomes.first_rank:
        return {}
    golden = golden_queries(outcomes).any()
    flips = {fraction: golden_flips(outcomes, SERVED, state, k=policy.k) for fraction, state in way.items() if golden}
    looked = [
        discover_slices(
            outcomes, SERVED, state, k=policy.k, false_share=policy.max_false_discoveries, alpha=policy.alpha
        )
        for state in way.values()
    ]
    return {
        "golden": tuple(
            GoldenEvidence(fraction=fraction, state=way[fraction], num_right=num_right, flips=names)
            for fraction, (num_right, names) in flips.items()
        ),
        "discovered": tuple(item for discovery in looked for item in discovery.found),
        "slices_tested": max((discovery.num_tested for discovery in looked), default=0),
        "slices_left_out": max((discovery.num_left_out for discovery in looked), default=0),
    }


def certify(
    outcomes: Outcomes, policy: RolloutPolicy, *, live_owners: Mapping[str, float], candidate: str, champion: str
) -> tuple[CertificateEvidence, ...]:
    """Judge whether the candidate's queries may be scored against each live owner's vectors.

    Needs only the live/... states, so that it can be asked before the fraction states are built (they depend on wave
    0). PASS when the lower bound of the paired difference is at least minus the margin, FAIL when the upper bound is
    below it. The candidate's own rows, if any, are covered by its self-test and left out.
    """
    owners = [owner for owner in live_owners if owner != candidate]
    return certify_pairs(
        outcomes,
        policy,
        [(candidate, owner, float(live_owners[owner])) for owner in owners],
        [(live_state(champion, owner), live_state(candidate, owner)) for owner in owners],
    )


def certify_clients(
    outcomes: Outcomes, policy: RolloutPolicy, clients: Sequence[str], *, candidate: str
) -> tuple[CertificateEvidence, ...]:
    """Judge whether queries of older generations may be scored against the candidate's vectors.

    Each is compared with what it has for sure: a gallery of its own vectors. Without the certificate ingest goes on
    writing vectors for it; no option depends on it.
    """
    return certify_pairs(
        outcomes,
        policy,
        [(client, candidate, 1.0) for client in clients],
        [(pair_state(client, client), pair_state(client, candidate)) for client in clients],
    )


def certify_pairs(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    wanted: Sequence[tuple[str, str, float]],
    states: Sequence[tuple[str, str]],
) -> tuple[CertificateEvidence, ...]:
    """Judge each wanted (query generation, gallery generation, share) by its states (before, after).

    A state that was not measured is UNKNOWN.
    """
    pairs = [
        _pair(outcomes, policy, before, after)
        if before in outcomes.first_rank and after in outcomes.first_rank
        else None
        for before, after in states
    ]
    bands = _bands(_codes(outcomes), policy, pairs, families=[[index] for index in range(len(pairs))])
    certificates, margin = [], policy.quality_margin_points
    for index, (query, gallery, share) in enumerate(wanted):
        numbers = _difference_numbers(pairs[index], bands[index], 0)
        verdict: Verdict = "UNKNOWN"
        if margin is not None:
            verdict = verdict_not_below(numbers["difference_lower"], numbers["difference_upper"], -margin / 100)
        certificates.append(
            CertificateEvidence(
                query_generation=query, gallery_generation=gallery, share=share, verdict=verdict, **numbers
            )
        )
    return tuple(certificates)


def wave_zero_generations(certificates: Sequence[CertificateEvidence]) -> tuple[str, ...]:
    """Owners whose certificate is not issued (FAIL or UNKNOWN): their rows are re-embedded before the move."""
    return tuple(item.gallery_generation for item in certificates if item.verdict != "PASS")


def _self_test(outcomes: Outcomes, policy: RolloutPolicy, candidate: str) -> float | None:
    state = pair_state(candidate, candidate)
    if not measured(outcomes, state).any():
        return None
    return _finite(np.nanmean(metric_values(outcomes, state, policy.metric, policy.k)))


def metric_lower(outcomes: Outcomes, policy: RolloutPolicy, state: str) -> float | None:
    """Lower bound of the metric in a state, clusters respected; None where it has none (mAP) or nothing is measured."""
    counted = measured(outcomes, state)
    if policy.metric != "recall@k" or not counted.any():
        return None
    return share_bounds(right(outcomes, state, policy.k)[counted], outcomes.clusters[counted], policy.alpha).lower


def _missing_baselines(outcomes: Outcomes, shares: Mapping[str, float], candidate: str, champion: str) -> list[str]:
    missing = []
    if not measured(outcomes, SERVED).any():
        missing.append(f"baseline: state {SERVED!r}")
    if not shares:
        missing.append("baseline: live owners of the gallery")
    for owner in shares:
        for query, kind in ((candidate, "metric"), (champion, "baseline")):
            if owner != candidate and live_state(query, owner) not in outcomes.first_rank:
                missing.append(f"{kind}: state {live_state(query, owner)!r}")
    return missing


def _way(outcomes: Outcomes, policy: RolloutPolicy, question: Question, wave_zero: Sequence[str]) -> dict[float, str]:
    """The measured state of each fraction on the way that begins with this wave 0; without those never measured.

    Fully re-embedded is one state, whatever came first; and where wave 0 is the whole gallery, it is the only one.
    """
    as_named = question.wave_zero is None or set(question.wave_zero) == set(wave_zero)
    whole = question.wave_zero is not None and {*question.live_owners} - {question.candidate} <= {*wave_zero}
    asked = {parse_state(state).fraction for state in outcomes.states}
    found = {}
    for fraction in policy.fractions:
        full = fraction == 1 or whole
        name = fraction_state(1) if full else fraction_state(fraction, None if as_named else wave_zero)
        if name in outcomes.first_rank and fraction in asked:
            found[fraction] = name
    return found


def _named(fraction: float, question: Question, wave_zero: Sequence[str]) -> str:
    if question.wave_zero is None or set(question.wave_zero) == set(wave_zero):
        return f"state {fraction_state(fraction)!r}"
    before, after = (", ".join(names) or "nothing" for names in (question.wave_zero, wave_zero))
    return (
        f"state {fraction_state(fraction, wave_zero)!r}: the stored one was measured with {before} re-embedded before "
        f"the move, this policy decides {after}"
    )


def unmeasured_wave(outcomes: Outcomes, policy: RolloutPolicy, question: Question) -> tuple[str, ...] | None:
    """The wave 0 that this policy decides, where none of its states was measured; None where they were."""
    if question.champion is None or question.wave_zero is None:
        return None
    certificates = certify(
        outcomes,
        at_level(policy, question.look),
        live_owners=question.live_owners,
        candidate=question.candidate,
        champion=question.champion,
    )
    wave_zero = wave_zero_generations(certificates)
    as_named = question.model_copy(update={"wave_zero": wave_zero})
    measured_as_named = set(_way(outcomes, policy, as_named, wave_zero))
    return wave_zero if measured_as_named - set(_way(outcomes, policy, question, wave_zero)) else None


class _Pair(NamedTuple):
    """Two states query by query: queries with an identity, and those of the log by what changed (NaN: not settled)."""

    known: Comparison
    log: NDArray[np.float64]

    @property
    def differences(self) -> NDArray[np.float64]:
        """After less before, of all queries compared."""
        return np.concatenate([self.known.after - self.known.before, self.log[~np.isnan(self.log)]])


def _pair(
    outcomes: Outcomes, policy: RolloutPolicy, before: str, after: str, within: NDArray[np.bool_] | None = None
) -> _Pair:
    """Compare two states; `within` is over the queries with an identity and then those of the log."""
    num = len(outcomes)
    known = compare(
        outcomes, before, after, metric=policy.metric, k=policy.k, within=None if within is None else within[:num]
    )
    if outcomes.log is None:
        return _Pair(known, np.zeros(0))
    inside = None if within is None else within[num:]
    return _Pair(known, log_differences(outcomes.log, (before, after), metric=policy.metric, k=policy.k, within=inside))


def _scopes(outcomes: Outcomes, policy: RolloutPolicy) -> tuple[dict[str, NDArray[np.bool_]], list[str]]:
    """Queries of each guarded scope, those of the log last, and the slices that have none."""
    log = outcomes.log
    scopes = {OVERALL: np.ones(len(outcomes) + (0 if log is None else len(log)), np.bool_)}
    missing = []
    baseline = measured(outcomes, SERVED)
    for required in dict.fromkeys((*policy.required_slices, *severity_scopes(policy))):
        name, _, value = required.partition("=")
        column = outcomes.slices.get(name)
        if column is None:
            missing.append(f"slice {required!r}: no such slice, found {sorted(outcomes.slices)}")
            continue
        if log is not None:
            column = np.concatenate([column, log.slices.get(name, np.full(len(log), ""))])
        num_untagged = int((column == "").sum())
        if num_untagged:
            missing.append(f"slice {required!r}: {num_untagged} of {len(column)} queries have no value; tag all")
        for each in [value] if value else sorted(set(column.tolist()) - {""}):
            inside = column == each
            scopes[f"{name}={each}"] = inside
            if not (inside[: len(outcomes)] & baseline).any():
                missing.append(f"slice '{name}={each}': no query of it is measurable in state {SERVED!r}")
        if not value and not set(column.tolist()) - {""}:
            missing.append(f"slice {required!r}: no query has a value")
    return scopes, missing


def _states(
    outcomes: Outcomes,
    policy: RolloutPolicy,
    scopes: Mapping[str, NDArray[np.bool_]],
    way: Mapping[float, str],
    anchor: str | None,
) -> tuple[StateEvidence, ...]:
    if SERVED not in outcomes.first_rank:
        return ()
    fractions = list(way)
    cells = [(scope, fraction) for scope in scopes for fraction in fractions]
    pairs = [_pair(outcomes, policy, SERVED, way[f], scopes[scope]) for scope, f in cells]
    width = len(fractions)
    families = [list(range(s * width, (s + 1) * width)) for s in range(len(scopes))]
    clusters = _codes(outcomes)
    bands = _bands(clusters, policy, pairs, families)
    alpha = policy.alpha / NFR_FAMILIES
    states = []
    for index, ((scope, fraction), pair) in enumerate(zip(cells, pairs, strict=True)):
        state, band = way[fraction], bands[index // width]
        alone = measured(outcomes, state) & ~measured(outcomes, SERVED) & scopes[scope][: len(outcomes)]
        states.append(
            StateEvidence(
                scope=scope,
                fraction=fraction,
                state=state,
                num_lost=pair.known.num_lost,
                num_without_baseline=int(alone.sum()),
                band_critical=_finite(band.critical),
                **_difference_numbers(pair, band, index % width),
                **_flip_numbers(pair, clusters, alpha, policy.noise_floor),
                **_flips_since(outcomes, anchor, state, policy.k, scopes[scope], clusters, alpha),
            )
        )
    return tuple(states)


def _bands(
    clusters: NDArray[np.int64],
    policy: RolloutPolicy,
    pairs: Sequence[_Pair | None],
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


def _difference_numbers(pair: _Pair | None, band: DifferenceBands, column: int) -> dict[str, Any]:
    known = pair is not None and len(pair.known.before) > 0
    return {
        "num_queries": int(band.num_queries[column]),
        "num_clusters": int(band.num_clusters[column]),
        "num_log_queries": 0 if pair is None else int((~np.isnan(pair.log)).sum()),
        "value": _finite(pair.known.after.mean()) if pair is not None and known else None,
        "baseline": _finite(pair.known.before.mean()) if pair is not None and known else None,
        "difference": _finite(band.value[column]),
        "difference_lower": _finite(band.lower[column]),
        "difference_upper": _finite(band.upper[column]),
        "difference_sd": _finite(pair.differences.std()) if pair is not None and known else None,
        "difference_design_effect": _finite(band.design_effect[column]) if known else None,
    }


def _flip_numbers(pair: _Pair, clusters: NDArray[Any], alpha: float, noise_floor: float | None) -> dict[str, Any]:
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
        return {**dict.fromkeys((*unknown, "mcnemar_p")), "num_flipped_clusters": 0}
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


def _flips_since(
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


def _ratio(value: float, base: float) -> float | None:
    return value / base if base > 0 else None


def _codes(outcomes: Outcomes) -> NDArray[np.int64]:
    """Clusters as small integers, made once: text is slow to sort. Those of the log come last."""
    log = outcomes.log
    names = outcomes.clusters if log is None else np.concatenate([outcomes.clusters, log.clusters.astype(np.str_)])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _finite(value: float | np.floating[Any]) -> float | None:
    return float(value) if math.isfinite(value) else None
