"""Exact scores, blockwise: ranks of the relevant gallery rows, and top-k as the oracle of every index.

Scores are float32 inner products of unit vectors; higher is better. What leaves this module are ranks and row numbers,
never embeddings.

Invariants:
* Ranks are exact, not estimated from a sample or a histogram; an irrelevant row with the score of a relevant one counts
  as ranked before it (pessimistic ties), so that a collapsed space scores worst, not best.
* A query's own item is known by its item id, never by its label.
* Widths that differ are an error unless the caller declares that prefixes of that width are embeddings themselves.

Several states of one query generation share their products: a mixed gallery picks, column by column, from those of the
pure galleries. `ranking.py` says how it is fast.

Shapes: Q queries, N gallery rows, D width, P relevant rows of a query, B rows of a block.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graceful.errors import GracefulError
from graceful.indexing.matching import lay_out, match_rows, owner_codes
from graceful.indexing.ranking import rank_layout

# At most this many scores (256 MiB) are held at a time; large galleries get smaller blocks of queries.
MAX_BLOCK_SCORES = 64 * 2**20
MIN_BLOCK_ROWS = 16
MAX_THREADS = 16
CHUNK = 64


class WidthMismatchError(GracefulError):
    """Query and gallery widths differ and no declared prefix allows it."""


class NonFiniteEmbeddingError(GracefulError):
    """An embedding holds NaN or infinity."""


@dataclass(frozen=True)
class RelevantRanks:
    """1-based ranks of the relevant gallery rows of every query, ascending per query.

    `offsets` (Q + 1,) int64 delimit each query's slice of `ranks` (sum of P,) int32; the slice of a query without a
    relevant row is empty. The query's own item is not ranked.
    """

    offsets: NDArray[np.int64]
    ranks: NDArray[np.int32]

    def of_query(self, query: int) -> NDArray[np.int32]:
        return self.ranks[self.offsets[query] : self.offsets[query + 1]]

    def first(self) -> NDArray[np.int32]:
        """Rank (Q,) of the best relevant row; 0 where there is none."""
        first = np.zeros(len(self.offsets) - 1, dtype=np.int32)
        measurable = np.diff(self.offsets) > 0
        first[measurable] = self.ranks[self.offsets[:-1][measurable]]
        return first


def relevant_ranks(
    query_vectors: NDArray[np.float32],
    gallery_vectors: NDArray[np.float32],
    query_identities: ArrayLike,
    gallery_identities: ArrayLike,
    query_item_ids: ArrayLike | None = None,
    gallery_item_ids: ArrayLike | None = None,
    *,
    block_rows: int = 1024,
    prefix_widths: Collection[int] = (),
) -> RelevantRanks:
    """Rank every gallery row that has the query's identity among all rows that are not the query's own item.

    An identity of None or "" is unknown: it matches nothing. `block_rows` bounds the queries scored at a time.

    Raises:
        WidthMismatchError: widths differ and the gallery's is not in `prefix_widths`.
        NonFiniteEmbeddingError: names the first row with NaN or infinity.
    """
    ranks = rank_states(
        {"queries": query_vectors},
        {"gallery": gallery_vectors},
        [("queries", "gallery")],
        query_identities,
        gallery_identities,
        query_item_ids,
        gallery_item_ids,
        block_rows=block_rows,
        prefix_widths={"queries": prefix_widths},
    )
    return ranks["queries", "gallery"]


def rank_states(
    query_vectors: Mapping[str, NDArray[np.float32]],
    gallery_vectors: Mapping[str, NDArray[np.float32]],
    pairs: Sequence[tuple[str, str]],
    query_identities: ArrayLike,
    gallery_identities: ArrayLike,
    query_item_ids: ArrayLike | None = None,
    gallery_item_ids: ArrayLike | None = None,
    *,
    mixes: Mapping[str, ArrayLike] | None = None,
    block_rows: int = 1024,
    prefix_widths: Mapping[str, Collection[int]] | None = None,
) -> dict[tuple[str, str], RelevantRanks]:
    """Rank several (query generation, gallery) pairs over the same Q queries and N gallery rows.

    The second name of a pair is a key of `gallery_vectors` or of `mixes`. A mix says for each gallery row which entry
    of `gallery_vectors` owns it: (N,) keys, or codes in the order of `gallery_vectors`. All states of one query
    generation share its products, so a backfill curve costs the products of its two ends. `prefix_widths` are those
    that each query generation declares.
    """
    mixes = mixes or {}
    widths = prefix_widths or {}
    matches = match_rows(query_identities, gallery_identities, query_item_ids, gallery_item_ids)
    for kind, mapping, rows in (
        ("query", query_vectors, matches.num_queries),
        ("gallery", gallery_vectors, matches.num_rows),
    ):
        for name, vectors in mapping.items():
            if len(vectors) != rows:
                raise ValueError(f"ranking: expected {rows} {kind} vectors of {name}, found {len(vectors)}")
            check_finite(vectors, f"{kind} vectors of {name}")
    owners = {name: owner_codes(gallery_vectors, owner, matches.num_rows) for name, owner in mixes.items()}
    for query, gallery in pairs:
        if query not in query_vectors or (gallery in gallery_vectors) == (gallery in owners):
            raise ValueError(
                f"ranking: expected a pair of {sorted(query_vectors)} and one of {sorted(gallery_vectors)} or "
                f"{sorted(owners)}, found {(query, gallery)}"
            )

    results: dict[tuple[str, str], RelevantRanks] = {}
    for query in dict.fromkeys(query for query, _ in pairs):
        states = list(dict.fromkeys(gallery for other, gallery in pairs if other == query))
        layout = lay_out(gallery_vectors, states, owners, matches.num_rows)
        at_width = {
            width: comparable_queries(query_vectors[query], width, widths.get(query, ()))
            for width in {piece.vectors.shape[1] for piece in layout.pieces}
        }
        ranks = rank_layout(
            [at_width[piece.vectors.shape[1]] for piece in layout.pieces],
            layout,
            len(states),
            matches,
            block_rows=block_rows,
            num_threads=_num_threads(),
        )
        results.update(
            {
                (query, state): RelevantRanks(matches.relevant_offsets, found)
                for state, found in zip(states, ranks, strict=True)
            }
        )
    return {pair: results[pair] for pair in pairs}


def top_k(
    query_vectors: NDArray[np.float32],
    gallery_vectors: NDArray[np.float32],
    k: int,
    *,
    exclude: NDArray[np.int64] | None = None,
    block_rows: int = 1024,
    prefix_widths: Collection[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and row numbers, both (Q, k), of the best k rows, best first; ties by the lower row number.

    `exclude` (Q,) names one gallery row per query that is not returned, -1 for none. Where the gallery has fewer rows,
    the rest is NaN and -1.
    """
    if k < 1:
        raise ValueError(f"searching: expected k >= 1, found {k}")
    check_finite(query_vectors, "query vectors")
    check_finite(gallery_vectors, "gallery vectors")
    queries = comparable_queries(query_vectors, gallery_vectors.shape[1], prefix_widths)
    scores = np.full((len(queries), k), np.nan, dtype=np.float32)
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    for rows, (block,) in _products([queries], [gallery_vectors], block_rows):
        if exclude is not None:
            excluded = np.flatnonzero(exclude[rows] >= 0)
            block[excluded, exclude[rows][excluded]] = -np.inf
        for row in range(len(block)):
            found = _best(block[row], k)
            indices[rows.start + row, : len(found)] = found
            scores[rows.start + row, : len(found)] = block[row, found]
    return scores, indices


def comparable_queries(
    query_vectors: NDArray[np.float32], width: int, prefix_widths: Collection[int]
) -> NDArray[np.float32]:
    """Return the queries at the gallery's width: as they are, or a declared prefix normalised again.

    Raises:
        WidthMismatchError: the width is neither the queries' own nor a declared, shorter prefix.
    """
    own = query_vectors.shape[1]
    if own == width:
        return query_vectors
    if width > own or width not in prefix_widths:
        raise WidthMismatchError(
            f"comparing embeddings: expected gallery vectors of width {own}, found {width} (declared prefixes: "
            f"{sorted(prefix_widths) or 'none'}); re-embed those rows or declare the prefix if the model was trained so"
        )
    prefix = query_vectors[:, :width]
    norms = np.linalg.norm(prefix, axis=1, keepdims=True)
    return np.ascontiguousarray(prefix / np.where(norms > 0, norms, 1), dtype=np.float32)


def check_finite(vectors: NDArray[np.float32], what: str) -> None:
    """Raise NonFiniteEmbeddingError naming the first row of (n, D) that holds NaN or infinity."""
    for start in range(0, len(vectors), 65_536):
        # A sum is finite when all terms are, unless it overflows; only then is each value looked at.
        with np.errstate(invalid="ignore", over="ignore"):
            suspects = np.flatnonzero(~np.isfinite(vectors[start : start + 65_536].sum(axis=1)))
        for row in suspects:
            if not np.isfinite(vectors[start + row]).all():
                raise NonFiniteEmbeddingError(
                    f"comparing embeddings: expected finite {what}, found NaN or infinity in row {start + row}; "
                    "leave out rows that could not be embedded"
                )


def _products(
    queries: Sequence[NDArray[np.float32]], galleries: Sequence[NDArray[np.float32]], block_rows: int
) -> Iterator[tuple[slice, list[NDArray[np.float32]]]]:
    """Yield blocks of query rows and their scores (B, rows of each gallery); the arrays are used again."""
    if not galleries:
        return
    num_scores = sum(len(gallery) for gallery in galleries)
    size = max(1, min(block_rows, max(MIN_BLOCK_ROWS, MAX_BLOCK_SCORES // max(1, num_scores)), len(queries[0])))
    buffers = [np.empty((size, len(gallery)), dtype=np.float32) for gallery in galleries]
    for start in range(0, len(queries[0]), size):
        rows = slice(start, min(start + size, len(queries[0])))
        blocks = [buffer[: rows.stop - start] for buffer in buffers]
        for query, gallery, block in zip(queries, galleries, blocks, strict=True):
            np.matmul(query[rows], gallery.T, out=block)
        yield rows, blocks


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the columns of the best k finite scores (N,), best first, ties by the lower column."""
    if k * CHUNK < len(scores):
        # k chunks hold a score at least as high as the k-th highest chunk maximum, so nothing below it is wanted.
        whole = len(scores) // CHUNK
        maxima = scores[: whole * CHUNK].reshape(CHUNK, whole).max(axis=0)
        candidates = np.flatnonzero(scores >= np.partition(maxima, whole - k)[whole - k])
    else:
        candidates = np.arange(len(scores))
    order = np.lexsort((candidates, -scores[candidates]))[:k]
    best = candidates[order]
    return best[scores[best] > -np.inf]


def _num_threads() -> int:
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(stated) if stated.isdigit() and int(stated) else len(os.sched_getaffinity(0)), MAX_THREADS)
