"""Decisions that wait for a person: when they were asked for, and what was answered, as the lineage has it.

The record in the lineage is the truth; a form in the flow UI is only one way to write it. The first answer counts.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from graceful.errors import GracefulError
from graceful.files import crash_point
from graceful.flows.store.events import ApprovalAnswered, ApprovalAsked, Decided, Event
from graceful.flows.store.registry import Registry
from graceful.flows.store.workspace import open_workspace

Word = Literal["accepted", "rejected", "expired"]


class AlreadyAnsweredError(GracefulError):
    """The decision does not wait for an answer any more."""


@dataclass(frozen=True)
class Approval:
    """One decision for which a person was asked. `until`: seconds since the epoch; `word` is None while it waits."""

    update_key: str
    generation: str
    evaluation: str
    outcome: str
    champion: str | None
    asked_at: float
    until: float
    word: Word | None = None
    by: str = ""
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it waits, and there is time left."""
        return self.word is None and not self.is_late

    @property
    def is_late(self) -> bool:
        """Whether nobody has answered in time."""
        return self.word is None and time.time() > self.until

    def stale_with(self, champion: str | None) -> str | None:
        """Why it can no longer be accepted while `champion` serves, and what comes of it; None where it can."""
        if self.is_late:
            return "nobody accepted it in time; the next update holds it"
        if champion != self.champion:
            return f"judged against {self.champion}, and {champion} serves; the next update judges it anew"
        return None

    @property
    def said(self) -> str:
        """What became of it, in one line."""
        when = datetime.fromtimestamp(self.until, UTC).strftime("%Y-%m-%d %H:%M UTC")
        if self.word in (None, "expired"):
            return f"nobody accepted it by {when}" if self.word or self.is_late else f"waits until {when}"
        return f"{self.word} by {self.by}: {self.reason}"


def ask(
    registry: Registry, decided: Decided, *, update_key: str, generation: str, champion: str | None, hours: float
) -> Approval:
    """Record that a decision waits for a person; asked before, it is left alone."""
    asked = ApprovalAsked(evaluation=decided.evaluation, outcome=decided.outcome, champion=champion, hours=hours)
    # A decision that was made anew is asked for anew, under the name of its evaluation.
    registry.record_once(ApprovalAsked, decided.evaluation, generation, lambda _: asked, update_key=update_key)
    crash_point("approval-asked")
    found = approval_of(registry, decided.evaluation)
    assert found is not None
    return found


def answer(registry: Registry, approval: Approval, word: Word, *, by: str, reason: str) -> Approval:
    """Record what a person, or the end of the time, says to a decision; the same answer again changes nothing.

    Raises:
        AlreadyAnsweredError: another answer came first, or came too late.
    """
    doing = {"accepted": "accepting", "rejected": "rejecting", "expired": "holding"}[word]
    if approval.is_late and word != "expired":
        raise AlreadyAnsweredError(
            f"{doing} {approval.generation}: expected a decision that waits, found that {approval.said}; run 'graceful "
            "update --again' to judge it anew"
        )
    given = ApprovalAnswered(evaluation=approval.evaluation, answer=word, by=by, reason=reason)
    registry.record_once(
        ApprovalAnswered, approval.evaluation, approval.generation, lambda _: given, update_key=approval.update_key
    )
    crash_point("approval-answered")
    found = approval_of(registry, approval.evaluation)
    assert found is not None
    if found.word != word:
        raise AlreadyAnsweredError(
            f"{doing} {approval.generation}: expected a decision that waits, found it {found.said}; run 'graceful "
            "update --again' to judge it anew"
        )
    return found


def approval_of(registry: Registry, evaluation: str) -> Approval | None:
    """What was asked and answered about the decision of an evaluation; None where nobody was asked."""
    asked = [event for event in registry.events(ApprovalAsked) if event.payload.evaluation == evaluation]
    return _approval(registry, asked[0]) if asked else None


def is_answered(root: str, evaluation: str) -> bool:
    """Whether the decision of an evaluation waits no longer: it was answered, or its time is over."""
    asked = approval_of(open_workspace(root).registry, evaluation)
    return asked is None or not asked.is_open


def awaited(registry: Registry) -> Approval | None:
    """The decision that waits for a person now; one that was judged after it takes its place."""
    asked = registry.events(ApprovalAsked)
    if not asked or any(event.sequence > asked[-1].sequence for event in registry.events(Decided)):
        return None
    found = _approval(registry, asked[-1])
    return found if found.word is None else None


def _approval(registry: Registry, event: Event[ApprovalAsked]) -> Approval:
    asked = event.payload
    answers = [e.payload for e in registry.events(ApprovalAnswered) if e.payload.evaluation == asked.evaluation]
    given = answers[0] if answers else None
    return Approval(
        event.update_key,
        event.generation,
        asked.evaluation,
        asked.outcome,
        asked.champion,
        event.at,
        event.at + 3600 * asked.hours,
        given.answer if given else None,
        given.by if given else "",
        given.reason if given else "",
    )
