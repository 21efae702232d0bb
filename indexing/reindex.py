"""Carries out a plan: embeds what a wave still lacks, and commits it exactly once.

Progress is what the gallery holds, nothing else: every wave asks which of its items have no vector of the generation
for their latest revision, embeds those, and asks again. So a run that was killed anywhere goes on where it stopped and
ends in the same gallery, and an item whose image changed meanwhile is embedded from its new image.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from graceful.files import crash_point
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.gallery import Gallery

EmbedFunction = Callable[[Sequence[EmbedUnit], Callable[[EmbeddedUnit], None]], None]
"""Embeds units with one generation's encoder and calls back as each unit's file is complete."""

_ROUNDS = 4
"""A wave is asked again while images change under it; what is still missing after that is reported, not waited for."""


@dataclass(frozen=True)
class ReindexReport:
    """What a re-index did. `failures` are items whose image could not be embedded: (item_id, reason)."""

    embedded: int = 0
    stale: int = 0
    duplicate: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    superseded: bool = False
    waves: tuple[int, ...] = field(default=())

    def plus(self, other: "ReindexReport") -> "ReindexReport":
        """Add up two reports; an item that failed in both is listed once."""
        return ReindexReport(
            self.embedded + other.embedded,
            self.stale + other.stale,
            self.duplicate + other.duplicate,
            tuple(sorted({**dict(self.failures), **dict(other.failures)}.items())),
            self.seconds + other.seconds,
            self.superseded or other.superseded,
            self.waves + other.waves,
        )


def embed_missing(
    gallery: Gallery,
    generation: str,
    embed: EmbedFunction,
    *,
    item_ids: pa.Array | None = None,
    unit_rows: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> ReindexReport:
    """Give a generation's vector to every live item (or to those named) that lacks one for its latest revision.

    `on_rows` is called with the number of rows of each committed unit.
    """
    started = time.monotonic()
    report = ReindexReport()
    failed: dict[tuple[str, int], str] = {}
    for _ in range(_ROUNDS):
        rows = gallery.missing_vectors(generation)
        if item_ids is not None:
            rows = rows.filter(pc.is_in(rows["item_id"], value_set=item_ids))
        if failed:
            keys = zip(rows["item_id"].to_pylist(), rows["revision"].to_pylist(), strict=True)
            rows = rows.filter(pa.array([key not in failed for key in keys]))
        if not rows.num_rows:
            break
        units = {unit.unit_id: unit for unit in _units(gallery, generation, rows, unit_rows)}
        progress = _Progress(gallery, generation, units, failed, on_rows)
        embed(list(units.values()), progress.commit)
        report = report.plus(progress.report)
    failures = tuple((item_id, reason) for (item_id, _), reason in sorted(failed.items()))
    return replace(report, failures=failures, seconds=time.monotonic() - started)


def carry_out(
    gallery: Gallery,
    generation: str,
    plan_items: pa.Table,
    embed: EmbedFunction,
    *,
    waves: Sequence[int] | None = None,
    unit_rows: int = 4096,
    still_wanted: Callable[[], bool] = lambda: True,
    on_rows: Callable[[int], None] | None = None,
) -> ReindexReport:
    """Embed the plan's waves in order (all, or those named); stops before a wave once `still_wanted` says no."""
    report = ReindexReport()
    numbers = sorted(pc.unique(plan_items["wave"]).to_pylist()) if waves is None else list(waves)
    for wave in numbers:
        if not still_wanted():
            return replace(report, superseded=True)
        item_ids = plan_items.filter(pc.equal(plan_items["wave"], wave))["item_id"].combine_chunks()
        done = embed_missing(gallery, generation, embed, item_ids=item_ids, unit_rows=unit_rows, on_rows=on_rows)
        report = report.plus(replace(done, waves=(wave,)))
        crash_point("wave-done")
    return report


class _Progress:
    """Commits each finished unit and counts what became of it."""

    def __init__(
        self,
        gallery: Gallery,
        generation: str,
        units: dict[str, EmbedUnit],
        failed: dict[tuple[str, int], str],
        on_rows: Callable[[int], None] | None,
    ) -> None:
        self._gallery, self._generation, self._units = gallery, generation, units
        self._failed, self._on_rows = failed, on_rows
        self.report = ReindexReport()

    def commit(self, done: EmbeddedUnit) -> None:
        keys = self._units[done.unit_id].keys
        for index, reason in done.failures:
            self._failed[(str(keys["item_id"][index]), int(str(keys["revision"][index])))] = reason
        if not done.num_rows:
            return
        outcome = self._gallery.commit_vectors(self._generation, done.unit_id)
        self.report = self.report.plus(ReindexReport(outcome.committed, outcome.stale, outcome.duplicate))
        if self._on_rows is not None:
            self._on_rows(done.num_rows)


def _units(gallery: Gallery, generation: str, rows: pa.Table, unit_rows: int) -> list[EmbedUnit]:
    """Cut rows into units named by what they hold, so that the same rows make the same unit after a restart."""
    units = []
    for start in range(0, rows.num_rows, unit_rows):
        part = rows.slice(start, unit_rows)
        item_ids, revisions = part["item_id"].to_pylist(), part["revision"].to_pylist()
        content = "\n".join(f"{item_id}@{revision}" for item_id, revision in zip(item_ids, revisions, strict=True))
        unit_id = hashlib.sha256(content.encode()).hexdigest()[:24]
        keys = {"item_id": item_ids, "revision": revisions}
        path = gallery.staging_file(generation, unit_id)
        units.append(EmbedUnit(unit_id, tuple(part["source"].to_pylist()), keys, path))
    return units
