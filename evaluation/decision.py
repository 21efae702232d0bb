"""RolloutPolicy + Evidence -> Decision. Pure: no I/O, no clock, no random act.

Every guard is judged PASS, FAIL or UNKNOWN on states that would really be served, and the outcome follows from the
first rule that applies:

1. Empty lineage: BOOTSTRAP (self-test only). Anything missing: HOLD, naming it.
2. The fully backfilled state FAILs a guard: HOLD.
3. Some fraction passes all guards in every state from 0 to itself: COMPATIBLE_ROLLOUT with the fraction of best net
   value (without prices: the smallest). All those states are really served while the re-index runs.
4. Only full backfill passes, and it pays before the next generation is due: FULL_BACKFILL. Its only state is 1.0,
   because the pointer moves last. Without prices it is taken to pay, and the reasons say so.
5. Something is UNKNOWN: INCONCLUSIVE with what would settle the cheapest option that could still pass.
6. Otherwise HOLD.

Shares and differences are in [-1, 1] here; texts speak of points and per cent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.consumers import ThresholdToServe, thresholds_to_serve
from graceful.evaluation.cost import net_value
from graceful.evaluation.evidence import OVERALL, Evidence
from graceful.evaluation.guards import (
    Option,
    Reason,
    as_hoped,
    full_option,
    most_hopeful,
    pays,
    percent,
    rollout_options,
    standing,
    state_of,
)
from graceful.evaluation.needs import as_question, further, hardest, in_words
from graceful.evaluation.outcomes import fraction_state
from graceful.evaluation.policy import RolloutPolicy, severity_scopes
from graceful.evaluation.spending import at_level, told

JUDGING_VERSION = 2
"""Version of the judgement. Raise it with every change after which the same outcomes and policy are decided
otherwise."""

Outcome = Literal["BOOTSTRAP", "COMPATIBLE_ROLLOUT", "FULL_BACKFILL", "HOLD", "INCONCLUSIVE"]


class CertificateToIssue(BaseModel):
    """Queries of the first may be scored against vectors of the second, once the decision is recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    query_generation: str = Field(description="The candidate, or an old client's generation.")
    gallery_generation: str = Field(description="The generation whose vectors it may read.")


class Decision(BaseModel):
    """What to do, and why. The decisive reasons come first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    outcome: Outcome = Field(description="What to do.")
    summary: str = Field(description="The outcome and its reason in one sentence.")
    candidate: str = Field(description="The generation that was judged.")
    champion: str | None = Field(description="The generation that served when it was judged.")
    fraction: float | None = Field(default=None, description="Fraction of the gallery to re-embed.")
    order: str | None = Field(default=None, description="Order in which to re-embed.")
    wave_zero_generations: tuple[str, ...] = Field(default=(), description="Owners to re-embed before the move.")
    queries_needed: int | None = Field(default=None, description="Further queries that would settle the matter.")
    identities_needed: int | None = Field(
        default=None, description="Further identities (or photos) that would: queries of the same ones help little."
    )
    identities_range: tuple[int | None, int | None] | None = Field(
        default=None, description="The same for 80 % of what may be true; None: more than anybody could collect."
    )
    queries_needed_for: str | None = Field(default=None, description="Which option and guard they are for.")
    certificates: tuple[CertificateToIssue, ...] = Field(default=(), description="Certificates to issue with it.")
    thresholds: tuple[ThresholdToServe, ...] = Field(default=(), description="Thresholds to serve with it.")
    reasons: tuple[Reason, ...] = Field(description="Every guard with threshold, value, bound, n and verdict.")
    num_decisive: int = Field(default=0, description="How many of the reasons, from the first on, led to the outcome.")


def decide(evidence: Evidence, policy: RolloutPolicy) -> Decision:
    """Apply the rules above to the evidence."""
    policy = at_level(policy, evidence.look)
    missing = missing_pieces(evidence, policy)
    if missing:
        return _hold(evidence, f"evidence is missing ({len(missing)}), first: {missing[0].scope}", missing, ())
    if evidence.is_first_generation:
        return _bootstrap(evidence, policy)
    full, rollouts = full_option(evidence, policy), rollout_options(evidence, policy)
    everything = (
        *full.reasons, *(reason for option in rollouts for reason in option.reasons), *standing(evidence, policy)
    )  # fmt: skip
    failed = full.with_verdict("FAIL")
    if failed:
        return _hold(evidence, f"even the fully backfilled state fails: {failed[0].text}", failed, everything)
    passing = [option for option in rollouts if option.verdict == "PASS"]
    if passing:
        return _rollout(evidence, passing, everything)
    paying = Option(full.name, full.fraction, (*full.reasons, pays(evidence, policy)))
    if paying.verdict == "PASS":
        return _full_backfill(evidence, paying, rollouts, everything)
    then = as_hoped(evidence)
    waiting = rollout_options(then, policy)
    undecided = [option for option in (*waiting, paying) if option.verdict == "UNKNOWN"]
    if undecided:
        return _inconclusive(then, policy, undecided, (*paying.reasons, *everything))
    rollouts = waiting
    blocking = (*paying.with_verdict("FAIL"), *(r for option in rollouts for r in option.with_verdict("FAIL")))
    return _hold(evidence, f"no option passes: {blocking[0].text}", blocking, everything)


def certificates_to_issue(evidence: Evidence) -> tuple[CertificateToIssue, ...]:
    """The candidate's own, those that passed, and those of older clients that passed."""
    passed = [item.gallery_generation for item in evidence.certificates if item.verdict == "PASS"]
    candidate = evidence.candidate
    pairs = [(candidate, owner) for owner in (candidate, *passed)]
    pairs += [(item.query_generation, candidate) for item in evidence.clients if item.verdict == "PASS"]
    return tuple(CertificateToIssue(query_generation=query, gallery_generation=owner) for query, owner in pairs)


def served_with(evidence: Evidence) -> tuple[ThresholdToServe, ...]:
    """Thresholds of the candidate and of the older clients that may read it."""
    queries = {evidence.candidate, *(item.query_generation for item in evidence.clients if item.verdict == "PASS")}
    return thresholds_to_serve(evidence.consumers, queries)


def missing_pieces(evidence: Evidence, policy: RolloutPolicy) -> tuple[Reason, ...]:
    """Everything without which no rollout may be decided."""
    names = list(evidence.missing)
    if evidence.self_test is None and not any("self-test" in name for name in names):
        names.append("self-test")
    if not evidence.is_first_generation:
        names += _missing_limits(evidence, policy) + _missing_states(evidence, policy)
    held = _preconditions(evidence, policy)
    return tuple(
        Reason(
            guard="missing", scope=name, verdict="UNKNOWN", text=f"missing: {name}; nothing is rolled out without it"
        )
        for name in dict.fromkeys(names)
    ) + tuple(Reason(guard="missing", scope=why, verdict="UNKNOWN", text=why) for why in held)


def _preconditions(evidence: Evidence, policy: RolloutPolicy) -> list[str]:
    """Why nothing can be judged although everything was measured, each in a sentence."""
    found = []
    if evidence.self_test == 0:
        found.append(f"{evidence.candidate} finds nothing even in its own gallery: its self-test is 0")
    if evidence.is_first_generation:
        if evidence.champion is not None:
            found.append(f"{evidence.champion} serves already: {evidence.candidate} is not the first generation")
        known = evidence.self_test if evidence.self_test_lower is None else evidence.self_test_lower
        if evidence.chance is not None and known is not None and known <= evidence.chance:
            found.append(
                f"the self-test of {evidence.candidate}, {percent(evidence.self_test)} (at least {percent(known)}), is "
                f"not above the {percent(evidence.chance)} of a model that knows nothing"
            )
        return found
    if evidence.candidate == evidence.champion:
        found.append(f"{evidence.candidate} serves already: it cannot be judged against itself")
    if evidence.near_copy_share is not None and evidence.near_copy_share > policy.max_near_copy_share:
        found.append(
            f"the gallery holds a near copy of {percent(evidence.near_copy_share)} of the queries, which any model "
            f"finds; the limit is {percent(policy.max_near_copy_share)}: take them out of the evaluation"
        )
    if evidence.unreadable_share > policy.max_unreadable_share:
        found.append(
            f"{percent(evidence.unreadable_share)} of the gallery cannot be read now, the limit is "
            f"{percent(policy.max_unreadable_share)}: repair it first, 'graceful check' names the rows"
        )
    if evidence.look is not None and evidence.look.share == 0:
        found.append(
            f"the error level of evaluation set {evidence.look.evaluation_set} is spent: the "
            f"{evidence.look.number - 1} judgements before had all of it; bring fresh evaluation identities"
        )
    overall = [state for state in evidence.states if state.scope == OVERALL]
    judged = overall[-1].num_queries - overall[-1].num_log_queries if overall else 0
    if overall and judged < policy.min_coverage * evidence.num_queries:
        found.append(
            f"only {judged:,} of {evidence.num_queries:,} queries find a relevant row in what serves "
            f"now, {percent(policy.min_coverage)} are needed: the others were not judged"
        )
    if overall and overall[-1].num_clusters < policy.min_identities:
        found.append(
            f"the queries come from {overall[-1].num_clusters} identities, at least {policy.min_identities} are "
            "needed: more queries of the same ones do not help"
        )
    return found


def _missing_limits(evidence: Evidence, policy: RolloutPolicy) -> list[str]:
    names = ("quality_margin_points", "max_dip_points", "max_wave_zero_share")
    missing = [f"threshold: {name} of the policy" for name in names if getattr(policy, name) is None]
    if policy.nfr_limit is None and policy.max_flips_per_repair is None:
        missing.append("threshold: max_nfr of the policy")
    for name in ("alpha", "metric", "k", "quality_margin_points"):
        found, asked = getattr(evidence, name), getattr(policy, name)
        if found != asked:
            missing.append(f"threshold: evidence gathered for {name} {found}, policy asks for {asked}; gather again")
    return missing


def _missing_states(evidence: Evidence, policy: RolloutPolicy) -> list[str]:
    missing = []
    if evidence.champion is None:
        missing.append("baseline: the champion")
    if not evidence.certificates and set(evidence.live_owners) != {evidence.candidate}:
        missing.append("baseline: certificates of the live owners")
    scopes = {state.scope for state in evidence.states}
    for required in (OVERALL, *policy.required_slices, *severity_scopes(policy)):
        inside = [scope for scope in scopes if scope == required or scope.startswith(f"{required}=")]
        if not inside:
            missing.append(f"slice {required!r}" if required != OVERALL else "metric: all states")
        for scope in sorted(inside):
            for fraction in policy.fractions:
                if not _measured(evidence, scope, fraction):
                    missing.append(f"metric: state {fraction_state(fraction)!r} in {scope}")
    return missing


def _measured(evidence: Evidence, scope: str, fraction: float) -> bool:
    found = [state for state in evidence.states if state.scope == scope and state.fraction == fraction]
    return len(found) == 1 and found[0].num_queries > 0 and None not in (found[0].difference, found[0].nfr)


def _bootstrap(evidence: Evidence, policy: RolloutPolicy) -> Decision:
    return _decision(
        evidence,
        outcome="BOOTSTRAP",
        summary=f"BOOTSTRAP: the lineage is empty and the self-test of {evidence.candidate} was measured "
        f"({percent(evidence.self_test)}); it serves as the first generation.",
        certificates=certificates_to_issue(evidence),
        decisive=standing(evidence, policy),
    )


def _hold(evidence: Evidence, why: str, decisive: Sequence[Reason], others: Iterable[Reason]) -> Decision:
    return _decision(evidence, outcome="HOLD", summary=f"HOLD: {why}.", decisive=decisive, others=others)


def _rollout(evidence: Evidence, passing: Sequence[Option], everything: Iterable[Reason]) -> Decision:
    chosen, why = _best(evidence, passing)
    waves = evidence.wave_zero_generations
    before = f" Before the move, the rows of {', '.join(waves)} are re-embedded." if waves else ""
    work = f"re-embed {100 * chosen.fraction:g} % of the gallery in order '{evidence.order}'"
    if chosen.fraction == 0:
        work = "leave the gallery as it is"
    return _decision(
        evidence,
        outcome="COMPATIBLE_ROLLOUT",
        summary=f"COMPATIBLE_ROLLOUT: serve queries with {evidence.candidate} now and {work}: every guard passes in "
        f"every state on the way ({why}).{before}",
        fraction=chosen.fraction,
        order=evidence.order,
        wave_zero_generations=waves,
        certificates=certificates_to_issue(evidence),
        decisive=chosen.reasons,
        others=everything,
    )


def _best(evidence: Evidence, passing: Sequence[Option]) -> tuple[Option, str]:
    values = {}
    for option in passing:
        cost = next((cost for cost in evidence.costs if cost.fraction == option.fraction), None)
        gain = state_of(evidence, OVERALL, option.fraction).difference_lower
        if cost is not None and gain is not None and evidence.cost_inputs is not None:
            values[option.fraction] = net_value(evidence.cost_inputs, cost, 100 * gain)
    known = {fraction: value for fraction, value in values.items() if value is not None}
    if len(known) < len(passing):
        return passing[0], "no prices given: the smallest fraction that passes"
    best = max(passing, key=lambda option: known[option.fraction])
    return best, f"best net value {known[best.fraction]:,.0f} of {len(passing)} fractions that pass"


def _full_backfill(
    evidence: Evidence, full: Option, rollouts: Sequence[Option], everything: Iterable[Reason]
) -> Decision:
    blocking = next(reason for option in rollouts for reason in option.reasons if reason.verdict != "PASS")
    return _decision(
        evidence,
        outcome="FULL_BACKFILL",
        summary=f"FULL_BACKFILL: only the fully backfilled state passes ({full.reasons[-1].text}); a "
        f"compatible rollout does not: {blocking.text}.",
        fraction=1.0,
        order=evidence.order,
        certificates=certificates_to_issue(evidence),
        decisive=(*full.reasons, blocking),
        others=everything,
    )


def _inconclusive(
    evidence: Evidence, policy: RolloutPolicy, undecided: Sequence[Option], everything: Iterable[Reason]
) -> Decision:
    option = most_hopeful(undecided)
    open_reasons = option.with_verdict("UNKNOWN")
    needs = {further(reason, evidence, policy): reason for reason in open_reasons}
    need = hardest([*needs])
    reason = needs[need]
    return _decision(
        evidence,
        outcome="INCONCLUSIVE",
        summary=f"INCONCLUSIVE: the evaluation is too small to tell whether {as_question(option, reason, policy)}. "
        f"{in_words(need, policy)}{_spent(evidence, policy)}",
        queries_needed=need.queries,
        identities_needed=need.identities,
        identities_range=(need.least, need.most),
        queries_needed_for=f"{option.name}: {reason.guard} "
        f"({reason.scope}{', ' + reason.state if reason.state else ''})",
        decisive=open_reasons,
        others=everything,
    )


def _spent(evidence: Evidence, policy: RolloutPolicy) -> str:
    """What the error level has to do with it, where earlier candidates or a plan have taken of it."""
    look = evidence.look
    return "" if look is None or look.share == 1 else f" This was {told(look, policy)}."


def _decision(
    evidence: Evidence, *, decisive: Sequence[Reason], others: Iterable[Reason] = (), **fields: object
) -> Decision:
    reasons = tuple(dict.fromkeys((*decisive, *others)))
    common: dict[str, object] = {"candidate": evidence.candidate, "champion": evidence.champion, "reasons": reasons}
    if fields["outcome"] in ("BOOTSTRAP", "COMPATIBLE_ROLLOUT", "FULL_BACKFILL"):
        common["thresholds"] = served_with(evidence)
    return Decision.model_validate({**common, "num_decisive": len(set(decisive)), **fields})
