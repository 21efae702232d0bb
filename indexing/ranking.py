"""Ranks of relevant rows, counted tile by tile: no row of scores is ever whole in memory.

A tile is the product of a block of queries and some neighbouring gallery rows, made and looked at by one thread while
it is in its cache; BLAS itself runs on one thread. (Threads of BLAS that wait for the next product take the processors
of those that rank, and a block that is narrow enough to hold all its rows of scores makes the product itself slower.)
The scores of the relevant rows come first; then every tile is asked how many of its scores reach them.

Invariant: a relevant score and a tile come from products of the same kind (neither is small), so that equal vectors get
scores within the tie tolerance.

Shapes: Q queries, N gallery rows, D width, B queries of a block, P relevant rows of the block, W columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from graceful.indexing.matching import Layout, Matches, Piece

# Scores closer than this (4 to 8 float32 steps at 1) are ties. Equal vectors get scores that differ by a few steps,
# depending on their place in the block; without a tolerance a collapsed space would be ranked by that noise.
TIE_TOLERANCE = np.float32(2**-21)
TILE_COLUMNS = 1024
SPAN_COLUMNS = 16 * TILE_COLUMNS  # of one job of a thread
# Queries for which the scores of their relevant rows are computed together; never fewer, and of no fewer columns.
STRIP_ROWS, STRIP_COLUMNS = 128, 512
# With more relevant rows than this, tiles are wider: their rows may have to be sorted.
MAX_COMPARISONS = 32
SORTED_COLUMNS = 8 * TILE_COLUMNS
# Nanoseconds, measured: looking up a score among the relevant ones, comparing a score with one of them, and sorting:
# for each score that is sorted, relevant score that is looked up among them, and row. Only their proportions matter.
LOOK_UP_NS, COMPARE_NS = 45, 0.25
SORT_NS, FIND_NS, ROW_NS = 10, 25, 5000


@dataclass(frozen=True)
class _Block:
    """Queries that are ranked together, by the place of their first relevant row, and what they are compared with.

    `places` (P,) of the relevant rows in the overall list, `rows` (P,) the query of each, `columns` (P,) in the order
    of the layout; `starts` (B + 1,). `left_out` (2, n): queries and columns, by column, that take no part.
    """

    queries: NDArray[np.int64]
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    left_out: NDArray[np.int64]

    @cached_property
    def most(self) -> int:
        """The most relevant rows of one query."""
        return int(np.diff(self.starts).max())

    @property
    def tile_columns(self) -> int:
        """Columns of a tile."""
        return TILE_COLUMNS if self.most <= MAX_COMPARISONS else SORTED_COLUMNS


@dataclass(frozen=True)
class _Bounds:
    """Scores (P,) that a row must reach to be ranked before a relevant one: descending within each query."""

    block: _Block
    scores: NDArray[np.float32]
    keys: NDArray[np.int64]  # the same as `_keys`, ascending

    @cached_property
    def lowest(self) -> NDArray[np.float32]:
        """The lowest of each query, (B,)."""
        return self.scores[self.block.starts[1:] - 1]

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Bounds (most, B, 1), infinite where a query has fewer."""
        table = np.full((self.block.most, len(self.block.queries), 1), np.inf, np.float32)
        table[self.number, self.block.rows, 0] = self.scores
        return table

    @cached_property
    def number(self) -> NDArray[np.int64]:
        """Place (P,) of each bound within its query."""
        return np.arange(len(self.scores)) - self.block.starts[self.block.rows]


def rank_layout(
    queries: Sequence[NDArray[np.float32]],
    layout: Layout,
    num_states: int,
    matches: Matches,
    *,
    block_rows: int,
    num_threads: int,
) -> list[NDArray[np.int32]]:
    """Ranks of the relevant rows in every state, each (sum of P,) in the order of `matches.relevant_columns`.

    `queries` holds, for each piece of the layout, the query vectors (Q, D) at the width of its rows.
    """
    position_of = np.empty_like(layout.order)
    position_of[layout.order] = np.arange(len(layout.order))
    ranks = [np.zeros(len(matches.relevant_columns), np.int32) for _ in range(num_states)]
    with ThreadPoolExecutor(num_threads) as threads, threadpool_limits(1, user_api="blas"):
        for block in _blocks(matches, position_of, block_rows):
            vectors: dict[int, NDArray[np.float32]] = {}
            for whole in queries:
                if id(whole) not in vectors:
                    vectors[id(whole)] = whole[block.queries]
            mine = [vectors[id(whole)] for whole in queries]
            relevant = [np.empty(len(block.columns), np.float32) for _ in range(num_states)]
            products: list[NDArray[np.float32] | None] = []
            found = threads.map(partial(_relevant_scores, block), mine, layout.pieces)
            for piece, (inside, scores, product) in zip(layout.pieces, found, strict=True):
                products.append(product)
                for state in piece.states:
                    relevant[state][inside] = scores
            bounds = [_bounds(block, scores) for scores in relevant]
            counts = [np.ones(len(block.columns), np.int64) + bound.number for bound in bounds]
            jobs = [
                (queries_here, piece, product, span)
                for queries_here, piece, product in zip(mine, layout.pieces, products, strict=True)
                for span in _spans(piece.end - piece.begin, block.tile_columns)
            ]
            counted = threads.map(partial(_count_span, block, bounds), *zip(*jobs, strict=True))
            for (_, piece, _, _), numbers in zip(jobs, counted, strict=True):
                for state, number in zip(piece.states, numbers, strict=True):
                    counts[state] += number
            for state, number in enumerate(counts):
                ranks[state][block.places] = number
    return ranks


def _blocks(matches: Matches, position_of: NDArray[np.int64], block_rows: int) -> list[_Block]:
    """All queries with a relevant row, neighbours of an identity together."""
    sizes = np.diff(matches.relevant_offsets)
    asked = np.flatnonzero(sizes)
    first = position_of[matches.relevant_columns[matches.relevant_offsets[asked]]]
    asked = asked[np.argsort(first, kind="stable")]
    blocks = []
    for queries in np.array_split(asked, -(-len(asked) // block_rows)) if len(asked) else []:
        places, rows, starts = _ragged(matches.relevant_offsets, queries)
        columns = position_of[matches.relevant_columns[places]]
        own_places, own_rows, _ = _ragged(matches.own_offsets, queries)
        own_columns = position_of[matches.own_columns[own_places]]
        left_out = np.stack([np.concatenate([rows, own_rows]), np.concatenate([columns, own_columns])])
        left_out = left_out[:, np.argsort(left_out[1], kind="stable")]
        blocks.append(_Block(queries, starts, places, rows, columns, left_out))
    return blocks


def _ragged(
    offsets: NDArray[np.int64], queries: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The places of the values of some queries, the number of the query that each belongs to, and where each starts."""
    sizes = offsets[queries + 1] - offsets[queries]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = np.repeat(np.arange(len(queries)), sizes)
    return np.arange(starts[-1]) + (offsets[queries] - starts[:-1])[rows], rows, starts


def _relevant_scores(
    block: _Block, queries: NDArray[np.float32], piece: Piece
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32] | None]:
    """Which (P,) relevant rows lie in a piece, their scores, and the whole product where the piece is one tile."""
    inside = (block.columns >= piece.begin) & (block.columns < piece.end)
    rows, columns = block.rows[inside], block.columns[inside] - piece.begin
    scores = np.empty(len(rows), np.float32)
    if len(piece.vectors) <= TILE_COLUMNS:
        product = queries @ piece.vectors.T
        return inside, product[rows, columns], product
    if not len(rows):
        return inside, scores, None
    if len(queries) < 2 * STRIP_ROWS or len(piece.vectors) <= block.tile_columns:
        for begin, end in _tiles(len(piece.vectors), block.tile_columns):  # the very products that are counted in
            here = np.flatnonzero((columns >= begin) & (columns < end))
            if len(here):
                scores[here] = (queries @ piece.vectors[begin:end].T)[rows[here], columns[here] - begin]
        return inside, scores, None
    edges = np.linspace(0, len(queries), len(queries) // STRIP_ROWS + 1).astype(np.int64)
    for (begin, end), (low, high) in zip(pairwise(edges), pairwise(np.searchsorted(rows, edges)), strict=True):
        wanted, place = np.unique(columns[low:high], return_inverse=True)
        if len(wanted):
            gallery = piece.vectors[np.resize(wanted, max(len(wanted), STRIP_COLUMNS))]
            scores[low:high] = (queries[begin:end] @ gallery.T)[rows[low:high] - begin, place]
    return inside, scores, None


def _bounds(block: _Block, scores: NDArray[np.float32]) -> _Bounds:
    keys = np.sort(_keys(block.rows, scores - TIE_TOLERANCE))
    return _Bounds(block, _scores_of(keys, block.rows), keys)


def _tiles(num_rows: int, columns: int) -> list[tuple[int, int]]:
    """Even parts of a piece, none of them small unless the piece is."""
    edges = np.linspace(0, num_rows, max(1, -(-num_rows // columns)) + 1).astype(int).tolist()
    return list(pairwise(edges))


def _spans(num_rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """The tiles of a piece, as many together as one thread takes."""
    tiles, together = _tiles(num_rows, columns), max(1, SPAN_COLUMNS // columns)
    return [tiles[start : start + together] for start in range(0, len(tiles), together)]


def _count_span(
    block: _Block,
    bounds: Sequence[_Bounds],
    queries: NDArray[np.float32],
    piece: Piece,
    product: NDArray[np.float32] | None,
    span: Sequence[tuple[int, int]],
) -> list[NDArray[np.int64]]:
    """How many rows of a span reach each bound, (P,) for each state that shows the piece; `product` is overwritten."""
    counts = [np.zeros(len(block.columns), np.int64) for _ in piece.states]
    reached: list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = [[] for _ in piece.states]
    widest = max(end - begin for begin, end in span)
    memory = np.empty(len(queries) * widest, np.float32) if product is None else product.reshape(-1)
    for begin, end in span:
        tile = memory[: len(queries) * (end - begin)].reshape(len(queries), end - begin)
        if product is None:
            np.matmul(queries, piece.vectors[begin:end].T, out=tile)
        low, high = np.searchsorted(block.left_out[1], [piece.begin + begin, piece.begin + end])
        rows, columns = block.left_out[:, low:high]
        tile[rows, columns - piece.begin - begin] = -np.inf
        highest = tile.max(axis=1)
        for place, state in enumerate(piece.states):
            bound = bounds[state]
            rows = np.flatnonzero(highest >= bound.lowest)
            if not len(rows):
                continue
            some = tile[rows] if 2 * len(rows) < len(tile) else tile  # a row without any is not looked at again
            rows = rows if len(some) < len(tile) else np.arange(len(tile))
            mask = some >= bound.lowest[rows, None]
            num_reached = int(np.count_nonzero(mask))
            look_up = LOOK_UP_NS * num_reached
            compare = COMPARE_NS * tile.size * block.most
            sort = SORT_NS * num_reached + FIND_NS * len(block.columns) + ROW_NS * len(queries)
            if look_up <= min(compare, sort):
                row, column = np.divmod(np.flatnonzero(mask), mask.shape[1])
                reached[place].append((rows[row], some[row, column]))
            else:
                counts[place] += _count_by_comparing(tile, bound) if compare < sort else _count_by_sorting(tile, bound)
    for place, state in enumerate(piece.states):
        if reached[place]:
            rows, scores = (np.concatenate(parts) for parts in zip(*reached[place], strict=True))
            counts[place] += _count_reached(rows, scores, bounds[state])
    return counts


def _count_reached(rows: NDArray[np.int64], scores: NDArray[np.float32], bounds: _Bounds) -> NDArray[np.int64]:
    """How many of single scores, each of one query and not below its lowest bound, reach each bound."""
    highest_reached = np.searchsorted(bounds.keys, _keys(rows, scores))
    total = np.cumsum(np.bincount(highest_reached, minlength=len(bounds.keys)))
    before = np.concatenate([[0], total])[bounds.block.starts]
    return total - before[bounds.block.rows]


def _count_by_comparing(tile: NDArray[np.float32], bounds: _Bounds) -> NDArray[np.int64]:
    """How many scores of each row of a tile (B, W) reach each bound, (P,)."""
    width = tile.shape[1]
    mask = np.zeros((len(tile), -(-width // 8) * 8), np.bool_)  # eight at a time are counted
    table = np.empty(bounds.table.shape[:2], np.int64)
    for number, bound in enumerate(bounds.table):
        np.greater_equal(tile, bound, out=mask[:, :width])
        table[number] = np.bitwise_count(mask.view(np.uint64)).sum(axis=1, dtype=np.int64)
    return table[bounds.number, bounds.block.rows]


def _count_by_sorting(tile: NDArray[np.float32], bounds: _Bounds) -> NDArray[np.int64]:
    """The same."""
    counts = []
    for scores, lowest, (low, high) in zip(tile, bounds.lowest, pairwise(bounds.block.starts), strict=True):
        above = np.sort(scores[scores >= lowest])
        counts.append(len(above) - np.searchsorted(above, bounds.scores[low:high]))
    return np.concatenate(counts)


def _keys(rows: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Whole numbers in the order of (row ascending, score descending), equal where both are."""
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 and 0.0 are one score
    return (rows << 33) - (bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _scores_of(keys: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The scores of keys whose rows are known."""
    bits = (rows << 33) - keys
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
