"""Measures for consumers what ranks do not show: clusters of the evaluation gallery, and a sample of scores.

Shapes: Q queries, N rows of the evaluation gallery, P sampled pairs, D width.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.consumers import Clusterings, ScoreSample
from graceful.evaluation.policy import RolloutPolicy
from graceful.flows.update.bench import Bench
from graceful.flows.update.query_log import UNREADABLE
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.clusters import cluster_rows
from graceful.indexing.exact import WidthMismatchError, comparable_queries
from graceful.indexing.matching import match_rows

MAX_GENUINE, MAX_IMPOSTORS = 200_000, 500_000
"""Pairs that are sampled: at a FAR of 1e-4 fifty accepted impostors are expected among them."""
_BLOCK_PAIRS = 65_536


def measure_clusterings(bench: Bench, clusters: ClusteringConfig | None) -> Clusterings | None:
    """Cluster every mixed state that the bench has measured, where that is asked for.

    A state that cannot be clustered (HDBSCAN over two widths) is left out: the policy's guard misses it.
    """
    if clusters is None:
        return None
    gallery, labels = bench.evaluation_set.gallery, {}
    for state, owners in bench.owners.items():
        try:
            labels[state] = _cluster(bench, owners, clusters)
        except WidthMismatchError:
            continue
    return Clusterings(np.array(gallery.sources), gallery.labels, labels)


def _cluster(bench: Bench, owners: NDArray[np.str_], config: ClusteringConfig) -> NDArray[np.str_]:
    rows = {name: np.flatnonzero(owners == name) for name in sorted({*owners.tolist()} - {UNREADABLE})}
    vectors = {name: bench.gallery_vectors[name][places] for name, places in rows.items()}
    found = cluster_rows(vectors, rows, len(owners), config, bench.prefix_widths)
    return np.array([str(number) if number >= 0 else "" for number in found.label.tolist()], np.str_)


def sample_scores(
    bench: Bench, policy: RolloutPolicy, wanted: Sequence[tuple[str, str]], seed: int
) -> ScoreSample | None:
    """Score the same sampled pairs in each wanted (query, gallery generation) that can be compared.

    None where no consumer is registered. All genuine pairs, at most MAX_GENUINE; of impostors equally many rows of each
    query, drawn without replacement, at most MAX_IMPOSTORS together. Costs P products of width D for each wanted pair:
    little beside the Q x N of a ranking.
    """
    if not policy.thresholds:
        return None
    chosen, rng = bench.evaluation_set, np.random.default_rng(seed)
    gallery = chosen.gallery
    queries, rows, genuine = _pairs(bench, rng)
    row_names = np.where(
        gallery.labels == "", np.array([f"item {source}" for source in gallery.sources]), gallery.labels
    )
    scores = {
        (query, owner): _score(bench, query, owner, queries, rows)
        for query, owner in wanted
        if bench.comparable(query, owner)
    }
    return ScoreSample(
        genuine=genuine,
        query_groups=np.unique(chosen.clusters, return_inverse=True)[1].astype(np.int64)[queries],
        row_groups=np.unique(row_names, return_inverse=True)[1].astype(np.int64)[rows],
        rows=rows,
        scores=scores,
        owners=dict(bench.owners),
    )


def _pairs(bench: Bench, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Places of queries and rows (P,) of the sampled pairs, and whether they are genuine. The own item is no pair."""
    chosen = bench.evaluation_set
    num_queries, num_rows = len(chosen.queries), len(chosen.gallery)
    matches = match_rows(
        chosen.queries.labels, chosen.gallery.labels, np.array(chosen.queries.sources), np.array(chosen.gallery.sources)
    )
    queries = np.repeat(np.arange(num_queries), np.diff(matches.relevant_offsets))
    rows = matches.relevant_columns
    if len(rows) > MAX_GENUINE:
        kept = np.sort(rng.choice(len(rows), MAX_GENUINE, replace=False))
        queries, rows = queries[kept], rows[kept]
    each = min(num_rows, MAX_IMPOSTORS // max(num_queries, 1))
    strangers = []
    for query in range(num_queries):
        excluded = np.concatenate(
            [
                matches.relevant_columns[matches.relevant_offsets[query] : matches.relevant_offsets[query + 1]],
                matches.own_columns[matches.own_offsets[query] : matches.own_offsets[query + 1]],
            ]
        )
        drawn = rng.choice(num_rows, min(num_rows, each + len(excluded)), replace=False)
        # What is left of a random choice is one of the rows that are no exclusions.
        strangers.append(drawn[~np.isin(drawn, excluded)][:each])
    impostor_rows = np.concatenate([np.zeros(0, np.int64), *strangers])
    impostor_queries = np.repeat(np.arange(num_queries), [len(part) for part in strangers])
    genuine = np.arange(len(rows) + len(impostor_rows)) < len(rows)
    return np.concatenate([queries, impostor_queries]), np.concatenate([rows, impostor_rows]), genuine


def _score(
    bench: Bench, query: str, owner: str, queries: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    stored = bench.gallery_vectors[owner]
    asking = comparable_queries(bench.query_vectors[query], stored.shape[1], bench.prefix_widths.get(query, ()))
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        scores[part] = np.einsum("pd,pd->p", asking[queries[part]], stored[rows[part]])
    return scores
