"""The head of a report, for a person in a hurry: what was decided, why, what users lose and win, its cost, what next.

Plain words: whoever reads them need not know what a guard, a bound or a certificate is. Flips are counted per 10,000
searches of the users, in the worst state that they live through and in the one that stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from graceful.evaluation.captions import FULLY, duration, metric_name, moment, number, percent, reason_row, share_text
from graceful.evaluation.decision import Decision
from graceful.evaluation.evidence import OVERALL, Evidence, StateEvidence
from graceful.evaluation.guards import Reason
from graceful.evaluation.outcomes import Outcomes
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.ways import LivedStates, lived_states, wins

PER = 10_000
"""Searches that losses and wins are counted of."""


@dataclass(frozen=True)
class Stage:
    """What users live through in one state, per 10,000 of their searches. Bounds are None where there are none."""

    title: str
    when: str
    state: StateEvidence
    lost: int
    lost_at_most: int | None
    won: int
    won_at_least: int | None


@dataclass(frozen=True)
class NextStep:
    """A command, and what it is for."""

    purpose: str
    command: str


@dataclass(frozen=True)
class Headline:
    """The head of a report. `stages`: the worst state on the way, and the last one where it is another."""

    title: str
    why: str
    stages: tuple[Stage, ...]
    would_be: bool
    cost: str
    next_steps: tuple[NextStep, ...]


def headline(
    evidence: Evidence, decision: Decision, policy: RolloutPolicy, outcomes: Outcomes | None = None
) -> Headline:
    """Say a decision in plain words. Wins have bounds only where the outcomes are given."""
    lived = lived_states(evidence, decision, policy)
    return Headline(
        title=_title(decision),
        why=_why(evidence, decision, lived),
        stages=_stages(evidence, lived, outcomes),
        would_be=lived.would_be,
        cost=_cost(evidence, decision),
        next_steps=_next_steps(decision),
    )


def short_name(generation: str | None) -> str:
    """A generation as people call it.

    >>> short_name("g003-9f2c1a"), short_name(None)
    ('g003', 'nothing')
    """
    return "nothing" if generation is None else generation.partition("-")[0]


def decision_markdown(head: Headline, decision: Decision, evidence: Evidence) -> str:
    """The head of the page and the guards that led to the decision, as Markdown."""
    lines = [f"## {decision.outcome}: {head.title}", "", head.why, ""]
    if head.stages:
        served = ", if it served" if head.would_be else ""
        lines += [f"| of {PER:,} searches{served} | lost | won | {metric_name(evidence)} |", "|---" * 4 + "|"]
        for stage in head.stages:
            lost = f"{stage.lost:,}" + ("" if stage.lost_at_most is None else f", at most {stage.lost_at_most:,}")
            won = f"{stage.won:,}" + ("" if stage.won_at_least is None else f", at least {stage.won_at_least:,}")
            quality = f"{percent(stage.state.baseline)} to {percent(stage.state.value)}"
            lines.append(f"| {stage.title}: {stage.when} | {lost} | {won} | {quality} |")
        lines.append("")
    lines += [f"What it costs: {head.cost}", ""]
    lines += [f"{step.purpose}: `{step.command}`  " for step in head.next_steps]
    passed = sum(reason.verdict == "PASS" for reason in decision.reasons)
    lines += ["", f"{passed} of {len(decision.reasons)} guards pass. Those that led to the decision:", ""]
    lines += ["| guard | where | limit | measured | bound | n (effective) | verdict |", "|---" * 7 + "|"]
    for reason in decision.reasons[: decision.num_decisive]:
        row = reason_row(reason, evidence)
        keys = ("guard", "where", "limit", "value", "bound", "n", "verdict")
        lines.append("| " + " | ".join(str(row[key]).replace("|", "/") for key in keys) + " |")
    return "\n".join(lines)


def in_words(reason: Reason, evidence: Evidence) -> str:
    """One guard as a sentence without a full stop, for somebody who does not know what a guard is."""
    if reason.guard == "missing" or reason.value is None:
        return reason.text.removeprefix("missing: ")
    if reason.verdict == "UNKNOWN" and reason.guard in _ASKED:
        return f"nobody can say yet {_question(reason, evidence)}"
    metric, place, failed = metric_name(evidence), _place(reason, evidence), reason.verdict == "FAIL"
    limit = 0.0 if reason.threshold is None else reason.threshold
    if reason.guard == "NFR":
        side = "at least" if failed else "at most"
        return f"{side} {_share(reason.bound)} of the searches that work now fail {place}, {share_text(limit)} may"
    if reason.guard in ("quality", "dip"):
        if failed and reason.bound is not None:
            return f"{metric} falls by at least {_points(-reason.bound)} {place}, {_points(-limit)} may be lost"
        return f"{metric} changes by at least {_signed(reason.bound)} {place}, {_points(-limit)} may be lost"
    if reason.guard == "wave zero":
        return (
            f"the searches of {short_name(evidence.candidate)} do not work on {_share(reason.bound)} of the stored "
            f"vectors, which would have to be embedded again first; {share_text(limit)} may be"
        )
    return reason.text


_ASKED = ("NFR", "quality", "dip", "wave zero")


def _question(reason: Reason, evidence: Evidence) -> str:
    """What an open guard leaves open: whether..., with what was measured and what it may be."""
    place, limit = _place(reason, evidence), 0.0 if reason.threshold is None else reason.threshold
    if reason.guard == "NFR":
        return (
            f"whether more than {share_text(limit)} of the searches that work now would fail {place}: measured "
            f"{_share(reason.value)}, but it could be up to {_share(reason.bound)}"
        )
    if reason.guard == "wave zero":
        name = short_name(evidence.candidate)
        rows = "the vectors that are stored now" if reason.value == 1 else f"{_share(reason.value)} of the vectors"
        return f"whether the searches of {name} work on {rows}"
    return (
        f"whether {metric_name(evidence)} {place} falls by more than {_points(-limit)}: measured "
        f"{_signed(reason.value)}, but it could be {_signed(reason.bound)}"
    )


def _title(decision: Decision) -> str:
    name, champion = short_name(decision.candidate), short_name(decision.champion)
    fraction = decision.fraction or 0.0
    meanwhile = "re-embed everything meanwhile" if fraction == 1 else f"re-embed {share_text(fraction)} meanwhile"
    return {
        "BOOTSTRAP": f"Serve {name}, the first model",
        "COMPATIBLE_ROLLOUT": f"Serve {name} now, " + (meanwhile if fraction else "on the gallery as it is"),
        "FULL_BACKFILL": f"Re-embed the whole gallery, then serve {name}",
        "HOLD": f"Keep {champion}: {name} is not served" if decision.champion else f"{name} is not served",
        "INCONCLUSIVE": f"Not enough evidence: {champion} stays",
    }[decision.outcome]


def _why(evidence: Evidence, decision: Decision, lived: LivedStates) -> str:
    """The reason in one sentence."""
    name, decisive = short_name(decision.candidate), decision.reasons[: decision.num_decisive]
    if decision.outcome == "BOOTSTRAP":
        return (
            f"Nothing serves yet, so nothing can break: {name} reaches {_share(evidence.self_test)} "
            f"{metric_name(evidence)} on its own gallery."
        )
    if decision.outcome == "COMPATIBLE_ROLLOUT":
        rest = " and in every state on the way" if len(lived.states) > 1 else ""
        first = evidence.wave_zero_generations
        before = f", after the vectors of {', '.join(map(short_name, first))} were replaced" if first else ""
        return (
            f"The searches of {name} work on today's vectors{before}: from the first moment{rest} neither quality nor "
            "the searches that work today suffer more than was allowed."
        )
    if decision.outcome == "FULL_BACKFILL":
        blocking = decisive[-1]
        return f"{name} is good enough once every vector is its own, but not before: {in_words(blocking, evidence)}."
    if not decisive:
        return decision.summary.removeprefix(f"{decision.outcome}: ")
    said = in_words(decisive[0], evidence)
    if decision.outcome == "INCONCLUSIVE" and decisive[0].guard in _ASKED:
        identities = max((state.num_clusters for state in evidence.states), default=0)
        searched = f"{evidence.num_queries:,} queries of {identities:,} identities"
        said = f"{searched} are too few to tell {_question(decisive[0], evidence)}"
    others = len(decisive) - 1
    more = "" if not others else f" (and {others} more {'reason' if others == 1 else 'reasons'} below)"
    if decision.outcome == "HOLD" and decisive[0].guard != "missing":
        said = said.replace(FULLY, f"even {FULLY}")
    return f"{said[:1].upper()}{said[1:]}{more}."


def _place(reason: Reason, evidence: Evidence) -> str:
    """Where a guard looks, in words."""
    state = next((s for s in (*evidence.states, *evidence.hoped_states) if s.state == reason.state), None)
    where = "" if reason.scope == OVERALL else f"among {reason.scope} "
    if state is None:
        return where.strip() or "then"
    return (where + moment(state.fraction, whole=state.state == "fraction/1")).strip()


def _stages(evidence: Evidence, lived: LivedStates, outcomes: Outcomes | None) -> tuple[Stage, ...]:
    worst, last = lived.worst, lived.last
    if worst is None or last is None:
        return ()
    stages = [("Worst on the way", worst)] if worst is not last else []
    stages.append(("In the end" if len(lived.states) > 1 else "At once" if last.fraction < 1 else "After it", last))
    return tuple(_stage(title, state, evidence, outcomes) for title, state in stages)


def _stage(title: str, state: StateEvidence, evidence: Evidence, outcomes: Outcomes | None) -> Stage:
    known = outcomes is not None and state.state in outcomes.first_rank
    won = wins(outcomes, evidence, state) if known and outcomes is not None else None
    return Stage(
        title=title,
        when=moment(state.fraction, whole=state.state == "fraction/1"),
        state=state,
        lost=round(PER * (state.nfr or 0.0)),
        lost_at_most=None if state.nfr_upper is None else round(PER * state.nfr_upper),
        won=round(PER * (state.pfr or 0.0)),
        won_at_least=None if won is None else round(PER * won.lower),
    )


def _cost(evidence: Evidence, decision: Decision) -> str:
    if decision.outcome in ("HOLD", "INCONCLUSIVE"):
        return "Nothing: nothing moves."
    fraction = 1.0 if decision.fraction is None else decision.fraction
    cost = next((cost for cost in evidence.costs if cost.fraction == fraction), None)
    if decision.outcome == "BOOTSTRAP":
        return "The gallery is embedded once."
    if cost is None:
        return f"{share_text(max(fraction, evidence.wave_zero_share))} of the gallery to embed; not measured how long."
    if not cost.num_rows:
        return "Nothing: no image is embedded again."
    price = "price unavailable" if cost.total_price is None else f"price {number(float(cost.total_price))}"
    return f"{cost.num_rows:,} images to embed again, about {duration(cost.hours)}; {price}."


def _next_steps(decision: Decision) -> tuple[NextStep, ...]:
    name = short_name(decision.candidate)
    look = NextStep("See what would be lost", f"graceful flips {name}")
    accept = NextStep("Serve it all the same", f"graceful accept {name} --reason '...'")
    if decision.outcome == "BOOTSTRAP":
        return (NextStep("Try it", "graceful search <image>"),)
    if any(reason.guard == "missing" for reason in decision.reasons):
        return (NextStep("Find what is missing", "graceful check"),)
    if decision.outcome == "INCONCLUSIVE":
        return (look, accept, NextStep("Turn it down", f"graceful reject {name} --reason '...'"))
    if decision.outcome == "HOLD":
        return (look, accept)
    return (look, NextStep("Take it back", "graceful rollback"))


def _share(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.3g} %"


def _points(share: float) -> str:
    text = f"{100 * share:.3g}"
    return f"{text} point" if text == "1" else f"{text} points"


def _signed(share: float | None) -> str:
    return "anything" if share is None else f"{100 * share:+.2f} points"
