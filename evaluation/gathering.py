"""From per-query outcomes to evidence, purely: no I/O, no clock, every random draw seeded.

Multiplicity. All guards must pass, so each one has the whole alpha. The *best* fraction is chosen among several, so:

* Quality and dip use one simultaneous (max-t) band over all fractions of a scope.
* NFR, flips since the anchor and flips per repair need no such correction along the way: a rollout to any fraction must
  pass every earlier state, which is a fixed-sequence test (the first state that is really bad has to pass, at its own
  alpha, before anything goes wrong). A full backfill is a second way to go wrong, so both share alpha: every bound of
  flips is taken at alpha / 2.
* Candidates that are judged on the same evaluation identities share alpha: see `evaluation.spending`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.certificates import certify, certify_clients, wave_zero_generations
from graceful.evaluation.consumers import Consumed, GoldenEvidence, Reads, gather_consumers
from graceful.evaluation.cost import option_costs
from graceful.evaluation.differences import (
    bands_of,
    cluster_codes,
    difference_numbers,
    finite,
    flip_numbers,
    flips_since,
    paired,
)
from graceful.evaluation.evidence import NFR_FAMILIES, OVERALL, Evidence, Question, StateEvidence
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import (
    SERVED,
    Outcomes,
    fraction_state,
    live_state,
    measured,
    metric_values,
    pair_state,
    parse_state,
    right,
)
from graceful.evaluation.policy import RolloutPolicy, severity_scopes
from graceful.evaluation.slices import discover_slices, golden_flips, golden_queries
from graceful.evaluation.spending import at_level


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


def _self_test(outcomes: Outcomes, policy: RolloutPolicy, candidate: str) -> float | None:
    state = pair_state(candidate, candidate)
    if not measured(outcomes, state).any():
        return None
    return finite(np.nanmean(metric_values(outcomes, state, policy.metric, policy.k)))


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
    pairs = [paired(outcomes, policy, SERVED, way[f], scopes[scope]) for scope, f in cells]
    width = len(fractions)
    families = [list(range(s * width, (s + 1) * width)) for s in range(len(scopes))]
    clusters = cluster_codes(outcomes)
    bands = bands_of(clusters, policy, pairs, families)
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
                band_critical=finite(band.critical),
                **difference_numbers(pair, band, index % width),
                **flip_numbers(pair, clusters, alpha, policy.noise_floor),
                **flips_since(outcomes, anchor, state, policy.k, scopes[scope], clusters, alpha),
            )
        )
    return tuple(states)
