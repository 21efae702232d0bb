"""What a partial re-index costs against a full one, and a whole matrix against bare matrix products."""

import functools
import hashlib
import resource
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.harness import Ratio, paired, ratio_of, timed
from graceful.evaluation.bands import difference_bands
from graceful.evaluation.flips import nfr_matrix
from graceful.evaluation.matrix import matrix_from_outcomes
from graceful.evaluation.outcomes import Outcomes, metric_values, outcome_from_ranks, pair_state
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit, embed_units
from graceful.indexing.exact import RelevantRanks, rank_states
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


def evaluate_matrix() -> list[Ratio]:
    """10 generations, 10,000 queries, all 55 pairs: ranks, metrics, NFR, 1,000 resamples / the bare matrix products."""
    return [_evaluate_matrix(rows, repeats) for rows, repeats in ((1_000, 3), (10_000, 1), (100_000, 1))]


def _evaluate_matrix(num_rows: int, repeats: int) -> Ratio:
    """Bare products and ranks alternate, one query generation after another; what follows is timed once a repeat.

    The bare products are written into one buffer, block by block, as fast as this NumPy makes them.
    """
    num_queries, num_generations, each = 10_000, 10, 4
    random = np.random.default_rng(0)
    identities = np.array([f"id{number:05d}" for number in range(num_rows // each)])
    asked = random.integers(0, len(identities), num_queries)
    gallery_identities, query_identities = np.repeat(identities, each), identities[asked]
    centres = _unit(random.standard_normal((len(identities), _WIDTH), np.float32))
    names = [f"g{number:03d}-{number:06x}" for number in range(1, num_generations + 1)]
    queries = {name: _noisy(centres[asked], random) for name in names}
    galleries = {name: _noisy(np.repeat(centres, each, axis=0), random) for name in names}
    buffer = np.empty((1024, num_rows), np.float32)

    def bare(query: str, seen: Sequence[str]) -> None:
        for gallery in seen:
            for start in range(0, num_queries, len(buffer)):
                block = queries[query][start : start + len(buffer)]
                np.matmul(block, galleries[gallery].T, out=buffer[: len(block)])

    def rank(query: str, seen: Sequence[str], ranked: dict[tuple[str, str], RelevantRanks]) -> None:
        pairs = [(query, gallery) for gallery in seen]
        shown = {name: galleries[name] for name in seen}
        ranked.update(rank_states({query: queries[query]}, shown, pairs, query_identities, gallery_identities))

    def conclude(ranked: dict[tuple[str, str], RelevantRanks]) -> None:
        found = {pair_state(*pair): outcome_from_ranks(ranks.offsets, ranks.ranks) for pair, ranks in ranked.items()}
        outcomes = Outcomes(
            np.array([f"q{number}" for number in range(num_queries)]),
            query_identities,
            query_identities,
            {},
            {state: first for state, (first, _) in found.items()},
            {state: precision for state, (_, precision) in found.items()},
        )
        matrix_from_outcomes(outcomes, names)
        nfr_matrix(outcomes, [pair_state(name, name) for name in names])
        values = np.stack([metric_values(outcomes, state) for state in found], axis=1)
        difference_bands(values - values[:, :1], asked)

    pairs, processor, rest = [], [], []
    for _ in range(repeats):
        ranked: dict[tuple[str, str], RelevantRanks] = {}
        for place, query in enumerate(names):
            seen = names[: place + 1]
            measures = [functools.partial(bare, query, seen), functools.partial(rank, query, seen, ranked)]
            seconds, spent = [0.0, 0.0], [0.0, 0.0]
            for which in (0, 1) if place % 2 else (1, 0):
                spent[which] -= time.process_time()
                seconds[which] = timed(measures[which])
                spent[which] += time.process_time()
            pairs.append((seconds[0], seconds[1]))
            processor.append((spent[0], spent[1]))
        rest.append(timed(functools.partial(conclude, ranked)))
    bare_s, rest_s = sum(b for b, _ in pairs) / repeats, statistics.median(rest)
    bare_cpu_s, candidate_cpu_s = (sum(seconds) for seconds in zip(*processor, strict=True))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return ratio_of(
        "evaluate_matrix" if num_rows == 100_000 else f"evaluate_matrix_{num_rows // 1000}k_rows",
        [(b, c + b * rest_s / bare_s) for b, c in pairs],
        at_most=1.3,
        note=f"{num_queries:,} queries, {num_rows:,} rows, {_WIDTH}-d, 55 pairs, 1,000 resamples; {bare_s:,.1f} s "
        f"bare, {rest_s:.2f} s after ranking, ranking takes {candidate_cpu_s / bare_cpu_s:.2f} times "
        f"their processor time; peak {peak_mib:,.0f} MiB with vectors and the bare buffer",
    )


def _noisy(centres: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    return _unit(centres + np.float32(1.2 / np.sqrt(_WIDTH)) * random.standard_normal(centres.shape, np.float32))


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
