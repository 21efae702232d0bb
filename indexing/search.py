"""Search over an immutable state in memory: rows of one or many generations, exact or approximate, changed by copying.

A state has, per width, a *base* (rows that never change, with an approximate index or none), a bitmap of the base's
live rows, and a small *fresh* part of rows that came since. A change makes a new state that shares the base: it costs
what changed. Whoever searches holds one state for a whole request; a new state is published by one assignment.

Invariants:
* Exact search finds what a full sort by (score, then lower revision) finds, the same for one query and for a thousand,
  for a mixed gallery and for one of a single generation, however many rows are dead. FAISS proposes a few more rows
  than asked for; these are scored again in one way, and where that does not prove the answer exact, all rows near the
  last score are scored again.
* Approximate search returns live rows only, with exact scores, at a breadth whose recall was measured. A K that was not
  measured, and a query that finds fewer rows than it should, are answered exactly.
* No state ever changes: an answer comes from one state, and names it.

Shapes: Q queries, N rows, K results, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from graceful.indexing.derived_files import IndexCorruptedError
from graceful.indexing.exact import check_finite, comparable_queries
from graceful.indexing.index_choice import IndexReport, SearchConfig
from graceful.indexing.kinds import choose_index, proposals, search_parameters, selector_of
from graceful.indexing.ranking import TIE_TOLERANCE
from graceful.indexing.snapshots import (
    Manifest,
    SegmentRows,
    ServedSegment,
    map_vectors,
    read_index,
    read_live,
    read_manifest,
    read_revisions,
    read_vectors,
)

__all__ = ["AddedRows", "IndexCorruptedError", "IndexState", "SearchResult", "build_state", "open_snapshot"]

# Rows proposed beyond K; ties wider than this are resolved by scoring more rows again.
EXTRA_CANDIDATES = 16
# A query whose proposals are mostly dead asks once more for so many times as many.
WIDER = 8
BLOCK_QUERIES = 1024
# The proposed rows of a block of queries are copied to be scored again: 64 MiB at most.
BLOCK_VALUES = 16 * 2**20
OPEN_THREADS = 4
# Kinds that are chosen to save memory: the vectors themselves stay on disk.
MAPPED_KINDS = ("ivf_sq8", "ivf_pq")
NOT_HERE = np.int16(-1)


@dataclass(frozen=True)
class SearchResult:
    """The best rows, best first, all (Q, K): revisions int64, scores float32, owning generations (object).

    Where there are fewer than K rows the rest is -1, NaN and None.
    """

    revisions: NDArray[np.int64]
    scores: NDArray[np.float32]
    generations: NDArray[np.object_]
    snapshot_id: str


@dataclass(frozen=True)
class AddedRows:
    """Rows to add to a state: `revisions` (n,) with vectors (n, D) of one generation."""

    generation: str
    revisions: NDArray[np.int64]
    vectors: NDArray[np.float32]


@dataclass(frozen=True)
class IndexState:
    """What one query generation sees at one moment. Any number of threads may search it at the same time."""

    snapshot_id: str
    query_generation: str
    generations: tuple[str, ...]
    prefix_widths: tuple[int, ...]
    widths: tuple[_Width, ...] = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Rows that can be found."""
        return sum(part.num_live for width in self.widths for part in width.parts)

    @property
    def num_changed(self) -> int:
        """Rows that are not as the base has them: dead ones of the base, and fresh ones."""
        return sum(len(width.fresh) + len(width.base) - width.base.num_live for width in self.widths)

    def rows_by_generation(self) -> dict[str, int]:
        """Number of rows of each generation. Costs a pass over all rows."""
        _, codes = self.live_rows()
        counts = np.bincount(codes, minlength=len(self.generations))
        return {name: int(count) for name, count in zip(self.generations, counts, strict=True)}

    @property
    def reports(self) -> dict[int, IndexReport | None]:
        """By width: what the approximate index is, None where search is exact."""
        return {width.size: None if width.base.index is None else width.base.index.report for width in self.widths}

    def search(self, queries: NDArray[np.float32], k: int) -> SearchResult:
        """Return the K best rows of each query (Q, D): by score, ties by the lower revision.

        Raises:
            WidthMismatchError: rows of a width that is neither the queries' nor a declared prefix of it.
            NonFiniteEmbeddingError: a query holds NaN or infinity.
        """
        if queries.ndim != 2 or k < 1:
            raise ValueError(f"searching: expected queries (Q, D) and k >= 1, found {queries.shape} and {k}")
        check_finite(queries, "queries")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        scores = np.full((len(queries), k), np.nan, dtype=np.float32)
        revisions = np.full((len(queries), k), -1, dtype=np.int64)
        codes = np.full((len(queries), k), NOT_HERE, dtype=np.int16)
        # Below this number of queries FAISS would leave BLAS and be four to six times slower.
        faiss.cvar.distance_compute_blas_threshold = 1
        block = max(1, min(BLOCK_QUERIES, BLOCK_VALUES // ((k + EXTRA_CANDIDATES) * queries.shape[1])))
        for start in range(0, len(queries), block):
            rows = slice(start, start + block)
            found = [
                part.best(comparable_queries(queries[rows], width.size, self.prefix_widths), k)
                for width in self.widths
                for part in width.parts
                if part.num_live
            ]
            if not found:
                continue
            best = found[0] if len(found) == 1 else _merged(found, k)
            count = best.scores.shape[1]
            is_found = best.revisions >= 0
            scores[rows, :count] = np.where(is_found, best.scores, np.nan)
            revisions[rows, :count] = best.revisions
            codes[rows, :count] = np.where(is_found, best.codes, NOT_HERE)
        names = np.array([*self.generations, None], dtype=object)
        return SearchResult(revisions, scores, names[codes], self.snapshot_id)

    def changed(
        self,
        snapshot_id: str,
        dead: NDArray[np.int64],
        added: Sequence[AddedRows] = (),
        *,
        query_generation: str | None = None,
        prefix_widths: Collection[int] | None = None,
    ) -> IndexState:
        """Return a state without the rows of the `dead` revisions and with the `added` rows.

        A revision that is added takes the place of its row here, whatever its width. The base is shared.

        Raises:
            NonFiniteEmbeddingError: a vector holds NaN or infinity.
        """
        for rows in added:
            check_finite(rows.vectors, f"vectors of {rows.generation}")
        added = [rows for rows in added if len(rows.revisions)]
        taken = np.unique(np.concatenate([np.empty(0, np.int64), *(rows.revisions for rows in added)]))
        if len(taken) != sum(len(rows.revisions) for rows in added):
            raise ValueError("changing an index: expected each added revision once, found one twice")
        gone = np.union1d(np.asarray(dead, np.int64), taken)
        names = tuple(dict.fromkeys([*self.generations, *(rows.generation for rows in added)]))
        widths = [width.without(gone) for width in self.widths]
        for rows in added:
            size = rows.vectors.shape[1]
            place = next((number for number, width in enumerate(widths) if width.size == size), None)
            if place is None:
                place = len(widths)
                widths.append(_Width(size, _empty_part(size), _empty_part(size)))
            code = names.index(rows.generation)
            widths[place] = replace(widths[place], fresh=widths[place].fresh.extended(rows, code))
        return IndexState(
            snapshot_id,
            query_generation or self.query_generation,
            names,
            self.prefix_widths if prefix_widths is None else tuple(sorted(prefix_widths)),
            tuple(widths),
        )

    def owners(self, revisions: NDArray[np.int64]) -> NDArray[np.int16]:
        """For each revision (n,) the position in `generations` of who owns its row, -1 where there is none."""
        owners = np.full(len(revisions), NOT_HERE, dtype=np.int16)
        for width in self.widths:
            for part in width.parts:
                asked, rows = part.rows_of(revisions)
                owners[asked] = part.codes[rows]
        return owners

    def live_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
        """Revisions (N,) ascending of all rows, and the position in `generations` of who owns each."""
        parts = [(part, part.live_rows()) for width in self.widths for part in width.parts]
        revisions = np.concatenate([np.empty(0, np.int64), *(part.revisions[rows] for part, rows in parts)])
        codes = np.concatenate([np.empty(0, np.int16), *(part.codes[rows] for part, rows in parts)])
        order = np.argsort(revisions, kind="stable")
        return revisions[order], codes[order]

    def segment_rows(self) -> list[SegmentRows]:
        """All rows by generation, to be published."""
        revisions, codes = self.live_rows()
        result = []
        for code, generation in enumerate(self.generations):
            mine = revisions[codes == code]
            if len(mine):

                def load(positions: NDArray[np.int64], mine: NDArray[np.int64] = mine) -> NDArray[np.float32]:
                    return self.vectors(mine[positions])

                result.append(SegmentRows(generation, mine, load))
        return result

    def vectors(self, revisions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors (n, D) of rows that are here and have one width."""
        out: NDArray[np.float32] | None = None
        for width in self.widths:
            for part in width.parts:
                asked, rows = part.rows_of(revisions)
                if len(asked):
                    if out is None:
                        out = np.empty((len(revisions), width.size), np.float32)
                    out[asked] = part.vectors[rows]
        return np.empty((0, 0), np.float32) if out is None else out


def open_snapshot(
    folder: str | Path, *, prefix_widths: Collection[int] = (), manifest: Manifest | None = None
) -> IndexState:
    """Load a snapshot for search; every file is compared with its checksum.

    Vectors under a compressed index are mapped, to save memory: their file must not be cut meanwhile. Others are read.

    Raises:
        UnknownFormatError: written in a format that this version does not know.
        IndexCorruptedError: a file is missing or damaged.
    """
    manifest = manifest or read_manifest(folder)
    root = Path(folder).parent
    generations = tuple(dict.fromkeys(served.segment.generation for served in manifest.segments))
    widths = []
    with ThreadPoolExecutor(OPEN_THREADS) as threads:
        for size in dict.fromkeys(served.segment.width for served in manifest.segments):
            members = {s.segment.segment_id: s for s in manifest.segments if s.segment.width == size}
            stored = next((index for index in manifest.indexes if index.width == size), None)
            index, covered = None, list(members.values())
            if stored is not None:
                index = _Approximate(read_index(root, stored), stored.report)
                covered = [members[name] for name in stored.segment_ids if name in members]
                num_rows = sum(entry.segment.num_rows for entry in covered)
                if len(covered) != len(stored.segment_ids) or (index.index.ntotal, index.index.d) != (num_rows, size):
                    raise IndexCorruptedError(
                        f"opening the index: expected {num_rows} x {size} rows of {len(stored.segment_ids)} segments, "
                        f"found {index.index.ntotal} x {index.index.d} of {len(covered)} ({stored.index_id}); "
                        "build it again from the gallery"
                    )
            base = _read_part(Path(folder), covered, size, generations, index, threads)
            rest = [entry for entry in members.values() if entry not in covered]
            fresh = _read_part(Path(folder), rest, size, generations, None, threads)
            widths.append(_Width(size, base, replace(fresh, starts=None)))
    widths_of_prefixes = tuple(sorted(prefix_widths))
    return IndexState(manifest.snapshot_id, manifest.query_generation, generations, widths_of_prefixes, tuple(widths))


def build_state(
    snapshot_id: str,
    query_generation: str,
    rows: Sequence[SegmentRows],
    *,
    prefix_widths: Collection[int] = (),
    config: SearchConfig = SearchConfig(),
) -> IndexState:
    """Make a state of rows in memory alone: what a snapshot of them would be, where none can be written."""
    generations = tuple(part.generation for part in rows if len(part.revisions))
    by_width: dict[int, list[tuple[int, NDArray[np.int64], NDArray[np.float32]]]] = {}
    for code, part in enumerate(part for part in rows if len(part.revisions)):
        order = np.argsort(part.revisions, kind="stable")
        vectors = np.ascontiguousarray(part.load(order), np.float32)
        by_width.setdefault(vectors.shape[1], []).append((code, part.revisions[order], vectors))
    widths = []
    for size, members in by_width.items():
        vectors = members[0][2] if len(members) == 1 else np.concatenate([vectors for _, _, vectors in members])
        kind = config.kind_for(len(vectors))
        chosen = None if kind == "flat" else choose_index(kind, vectors, config.recall_target)
        starts = np.cumsum([0, *(len(revisions) for _, revisions, _ in members)])
        base = _Part(
            vectors,
            np.concatenate([revisions for _, revisions, _ in members]),
            np.concatenate([np.full(len(revisions), code, np.int16) for code, revisions, _ in members]),
            _all_live(len(vectors)),
            len(vectors),
            tuple(int(start) for start in starts),
            None if chosen is None else _Approximate(*chosen),
        )
        widths.append(_Width(size, base, _empty_part(size)))
    return IndexState(snapshot_id, query_generation, generations, tuple(sorted(prefix_widths)), tuple(widths))


@dataclass(frozen=True)
class _Best:
    """Candidates of each query, best first, all (Q, K')."""

    scores: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]


@dataclass(frozen=True)
class _Approximate:
    index: Any
    report: IndexReport


@dataclass(frozen=True)
class _Width:
    """All rows of one width."""

    size: int
    base: _Part
    fresh: _Part

    @property
    def parts(self) -> tuple[_Part, _Part]:
        return self.base, self.fresh

    def without(self, revisions: NDArray[np.int64]) -> _Width:
        return _Width(self.size, self.base.without(revisions), self.fresh.without(revisions))


@dataclass
class _Room:
    """Memory that a fresh part grows into: `used` rows belong to some state, the newest of which may take more."""

    vectors: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]
    used: int


@dataclass(frozen=True)
class _Part:
    """Rows of one width: vectors (N, D), revisions and codes (N,), and a bitmap of who is live, low bit first.

    `starts` delimits runs of ascending revisions; None: no order. `room`: the memory that the rows lie in, if it grows.
    """

    vectors: NDArray[np.float32]
    revisions: NDArray[np.int64]
    codes: NDArray[np.int16]
    live: NDArray[np.uint8]
    num_live: int
    starts: tuple[int, ...] | None = None
    index: _Approximate | None = None
    room: _Room | None = None

    def __len__(self) -> int:
        return len(self.revisions)

    def live_rows(self) -> NDArray[np.int64]:
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

    def without(self, revisions: NDArray[np.int64]) -> _Part:
        _, rows = self.rows_of(revisions)
        if not len(rows):
            return self
        live = self.live.copy()
        np.bitwise_and.at(live, rows >> 3, ~(np.uint8(1) << (rows & 7).astype(np.uint8)))
        return replace(self, live=live, num_live=self.num_live - len(rows))

    def extended(self, added: AddedRows, code: int) -> _Part:
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

    def best(self, queries: NDArray[np.float32], k: int) -> _Best:
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

    def _exact(self, queries: NDArray[np.float32], k: int) -> _Best:
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
    ) -> tuple[_Best, NDArray[np.int64], NDArray[np.float32]]:
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

    def _scanned(self, query: NDArray[np.float32], k: int, bound: np.float32) -> _Best:
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
        return _Best(scores, revisions, codes)

    def _scored(self, queries: NDArray[np.float32], rows: NDArray[np.int64], valid: NDArray[np.bool_], k: int) -> _Best:
        """Score proposed rows (Q, M) in one way and keep the best K of the valid ones; the rest is -inf and -1."""
        rows = np.where(valid, rows, 0)
        scores = np.einsum("qd,qkd->qk", queries, self.vectors[rows])
        scores[~valid] = -np.inf
        revisions = np.where(valid, self.revisions[rows], -1)
        return _ordered(scores, revisions, self.codes[rows], k)


def _ordered(scores: NDArray[np.float32], revisions: NDArray[np.int64], codes: NDArray[np.int16], k: int) -> _Best:
    """Sort each row of (Q, M) by score, ties by the lower revision, and keep K."""
    order = np.lexsort((revisions, -scores), axis=-1)[:, :k]
    return _Best(
        np.take_along_axis(scores, order, axis=1),
        np.take_along_axis(revisions, order, axis=1),
        np.take_along_axis(codes, order, axis=1),
    )


def _merged(found: Sequence[_Best], k: int) -> _Best:
    return _ordered(
        np.concatenate([part.scores for part in found], axis=1),
        np.concatenate([part.revisions for part in found], axis=1),
        np.concatenate([part.codes for part in found], axis=1),
        k,
    )


def _with(found: _Best, queries: NDArray[np.int64], again: _Best) -> _Best:
    """The same answers with those of some queries replaced."""
    for name in ("scores", "revisions", "codes"):
        getattr(found, name)[queries] = getattr(again, name)
    return found


def _empty_part(width: int) -> _Part:
    rows = np.empty((0, width), np.float32)
    return _Part(rows, np.empty(0, np.int64), np.empty(0, np.int16), np.zeros(0, np.uint8), 0)


def _all_live(num_rows: int) -> NDArray[np.uint8]:
    return np.packbits(np.ones(num_rows, bool), bitorder="little")


def _read_part(
    folder: Path,
    members: Sequence[ServedSegment],
    width: int,
    generations: tuple[str, ...],
    index: _Approximate | None,
    threads: ThreadPoolExecutor,
) -> _Part:
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
    return _Part(vectors, revisions, codes, bits, num_live, tuple(int(start) for start in starts), index)
