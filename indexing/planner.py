"""Which items are re-embedded first, and in which waves.

An order ranks the items of a view; a plan is the first part of that ranking, cut into waves. Wave 0 holds what the new
generation cannot read at all: it is embedded before the serving state moves, whatever the fraction. The same orders
rank the evaluation gallery, so that what is judged at a fraction is what production would serve at it.

Shapes: N items of a view.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError, UsageError

PLAN_ITEMS_SCHEMA = pa.schema([("wave", pa.int32()), ("position", pa.int64()), ("revision", pa.int64())])


@dataclass(frozen=True)
class OrderInputs:
    """What an order may look at, one entry per item.

    `keys` (N,) uint64: a uniform random key of each, see `random_key` and `random_key_of`.
    `owner_age` (N,): place of the owning generation in lineage order, 0 the oldest; -1 for an unreadable item.
    `class_distance` (N,) or None: cosine distance of the stored vector to the nearest class mean of its generation.
    """

    keys: NDArray[np.uint64]
    owner_age: NDArray[np.int64]
    class_distance: NDArray[np.float32] | None = None


class MissingOrderInputError(GracefulError, ValueError):
    """An order was asked for without what it ranks by."""


def random_key(item_ids: Sequence[str] | NDArray[np.object_], seed: int) -> NDArray[np.uint64]:
    """Hash every item id to a uniform key: an item has the same place in every set that holds it."""
    prefix = f"{seed}/".encode()
    digests = b"".join(hashlib.blake2b(prefix + str(item).encode(), digest_size=8).digest() for item in item_ids)
    return np.frombuffer(digests, "<u8")


def random_key_of(revisions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A uniform key of every revision (N,): the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        mixed = revisions.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _random(inputs: OrderInputs) -> NDArray[np.int64]:
    """Random: the control that every other order has to beat."""
    return np.argsort(inputs.keys, kind="stable")


def _oldest_generation(inputs: OrderInputs) -> NDArray[np.int64]:
    """Items owned by the oldest generation first, random among equals."""
    return np.lexsort((inputs.keys, inputs.owner_age))


def _class_distance(inputs: OrderInputs) -> NDArray[np.int64]:
    """Items farthest from every class mean of their generation first (lambda-orthogonal, arXiv 2509.16664)."""
    if inputs.class_distance is None:
        raise MissingOrderInputError(
            "ordering by class_distance: expected class means of every owning generation, found none; "
            "choose 'random' or 'oldest_generation'"
        )
    distance = np.where(np.isfinite(inputs.class_distance), inputs.class_distance, np.inf)
    return np.lexsort((inputs.keys, -distance))


ORDERS: dict[str, Callable[[OrderInputs], NDArray[np.int64]]] = {
    "random": _random,
    "oldest_generation": _oldest_generation,
    "class_distance": _class_distance,
}


def rank_items(order: str, inputs: OrderInputs, first: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Rank items by a named order; those marked in `first` (wave 0) come before all others.

    Returns a permutation (N,): position in the view of the item at each rank.
    """
    if order not in ORDERS:
        raise UsageError(f"ordering items: expected one of {', '.join(sorted(ORDERS))}, found {order!r}")
    ranking = ORDERS[order](inputs)
    if first is None:
        return ranking
    marked = first[ranking]
    return np.concatenate([ranking[marked], ranking[~marked]])


def nearest_mean_distance(vectors: NDArray[np.float32], class_means: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine distance (n,) of unit vectors (n, D) to the nearest of the unit class means (C, D)."""
    return (1.0 - (vectors @ class_means.T).max(axis=1)).astype(np.float32)


def num_chosen(num_items: int, num_first: int, fraction: float) -> int:
    """Rows that are re-embedded at a fraction: the share of all items, and never less than wave 0."""
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"planning a re-index: expected a fraction in [0, 1], found {fraction}")
    return max(num_first, int(np.ceil(fraction * num_items - 1e-9)))


def plan_waves(
    revisions: NDArray[np.int64], ranking: NDArray[np.int64], num_first: int, fraction: float, wave_rows: int
) -> pa.Table:
    """Cut the first part of a ranking into waves: wave 0 (the first `num_first`), then waves of `wave_rows`.

    Returns a table PLAN_ITEMS_SCHEMA in plan order.
    """
    if wave_rows < 1:
        raise UsageError(f"planning a re-index: expected at least one row a wave, found {wave_rows}")
    chosen = num_chosen(len(revisions), num_first, fraction)
    positions = np.arange(chosen)
    waves = np.where(positions < num_first, 0, 1 + (positions - num_first) // wave_rows).astype(np.int32)
    return pa.table(
        {"wave": waves, "position": positions, "revision": revisions[ranking[:chosen]]},
        schema=PLAN_ITEMS_SCHEMA,
    )
