"""Which gallery rows a query is compared with: equal identities, a query's own item, and who owns a row in each state.

Bookkeeping over identities and columns for `exact.py`; no score is computed here.

Invariants:
* An identity or item id of None or "" is unknown and matches nothing, not even another unknown one.
* However many states are laid out, a gallery row is in one piece per generation that some state shows it with.

Shapes: Q queries, N gallery rows, D width.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Matches:
    """Columns of each query's relevant rows, its own item left out, and of its own item; as offsets and values."""

    num_queries: int
    num_rows: int
    relevant_offsets: NDArray[np.int64]
    relevant_columns: NDArray[np.int64]
    own_offsets: NDArray[np.int64]
    own_columns: NDArray[np.int64]


def match_rows(
    query_identities: ArrayLike,
    gallery_identities: ArrayLike,
    query_item_ids: ArrayLike | None,
    gallery_item_ids: ArrayLike | None,
) -> Matches:
    """Find, for every query, the gallery rows of its identity and those of its own item."""
    if (query_item_ids is None) != (gallery_item_ids is None):
        raise ValueError("ranking: expected item ids of queries and gallery, or of neither; found one of them")
    num_queries, num_rows = len(np.asarray(query_identities)), len(np.asarray(gallery_identities))
    offsets, columns = _equal_columns(query_identities, gallery_identities)
    own_offsets, own_columns = np.zeros(num_queries + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if query_item_ids is not None and gallery_item_ids is not None:
        if len(np.asarray(query_item_ids)) != num_queries or len(np.asarray(gallery_item_ids)) != num_rows:
            raise ValueError("ranking: expected as many item ids as identities, found another number")
        own_offsets, own_columns = _equal_columns(query_item_ids, gallery_item_ids)
        rows = np.repeat(np.arange(num_queries), np.diff(offsets))
        own_rows = np.repeat(np.arange(num_queries), np.diff(own_offsets))
        others = ~np.isin(rows * num_rows + columns, own_rows * num_rows + own_columns)
        columns = columns[others]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[others], minlength=num_queries))]).astype(np.int64)
    return Matches(num_queries, num_rows, offsets, columns, own_offsets, own_columns)


def _equal_columns(left: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each value of `left`: the positions in `right` that hold it (offsets, positions); unknown matches nothing."""
    codes: dict[Hashable, int] = {}
    right_values, left_values = np.asarray(right).tolist(), np.asarray(left).tolist()
    right_codes = np.array([codes.setdefault(value, len(codes)) for value in right_values], dtype=np.int64)
    left_codes = np.array(
        [-1 if value is None or value == "" else codes.get(value, -1) for value in left_values], dtype=np.int64
    )
    order = np.argsort(right_codes, kind="stable")
    ends = np.cumsum(np.bincount(right_codes, minlength=len(codes) + 1))
    starts = np.concatenate([[0], ends[:-1]])
    sizes = np.where(left_codes >= 0, (ends - starts)[left_codes], 0)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return offsets, order[np.repeat(starts[left_codes], sizes) + within]


@dataclass(frozen=True)
class Piece:
    """Neighbouring columns with one owner in every state: those in [begin, end) of `Layout.order`.

    `vectors` (end - begin, D) are the rows of one generation; `states` (positions) show these columns with them.
    """

    begin: int
    end: int
    vectors: NDArray[np.float32]
    states: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Gallery columns reordered so that every state is a few contiguous pieces, each computed once for all states.

    `order` (N,) original columns. The pieces of one state cover every column once.
    """

    order: NDArray[np.int64]
    pieces: tuple[Piece, ...]


def lay_out(
    gallery_vectors: Mapping[str, NDArray[np.float32]],
    states: Sequence[str],
    owners: Mapping[str, NDArray[np.int64]],
    num_rows: int,
) -> Layout:
    """Lay out the galleries for `states`: keys of `gallery_vectors`, or of `owners` (codes in its order)."""
    names = list(gallery_vectors)
    # Columns that have the same owner in every state belong together.
    kind = np.zeros(num_rows, dtype=np.int64)
    for state in states:
        if state in owners:
            kind = np.unique(kind * len(names) + owners[state], return_inverse=True)[1]
    order = np.argsort(kind, kind="stable")
    edges = np.flatnonzero(np.diff(kind[order], prepend=-1, append=num_rows)) if num_rows else np.zeros(1, dtype=int)
    pieces = []
    for begin, end in pairwise(edges.tolist()):
        shown: dict[str, list[int]] = {}
        for position, state in enumerate(states):
            owner = state if state in gallery_vectors else names[owners[state][order[begin]]]
            shown.setdefault(owner, []).append(position)
        for name, positions in shown.items():
            vectors = gallery_vectors[name]
            rows = vectors if len(edges) == 2 else vectors[order[begin:end]]
            pieces.append(Piece(begin, end, rows, tuple(positions)))
    return Layout(order, tuple(pieces))


def owner_codes(
    vectors: Mapping[str, NDArray[np.float32]], owner: ArrayLike, num_rows: int | None
) -> NDArray[np.int64]:
    """Return (N,) positions in `vectors`, given those or the keys."""
    values = np.asarray(owner)
    if values.ndim != 1 or (num_rows is not None and len(values) != num_rows):
        raise ValueError(f"mixing galleries: expected an owner for each of {num_rows} rows, found {values.shape}")
    if values.dtype.kind in "iu":
        if len(values) and (values.min() < 0 or values.max() >= len(vectors)):
            raise ValueError(
                f"mixing galleries: expected codes from 0 to {len(vectors) - 1}, found {values.min()} to {values.max()}"
            )
        return values.astype(np.int64)
    codes = {name: code for code, name in enumerate(vectors)}
    unknown = sorted({str(value) for value in values.tolist() if value not in codes})
    if unknown:
        raise ValueError(f"mixing galleries: expected owners among {list(codes)}, found {unknown}")
    return np.array([codes[value] for value in values.tolist()], dtype=np.int64)
