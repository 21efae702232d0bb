"""Rows of one width in memory: searched exactly or approximately, changed by copying what changed.

A part never changes. Its rows may lie in memory that a newer part shares and has more rows in.

Shapes: Q queries, N rows, K results, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from graceful.indexing.index_choice import IndexReport
from graceful.indexing.kinds import proposals, search_parameters, selector_of
from graceful.indexing.ranking import TIE_TOLERANCE
from graceful.indexing.snapshots import ServedSegment, map_vectors, read_live, read_revisions, read_vectors

# Rows proposed beyond K; ties wider than this are resolved by scoring more rows again.
EXTRA_CANDIDATES = 16
# A query whose proposals are mostly dead asks once more for so many times as many.
WIDER = 8
# Kinds that are chosen to save memory: the vectors themselves stay on disk.
MAPPED_KINDS = ("ivf_sq8", "ivf_pq")
NOT_HERE = np.int16(-1)


@dataclass(frozen=True)
class AddedRows:
    """Rows to add to a state: `revisions` (n,) with vectors (n, D) of one generation."""

    generation: str
    revisions: NDArray[np.int64]
    vectors: NDArray[np.float32]


@dataclass(frozen=True)
class Best:
    """Candidates of each query, best first, all (Q, K')."""

    scores: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]


@dataclass(frozen=True)
class Approximate:
    """An approximate index over all rows of a part, and what it is."""

    index: Any
    report: IndexReport


@dataclass(frozen=True)
class Width:
    """All rows of one width."""

    size: int
    base: Part
    fresh: Part

    @property
    def parts(self) -> tuple[Part, Part]:
        """What never changes, then what came since."""
        return self.base, self.fresh

    def without(self, revisions: NDArray[np.int64]) -> Width:
        """The same rows, those of some revisions (n,) dead."""
        return Width(self.size, self.base.without(revisions), self.fresh.without(revisions))


@dataclass
class _Room:
    """Memory that a fresh part grows into: `used` rows belong to some state, the newest of which may take more."""

    vectors: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]
    used: int


@dataclass(frozen=True)
class Part:
    """Rows of one width: vectors (N, D), revisions and codes (N,), and a bitmap of who is live, low bit first.

    `starts` delimits runs of ascending revisions; None: no order. `room`: the memory that the rows lie in, if it grows.
    """

    vectors: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]
    live: NDArray[np.uint8]
    num_live: int
    starts: tuple[int, ...] | None = None
    index: Approximate | None = None
    room: _Room | None = None

    def __len__(self) -> int:
        return len(self.revisions)

    def live_rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that are live, ascending."""
        return np.flatnonzero(np.unpackbits(self.live, count=len(self), bitorder="little"))

    def rows_of(self, revisions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the revisions (n,) have a live row here, as positions (m,), and these rows (m,)."""
        asked: list[NDArray[np.int64]] = []
        rows: list[NDArray[np.int64]] = []
        if self.starts is None:
            order = np.argsort(revisions, kind="stable")
            ordered = revisions[order]
            places = np.searchsorted(ordered, self.revisions)
            here = np.flatnonzero(places < len(ordered))
            here = here[ordered[places[here]] == self.revisions[here]]
            asked, rows = [order[places[here]]], [here]
        else:
            for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
                if stop > start:
                    run = self.revisions[start:stop]
                    places = np.minimum(np.searchsorted(run, revisions), stop - start - 1)
                    known = np.flatnonzero(run[places] == revisions)
                    asked.append(known)
                    rows.append(start + places[known])
        found = np.concatenate([np.empty(0, np.int64), *rows])
        alive = self.is_live(found)
        return np.concatenate([np.empty(0, np.int64), *asked])[alive], found[alive]

    def is_live(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for each row number, of any shape, whether it is live."""
        return (self.live[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 != 0

    def without(self, revisions: NDArray[np.int64]) -> Part:
        """The same rows, those of some revisions (n,) dead; the vectors are shared."""
        _, rows = self.rows_of(revisions)
        if not len(rows):
            return self
        live = self.live.copy()
        np.bitwise_and.at(live, rows >> 3, ~(np.uint8(1) << (rows & 7).astype(np.uint8)))
        return replace(self, live=live, num_live=self.num_live - len(rows))

    def extended(self, added: AddedRows, code: int) -> Part:
        """The same rows and more; memory is shared where the rows here are the last that lie in it."""
        old, new = len(self), len(self) + len(added.revisions)
        room = self.room
        if room is None or room.used != old or len(room.revisions) < new:
            size = max(256, 2 * new)
            vectors = np.empty((size, self.vectors.shape[1]), np.float32)
            room = _Room(vectors, np.empty(size, np.int64), np.empty(size, np.int16), new)
            room.vectors[:old], room.revisions[:old], room.codes[:old] = self.vectors, self.revisions, self.codes
        room.vectors[old:new], room.revisions[old:new], room.codes[old:new] = added.vectors, added.revisions, code
        room.used = new
        live = np.zeros((new + 7) // 8, np.uint8)
        live[: len(self.live)] = self.live
        rows = np.arange(old, new)
        np.bitwise_or.at(live, rows >> 3, np.uint8(1) << (rows & 7).astype(np.uint8))
        return replace(
            self,
            vectors=room.vectors[:new],
            revisions=room.revisions[:new],
            codes=room.codes[:new],
            live=live,
            num_live=self.num_live + len(added.revisions),
            room=room,
        )

    def best(self, queries: NDArray[np.float32], k: int) -> Best:
        """The best min(K, live) rows of each query, in the final order."""
        k = min(k, self.num_live)
        breadth = None if self.index is None else self.index.report.breadth_for(k)
        if breadth is None:
            return self._exact(queries, k)
        assert self.index is not None
        selector = None if self.num_live == len(self) else selector_of(self.live)
        asked = min(proposals(self.index.report.kind, k + 1), len(self))
        parameters = search_parameters(self.index.report.kind, breadth, selector)
        _, rows = self.index.index.search(queries, asked, params=parameters)
        found = self._scored(queries, rows, rows >= 0, k)
        short = np.flatnonzero(found.revisions[:, -1] < 0)
        return _with(found, short, self._exact(queries[short], k)) if len(short) else found

    def _exact(self, queries: NDArray[np.float32], k: int) -> Best:
        num_dead = len(self) - self.num_live
        proposed = k + EXTRA_CANDIDATES
        if num_dead:
            proposed += EXTRA_CANDIDATES + 2 * proposed * num_dead // len(self)
        proposed = min(proposed, len(self))
        found, unsure, bounds = self._proposed(queries, k, proposed)
        if len(unsure) and num_dead and proposed < len(self):
            wider = min(WIDER * proposed, len(self))
            again, still, bounds_again = self._proposed(queries[unsure], k, wider)
            found = _with(found, unsure, again)
            bounds[unsure] = bounds_again
            unsure = unsure[still]
        for query in unsure:
            found = _with(found, np.array([query]), self._scanned(queries[query], k, bounds[query]))
        return found

    def _proposed(
        self, queries: NDArray[np.float32], k: int, proposed: int
    ) -> tuple[Best, NDArray[np.int64], NDArray[np.float32]]:
        """Score what FAISS proposes; also which queries that does not prove exact, and the lowest score of interest."""
        proposed_scores, rows = faiss.knn(queries, self.vectors, proposed, faiss.METRIC_INNER_PRODUCT)
        found = self._scored(queries, rows, (rows >= 0) & self.is_live(np.maximum(rows, 0)), k)
        # A row that was not proposed scores at most the last proposal's score, give or take the rounding.
        tolerance = 2 * TIE_TOLERANCE * np.maximum(1, np.abs(proposed_scores[:, -1]))
        last = np.where(found.revisions[:, -1] < 0, -np.inf, found.scores[:, -1]).astype(np.float32)
        if proposed == len(self):
            unsure = np.flatnonzero(found.revisions[:, -1] < 0)
        else:
            unsure = np.flatnonzero(last <= proposed_scores[:, -1] + tolerance)
        return found, unsure, (last - tolerance).astype(np.float32)

    def _scanned(self, query: NDArray[np.float32], k: int, bound: np.float32) -> Best:
        """The best rows of one query among all that score at least about `bound`."""
        rough = self.vectors @ query
        near = np.flatnonzero(rough >= bound)
        near = near[self.is_live(near)]
        if np.isneginf(bound) and len(near) > k:
            # Nothing is known of the k-th score yet.
            kth = np.partition(rough[near], len(near) - k)[len(near) - k]
            near = near[rough[near] >= kth - 2 * TIE_TOLERANCE * max(np.float32(1), abs(kth))]
        again = np.einsum("d,nd->n", query, self.vectors[near])
        order = np.lexsort((self.revisions[near], -again))[:k]
        best = near[order]
        # Rows that are no numbers are never near: then there are fewer.
        scores, revisions = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
        codes = np.full((1, k), NOT_HERE, np.int16)
        scores[0, : len(best)], revisions[0, : len(best)] = again[order], self.revisions[best]
        codes[0, : len(best)] = self.codes[best]
        return Best(scores, revisions, codes)

    def _scored(self, queries: NDArray[np.float32], rows: NDArray[np.int64], valid: NDArray[np.bool_], k: int) -> Best:
        """Score proposed rows (Q, M) in one way and keep the best K of the valid ones; the rest is -inf and -1."""
        rows = np.where(valid, rows, 0)
        scores = np.einsum("qd,qkd->qk", queries, self.vectors[rows])
        scores[~valid] = -np.inf
        revisions = np.where(valid, self.revisions[rows], -1)
        return _ordered(scores, revisions, self.codes[rows], k)


def _ordered(scores: NDArray[np.float32], revisions: NDArray[np.int64], codes: NDArray[np.int16], k: int) -> Best:
    """Sort each row of (Q, M) by score, ties by the lower revision, and keep K."""
    order = np.lexsort((revisions, -scores), axis=-1)[:, :k]
    return Best(
        np.take_along_axis(scores, order, axis=1),
        np.take_along_axis(revisions, order, axis=1),
        np.take_along_axis(codes, order, axis=1),
    )


def merged(found: Sequence[Best], k: int) -> Best:
    """The best K of what several parts found."""
    return _ordered(
        np.concatenate([part.scores for part in found], axis=1),
        np.concatenate([part.revisions for part in found], axis=1),
        np.concatenate([part.codes for part in found], axis=1),
        k,
    )


def _with(found: Best, queries: NDArray[np.int64], again: Best) -> Best:
    """The same answers with those of some queries replaced."""
    for name in ("scores", "revisions", "codes"):
        getattr(found, name)[queries] = getattr(again, name)
    return found


def empty_part(width: int) -> Part:
    """No rows."""
    rows = np.empty((0, width), np.float32)
    return Part(rows, np.empty(0, np.int64), np.empty(0, np.int16), np.zeros(0, np.uint8), 0)


def all_live(num_rows: int) -> NDArray[np.uint8]:
    """Bitmap of rows that are all live, low bit first."""
    return np.packbits(np.ones(num_rows, bool), bitorder="little")


def read_part(
    folder: Path,
    members: Sequence[ServedSegment],
    width: int,
    generations: tuple[str, ...],
    index: Approximate | None,
    threads: ThreadPoolExecutor,
) -> Part:
    """Put the rows of some segments one after the other, dead ones too."""
    root, sizes = folder.parent, [served.segment.num_rows for served in members]
    starts = np.cumsum([0, *sizes])
    num_rows = int(starts[-1])
    codes = np.empty(num_rows, np.int16)
    live = np.zeros(num_rows, bool)
    jobs = []
    mapped = index is not None and index.report.kind in MAPPED_KINDS and len(members) == 1
    vectors = map_vectors(root, members[0].segment) if mapped else np.empty((num_rows, width), np.float32)
    for served, start, stop in zip(members, starts[:-1], starts[1:], strict=True):
        codes[start:stop] = generations.index(served.segment.generation)
        live[start:stop] = read_live(folder, served)
        jobs.append(threads.submit(read_revisions, root, served.segment))
        if not mapped:
            read_vectors(root, served.segment, vectors[start:stop])
    revisions = np.concatenate([np.empty(0, np.int64), *(job.result() for job in jobs)])
    num_live = sum(served.num_live for served in members)
    bits = np.packbits(live, bitorder="little")
    return Part(vectors, revisions, codes, bits, num_live, tuple(int(start) for start in starts), index)
