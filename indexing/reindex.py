"""Carries out a plan: embeds what a wave still lacks, and commits it exactly once.

Progress is what the gallery holds, nothing else: every wave asks which of its revisions are live and have no vector of
the generation, embeds those, and commits them. So a run that was killed anywhere goes on where it stopped and ends in
the same gallery. A revision that is replaced meanwhile is left to whoever writes the new one.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graceful.files import crash_point
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.gallery import Gallery, GalleryVersion, VectorCommit
from graceful.indexing.revisions import is_member

EmbedFunction = Callable[[Sequence[EmbedUnit], Callable[[EmbeddedUnit], None]], None]
"""Embeds units with one generation's encoder and calls back as each unit's file is complete."""

_ROUNDS = 4
"""A gallery is asked again while images change in it; what is missing after that is reported, not waited for."""
_BLOCK_ROWS = 131_072
"""Rows whose sources are in memory at a time; a scan of the items serves as many."""


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
    revisions: NDArray[np.int64] | None = None,
    unit_rows: int = 4096,
    on_rows: Callable[[int], None] | None = None,
) -> ReindexReport:
    """Give a generation's vector to every live item (or to the revisions named, (n,) int64) that lacks one.

    `on_rows` is called with the number of rows of each committed unit.
    """
    started = time.monotonic()
    report = ReindexReport()
    failed: dict[int, str] = {}
    for _ in range(_ROUNDS):
        version = gallery.version()
        missing = gallery.missing_vectors(generation, revisions, version)
        missing = missing[~is_member(missing, np.array(sorted(failed), np.int64))]
        if not len(missing):
            break
        for start in range(0, len(missing), _BLOCK_ROWS):
            block = missing[start : start + _BLOCK_ROWS]
            work = _Work(gallery, generation, version, embed, unit_rows, on_rows)
            report = report.plus(work.embed(block, gallery.items.take(block, ["source"], version.items)))
            failed |= work.failed
            gallery.vectors_table.compact()
        if revisions is not None:
            break
    return replace(report, failures=_named(gallery, failed), seconds=time.monotonic() - started)


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
    started = time.monotonic()
    report = ReindexReport()
    failed: dict[int, str] = {}
    for block in _blocks(plan_items, waves):
        version = gallery.version()
        everyone = np.concatenate([revisions for _, revisions in block])
        missing = gallery.missing_vectors(generation, everyone, version)
        sources = gallery.items.take(missing, ["source"], version.items)
        for wave, revisions in block:
            if not still_wanted():
                report = replace(report, superseded=True)
                break
            chosen = np.flatnonzero(is_member(missing, np.sort(revisions)))
            work = _Work(gallery, generation, version, embed, unit_rows, on_rows)
            done = work.embed(missing[chosen], sources.take(pa.array(chosen)))
            failed |= work.failed
            report = report.plus(replace(done, waves=(wave,)))
            gallery.vectors_table.compact()
            crash_point("wave-done")
        if report.superseded:
            break
    return replace(report, failures=_named(gallery, failed), seconds=time.monotonic() - started)


def _blocks(plan_items: pa.Table, waves: Sequence[int] | None) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """Waves with their revisions, several at a time: as many as may be in memory, at least one."""
    numbers = sorted(pc.unique(plan_items["wave"]).to_pylist()) if waves is None else list(waves)
    wave_of, revisions = plan_items["wave"].to_numpy(), plan_items["revision"].to_numpy()
    block: list[tuple[int, NDArray[np.int64]]] = []
    for wave in numbers:
        rows = revisions[wave_of == wave]
        if block and sum(len(part) for _, part in block) + len(rows) > _BLOCK_ROWS:
            yield block
            block = []
        block.append((wave, rows))
    if block:
        yield block


class _Work:
    """Embeds some rows in units, commits each as it is finished, and counts what became of it."""

    def __init__(
        self,
        gallery: Gallery,
        generation: str,
        version: GalleryVersion,
        embed: EmbedFunction,
        unit_rows: int,
        on_rows: Callable[[int], None] | None,
    ) -> None:
        self._gallery, self._generation, self._version = gallery, generation, version
        self._embed, self._unit_rows, self._on_rows = embed, unit_rows, on_rows
        self._revisions: dict[str, NDArray[np.int64]] = {}
        self._report = ReindexReport()
        self._units: dict[str, EmbedUnit] = {}
        self.failed: dict[int, str] = {}

    def embed(self, revisions: NDArray[np.int64], sources: pa.Table) -> ReindexReport:
        """Embed rows (n,), ascending, whose `source` stands in a table (n rows)."""
        units = []
        for start in range(0, len(revisions), self._unit_rows):
            part = revisions[start : start + self._unit_rows]
            names = tuple(sources["source"].slice(start, self._unit_rows).to_pylist())
            # Named by what it holds: the same rows make the same unit after a restart.
            unit_id = hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:24]
            self._revisions[unit_id] = part
            path = self._gallery.staging_file(self._generation, unit_id)
            units.append(EmbedUnit(unit_id, names, pa.table({"revision": part}), path))
        self._units = {unit.unit_id: unit for unit in units}
        for _ in range(_ROUNDS):
            if not self._units:
                break
            # A unit stays here where somebody cleared the staging area before it was committed: it is embedded again.
            self._embed(list(self._units.values()), self._commit)
        return self._report

    def _commit(self, done: EmbeddedUnit) -> None:
        revisions = self._revisions[done.unit_id]
        for index, reason in done.failures:
            self.failed[int(revisions[index])] = reason
        if not done.num_rows:
            self._units.pop(done.unit_id)
            return
        outcome = self._gallery.commit_vectors(self._generation, done.unit_id, self._version)
        if outcome == VectorCommit(0, 0, 0):
            return
        self._units.pop(done.unit_id)
        self._report = self._report.plus(ReindexReport(outcome.committed, outcome.stale, outcome.duplicate))
        if self._on_rows is not None:
            self._on_rows(done.num_rows)


def _named(gallery: Gallery, failed: dict[int, str]) -> tuple[tuple[str, str], ...]:
    """Failures by item id; items that are gone by now are left out."""
    if not failed:
        return ()
    revisions = np.array(sorted(failed), np.int64)
    version = gallery.items_table.version()
    revisions = revisions[is_member(revisions, gallery.items.live(version))]
    names = gallery.items.take(revisions, ["item_id"], version)["item_id"].to_pylist()
    return tuple(sorted((name, failed[int(revision)]) for name, revision in zip(names, revisions, strict=True)))
