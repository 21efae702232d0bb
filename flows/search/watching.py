"""A canary as one endpoint sees it: which queries take part, what is compared, and when it is over.

A query takes part by a hash of its bytes, so that the same picture is always answered by the same generation, in every
process. Two answers are compared by their first item: another label is another answer, and where items have none,
another item is. A picture that was compared before says nothing new and is not counted again by this process.

Invariant: comparing never delays an answer. It waits in a queue of its own, after the answer; what finds no room there
is dropped, and counted.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.search.answering import ImageQuestion
from graceful.flows.search.searcher import GallerySearcher, ServedSnapshot
from graceful.flows.store.canaries import (
    Canary,
    Tally,
    read_tallies,
    standing,
    together,
    under_way,
    write_tally,
)
from graceful.flows.store.events import CanaryEnded
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.canary import settle, summary_of
from graceful.training.probes import EncoderChangedError

FLUSH_S = 1.0
"""Seconds between two writes of what was counted: a process that is killed loses what came since."""
MAX_SEEN = 200_000
"""Pictures that are remembered as seen. With so many the bounds are narrow enough, and no more are compared."""

_log = logging.getLogger("graceful.search")

AnswerImages = Callable[[ServedSnapshot, Sequence[ImageQuestion]], Sequence[bytes | Exception]]


@dataclass(frozen=True)
class Arm:
    """A canary whose generation beside the serving one is open."""

    canary: Canary
    searcher: GallerySearcher

    def takes(self, payload: bytes) -> bool:
        """Whether a query takes part: always the same for the same bytes."""
        name = f"{self.canary.number}/".encode()
        digest = hashlib.blake2b(payload, digest_size=8, key=name).digest()
        return int.from_bytes(digest, "big") < self.canary.started.share * 2**64


@dataclass(frozen=True)
class Comparison:
    """A query that was answered, to be asked of the other generation too. `seconds`: what answering it took."""

    number: int
    question: ImageQuestion
    answer: bytes
    seconds: float


class CanaryWatch:
    """What one process knows and counts. Only the thread that calls `look` reads or writes the workspace."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.process = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.arm: Arm | None = None
        self.error: str | None = None
        self.total = Tally()
        self._tally = Tally()
        self._seen: set[bytes] = set()
        self._lock = threading.Lock()
        self._canary: Canary | None = None
        self._lineage = -1
        self._began = self._before_s = 0.0
        self._flush_due = 0.0

    # Asked by those that answer ---------------------------------------------------------------------------------------

    def arm_for(self, payload: bytes) -> Arm | None:
        """The canary that a query takes part in, if it does."""
        arm = self.arm
        return arm if arm is not None and arm.takes(payload) else None

    def dropped(self) -> None:
        """Note a comparison for which there was no room."""
        self._add(Tally(dropped=1))

    def compare(self, given: Sequence[Comparison], champion: ServedSnapshot, ask: AnswerImages) -> None:
        """Ask the other generation what was answered already, and count what differs."""
        arm = self.arm
        current = [one for one in given if arm is not None and one.number == arm.canary.number]
        fresh = [one for one in current if self._is_new(one.question.payload)]
        self._add(Tally(repeated=len(current) - len(fresh)))
        if arm is None or not fresh:
            return
        canary = arm.canary
        other = champion if canary.answers else arm.searcher.served
        started = time.perf_counter()
        answers = ask(other, [one.question for one in fresh])
        seconds = (time.perf_counter() - started) / len(fresh)
        for one, answer in zip(fresh, answers, strict=True):
            self._add(_compared(canary, one, answer, seconds))

    def _is_new(self, payload: bytes) -> bool:
        digest = hashlib.blake2b(payload, digest_size=8).digest()
        if digest in self._seen or len(self._seen) >= MAX_SEEN:
            return False
        self._seen.add(digest)
        return True

    def _add(self, more: Tally) -> None:
        with self._lock:
            self._tally = self._tally.plus(more)

    # Looking ----------------------------------------------------------------------------------------------------------

    def look(self, workspace: Workspace) -> None:
        """Follow the lineage, count what all processes have seen, and end what is over; never raises."""
        wrong: Exception | None = None
        for step in (self._follow, self._judge):  # one that cannot be opened comes to its end all the same
            try:
                step(workspace)
            except Exception as error:
                wrong = wrong or error
        line = None if wrong is None else f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"
        if line is not None and line != self.error:
            _log.warning("watching a canary: %s", line)
            if isinstance(wrong, EncoderChangedError):
                self._tell(Notice("encoder", str(wrong), line))
        self.error = line

    def close(self) -> None:
        """Write what was counted."""
        try:
            self._flush()
        except OSError as error:
            _log.warning("writing what a canary has seen: %s", error)

    def status(self) -> dict[str, Any] | None:
        """How the canary stands, by what all processes had written at the last look; None where there is none."""
        canary = self._canary
        if canary is None:
            return None if self.error is None else {"error": self.error}
        return {**summary_of(canary, self.total), "watched_here": self.arm is not None, "error": self.error}

    def _follow(self, workspace: Workspace) -> None:
        version = workspace.registry.lineage_version()
        if version != self._lineage:
            canary = under_way(workspace.registry)
            if canary is None or self._canary is None or canary.number != self._canary.number:
                self._close_arm()
                self._canary = canary
                self._seen = set()
                self.total = self._tally = Tally()
            self._lineage = version
        if self._canary is None:
            return
        if self.arm is None:
            granted = self._canary.started.readable
            searcher = GallerySearcher(workspace, self._canary.beside, granted)
            known = together(list(read_tallies(self.root, self._canary.number).values()))
            self._before_s, self._began = known.watched_s, time.monotonic()
            self.arm = Arm(self._canary, searcher)
            _log.info("watching %s beside %s (canary %d)", self._canary.candidate, self._canary.started.reference,
                      self._canary.number)  # fmt: skip
        else:
            self.arm.searcher.refresh()

    def _judge(self, workspace: Workspace) -> None:
        canary = self._canary
        if canary is None or time.monotonic() < self._flush_due:
            return
        self._flush()
        self._flush_due = time.monotonic() + FLUSH_S
        self.total = total = together(list(read_tallies(self.root, canary.number).values()))
        found, serving = standing(canary, total), workspace.registry.serving()
        if serving.champion != canary.champion:
            if not serving.moved_by.startswith(canary.moved_by):
                self._end(workspace, canary, "moved", f"{serving.champion} serves now", total)
                return
            # Rolled back by this canary, by a process that died before it said so.
            is_failing = found.verdict == "failing"
            self._end(
                workspace,
                canary,
                "failing" if is_failing else "changed",
                serving.moved_by.removeprefix(canary.moved_by),
                total,
            )
        elif found.verdict == "changed":
            reason = (
                f"at least {found.changed_lower:.1%} of the first answers change, above {canary.limits.max_changed:.1%}"
            )
            self._end(workspace, canary, "changed", reason, total)
        elif found.verdict == "failing":
            limit = canary.limits.max_failed
            reason = f"at least {found.failed_lower:.1%} of the answers fail or are late, above {limit:.1%}"
            self._end(workspace, canary, "failing", reason, total)
        elif total.watched_s >= 3600 * canary.started.hours:
            self._end(workspace, canary, "time", f"watched for {canary.started.hours:g} hours", total)

    def _end(
        self,
        workspace: Workspace,
        canary: Canary,
        outcome: Literal["changed", "failing", "time", "moved"],
        reason: str,
        total: Tally,
    ) -> None:
        self.arm = None  # nobody is answered by it while others are told
        ended = settle(workspace, canary, outcome, reason, total)
        self._canary = None
        self._tell(_notice(canary, ended, total))
        if ended.move.startswith("rolled back"):
            said = {"champion": canary.started.reference, "reason": canary.moved_by + ended.reason, "by": "canary"}
            summary = f"rolled back from {canary.candidate} to {canary.started.reference}: {ended.reason}"
            self._tell(Notice("rollback", summary, f"canary {canary.number}", canary.candidate, said))
        _log.info("canary %d of %s is over: %s%s", canary.number, canary.candidate, ended.reason,
                  f"; {ended.move}" if ended.move else "")  # fmt: skip

    def _flush(self) -> None:
        canary = self._canary
        if canary is None or self.arm is None:
            return
        watched_s = self._before_s + time.monotonic() - self._began
        with self._lock:
            tally = self._tally = self._tally.model_copy(update={"watched_s": watched_s})
        write_tally(self.root, canary.number, self.process, tally)

    def _close_arm(self) -> None:
        self._flush()
        self.arm = None

    def _tell(self, notice: Notice) -> None:
        threading.Thread(target=tell_of, args=(self.root, notice), daemon=True, name="search-telling").start()


def _compared(canary: Canary, given: Comparison, other: bytes | Exception, seconds: float) -> Tally:
    """What one comparison adds. A query that the other one, which serves, cannot answer says nothing."""
    mine = json.loads(given.answer)
    is_late = (given.seconds if canary.answers or canary.started.is_champion else seconds) > canary.started.max_answer_s
    if canary.answers:
        if isinstance(other, Exception) or mine["query_generation"] not in (canary.candidate, canary.champion):
            return Tally()
        if mine["query_generation"] != canary.candidate:  # answered in its place
            return Tally(attempted=1, failed=1)
        counted = Tally(attempted=1, failed=int(is_late), answered=1)
    elif mine["query_generation"] != canary.champion:
        return Tally()
    elif isinstance(other, Exception):
        return Tally(attempted=1, failed=int(not canary.started.is_champion))
    else:
        counted = Tally(attempted=1, failed=int(is_late))
    theirs = json.loads(other)
    return counted.plus(Tally(compared=1, changed=int(_first(mine) != _first(theirs)), overlap=_overlap(mine, theirs)))


def _first(answer: dict[str, Any]) -> str:
    """What an answer shows first: a label, an item without one, or nothing."""
    hits = answer["hits"]
    if not hits:
        return ""
    return f"label:{hits[0]['label']}" if hits[0]["label"] else f"item:{hits[0]['item_id']}"


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of items that two answers have in common; 1 where both are empty."""
    mine, theirs = ({hit["item_id"] for hit in answer["hits"]} for answer in (one, other))
    return len(mine & theirs) / max(len(mine), len(theirs)) if mine or theirs else 1.0


def _notice(canary: Canary, ended: CanaryEnded, total: Tally) -> Notice:
    details = {
        **summary_of(canary, total),
        "outcome": ended.outcome,
        "reason": ended.reason,
        "move": ended.move or None,
    }
    summary = f"the {'watch' if canary.started.is_champion else 'canary'} of {canary.candidate} is over: {ended.reason}"
    summary += f"; {ended.move}" if ended.move else ""
    return Notice("canary", summary, str(canary.number), canary.candidate, details)
