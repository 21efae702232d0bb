"""Clusters of stored vectors: against loops over all pairs, in mixed galleries, and at their limits."""

import numpy as np
import pytest

from graceful.errors import UsageError
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.clusters import cluster_rows
from graceful.indexing.exact import WidthMismatchError

GRAPH = ClusteringConfig(threshold=0.8)


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def people(num_people, photos_each, spread=0.1, width=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.repeat(unit(rng.standard_normal((num_people, width))), photos_each, axis=0)
    return unit(centres + spread * rng.standard_normal(centres.shape) / np.sqrt(width))


def loop(vectors, threshold, min_photos=2):
    """Connected components of all pairs that score enough, by spreading labels until nothing changes."""
    label = list(range(len(vectors)))
    changed = True
    while changed:
        changed = False
        for i in range(len(vectors)):
            for j in range(len(vectors)):
                if i != j and vectors[i] @ vectors[j] >= threshold and label[j] > label[i]:
                    label[j], changed = label[i], True
    kept = [value for value in dict.fromkeys(label) if label.count(value) >= min_photos]
    return [kept.index(value) if value in kept else -1 for value in label]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("min_photos", [2, 4])
def test_threshold_graph_is_that_of_a_loop_over_all_pairs(threshold, min_photos):
    vectors = people(6, 4, spread=0.8, seed=3)
    vectors = vectors[np.random.default_rng(1).permutation(len(vectors))]
    config = ClusteringConfig(threshold=threshold, neighbours=100, min_photos=min_photos)
    found = cluster_rows({"g1": vectors}, {"g1": np.arange(24)}, 24, config)
    assert found.label.tolist() == loop(vectors, threshold, min_photos)


def test_mixed_gallery_is_clustered_as_one_and_knows_the_places_of_its_photos():
    vectors = people(8, 3)
    order = np.random.default_rng(0).permutation(24)
    halves = {"g1": order[:10], "g2": order[10:]}
    mixed = cluster_rows({name: vectors[rows] for name, rows in halves.items()}, halves, 24, GRAPH)
    whole = cluster_rows({"g1": vectors}, {"g1": np.arange(24)}, 24, GRAPH)
    assert mixed.label.tolist() == whole.label.tolist() == np.repeat(np.arange(8), 3).tolist()
    assert (mixed.num_clusters, mixed.apart) == (8, ())


def test_only_the_nearest_neighbours_are_joined():
    chain = unit([[np.cos(angle), np.sin(angle)] for angle in np.linspace(0, 1.2, 7)])
    near = ClusteringConfig(threshold=0.95, neighbours=2)
    assert cluster_rows({"g1": chain}, {"g1": np.arange(7)}, 7, near).label.tolist() == [0] * 7
    pairs = unit([[1, 0], [1, 0.01], [1, 0.2], [1, 0.21]])
    one = ClusteringConfig(threshold=0.5, neighbours=1)
    assert cluster_rows({"g1": pairs}, {"g1": np.arange(4)}, 4, one).label.tolist() == [0, 0, 1, 1]


def test_photos_that_nobody_owns_and_single_ones_belong_to_nobody():
    vectors = people(2, 2)
    found = cluster_rows({"g1": vectors[[0, 1, 2]]}, {"g1": np.array([1, 3, 5])}, 7, GRAPH)
    assert found.label.tolist() == [-1, 0, -1, 0, -1, -1, -1]
    none = cluster_rows({}, {}, 0, GRAPH)
    assert (len(none.label), none.num_clusters) == (0, 0)
    empty = cluster_rows({"g1": np.zeros((0, 4), np.float32)}, {"g1": np.zeros(0, np.int64)}, 2, GRAPH)
    assert empty.label.tolist() == [-1, -1]


def test_a_wider_generation_is_compared_by_the_prefix_that_it_declares():
    vectors = people(4, 4, width=16)
    wide = unit(np.hstack([vectors, np.full((16, 8), 0.3, np.float32)]))
    rows = {"g1": np.arange(0, 16, 2), "g2": np.arange(1, 16, 2)}
    parts = {"g1": vectors[rows["g1"]], "g2": wide[rows["g2"]]}
    joined = cluster_rows(parts, rows, 16, GRAPH, {"g2": (16,)})
    assert joined.label.tolist() == np.repeat(np.arange(4), 4).tolist()
    assert joined.apart == ()
    apart = cluster_rows(parts, rows, 16, GRAPH)
    assert apart.apart == (("g1", "g2"),)
    assert apart.label.tolist() == [2 * (i // 4) + i % 2 for i in range(16)]


def test_hdbscan_finds_the_people_and_leaves_strangers_alone():
    vectors = np.concatenate([people(5, 8, spread=0.15), unit(np.random.default_rng(9).standard_normal((3, 16)))])
    config = ClusteringConfig(method="hdbscan", min_photos=4)
    found = cluster_rows({"g1": vectors}, {"g1": np.arange(43)}, 43, config)
    assert found.label[:40].tolist() == np.repeat(np.arange(5), 8).tolist()
    assert (found.label[40:] == -1).all()
    few = cluster_rows({"g1": vectors[:3]}, {"g1": np.arange(3)}, 3, config)
    assert few.label.tolist() == [-1, -1, -1]


def test_what_cannot_be_clustered_is_refused_with_a_remedy():
    with pytest.raises(UsageError, match=r"lowest score .* found none; set clusters.threshold"):
        cluster_rows({}, {}, 0, ClusteringConfig())
    parts = {"g1": people(1, 4), "g2": people(1, 4, width=8)}
    rows = {"g1": np.arange(4), "g2": np.arange(4, 8)}
    with pytest.raises(WidthMismatchError, match=r"one width for HDBSCAN, found .*'g2': 8"):
        cluster_rows(parts, rows, 8, ClusteringConfig(method="hdbscan"))
    assert not ClusteringConfig().is_complete
    assert ClusteringConfig(method="hdbscan").is_complete
