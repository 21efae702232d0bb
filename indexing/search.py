"""Exact search over an index snapshot in memory: one flat index, however many generations own its rows; hot swap.

Invariants:
* What is found is what a full sort by (score, then item id) finds, the same for one query and for a thousand, for a
  mixed gallery and for one of a single generation. FAISS proposes a few more rows than asked for; these are scored
  again in one way, and where that does not prove the answer exact, all rows near the last score are scored again.
* An answer comes from one snapshot and one state of it, and names it; no query sees a half-written row.
* A snapshot that cannot be opened leaves the one being served in place.

Rows of one width share one flat index, so a mixed gallery costs what a single-generation one costs; further widths are
searched with a declared prefix of the query and merged. In place, a wave of re-embedded rows costs its own rows only.

Shapes: Q queries, N rows, K results, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from graceful.indexing.exact import TIE_TOLERANCE, WidthMismatchError, check_finite, comparable_queries
from graceful.indexing.snapshots import (
    SEGMENTS_FOLDER,
    IndexCorruptedError,
    Manifest,
    SegmentInfo,
    SegmentRows,
    as_strings,
    prune_snapshots,
    publish_snapshot,
    read_bitmap,
    read_manifest,
    read_segment_rows,
    read_segment_vectors,
    vectors_of,
    write_segment,
)

__all__ = [
    "FlatSearcher",
    "IndexCorruptedError",
    "Manifest",
    "SearchResult",
    "SegmentInfo",
    "SegmentRows",
    "SwappableSearcher",
    "open_snapshot",
    "prune_snapshots",
    "publish_snapshot",
    "read_manifest",
    "write_segment",
]

# Rows proposed beyond K; ties wider than this are resolved by scoring more rows again.
EXTRA_CANDIDATES = 16
BLOCK_QUERIES = 1024
# The proposed rows of a block of queries are copied to be scored again: 64 MiB at most.
BLOCK_VALUES = 16 * 2**20
OPEN_THREADS = 4


@dataclass(frozen=True)
class SearchResult:
    """The best rows, best first, all (Q, K): item ids and owning generations (object), scores float32.

    Where there are fewer than K rows the rest is None and NaN.
    """

    item_ids: NDArray[np.object_]
    scores: NDArray[np.float32]
    generations: NDArray[np.object_]
    snapshot_id: str


def open_snapshot(folder: str | Path, verify: bool = True) -> FlatSearcher:
    """Load the current rows of a snapshot for search; `verify` compares the checksums of the segments as well.

    Raises:
        UnknownFormatError: written in a format that this version does not know.
        IndexCorruptedError: a file is missing or damaged; rebuild the index.
    """
    manifest = read_manifest(folder)
    segments_folder = Path(folder).parent / SEGMENTS_FOLDER
    generations = tuple(dict.fromkeys(served.segment.generation for served in manifest.segments))
    groups: list[_Group] = []
    with ThreadPoolExecutor(OPEN_THREADS) as threads:
        for width in dict.fromkeys(served.segment.width for served in manifest.segments):
            members = [served for served in manifest.segments if served.segment.width == width]
            index = _empty_index(width, sum(served.num_current for served in members))
            vectors = vectors_of(index)
            codes = np.empty(index.ntotal, dtype=np.int16)
            jobs, start = [], 0
            for served in members:
                segment, current = served.segment, read_bitmap(folder, served)
                part = slice(start, start + served.num_current)
                if np.count_nonzero(current) != served.num_current:
                    raise IndexCorruptedError(
                        f"opening index snapshot: expected {served.num_current} current rows of {segment.segment_id}, "
                        f"found {np.count_nonzero(current)} ({folder}); rebuild the index"
                    )
                codes[part] = generations.index(segment.generation)
                jobs.append(threads.submit(_load, segments_folder, segment, current, vectors[part], verify))
                start = part.stop
            item_ids = pa.chunked_array([job.result() for job in jobs], pa.large_string()).combine_chunks()
            groups.append(_Group(index, item_ids, codes))
    return FlatSearcher(manifest.snapshot_id, manifest.query_generation, generations, manifest.prefix_widths, groups)


class FlatSearcher:
    """The rows of one snapshot in memory. Any number of threads may search at the same time."""

    def __init__(
        self,
        snapshot_id: str,
        query_generation: str,
        generations: tuple[str, ...],
        prefix_widths: Collection[int],
        groups: Sequence[_Group],
    ) -> None:
        self.snapshot_id = snapshot_id
        self.query_generation = query_generation
        self._generations = generations
        self._prefix_widths = prefix_widths
        self._groups = list(groups)
        self._access = _SharedAccess()

    @property
    def num_rows(self) -> int:
        return sum(group.index.ntotal for group in self._groups)

    def search(self, queries: NDArray[np.float32], k: int) -> SearchResult:
        """Return the K best rows of each query (Q, D): by score, ties by the lower item id.

        Raises:
            WidthMismatchError: rows of a width that is neither the queries' nor a declared prefix of it.
            NonFiniteEmbeddingError: a query holds NaN or infinity.
        """
        if queries.ndim != 2 or k < 1:
            raise ValueError(f"searching: expected queries (Q, D) and k >= 1, found {queries.shape} and {k}")
        check_finite(queries, "queries")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        item_ids = np.full((len(queries), k), None, dtype=object)
        generations = np.full((len(queries), k), None, dtype=object)
        scores = np.full((len(queries), k), np.nan, dtype=np.float32)
        # Below this number of queries FAISS would leave BLAS and be four to six times slower.
        faiss.cvar.distance_compute_blas_threshold = 1
        names = np.array([*self._generations, None], dtype=object)
        with self._access.shared():
            snapshot_id = self.snapshot_id
            block = max(1, min(BLOCK_QUERIES, BLOCK_VALUES // ((k + EXTRA_CANDIDATES) * queries.shape[1])))
            for start in range(0, len(queries), block):
                rows = slice(start, start + block)
                found = [
                    group.best(comparable_queries(queries[rows], group.index.d, self._prefix_widths), k)
                    for group in self._groups
                    if group.index.ntotal
                ]
                if not found:
                    continue
                best_scores, best_items, best_codes = (
                    found[0]
                    if len(found) == 1
                    else _ordered(
                        np.concatenate([part[0] for part in found], axis=1),
                        np.concatenate([part[1] for part in found], axis=1),
                        np.concatenate([part[2] for part in found], axis=1),
                        k,
                    )
                )
                width = best_scores.shape[1]
                scores[rows, :width] = best_scores
                item_ids[rows, :width] = best_items
                generations[rows, :width] = names[best_codes]
        return SearchResult(item_ids, scores, generations, snapshot_id)

    def _copy(self) -> FlatSearcher:
        with self._access.shared():
            groups = [group.copy() for group in self._groups]
            return FlatSearcher(self.snapshot_id, self.query_generation, self._generations, self._prefix_widths, groups)

    def _plan_wave(self, item_ids: pa.Array, width: int) -> tuple[int, NDArray[np.int64]]:
        """Return the group and the rows that hold these items; copies of this searcher have the same ones."""
        for number, group in enumerate(self._groups):
            if group.index.d == width:
                rows = group.rows_of(item_ids)
                if (rows >= 0).all():
                    return number, rows
                item_ids = item_ids.filter(pa.array(rows < 0))
        raise WidthMismatchError(
            f"applying a wave in place: expected served items of width {width}, each once, found {len(item_ids)} more "
            f"such as {item_ids[0]}; publish a snapshot and swap"
        )

    def _overwrite(self, wave: _Wave) -> None:
        with self._access.exclusive():
            if wave.generation not in self._generations:
                self._generations += (wave.generation,)
            group = self._groups[wave.group]
            vectors_of(group.index)[wave.rows] = wave.vectors
            group.codes[wave.rows] = self._generations.index(wave.generation)
            self.snapshot_id = wave.snapshot_id


class SwappableSearcher:
    """Serves one snapshot and moves to the next without a pause: by opening it, or by overwriting rows of a copy.

    The first wave in place copies the rows being served; from then on there are two buffers of them.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self._current = open_snapshot(folder, verify)
        self._spare: FlatSearcher | None = None
        self._last_wave: _Wave | None = None
        self._one_writer = threading.Lock()

    @property
    def current(self) -> FlatSearcher:
        """What is served now; take it once per request."""
        return self._current

    def search(self, queries: NDArray[np.float32], k: int) -> SearchResult:
        """Search what is served now; see `FlatSearcher.search`."""
        return self._current.search(queries, k)

    def swap(self, folder: str | Path, *, verify: bool = True) -> str:
        """Open a snapshot and serve it from now on; return its id. If that fails, the served one stays.

        Raises:
            UnknownFormatError, IndexCorruptedError: see `open_snapshot`.
        """
        with self._one_writer:
            self._current = open_snapshot(folder, verify)
            self._spare = self._last_wave = None
            return self._current.snapshot_id

    def apply_wave(
        self, item_ids: ArrayLike | pa.Array, vectors: NDArray[np.float32], generation: str, snapshot_id: str
    ) -> None:
        """Overwrite the rows of some items with vectors (n, D) of `generation`, and serve that as `snapshot_id`.

        Only for items that are served already, at the same width; anything else needs a published snapshot and `swap`.

        Raises:
            WidthMismatchError: an item is not served at this width; nothing has changed.
            NonFiniteEmbeddingError: a vector holds NaN or infinity; nothing has changed.
        """
        check_finite(vectors, f"vectors of {generation}")
        ids = as_strings(item_ids)
        if len(ids) != len(vectors):
            raise ValueError(f"applying a wave: expected {len(ids)} vectors, found {len(vectors)}")
        if not len(ids):
            return
        with self._one_writer:
            served = self._current
            group, rows = served._plan_wave(ids, vectors.shape[1])
            wave = _Wave(group, rows, np.array(vectors, dtype=np.float32), generation, snapshot_id)
            spare = self._spare
            if spare is None:
                spare = served._copy()
            elif self._last_wave is not None:
                spare._overwrite(self._last_wave)
            spare._overwrite(wave)
            self._current, self._spare, self._last_wave = spare, served, wave


@dataclass(frozen=True)
class _Wave:
    group: int
    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]
    generation: str
    snapshot_id: str


@dataclass
class _Group:
    """All rows of one width: a flat index, their item ids and the position of their generation."""

    index: Any
    item_ids: pa.Array
    codes: NDArray[np.int16]

    def copy(self) -> _Group:
        return _Group(faiss.clone_index(self.index), self.item_ids, self.codes.copy())

    def rows_of(self, item_ids: pa.Array) -> NDArray[np.int64]:
        """Row of each item, -1 where it is not here."""
        # A hash table of the few and one walk over the many, not the other way round.
        positions = pc.index_in(self.item_ids, value_set=item_ids)
        rows = np.full(len(item_ids), -1, dtype=np.int64)
        rows[positions.drop_null().to_numpy()] = np.flatnonzero(positions.is_valid().to_numpy(zero_copy_only=False))
        return rows

    def best(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.object_], NDArray[np.int16]]:
        """Return scores, item ids and generation codes of the best rows, all (Q, min(K, N)), in the final order."""
        k = min(k, self.index.ntotal)
        num_proposed = min(k + EXTRA_CANDIDATES, self.index.ntotal)
        proposed_scores, rows = self.index.search(queries, num_proposed)
        vectors = vectors_of(self.index)
        scores = np.einsum("qd,qkd->qk", queries, vectors[rows])
        best_scores, best_items, best_codes = _ordered(scores, self._items(rows), self.codes[rows], k)
        if num_proposed < self.index.ntotal:
            # A row that was not proposed scores at most the last proposal's score, give or take the rounding.
            scale = np.maximum(1, np.abs(proposed_scores[:, -1]))
            unsure = best_scores[:, -1] <= proposed_scores[:, -1] + 2 * TIE_TOLERANCE * scale
            for query in np.flatnonzero(unsure):
                near = np.flatnonzero(
                    vectors @ queries[query] >= best_scores[query, -1] - 2 * TIE_TOLERANCE * scale[query]
                )
                again = np.einsum("d,nd->n", queries[query], vectors[near])
                table = pa.table({"score": again, "item_id": self.item_ids.take(pa.array(near))})
                order = pc.select_k_unstable(table, k, [("score", "descending"), ("item_id", "ascending")]).to_numpy()
                best_scores[query], best_codes[query] = again[order], self.codes[near[order]]
                best_items[query] = self._items(near[order])
        return best_scores, best_items, best_codes

    def _items(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        taken: NDArray[np.object_] = self.item_ids.take(pa.array(rows.ravel())).to_numpy(zero_copy_only=False)
        return taken.reshape(rows.shape)


def _ordered(
    scores: NDArray[np.float32], items: NDArray[np.object_], codes: NDArray[np.int16], k: int
) -> tuple[NDArray[np.float32], NDArray[np.object_], NDArray[np.int16]]:
    """Sort each row of (Q, M) by score, ties by item id, and keep K."""
    order = np.argsort(-scores, axis=1, kind="stable")
    sorted_scores = np.take_along_axis(scores, order, axis=1)
    for query in np.flatnonzero((np.diff(sorted_scores, axis=1) == 0).any(axis=1)):
        order[query] = sorted(range(scores.shape[1]), key=lambda m: (-scores[query, m], items[query, m]))
    order = order[:, :k]
    return (
        np.take_along_axis(scores, order, axis=1),
        np.take_along_axis(items, order, axis=1),
        np.take_along_axis(codes, order, axis=1),
    )


class _SharedAccess:
    """Many readers or one writer, who waits for the readers inside; readers who come meanwhile wait for the writer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_readers = 0
        self._writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._num_readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_readers -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._writing = True
            self._changed.wait_for(lambda: self._num_readers == 0)
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


def _empty_index(width: int, num_rows: int) -> faiss.IndexFlatIP:
    """A flat index with room for its rows, which are not set yet: `add` would grow and copy it several times."""
    index = faiss.IndexFlatIP(width)
    index.codes.resize(4 * width * num_rows)
    index.ntotal = num_rows
    return index


def _load(
    folder: Path, segment: SegmentInfo, current: NDArray[np.bool_], out: NDArray[np.float32], verify: bool
) -> pa.Array:
    """Copy the current vectors of a segment into `out` and return the item ids of those rows."""
    read_segment_vectors(folder, segment, current, out=out, verify=verify)
    item_ids = read_segment_rows(folder, segment, verify=verify)["item_id"]
    return as_strings(item_ids).filter(pa.array(current))
