"""Which gallery rows a query is compared with: equal identities, a query's own item, and who owns a row in each state.

Bookkeeping over identities and columns for `exact.py`; no score is computed here.

Invariants:
* An identity or item id of None or "" is unknown and matches nothing, not even another unknown one.
* However many states are laid out, a gallery row is packed once per generation that some state shows it with.

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
class Layout:
    """Gallery columns reordered so that every state is a few contiguous pieces of packed galleries.

    `order` (N,) original columns; `packed` the rows that some state shows, per owning generation; `segments` per state
    (entry of `packed`, begin, end), which together give the columns in `order`.
    """

    order: NDArray[np.int64]
    packed: list[NDArray[np.float32]]
    segments: list[list[tuple[int, int, int]]]


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
    groups = list(pairwise(edges.tolist()))
    shown: list[list[str]] = [
        [state if state in gallery_vectors else names[owners[state][order[begin]]] for begin, _ in groups]
        for state in states
    ]
    packed: list[NDArray[np.float32]] = []
    place: dict[tuple[str, int], tuple[int, int]] = {}
    for name in names:
        used = [group for group in range(len(groups)) if any(row[group] == name for row in shown)]
        if not used:
            continue
        begin = 0
        for group in used:
            place[name, group] = (len(packed), begin)
            begin += groups[group][1] - groups[group][0]
        columns = np.concatenate([order[slice(*groups[group])] for group in used])
        vectors = gallery_vectors[name]
        packed.append(vectors if len(groups) == 1 else vectors[columns])
    segments: list[list[tuple[int, int, int]]] = []
    for row in shown:
        pieces: list[tuple[int, int, int]] = []
        for group, name in enumerate(row):
            part, begin = place[name, group]
            end = begin + groups[group][1] - groups[group][0]
            if pieces and pieces[-1][0] == part and pieces[-1][2] == begin:
                pieces[-1] = (part, pieces[-1][1], end)
            else:
                pieces.append((part, begin, end))
        segments.append(pieces)
    return Layout(order, packed, segments)


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
