"""What a partial re-index costs against a full one, and a whole matrix against bare matrix products."""

import functools
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.harness import Ratio, paired
from graceful.evaluation.flips import nfr_matrix
from graceful.evaluation.intervals import bootstrap_means
from graceful.evaluation.matrix import matrix_from_outcomes
from graceful.evaluation.outcomes import Outcomes, metric_values, outcome_from_ranks, pair_state
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit, embed_units
from graceful.indexing.exact import rank_states
from graceful.indexing.gallery import Gallery
from graceful.indexing.planner import OrderInputs, plan_waves, random_key_of, rank_items
from graceful.indexing.reindex import carry_out

_WIDTH = 128


def reindex_proportional() -> Ratio:
    """Re-index 10 % / re-index everything: 40,000 items already embedded by a predecessor, in process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = 40_000
        gallery = Gallery(f"{folder}/gallery", create=True)
        ids = [f"item-{number:07d}" for number in range(rows)]
        digests = [hashlib.sha256(item.encode()).hexdigest() for item in ids]
        columns = {"item_id": ids, "source": ids, "content_sha256": digests}
        gallery.ingest(pa.table({**columns, "label": [""] * rows, "attributes": ["{}"] * rows}))
        numbers = iter(range(1, 1000))
        revisions = gallery.view([]).revisions
        ranking = rank_items("random", OrderInputs(random_key_of(revisions, 0), np.zeros(rows, np.int64)))
        carry_out(gallery, "g001-000000", plan_waves(revisions, ranking, 0, 1.0, 8192), _embed)

        def reindex(fraction: float) -> None:
            generation = f"g{next(numbers):03d}-ffffff"
            carry_out(gallery, generation, plan_waves(revisions, ranking, 0, fraction, 8192), _embed)

        return paired(
            "reindex_proportional",
            functools.partial(reindex, 1.0),
            functools.partial(reindex, 0.1),
            pairs=7,
            at_most=0.12,
            note=f"{rows:,} items, {_WIDTH}-d, about 5,000 rows/s of encoder; waves of 8,192 rows",
        )


def evaluate_matrix() -> Ratio:
    """10 generations, all 55 pairs, exact ranks, metrics, NFR and 1,000 resamples / the bare matrix products."""
    num_queries, num_rows, num_generations = 1_000, 50_000, 10
    random = np.random.default_rng(0)
    identities = np.array([f"id{number:05d}" for number in range(num_rows // 4)])
    gallery_identities = np.repeat(identities, 4)
    query_identities = random.choice(identities, num_queries)
    centres = _unit(random.standard_normal((len(identities), _WIDTH)))
    place = {name: number for number, name in enumerate(identities)}
    query_centres = centres[[place[name] for name in query_identities]]
    names = [f"g{number:03d}-{number:06x}" for number in range(1, num_generations + 1)]
    noise = 1.2 / np.sqrt(_WIDTH)
    queries = {n: _unit(query_centres + noise * random.standard_normal((num_queries, _WIDTH))) for n in names}
    galleries = {
        n: _unit(np.repeat(centres, 4, axis=0) + noise * random.standard_normal((num_rows, _WIDTH))) for n in names
    }
    pairs = [(q, g) for place, q in enumerate(names) for g in names[: place + 1]]
    clusters = np.unique(query_identities, return_inverse=True)[1]

    def bare() -> None:
        for query, gallery in pairs:
            _ = queries[query] @ galleries[gallery].T

    def whole() -> None:
        ranked = rank_states(queries, galleries, pairs, query_identities, gallery_identities)
        first, precision = {}, {}
        for (query, gallery), ranks in ranked.items():
            state = pair_state(query, gallery)
            first[state], precision[state] = outcome_from_ranks(ranks.offsets, ranks.ranks)
        ids = np.array([f"q{number}" for number in range(num_queries)])
        outcomes = Outcomes(ids, query_identities, query_identities, {}, first, precision)
        matrix_from_outcomes(outcomes, names)
        nfr_matrix(outcomes, [pair_state(name, name) for name in names])
        values = np.stack([metric_values(outcomes, state) for state in first], axis=1)
        bootstrap_means(values, clusters, num_resamples=1000, seed=0)

    note = f"{num_queries:,} queries, {num_rows:,} rows, {_WIDTH}-d, 55 pairs; a tenth of the full size"
    return paired("evaluate_matrix", bare, whole, pairs=7, at_most=1.3, note=note)


def _embed(units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
    embed_units(units, _open, on_unit=on_unit)


def _open() -> Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]:
    weights = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)

    def encode(sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """As much arithmetic as a small network, so that the encoder weighs what it weighs in a real backfill."""
        seeds = np.array([1 + (zlib.crc32(source.encode()) & 0xFFFF) for source in sources], np.float32)[:, None]
        hidden = np.sin(seeds * np.arange(1, 1025, dtype=np.float32))
        for _ in range(12):
            hidden = np.tanh(hidden @ weights / 32)
        return _unit(hidden[:, :_WIDTH]), {}

    return encode


def _unit(rows: NDArray) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
