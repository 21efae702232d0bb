"""A canary as one endpoint sees it: which queries take part, what is compared, and when it is over.

A query takes part by a hash of its bytes, so that the same picture is always answered by the same generation, in every
process. A picture that was compared, or labelled, before says nothing new and is not counted again by this process.

Invariant: comparing never delays an answer. It waits in a queue of its own, after the answer; what finds no room there
is dropped, and counted.
"""

import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graceful.errors import GracefulError
from graceful.evaluation.watching import Limits, Watched
from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.search.answering import ImageQuestion
from graceful.flows.search.comparing import Comparison, Judged, Labelled, compared
from graceful.flows.search.searcher import OpenSearcher, ServedSnapshot, ServingSearcher
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

_NO_VECTORS = "a vector can be answered by the generation alone that made it: such searches are not watched"

AnswerImages = Callable[[ServedSnapshot, Sequence[ImageQuestion]], Sequence[bytes | Exception]]


@dataclass(frozen=True)
class Arm:
    """A canary whose generation beside the serving one is open."""

    canary: Canary
    searcher: ServingSearcher

    def takes(self, payload: bytes) -> bool:
        """Whether a query takes part: always the same for the same bytes."""
        name = f"{self.canary.number}/".encode()
        digest = hashlib.blake2b(payload, digest_size=8, key=name).digest()
        return int.from_bytes(digest, "big") < self.canary.started.share * 2**64


class NothingWatchedError(GracefulError):
    """No generation is watched here now."""


class CanaryWatch:
    """What one process knows and counts. Only the thread that calls `look` reads or writes the workspace."""

    def __init__(self, root: str, open_searcher: OpenSearcher) -> None:
        self.root = root
        self._open = open_searcher
        self.process = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.arm: Arm | None = None
        self.error: str | None = None
        self.total = Tally()
        self._tally = Tally()
        self._seen: set[bytes] = set()
        self._labelled: set[bytes] = set()
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

    def vector_came(self) -> None:
        """Note a search by a vector, which nobody but the generation that made it can answer."""
        if self.arm is None:
            return
        if not self._tally.vectors:
            _log.warning("canary %d: %s", self.arm.canary.number, _NO_VECTORS)
        self._add(Tally(vectors=1))

    def compare(self, given: Sequence[Comparison], champion: ServedSnapshot, ask: AnswerImages) -> None:
        """Ask the other generation what was answered already, and count what differs."""
        arm = self.arm
        current = [one for one in given if arm is not None and one.number == arm.canary.number]
        fresh = [one for one in current if _is_new(one.question.payload, self._seen)]
        self._add(Tally(repeated=len(current) - len(fresh)))
        if arm is None or not fresh:
            return
        canary = arm.canary
        other = champion if canary.answers else arm.searcher.served
        started = time.perf_counter()
        answers = ask(other, [one.question for one in fresh])
        seconds = (time.perf_counter() - started) / len(fresh)
        for one, answer in zip(fresh, answers, strict=True):
            self._add(compared(canary, one, answer, seconds))

    def judge(self, given: Sequence[Labelled], champion: ServedSnapshot, ask: AnswerImages) -> list[Judged | Exception]:
        """Ask both generations, and count who is right; for each label what was found, or why nothing was."""
        arm, questions = self.arm, [one.question for one in given]
        if not given:
            return []
        if arm is None or champion.generation != arm.canary.champion:
            over = NothingWatchedError("judging a label: the canary is over; nothing was counted")
            return [over for _ in given]
        serving, beside = ask(champion, questions), ask(arm.searcher.served, questions)
        found: list[Judged | Exception] = []
        for one, served, other in zip(given, serving, beside, strict=True):
            if isinstance(served, Exception):
                found.append(served)
            elif isinstance(other, Exception):
                found.append(other)
            else:
                found.append(self._judged(arm.canary, one, served, other))
        return found

    def _judged(self, canary: Canary, given: Labelled, served: bytes, other: bytes) -> Judged:
        is_right = {canary.champion: given.is_right(served), canary.beside: given.is_right(other)}
        judged = Judged(
            canary=canary.number,
            candidate=canary.candidate,
            reference=canary.started.reference,
            candidate_is_right=is_right[canary.candidate],
            reference_is_right=is_right[canary.started.reference],
            counted=_is_new(given.question.payload, self._labelled),
        )
        self._add(judged.tally)
        return judged

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
                self._seen, self._labelled = set(), set()
                self.total = self._tally = Tally()
            self._lineage = version
        if self._canary is None:
            return
        if self.arm is None:
            granted = self._canary.started.readable
            searcher = self._open(workspace, self._canary.beside, granted)
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
            outcome = "changed" if found.verdict == "goes on" else found.verdict
            self._end(workspace, canary, outcome, serving.moved_by.removeprefix(canary.moved_by), total)
        elif found.verdict != "goes on":
            self._end(workspace, canary, found.verdict, _reason(found, canary.limits), total)
        elif total.watched_s >= 3600 * canary.started.hours:
            reason = f"watched for {canary.started.hours:g} hours"
            reason += f"; {total.vectors:,} searches came as vectors: {_NO_VECTORS}" if total.vectors else ""
            self._end(workspace, canary, "time", reason, total)

    def _end(
        self,
        workspace: Workspace,
        canary: Canary,
        outcome: Literal["changed", "failing", "flipping", "time", "moved"],
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


def _is_new(payload: bytes, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(payload, digest_size=8).digest()
    if digest in seen or len(seen) >= MAX_SEEN:
        return False
    seen.add(digest)
    return True


def _reason(found: Watched, limits: Limits) -> str:
    """Why a candidate is ended that has crossed a limit."""
    if found.verdict == "changed":
        return f"at least {found.changed_lower:.1%} of the first answers change, above {limits.max_changed:.1%}"
    if found.verdict == "failing":
        return f"at least {found.failed_lower:.1%} of the answers fail or are late, above {limits.max_failed:.1%}"
    return f"at least {found.nfr_lower:.1%} of the labelled pictures flip negatively, above {limits.max_nfr:.1%}"


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
