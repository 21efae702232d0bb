"""Two clusterings of the same items: how far they agree, which names survive, and what a person would see change.

Items are photos, clusters are people. A clustering is an array (N,) of labels; "" is an item without a cluster, which
is alike no other one: for the agreement a cluster of its own, for a person a photo of nobody.

Pairwise F and B-cubed: Amigo et al., Information Retrieval 12, 2009; B-cubed: Bagga and Baldwin, COLING 1998; variation
of information: Meila, Journal of Multivariate Analysis 98, 2007. Everything is counted in the table of overlaps, which
has at most N entries: memory is linear in N, however many clusters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array, csr_array, hstack
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

NOBODY = ""
"""Label of an item without a cluster."""
MAX_EXACT = 2**53  # whole numbers up to here are exact in float64


class Agreement(NamedTuple):
    """How far a clustering agrees with a reference; higher is better. NaN where nothing is together."""

    precision: float
    recall: float
    f: float


@dataclass(frozen=True)
class Churn:
    """What a person sees between two clusterings in which people have names.

    `num_items`: photos that had a person before; `num_changed` of them have another one, or none, now. `split`: people
    whose photos lie in several clusters now; `merged`: people of now who hold photos of several people of before, both
    counting only parts of at least `min_photos` photos. `gone`: names that nobody bears now; `new`: names of now that
    nobody bore.
    """

    num_items: int
    num_changed: int
    split: tuple[str, ...]
    merged: tuple[str, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the photos that change person; NaN where no photo had one."""
        return self.num_changed / self.num_items if self.num_items else np.nan


class _Overlaps(NamedTuple):
    """Non-empty overlaps of two clusterings: cluster of each, items in both; sizes; and the overlap of each item."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    shared: NDArray[np.int64]
    first_sizes: NDArray[np.int64]
    second_sizes: NDArray[np.int64]
    of_item: NDArray[np.int64]


def pairwise_agreement(reference: ArrayLike, found: ArrayLike) -> Agreement:
    """Agreement on pairs of items: of those together in `found`, the share together in `reference`, and the reverse.

    f = 2 pairs together in both / (pairs together in found + in reference). Large clusters count quadratically.

    >>> pairwise_agreement(["a", "a", "b", "b"], ["x", "x", "x", "y"])  # 1 of 3 found pairs is right, 1 of 2 is found
    Agreement(precision=0.3333333333333333, recall=0.5, f=0.4)
    """
    table = _overlaps(reference, found)
    both, known, ours = (_num_pairs(counts) for counts in (table.shared, table.first_sizes, table.second_sizes))
    return Agreement(_ratio(both, ours), _ratio(both, known), _ratio(2 * both, ours + known))


def b_cubed_values(reference: ArrayLike, found: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of every item (N,): the share of its cluster, and of its identity, that is of both.

    >>> b_cubed_values(["a", "a", "b"], ["x", "x", "x"])[0].round(2).tolist()
    [0.67, 0.67, 0.33]
    """
    table = _overlaps(reference, found)
    precision = table.shared / table.second_sizes[table.second]
    recall = table.shared / table.first_sizes[table.first]
    return precision[table.of_item], recall[table.of_item]


def b_cubed(reference: ArrayLike, found: ArrayLike) -> Agreement:
    """Means of `b_cubed_values`, f their harmonic mean. Every item counts the same, whatever its cluster's size.

    >>> b_cubed(["a", "a", "b", "b"], ["x", "x", "x", "y"])  # precision (2/3 + 2/3 + 1/3 + 1) / 4, recall 3/4
    Agreement(precision=0.6666666666666666, recall=0.75, f=0.7058823529411765)
    """
    precision, recall = (float(values.mean()) if len(values) else np.nan for values in b_cubed_values(reference, found))
    return Agreement(precision, recall, _ratio(2 * precision * recall, precision + recall))


def variation_of_information(first: ArrayLike, second: ArrayLike) -> float:
    """H(first | second) + H(second | first) in nats: a distance, 0 for the same clusters, at most log N.

    >>> round(variation_of_information(["a", "a", "b", "b"], ["x", "x", "x", "x"]), 4)  # one bit is lost: log 2
    0.6931
    """
    table = _overlaps(first, second)
    total = table.shared.sum()
    if not total:
        return 0.0
    of_first = np.log(table.shared / table.first_sizes[table.first])
    of_second = np.log(table.shared / table.second_sizes[table.second])
    return max(0.0, -float((table.shared / total * (of_first + of_second)).sum()))


def keep_names(before: ArrayLike, after: ArrayLike, new_names: Sequence[str] = ()) -> dict[str, str]:
    """Give the clusters of now the names of before, so that as many photos as possible keep their person.

    A maximum-weight matching of names and clusters by the photos that they share; no name is given twice, and none to a
    cluster that holds no photo of it.

    Ties. The result depends on who is together and on the order of the photos (sort them by id), never on what the
    clusters of now are called. Of matchings that keep as many photos, the one is taken that gives names of earlier
    first photo to clusters of earlier first photo (largest sum of rank products, counted among names and clusters that
    photos connect): of two equal halves the name stays with the half that holds the first photo, and of two names of
    equal shares in one cluster the one of the first photo stays. Where so many are connected that this cannot be
    counted exactly (beyond 2^53), the solver's order is taken, which is the same every time.

    Args:
        before: (N,) name of each photo, "" for nobody.
        after: (N,) cluster of each photo now, "" for none.
        new_names: Names for the clusters that keep none, in the order of their first photo; needed as many as there
            are, by default none is named.

    Returns:
        Cluster of now -> name; without `new_names` only those that keep one.

    >>> keep_names(["Ann", "Ann", "Ann", "Bob", "", ""], ["7", "7", "3", "3", "5", ""])
    {'7': 'Ann', '3': 'Bob'}
    >>> keep_names(["Ann", "Ann", "", ""], ["7", "7", "5", "5"], new_names=["person 2"])
    {'7': 'Ann', '5': 'person 2'}
    """
    before, after = _labels(before), _labels(after)
    _same_items(before, after)
    names, clusters = _by_first_item(before), _by_first_item(after)
    both = (before != NOBODY) & (after != NOBODY)
    rows, columns = _places(before[both], names), _places(after[both], clusters)
    shared = coo_array((np.ones(len(rows), np.int64), (rows, columns)), (len(names), len(clusters))).tocsr()
    kept = {clusters[column]: names[row] for row, column in _match(shared)}
    unnamed = [cluster for cluster in clusters if cluster not in kept]
    if new_names and len(new_names) < len(unnamed):
        raise ValueError(f"naming clusters: expected {len(unnamed)} new names, found {len(new_names)}")
    fresh = dict(zip(unnamed, new_names, strict=False))
    return {cluster: kept.get(cluster) or fresh[cluster] for cluster in clusters if cluster in kept or cluster in fresh}


def renamed(after: ArrayLike, names: Mapping[str, str]) -> NDArray[np.str_]:
    """The name (N,) of each photo by its cluster; "" where the cluster has none."""
    labels, code = np.unique(_labels(after), return_inverse=True)
    return np.array([names.get(str(label), NOBODY) for label in labels], np.str_)[code]


def changed_person(before: ArrayLike, after: ArrayLike) -> NDArray[np.bool_]:
    """Which photos (N,) had a person before and have another one, or none, now. Both are names."""
    before, after = _labels(before), _labels(after)
    _same_items(before, after)
    return (before != NOBODY) & (before != after)


def churn(before: ArrayLike, after: ArrayLike, *, min_photos: int = 2) -> Churn:
    """What a person sees between two clusterings of the same photos, both with names; see `Churn`.

    >>> seen = churn(["Ann", "Ann", "Ann", "Ann", "Bob", "Bob"], ["Ann", "Ann", "Cid", "Cid", "Cid", "Cid"])
    >>> seen.num_changed, seen.split, seen.merged, seen.gone, seen.new
    (4, ('Ann',), ('Cid',), ('Bob',), ('Cid',))
    """
    if min_photos < 1:
        raise ValueError(f"counting churn: expected min_photos >= 1, found {min_photos}")
    before, after = _labels(before), _labels(after)
    changed = changed_person(before, after)
    both = (before != NOBODY) & (after != NOBODY)
    pairs, counts = np.unique(np.stack([before[both], after[both]]), axis=1, return_counts=True)
    parts = pairs[:, counts >= min_photos]
    then, now = set(before.tolist()) - {NOBODY}, set(after.tolist()) - {NOBODY}
    return Churn(
        num_items=int((before != NOBODY).sum()),
        num_changed=int(changed.sum()),
        split=_several(parts[0]),
        merged=_several(parts[1]),
        gone=tuple(sorted(then - now)),
        new=tuple(sorted(now - then)),
    )


def _several(names: NDArray[Any]) -> tuple[str, ...]:
    found, counts = np.unique(names, return_counts=True)
    return tuple(str(name) for name in found[counts > 1])


def _match(shared: csr_array) -> list[tuple[int, int]]:
    """Maximum-weight matching of rows and columns, component by component; ties as `keep_names` says."""
    num_rows, num_columns = shared.shape
    if not shared.nnz:
        return []
    whole = coo_array(shared)
    graph = coo_array(
        (np.ones(whole.nnz), (whole.row, whole.col + num_rows)), (num_rows + num_columns, num_rows + num_columns)
    )
    part = connected_components(graph, directed=False)[1]
    edges = np.argsort(part[whole.row], kind="stable")
    starts = np.flatnonzero(np.diff(part[whole.row][edges], prepend=-1))
    matched: list[tuple[int, int]] = []
    for mine in np.split(edges, starts[1:]):
        rows, row = np.unique(whole.row[mine], return_inverse=True)
        columns, column = np.unique(whole.col[mine], return_inverse=True)
        if len(mine) == 1:
            matched.append((int(rows[0]), int(columns[0])))
            continue
        chosen = _match_component(row, column, whole.data[mine], len(rows), len(columns))
        matched += [(int(rows[r]), int(columns[c])) for r, c in chosen]
    return sorted(matched)


def _match_component(
    row: NDArray[np.int64], column: NDArray[np.int64], count: NDArray[np.int64], num_rows: int, num_columns: int
) -> list[tuple[int, int]]:
    """The sparse assignment problem of one component; every row may stay alone, at a private column of no gain."""
    scale = min(num_rows, num_columns) * num_rows * num_columns + 1
    exact = int(count.sum()) * scale + scale < MAX_EXACT
    gain = count * scale + (num_rows - row) * (num_columns - column) if exact else count
    # The solver takes every stored entry for an edge and wants costs that are not 0: dear is what gains nothing.
    dear = int(gain.max()) + 1
    costs = coo_array(((dear - gain).astype(np.float64), (row, column)), (num_rows, num_columns))
    alone = coo_array((np.full(num_rows, float(dear)), (np.arange(num_rows), np.arange(num_rows))))
    chosen_rows, chosen_columns = min_weight_full_bipartite_matching(csr_array(hstack([costs, alone])))
    return [(int(r), int(c)) for r, c in zip(chosen_rows, chosen_columns, strict=True) if c < num_columns]


def _overlaps(first: ArrayLike, second: ArrayLike) -> _Overlaps:
    one, other = _labels(first), _labels(second)
    _same_items(one, other)
    first_code, second_code = _codes(one), _codes(other)
    width = int(second_code.max(initial=0)) + 1
    pairs, of_item, count = np.unique(first_code * width + second_code, return_inverse=True, return_counts=True)
    return _Overlaps(
        pairs // width, pairs % width, count, np.bincount(first_code), np.bincount(second_code), of_item.ravel()
    )


def _codes(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Whole numbers from 0; every item of nobody has one of its own."""
    names, code = np.unique(labels, return_inverse=True)
    code = code.astype(np.int64)
    alone = np.flatnonzero(labels == NOBODY)
    code[alone] = len(names) + np.arange(len(alone))
    return np.unique(code, return_inverse=True)[1].astype(np.int64)


def _by_first_item(labels: NDArray[Any]) -> list[str]:
    """Labels in the order of their first item, without nobody."""
    names, first = np.unique(labels, return_index=True)
    return [str(names[place]) for place in np.argsort(first) if names[place] != NOBODY]


def _places(labels: NDArray[Any], order: Sequence[str]) -> NDArray[np.int64]:
    """Position in `order` of each label."""
    names = np.array(order, np.str_)
    sorter = np.argsort(names)
    return sorter[np.searchsorted(names, labels, sorter=sorter)] if len(names) else np.zeros(0, np.int64)


def _labels(values: ArrayLike) -> NDArray[Any]:
    return np.asarray(values).astype(np.str_)


def _same_items(first: NDArray[Any], second: NDArray[Any]) -> None:
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"comparing clusterings: expected one label for each of the same items twice, found shapes {first.shape} "
            f"and {second.shape}"
        )


def _num_pairs(counts: NDArray[np.int64]) -> float:
    return float((counts * (counts - 1) // 2).sum())


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0 else np.nan
