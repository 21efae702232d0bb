"""Measures for consumers what ranks do not show: clusters of the evaluation gallery in every state that is judged."""

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.consumers import Clusterings, Consumed
from graceful.flows.update.bench import UNREADABLE, Bench
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.clusters import cluster_rows
from graceful.indexing.exact import WidthMismatchError


def measure_consumers(bench: Bench, clusters: ClusteringConfig | None) -> Consumed:
    """Cluster every mixed state that the bench has measured, where that is asked for.

    A state that cannot be clustered (HDBSCAN over two widths) is left out: the policy's guard misses it.
    """
    if clusters is None:
        return Consumed()
    gallery, labels = bench.evaluation_set.gallery, {}
    for state, owners in bench.owners.items():
        try:
            labels[state] = _cluster(bench, owners, clusters)
        except WidthMismatchError:
            continue
    return Consumed(Clusterings(np.array(gallery.sources), gallery.labels, labels))


def _cluster(bench: Bench, owners: NDArray[np.str_], config: ClusteringConfig) -> NDArray[np.str_]:
    rows = {name: np.flatnonzero(owners == name) for name in sorted({*owners.tolist()} - {UNREADABLE})}
    vectors = {name: bench.gallery_vectors[name][places] for name, places in rows.items()}
    found = cluster_rows(vectors, rows, len(owners), config, bench.prefix_widths)
    return np.array([str(number) if number >= 0 else "" for number in found.label.tolist()], np.str_)
