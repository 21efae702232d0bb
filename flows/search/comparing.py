"""Two generations' answers to one picture, side by side: what differs, and which of them is right where that is known.

Answers are compared by their first item: another label is another answer, and where items have none, another item is.
Nothing here is open or counted; what one comparison adds to the counts is a value.
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from graceful.flows.search.answering import ImageQuestion
from graceful.flows.store.canaries import Canary, Tally


@dataclass(frozen=True)
class Comparison:
    """A query that was answered, to be asked of the other generation too. `seconds`: what answering it took."""

    number: int
    question: ImageQuestion
    answer: bytes
    seconds: float


@dataclass(frozen=True)
class Labelled:
    """A picture whose right answer is known: a label, or the very item."""

    question: ImageQuestion
    label: str | None
    item_id: str | None

    def is_right(self, answer: bytes) -> bool:
        """Whether an answer shows what is right first."""
        hits = json.loads(answer)["hits"]
        if not hits:
            return False
        return bool(hits[0]["label"] == self.label if self.item_id is None else hits[0]["item_id"] == self.item_id)


class Judged(BaseModel):
    """What a label says about the two generations."""

    canary: int
    candidate: str
    reference: str
    candidate_is_right: bool
    reference_is_right: bool
    counted: bool = Field(description="False where this picture was labelled before.")

    @property
    def tally(self) -> Tally:
        """What it adds to the counts."""
        if not self.counted:
            return Tally()
        lost = self.reference_is_right and not self.candidate_is_right
        won = self.candidate_is_right and not self.reference_is_right
        return Tally(labelled=1, negative_flips=int(lost), positive_flips=int(won))


def compared(canary: Canary, given: Comparison, other: bytes | Exception, seconds: float) -> Tally:
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
