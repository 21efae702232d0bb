"""What people said about answers to queries of a log: is this answer right for this query?

A label is about a query (its content hash) and an answer, not about a model, so that it serves every later candidate.
Each file of labels that is taken in is stored once below `labels/` and never changed; a later one may only correct an
earlier one where that was asked for. Reading merges them in the order in which they came.
"""

import getpass
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from graceful.errors import GracefulError, UnknownFormatError
from graceful.evaluation.changed import NOTHING_SHOWN, RIGHT, UNCLEAR, UNKNOWN, WRONG
from graceful.files import exists, join, list_files, read_bytes, read_json, remove, write_json

FORMAT_VERSION = 1
IDENTITY = "is:"
"""Beginning of an answer that is an identity; one about a single item without an identity begins otherwise."""

PAGE_FILE = "label-next.html"
"""The page of what to label next, in an evaluation's folder."""

_SHOWN = 3


class ContradictoryLabelsError(GracefulError, ValueError):
    """One answer would be right and wrong for the same query."""


@dataclass(frozen=True)
class AnswerLabel:
    """One answer to one query: RIGHT, WRONG or UNCLEAR."""

    query: str
    answer: str
    verdict: int


@dataclass(frozen=True)
class AnswerLabels:
    """All labels of a workspace: (query, answer) to RIGHT, WRONG or UNCLEAR."""

    said: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.said)

    @property
    def identities(self) -> dict[str, str]:
        """The identity of every query of which an identity was called right; without those that have two."""
        found: dict[str, set[str]] = {}
        for (query, answer), verdict in self.said.items():
            if verdict == RIGHT and answer.startswith(IDENTITY):
                found.setdefault(query, set()).add(answer.removeprefix(IDENTITY))
        return {query: names.pop() for query, names in found.items() if len(names) == 1}

    def verdict(self, query: str, answer: str, identities: Mapping[str, str]) -> int:
        """What is known about an answer. One identity is right, so every other one is wrong; nothing is never right."""
        if answer == NOTHING_SHOWN:
            return WRONG
        said = self.said.get((query, answer), UNKNOWN)
        if said == UNKNOWN and query in identities and answer.startswith(IDENTITY):
            return RIGHT if answer == IDENTITY + identities[query] else WRONG
        return said


def read_labels(root: str) -> AnswerLabels:
    """Every label of a workspace, the newest word counting."""
    said: dict[tuple[str, str], int] = {}
    for place in list_files(join(root, "labels")):
        document = read_json(place)
        if document.get("format_version") != FORMAT_VERSION:
            raise UnknownFormatError(
                f"reading labels: expected format version {FORMAT_VERSION}, found {document.get('format_version')} (at "
                f"{place}); use the program version that wrote it"
            )
        said.update({(query, answer): int(verdict) for query, answer, verdict in document["labels"]})
    return AnswerLabels(said)


def add_labels(root: str, labels: Sequence[AnswerLabel], *, correct: bool = False) -> tuple[int, int]:
    """Store labels: how many are new, and how many correct an earlier one. The same labels again add nothing.

    A clear word takes the place of an unclear one, and an unclear one says nothing against it.

    Raises: ContradictoryLabelsError, where they contradict one another, or earlier ones without `correct`.
    """
    given: dict[tuple[str, str], int] = {}
    for label in labels:
        key = (label.query, label.answer)
        if _contradict(given.get(key, UNKNOWN), label.verdict):
            _refuse([key], "in the file", "keep one of the two rows")
        given[key] = _clearer(given.get(key, UNKNOWN), label.verdict)
    known = read_labels(root).said
    changed = [key for key, verdict in given.items() if _contradict(known.get(key, UNKNOWN), verdict)]
    if changed and not correct:
        _refuse(changed, "against what was said before", "say --correct if the new word is the right one")
    given = {key: v if key in changed else _clearer(known.get(key, UNKNOWN), v) for key, v in given.items()}
    new = {key: verdict for key, verdict in given.items() if known.get(key) != verdict}
    if new:
        rows = [[query, answer, verdict] for (query, answer), verdict in sorted(new.items())]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        number = len(list_files(join(root, "labels"))) + 1
        place = join(root, "labels", f"{number:06d}-{digest}.json")
        while exists(place):
            number += 1
            place = join(root, "labels", f"{number:06d}-{digest}.json")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(place, {"format_version": FORMAT_VERSION, "at": now, "by": getpass.getuser(), "labels": rows})
    return len(new) - len(changed), len(changed)


def forget_label_page(location: str, hashes: Iterable[str]) -> bool:
    """Remove an evaluation's page of what to label where it shows one of these contents; returns whether it did."""
    page = join(location, PAGE_FILE)
    if not exists(page):
        return False
    content = read_bytes(page)
    shown = any(digest.encode() in content for digest in hashes)
    if shown:
        remove(page)
    return shown


def _contradict(one: int, other: int) -> bool:
    return {one, other} == {RIGHT, WRONG}


def _clearer(one: int, other: int) -> int:
    return other if one in (UNKNOWN, UNCLEAR) else one


def _refuse(keys: Sequence[tuple[str, str]], where: str, remedy: str) -> None:
    shown = "; ".join(f"query {query[:12]} with answer {answer!r}" for query, answer in keys[:_SHOWN])
    raise ContradictoryLabelsError(
        f"taking labels: expected one word on each answer, found {len(keys)} that are right and wrong {where} "
        f"({shown}); {remedy}"
    )


VERDICT_OF: Mapping[str, tuple[int, int]] = {
    "both": (RIGHT, RIGHT),
    "before": (RIGHT, WRONG),
    "after": (WRONG, RIGHT),
    "neither": (WRONG, WRONG),
    "unclear": (UNCLEAR, UNCLEAR),
}
"""What a label of a pair of answers says about each of them."""
