"""Begins and ends a canary: who may be watched, what it may read meanwhile, and what becomes of the serving state.

Nothing here moves the serving state but `serving.rollback`, which goes through the move gate. What a candidate that
waits may read is what its evaluation certifies; it is granted by the record of the canary and ends with it, so that no
certificate is in force that no decision has issued.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graceful.errors import GracefulError, UsageError
from graceful.evaluation.changed import changed
from graceful.evaluation.decision import certificates_to_issue
from graceful.evaluation.outcomes import SERVED, fraction_state
from graceful.flows.settings.canary import CanaryConfig
from graceful.flows.store.approvals import awaited
from graceful.flows.store.canaries import Canary, Tally, record_end, record_start, standing
from graceful.flows.store.evaluations import Evaluation, read_evaluation
from graceful.flows.store.events import CanaryEnded, CanaryStarted, Decided
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.serving import operator, refuse_retired, rollback


@dataclass(frozen=True)
class Wanted:
    """What the operator asks for, over the configuration where it is given."""

    shadow: bool = False
    share: float | None = None
    hours: float | None = None
    max_changed: float | None = None
    max_nfr: float | None = None


def begin(
    workspace: Workspace,
    config: CanaryConfig,
    generation: str,
    wanted: Wanted,
    *,
    max_hidden: int = 0,
    policy_nfr: float | None = None,
) -> Canary:
    """Watch a generation beside what serves; endpoints begin at their next look.

    A candidate that waits, or one that served before a rollback, answers a share of the queries, or is only asked
    beside (`shadow`). The champion itself is watched against the generation whose place it took. `policy_nfr`: share of
    labelled pictures that may flip negatively, where neither `wanted` nor `config` says it; None limits nothing.

    Raises:
        MoveRefusedError: nobody waits for it, or more than `max_hidden` items that can be read now it could not read.
        UsageError: nothing says how many answers may change.
        CanaryUnderWayError: another one has not ended.
    """
    serving, act = workspace.registry.serving(), f"watching {generation}"
    if serving.champion is None:
        raise MoveRefusedError(f"{act}: expected a generation that serves, found none; run 'graceful update' first")
    refuse_retired(workspace, act, generation)
    evaluation = _newest_evaluation(workspace, generation)
    is_champion = generation == serving.champion
    if is_champion and serving.previous is None:
        raise MoveRefusedError(
            f"{act}: expected a previous generation to compare it with, found none; its probation is over"
        )
    reference = str(serving.previous) if is_champion else serving.champion
    if evaluation is not None and evaluation.decision.champion != reference:
        evaluation = None  # it says nothing about these two
    readable = () if is_champion else _readable(workspace, generation, evaluation, max_hidden)
    measured = None if evaluation is None else _measured(evaluation, is_champion)
    limit = _limit(config, wanted, measured, act)
    max_nfr = next((one for one in (wanted.max_nfr, config.max_nfr, policy_nfr) if one is not None), None)

    def started(number: int) -> CanaryStarted:
        return CanaryStarted(
            number=number,
            reference=reference,
            readable=readable,
            is_champion=is_champion,
            shadow=wanted.shadow,
            share=config.share if wanted.share is None else wanted.share,
            hours=config.hours if wanted.hours is None else wanted.hours,
            max_changed=limit,
            max_failed=config.max_failed,
            max_answer_s=config.max_answer_s,
            max_nfr=max_nfr,
            alpha=config.alpha,
            measured=measured,
            by=operator(),
        )

    return record_start(workspace.registry, generation, started)


def settle(
    workspace: Workspace,
    canary: Canary,
    outcome: Literal["changed", "failing", "flipping", "time", "stopped", "moved"],
    reason: str,
    tally: Tally,
    *,
    by: str = "",
) -> CanaryEnded:
    """End a canary; a champion that crossed a limit is rolled back, through the move gate.

    The move comes first: a process that dies after it leaves a canary whose champion serves no longer, which the next
    look ends, by `moved_by` knowing why. Where the gate refuses, the end says so, and nothing has moved.
    """
    move = ""
    if canary.started.is_champion and outcome in ("changed", "failing", "flipping"):
        try:
            state = rollback(workspace, reason=canary.moved_by + reason, leaving=canary.candidate)
            move = f"rolled back to {state.champion}"
        except GracefulError as error:
            serving = workspace.registry.serving()
            is_done = serving.moved_by.startswith(canary.moved_by)  # another process came first
            move = f"rolled back to {serving.champion}" if is_done else f"not rolled back: {error}"
    ended = CanaryEnded(
        number=canary.number,
        outcome=outcome,
        reason=reason,
        move=move,
        compared=tally.compared,
        changed=tally.changed,
        attempted=tally.attempted,
        failed=tally.failed,
        labelled=tally.labelled,
        negative_flips=tally.negative_flips,
        by=by,
    )
    return record_end(workspace.registry, canary, ended)


def summary_of(canary: Canary, tally: Tally) -> dict[str, Any]:
    """How a canary stands, by what was seen: shares, bounds that hold at every moment, and limits."""
    started, found = canary.started, standing(canary, tally)
    return {
        "number": canary.number,
        "candidate": canary.candidate,
        "reference": started.reference,
        "kind": "probation" if started.is_champion else "shadow" if started.shadow else "canary",
        "share": started.share,
        "hours": started.hours,
        "watched_hours": round(tally.watched_s / 3600, 4),
        "compared": tally.compared,
        "changed": tally.changed,
        "changed_share": found.changed,
        "changed_lower": found.changed_lower,
        "changed_upper": found.changed_upper,
        "max_changed": started.max_changed,
        "measured": started.measured,
        "overlap": found.overlap,
        "attempted": tally.attempted,
        "failed": tally.failed,
        "failed_lower": found.failed_lower,
        "max_failed": started.max_failed,
        "labelled": tally.labelled,
        "negative_flips": tally.negative_flips,
        "positive_flips": tally.positive_flips,
        "nfr": found.nfr,
        "nfr_lower": found.nfr_lower,
        "nfr_upper": found.nfr_upper,
        "max_nfr": started.max_nfr,
        "answered_by_candidate": tally.answered,
        "dropped": tally.dropped,
        "repeated": tally.repeated,
        "vectors": tally.vectors,
    }


def _newest_evaluation(workspace: Workspace, generation: str) -> Evaluation | None:
    found = [event.payload for event in workspace.registry.events(Decided) if event.generation == generation]
    return read_evaluation(workspace.evaluation_uri(found[-1].evaluation)) if found else None


def _readable(workspace: Workspace, generation: str, evaluation: Evaluation | None, max_hidden: int) -> tuple[str, ...]:
    """What a candidate may read while it is watched: nothing is granted to one that has certificates of its own."""
    registry, act = workspace.registry, f"watching {generation}"
    serving, asked = registry.serving(), awaited(registry)
    waits = [serving.left, serving.prepared, registry.pending_generation()]
    waits += [] if asked is None or not asked.is_open else [asked.generation]
    if generation not in waits:
        names = ", ".join(dict.fromkeys(name for name in (serving.champion, *waits) if name)) or "none"
        raise MoveRefusedError(
            f"{act}: expected a generation that serves, waits for a word, or served before a rollback, found another "
            f"one; those are {names}"
        )
    granted: tuple[str, ...] = ()
    if (generation, generation) in registry.certificates():
        readable = registry.readable(generation)
    elif evaluation is None:
        raise MoveRefusedError(
            f"{act}: expected an evaluation against {serving.champion}, which serves, found none; run 'graceful update "
            "--again'"
        )
    else:
        pairs = certificates_to_issue(evaluation.evidence)
        granted = tuple(pair.gallery_generation for pair in pairs if pair.query_generation == generation)
        readable = list(granted)
    _refuse_hidden(workspace, act, readable, max_hidden)
    return granted


def _refuse_hidden(workspace: Workspace, act: str, readable: Sequence[str], max_hidden: int) -> None:
    """Refuse a candidate that could not read what the champion reads: what is missing would change its answers."""
    champion = str(workspace.registry.serving().champion)
    with workspace.gallery.lease() as version:
        now, then = workspace.view(champion, version), workspace.gallery.view(list(readable), version)
        hidden = int(((now.owner >= 0) & (then.owner < 0)).sum())
    if hidden > max_hidden:
        raise MoveRefusedError(
            f"{act}: expected it to read every item that can be read now, found {hidden:,} that it could not: it has "
            "no certificate for the generations that own them; 'graceful accept' embeds these first, and the champion "
            "can be watched afterwards"
        )


def _measured(evaluation: Evaluation, is_champion: bool) -> float | None:
    """The share of changed first answers in the state that is watched; None without a query log."""
    log, decision = evaluation.outcomes.log, evaluation.decision
    state = fraction_state(float(decision.fraction or 0.0) if is_champion else 0.0)
    if log is None or not len(log) or not log.has((SERVED, state)):
        return None
    return float(np.mean(changed(log, (SERVED, state))))


def _limit(config: CanaryConfig, wanted: Wanted, measured: float | None, act: str) -> float:
    """How many answers may change: what is said, else what was measured and what it may be exceeded by."""
    given = config.max_changed if wanted.max_changed is None else wanted.max_changed
    if given is not None:
        return given
    if measured is None:
        raise UsageError(
            f"{act}: expected to know how many first answers may change, found no query log in its evaluation and no "
            "canary.max_changed; give --max-changed 10%"
        )
    return min(1.0, measured + config.max_changed_excess)
