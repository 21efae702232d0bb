"""What is known of a canary: its beginning and its end, as the lineage has them, and what the endpoints have counted.

The lineage is the truth. What was seen is counted by every process that answers searches for itself, in one small file
of its own, written whole: sums add up whoever writes when, and a process that dies takes with it what it has not
written yet. Invariant: no clock of a host decides when a canary ends. Every process counts the seconds that it has
watched by its monotonic clock, and begins where the furthest of the others was: the most is how long it was watched.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graceful.errors import GracefulError, UnknownFormatError
from graceful.evaluation.watching import Counts, Limits, Watched, watch
from graceful.files import join, list_files, read_bytes, write_bytes
from graceful.flows.store.events import CanaryEnded, CanaryStarted
from graceful.flows.store.registry import Registry


class CanaryUnderWayError(GracefulError):
    """One generation is watched already."""


class NoCanaryError(GracefulError):
    """No generation is watched."""


@dataclass(frozen=True)
class Canary:
    """One canary, or shadow, with its end where it has come to one. `at`: what a clock said when it began."""

    candidate: str
    started: CanaryStarted
    ended: CanaryEnded | None
    at: float

    @property
    def number(self) -> int:
        """Its name."""
        return self.started.number

    @property
    def limits(self) -> Limits:
        """What the candidate may do."""
        started = self.started
        max_nfr = 1.0 if started.max_nfr is None else started.max_nfr
        return Limits(started.max_changed, started.max_failed, started.alpha, max_nfr)

    @property
    def champion(self) -> str:
        """Who serves while it is under way."""
        return self.candidate if self.started.is_champion else self.started.reference

    @property
    def beside(self) -> str:
        """Who does not serve, and is asked all the same."""
        return self.started.reference if self.started.is_champion else self.candidate

    @property
    def answers(self) -> bool:
        """Whether the one beside answers a share of the queries, and not only the one that serves."""
        return not (self.started.shadow or self.started.is_champion)

    @property
    def moved_by(self) -> str:
        """How the reason of a rollback begins that this canary was for."""
        return f"canary {self.number}: "


class Tally(BaseModel):
    """What one process, or all of them, have seen of a canary. `watched_s`: for so long, by the process's own clock.

    `answered`: queries that the candidate answered; `dropped`: comparisons for which there was no room; `repeated`:
    queries that were seen before, which say nothing new; `vectors`: searches by a vector, which are not watched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    compared: int = Field(default=0, ge=0)
    changed: int = Field(default=0, ge=0)
    overlap: float = Field(default=0.0, ge=0)
    attempted: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    labelled: int = Field(default=0, ge=0)
    negative_flips: int = Field(default=0, ge=0)
    positive_flips: int = Field(default=0, ge=0)
    answered: int = Field(default=0, ge=0)
    dropped: int = Field(default=0, ge=0)
    repeated: int = Field(default=0, ge=0)
    vectors: int = Field(default=0, ge=0)
    watched_s: float = Field(default=0.0, ge=0)

    @property
    def counts(self) -> Counts:
        """What the bounds need."""
        names = (field.name for field in fields(Counts))
        return Counts(**{name: getattr(self, name) for name in names})

    def plus(self, other: "Tally") -> "Tally":
        """Both together; they were watched for as long as one of them was."""
        mine, theirs = self.model_dump(), other.model_dump()
        added = {name: mine[name] + theirs[name] for name in mine if name not in ("format_version", "watched_s")}
        return Tally(**added, watched_s=max(self.watched_s, other.watched_s))


def canaries(registry: Registry) -> list[Canary]:
    """All that there have been, the newest last."""
    ended = {event.payload.number: event.payload for event in registry.events(CanaryEnded)}
    return [
        Canary(event.generation, event.payload, ended.get(event.payload.number), event.at)
        for event in registry.events(CanaryStarted)
    ]


def under_way(registry: Registry) -> Canary | None:
    """The one that has not ended."""
    found = canaries(registry)[-1:]
    return found[0] if found and found[0].ended is None else None


def record_start(registry: Registry, candidate: str, make: Callable[[int], CanaryStarted]) -> Canary:
    """Write down that a generation is watched; `make` is given the number that it gets.

    Raises:
        CanaryUnderWayError: another one has not ended.
    """

    def numbered(before: object) -> CanaryStarted:
        assert isinstance(before, list)
        known = canaries(registry)
        if known and known[-1].ended is None:
            raise CanaryUnderWayError(
                f"watching {candidate}: expected no other canary, found that of {known[-1].candidate} under way; end "
                "it with 'graceful canary stop --reason ...'"
            )
        return make(len(before) + 1)

    started = registry.record_once(CanaryStarted, uuid.uuid4().hex, candidate, numbered)
    return next(found for found in canaries(registry) if found.number == started.number)


def record_end(registry: Registry, canary: Canary, ended: CanaryEnded) -> CanaryEnded:
    """Write down how a canary ended; the first to say so is believed, and what it said is returned."""
    return registry.record_once(CanaryEnded, str(canary.number), canary.candidate, lambda _: ended)


def write_tally(root: str, number: int, process: str, tally: Tally) -> None:
    """Write what one process has seen, in place of what it wrote before."""
    write_bytes(join(_folder(root, number), f"{process}.json"), tally.model_dump_json().encode())


def read_tallies(root: str, number: int) -> dict[str, Tally]:
    """What every process has seen. Raises UnknownFormatError, naming the file."""
    found: dict[str, Tally] = {}
    for place in list_files(_folder(root, number)):
        name = place.rpartition("/")[2]
        if not name.startswith(".") and name.endswith(".json"):
            try:
                found[name.removesuffix(".json")] = Tally.model_validate_json(read_bytes(place))
            except FileNotFoundError:
                continue
            except ValidationError as error:
                raise UnknownFormatError(
                    f"reading what a canary has seen: expected counts, found {error.errors()[0]['msg'].lower()} (at "
                    f"{place}); remove the file, what one process has seen is lost then"
                ) from None
    return found


def together(tallies: Sequence[Tally]) -> Tally:
    """What all processes have seen."""
    total = Tally()
    for tally in tallies:
        total = total.plus(tally)
    return total


def standing(canary: Canary, tally: Tally) -> Watched:
    """How a candidate stands by what was seen."""
    return watch(tally.counts, canary.limits)


def _folder(root: str, number: int) -> str:
    return join(root, "canary", f"{number:03d}")
