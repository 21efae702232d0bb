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

import faiss
import numpy as np
from numpy.typing import NDArray

from graceful.indexing.derived_files import IndexCorruptedError
from graceful.indexing.exact import check_finite, comparable_queries
from graceful.indexing.index_choice import IndexReport, SearchConfig
from graceful.indexing.kinds import choose_index
from graceful.indexing.parts import (
    EXTRA_CANDIDATES,
    NOT_HERE,
    AddedRows,
    Approximate,
    Part,
    Width,
    all_live,
    empty_part,
    merged,
    read_part,
)
from graceful.indexing.snapshots import Manifest, SegmentRows, read_index, read_manifest

BLOCK_QUERIES = 1024
# The proposed rows of a block of queries are copied to be scored again: 64 MiB at most.
BLOCK_VALUES = 16 * 2**20
OPEN_THREADS = 4


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
class IndexState:
    """What one query generation sees at one moment. Any number of threads may search it at the same time."""

    snapshot_id: str
    query_generation: str
    generations: tuple[str, ...]
    prefix_widths: tuple[int, ...]
    widths: tuple[Width, ...] = field(repr=False)

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
            best = found[0] if len(found) == 1 else merged(found, k)
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
                widths.append(Width(size, empty_part(size), empty_part(size)))
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
                index = Approximate(read_index(root, stored), stored.report)
                covered = [members[name] for name in stored.segment_ids if name in members]
                num_rows = sum(entry.segment.num_rows for entry in covered)
                if len(covered) != len(stored.segment_ids) or (index.index.ntotal, index.index.d) != (num_rows, size):
                    raise IndexCorruptedError(
                        f"opening the index: expected {num_rows} x {size} rows of {len(stored.segment_ids)} segments, "
                        f"found {index.index.ntotal} x {index.index.d} of {len(covered)} ({stored.index_id}); "
                        "build it again from the gallery"
                    )
            base = read_part(Path(folder), covered, size, generations, index, threads)
            rest = [entry for entry in members.values() if entry not in covered]
            fresh = read_part(Path(folder), rest, size, generations, None, threads)
            widths.append(Width(size, base, replace(fresh, starts=None)))
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
        base = Part(
            vectors,
            np.concatenate([revisions for _, revisions, _ in members]),
            np.concatenate([np.full(len(revisions), code, np.int16) for code, revisions, _ in members]),
            all_live(len(vectors)),
            len(vectors),
            tuple(int(start) for start in starts),
            None if chosen is None else Approximate(*chosen),
        )
        widths.append(Width(size, base, empty_part(size)))
    return IndexState(snapshot_id, query_generation, generations, tuple(sorted(prefix_widths)), tuple(widths))
