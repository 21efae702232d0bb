"""Revisions: the numbers by which items and vectors are known, never given twice in a gallery.

A revision is an int64, `bucket << 40 | number`. An item id belongs to one of 256 buckets for ever (by its hash), and
every bucket counts for itself, so that a later revision of an item has a higher number, and writers into different
buckets do not wait for each other. A new revision of an item, a delete and an item that comes back after it was
forgotten all take the next number: a vector of a revision can never be read as that of another image.

Sorted by revision, rows lie bucket by bucket; a range of buckets is a range of numbers.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

NUM_BUCKETS = 256
NUMBER_BITS = 40
_NUMBERS = (1 << NUMBER_BITS) - 1
_MOST_NUMBERS = 8


def hashes_of(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """XXH3 of every text as a signed 64-bit number, (n,)."""
    texts = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values
    digest = xxhash.xxh3_64_digest
    joined = b"".join([digest(text.encode()) for text in texts])
    return np.frombuffer(joined, ">i8").astype(np.int64)


def buckets_of(item_ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Bucket of each item id, (n,) in [0, 256).

    >>> buckets_of(["cat.jpg", "dog.jpg", "cat.jpg"]).tolist()
    [175, 223, 175]
    """
    return (hashes_of(item_ids) >> 56) & (NUM_BUCKETS - 1)


def bucket_of_revision(revisions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket of each revision."""
    return revisions >> NUMBER_BITS


def number_revisions(buckets: NDArray[np.int64], counters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each row of a bucket the numbers that follow its counter; (n,) buckets, (256,) numbers given so far.

    >>> number_revisions(np.array([1, 0, 1]), np.array([7, 0])).tolist() == [(1 << 40) + 1, 8, (1 << 40) + 2]
    True
    """
    order = np.argsort(buckets, kind="stable")
    ordered = buckets[order]
    starts = np.searchsorted(ordered, ordered)
    revisions = np.empty(len(buckets), np.int64)
    revisions[order] = (ordered << NUMBER_BITS) + counters[ordered] + 1 + np.arange(len(buckets)) - starts
    return revisions


class Positions:
    """Where each of some revisions (N,), ascending, stands: a table over the numbers that its buckets have given."""

    def __init__(self, revisions: NDArray[np.int64]) -> None:
        self._revisions = revisions
        ends = np.searchsorted(revisions, np.arange(1, NUM_BUCKETS + 1) << NUMBER_BITS)
        starts = np.concatenate([[0], ends[:-1]])
        highest = np.where(ends > starts, revisions[np.maximum(ends - 1, 0)] & _NUMBERS, -1) if len(revisions) else None
        self._table: NDArray[np.int32] | None = None
        # Where most numbers were given to what is gone by now, searching is cheaper than a table of them all.
        if highest is None or int((highest + 1).sum()) > _MOST_NUMBERS * len(revisions):
            return
        self._highest = highest
        self._base = np.concatenate([[0], np.cumsum(highest + 1)])
        self._table = np.full(int(self._base[-1]) + 1, -1, np.int32)
        slots = (revisions & _NUMBERS) + np.repeat(self._base[:-1], ends - starts)
        self._table[slots] = np.arange(len(revisions), dtype=np.int32)

    def of(self, revisions: NDArray[np.int64]) -> NDArray[np.int32]:
        """Position of each revision (n,), -1 for one that is not among them."""
        if self._table is None:
            if not len(self._revisions):
                return np.full(len(revisions), -1, np.int32)
            place = np.searchsorted(self._revisions, revisions)
            place[place == len(self._revisions)] = 0
            return np.where(self._revisions[place] == revisions, place, -1).astype(np.int32)
        buckets, numbers = revisions >> NUMBER_BITS, revisions & _NUMBERS
        slots = np.where(numbers <= self._highest[buckets], self._base[buckets] + numbers, self._base[-1])
        return self._table[slots]


def is_member(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which of `values` occur in `ordered` (ascending)."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    place = np.searchsorted(ordered, values)
    place[place == len(ordered)] = 0
    return np.asarray(ordered[place] == values)
