"""Clusters of stored vectors, of one generation or of several that share a gallery.

Two photos are compared as a search would: by the inner product of their unit vectors, whatever generation each is of;
where widths differ, by a prefix that the wider generation declares. Exact: N (N - 1) products, in blocks; what is kept
are the nearest neighbours, N x k.

Shapes: N photos, n photos of one generation, D width, k neighbours.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graceful.errors import UsageError
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.exact import WidthMismatchError, top_k

NOBODY = -1


@dataclass(frozen=True)
class Clusters:
    """`label` (N,) int64: number of each photo's cluster by its first photo, -1 for none.

    `apart`: pairs of generations that cannot be compared; their photos are never together.
    """

    label: NDArray[np.int64]
    apart: tuple[tuple[str, str], ...] = ()

    @property
    def num_clusters(self) -> int:
        """How many clusters there are."""
        return int(self.label.max(initial=NOBODY)) + 1


def cluster_rows(
    vectors: Mapping[str, NDArray[np.float32]],
    rows: Mapping[str, NDArray[np.int64]],
    num_rows: int,
    config: ClusteringConfig,
    prefix_widths: Mapping[str, Collection[int]] | None = None,
) -> Clusters:
    """Cluster N photos; those that no generation owns belong to nobody.

    Args:
        vectors: Unit vectors (n, D) of the photos that each generation owns.
        rows: Their places (n,) among the N photos; all places together are different.
        num_rows: N.
        config: How to cluster.
        prefix_widths: Widths that each generation declares to be embeddings themselves.

    Raises:
        UsageError: a threshold graph without a threshold.
        WidthMismatchError: HDBSCAN over several widths.
    """
    owning = {name: vectors[name] for name in rows if len(rows[name])}
    if config.method == "hdbscan":
        return Clusters(_ordered(_by_density(owning, rows, num_rows, config.min_photos), config.min_photos))
    if config.threshold is None:
        raise UsageError(
            "clustering: expected the lowest score at which two photos are the same person, found none; set "
            "clusters.threshold or give --threshold, or choose clusters.method = 'hdbscan', which needs none"
        )
    edges, apart = _neighbours(owning, rows, config.neighbours, config.threshold, prefix_widths or {})
    graph = coo_array((np.ones(len(edges[0]), np.bool_), edges), (num_rows, num_rows)).tocsr()
    label = connected_components(graph, directed=False)[1].astype(np.int64)
    return Clusters(_ordered(label, config.min_photos), apart)


def _neighbours(
    vectors: Mapping[str, NDArray[np.float32]],
    rows: Mapping[str, NDArray[np.int64]],
    k: int,
    threshold: float,
    prefix_widths: Mapping[str, Collection[int]],
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[tuple[str, str], ...]]:
    """Edges (from, to) to the k nearest photos of any generation that score at least the threshold."""
    starts, ends, apart = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], set()
    for name, mine in vectors.items():
        scores, places = [], []
        for other, theirs in vectors.items():
            if not _comparable(mine.shape[1], theirs.shape[1], prefix_widths.get(name, ())):
                # The narrower one cannot ask, but it is asked where the wider one declares its width.
                if not _comparable(theirs.shape[1], mine.shape[1], prefix_widths.get(other, ())):
                    apart.add((min(name, other), max(name, other)))
                continue
            own = np.arange(len(mine)) if other == name else None
            found, place = top_k(mine, theirs, k, exclude=own, prefix_widths=prefix_widths.get(name, ()))
            scores.append(found)
            places.append(np.where(place >= 0, rows[other][np.maximum(place, 0)], -1))
        score, place = np.hstack(scores), np.hstack(places)
        best = np.argsort(np.where(np.isnan(score), np.inf, -score), axis=1, kind="stable")[:, :k]
        score, place = np.take_along_axis(score, best, axis=1), np.take_along_axis(place, best, axis=1)
        joined = (score >= threshold) & (place >= 0)
        starts.append(np.repeat(rows[name], joined.sum(axis=1)))
        ends.append(place[joined])
    return (np.concatenate(starts), np.concatenate(ends)), tuple(sorted(apart))


def _comparable(width: int, stored: int, prefixes: Collection[int]) -> bool:
    return stored == width or (stored < width and stored in prefixes)


def _by_density(
    vectors: Mapping[str, NDArray[np.float32]], rows: Mapping[str, NDArray[np.int64]], num_rows: int, min_photos: int
) -> NDArray[np.int64]:
    from sklearn.cluster import HDBSCAN  # half a second to import, and nothing else here needs it

    widths = {name: part.shape[1] for name, part in vectors.items()}
    if len(set(widths.values())) > 1:
        raise WidthMismatchError(
            f"clustering: expected one width for HDBSCAN, found {widths}; re-embed the rest, or choose clusters.method "
            "= 'threshold_graph'"
        )
    label = np.full(num_rows, NOBODY, np.int64)
    places = np.concatenate([np.zeros(0, np.int64), *(rows[name] for name in vectors)])
    if len(places) >= min_photos:
        # Of unit vectors the distance is sqrt(2 - 2 score): the same order as the score.
        found = HDBSCAN(min_cluster_size=min_photos, copy=True).fit_predict(np.concatenate(list(vectors.values())))
        label[places] = found
    return label


def _ordered(label: NDArray[np.int64], min_photos: int) -> NDArray[np.int64]:
    """Numbers from 0 by the first photo; clusters of too few photos and negative labels become nobody."""
    names, first, code, sizes = np.unique(label, return_index=True, return_inverse=True, return_counts=True)
    kept = (names >= 0) & (sizes >= min_photos)
    number = np.full(len(names), NOBODY, np.int64)
    number[kept] = np.argsort(np.argsort(first[kept]))
    return number[code]
