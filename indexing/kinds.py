"""Approximate indexes over immutable rows: how each kind is built, and how wide it must search to keep its promise.

Invariant: an approximate index is used only with a breadth (nprobe, efSearch) whose recall was measured, on the rows
themselves, to reach the target. Half of a sample of stored vectors, which are held out, chooses the breadth; the other
half confirms it. Held out means that no query can be found, and that a graph (HNSW) has no node for it while recall is
measured: by its own links a stored row would find its neighbours too easily. The oracle is exact search over the same
rows. A neighbour whose score ties with the last exact one counts as found.

What an index proposes is scored again from the vectors themselves (see `indexing.parts`), so compressed kinds are
asked for more rows than wanted, and every kind returns exact scores.

Shapes: N rows, D width, Q queries, K neighbours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from graceful.indexing.index_choice import IndexKind, IndexReport, MeasuredRecall
from graceful.indexing.ranking import TIE_TOLERANCE

_log = logging.getLogger("graceful.search")
# The types that come with FAISS do not know the constructors that Python has.
_faiss: Any = faiss

NUM_QUERIES = 1_000
MEASURED_K = (10, 100)
ADD_ROWS = 2**17
# And no more than this share of the rows is held out.
MAX_HELD_OUT_SHARE = 0.1
ORACLE = "exact inner products over the same rows, the queries' own rows left out"
TRAINING_ROWS_PER_LIST = 64
HNSW_LINKS = 32
HNSW_BUILD_BREADTH = 100
PQ_VALUES_PER_CODE = 4
# Wider searches gain nothing over exact ones.
MAX_HNSW_BREADTH = 1_024
MIN_LISTS_LEFT_OUT = 8
# Rows proposed for each one wanted, to be scored again from the vectors themselves.
PROPOSED = {"ivf": 1, "hnsw": 1, "ivf_sq8": 2, "ivf_pq": 8}
# Coarse clusters are found in this many rounds; more gain no recall that the breadth does not give.
CLUSTERING_ROUNDS = 10


def build_index(
    kind: IndexKind, vectors: NDArray[np.float32], held_out: NDArray[np.int64], seed: int = 0
) -> tuple[Any, dict[str, int]]:
    """Build an index of one approximate kind over vectors (N, D); return it with its parameters.

    A graph is built without the held-out rows, which `complete_index` adds.

    Raises:
        ValueError: the rows are too few, or of a width that the kind cannot take.
    """
    num_rows, width = vectors.shape
    if kind == "hnsw":
        graph: Any = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_BUILD_BREADTH
        index: Any = faiss.IndexIDMap(graph)
        index.own_fields = True
        graph.this.disown()
        _add(index, vectors, np.setdiff1d(np.arange(num_rows), held_out, assume_unique=True))
        return index, {"links": HNSW_LINKS, "build_breadth": HNSW_BUILD_BREADTH}
    num_lists = num_lists_for(num_rows)
    if num_rows < 2 * num_lists or num_lists < 2:
        raise ValueError(f"building {kind}: expected more rows, found {num_rows}; use a flat index")
    quantizer: Any = faiss.IndexFlatIP(width)
    parameters = {"lists": num_lists, "rounds": CLUSTERING_ROUNDS}
    inner = faiss.METRIC_INNER_PRODUCT
    if kind == "ivf":
        index = faiss.IndexIVFFlat(quantizer, width, num_lists, inner)
    elif kind == "ivf_sq8":
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, num_lists, faiss.ScalarQuantizer.QT_8bit, inner)
        parameters["bits"] = 8
    elif kind == "ivf_pq":
        if width % PQ_VALUES_PER_CODE or num_rows < 256 * 4:
            raise ValueError(
                f"building ivf_pq: expected a width that {PQ_VALUES_PER_CODE} divides and 1,024 rows, found "
                f"{num_rows} x {width}; use ivf_sq8"
            )
        index = faiss.IndexIVFPQ(quantizer, width, num_lists, width // PQ_VALUES_PER_CODE, 8, inner)
        parameters["codes"] = width // PQ_VALUES_PER_CODE
    else:
        raise ValueError(f"building an index: expected an approximate kind, found {kind}")
    index.own_fields = True
    quantizer.this.disown()
    index.cp.niter, index.cp.seed, index.cp.spherical = CLUSTERING_ROUNDS, seed, True
    index.cp.max_points_per_centroid = TRAINING_ROWS_PER_LIST
    wanted = min(num_rows, TRAINING_ROWS_PER_LIST * num_lists)
    chosen = np.sort(np.random.default_rng(seed).choice(num_rows, wanted, replace=False))
    index.train(np.ascontiguousarray(vectors[chosen]))
    index.add(vectors)
    return index, parameters


def choose_index(
    kind: IndexKind, vectors: NDArray[np.float32], recall_target: float, seed: int = 0
) -> tuple[Any, IndexReport] | None:
    """Build an approximate index that reaches the target on these rows, or warn once why search stays exact."""
    try:
        num_held_out = min(NUM_QUERIES, int(MAX_HELD_OUT_SHARE * len(vectors)))
        held_out = np.random.default_rng(seed + 1).permutation(len(vectors))[:num_held_out]
        index, parameters = build_index(kind, vectors, held_out, seed)
        report = measure(kind, index, parameters, vectors, recall_target, held_out)
    except ValueError as error:
        _log.warning("%s; searching exactly", error)
        return None
    if report is None:
        _log.warning(
            "building %s over %d rows: expected recall@%d of %.3f, reached by no breadth that is faster than exact "
            "search; searching exactly",
            kind,
            len(vectors),
            MEASURED_K[0],
            recall_target,
        )
        return None
    complete_index(kind, index, vectors, held_out)
    return index, report


def approximate_rows(
    kind: IndexKind,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    recall_target: float,
    seed: int = 0,
) -> NDArray[np.int64] | None:
    """The rows (Q, K) that an index of this kind finds among vectors (N, D), best first, -1 where it finds fewer.

    Scored again from the vectors themselves, as a search is. None where such rows are searched exactly: a flat index,
    too few rows, a recall that is not reached, or a `k` beyond what was measured.
    """
    chosen = None if kind == "flat" else choose_index(kind, vectors, recall_target, seed)
    breadth = None if chosen is None else chosen[1].breadth_for(k)
    if chosen is None or breadth is None:
        return None
    asked = min(proposals(kind, k + 1), len(vectors))
    queries = np.ascontiguousarray(queries)
    _, found = chosen[0].search(queries, asked, params=search_parameters(kind, breadth))
    scores = np.einsum("qd,qkd->qk", queries, vectors[np.maximum(found, 0)])
    scores[found < 0] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows: NDArray[np.int64] = np.take_along_axis(found, best, axis=1)
    return rows


def num_lists_for(num_rows: int) -> int:
    """Inverted lists for so many rows: about 4 sqrt(N), a power of two, at least 32 rows in each."""
    wanted = 2 ** round(math.log2(max(1.0, 4 * math.sqrt(num_rows))))
    return max(1, min(wanted, num_rows // 32))


def complete_index(kind: IndexKind, index: Any, vectors: NDArray[np.float32], held_out: NDArray[np.int64]) -> None:
    """Add the rows that were held out while recall was measured."""
    if kind == "hnsw":
        _add(index, vectors, held_out)


def selector_of(live: NDArray[np.uint8]) -> Any:
    """FAISS's selector of the rows whose bit is set, low bit first; the bitmap must outlive it."""
    return _faiss.IDSelectorBitmap(live)


def search_parameters(kind: IndexKind, breadth: int, selector: Any | None = None) -> Any:
    """FAISS's parameters for a search of this breadth among the rows that the selector lets through."""
    if kind == "hnsw":
        return _faiss.SearchParametersHNSW(efSearch=breadth, **({"sel": selector} if selector else {}))
    return _faiss.SearchParametersIVF(nprobe=breadth, **({"sel": selector} if selector else {}))


def proposals(kind: IndexKind, k: int) -> int:
    """How many rows to ask an index for when k are wanted."""
    return k * PROPOSED[kind]


def measure(
    kind: IndexKind,
    index: Any,
    parameters: dict[str, int],
    vectors: NDArray[np.float32],
    recall_target: float,
    held_out: NDArray[np.int64],
) -> IndexReport | None:
    """Find the smallest breadth that reaches the target at each K; None where the first K has none.

    Where a further K has none, it is not in the report, and such searches are answered exactly.
    """
    num_rows = len(vectors)
    rows_of = {"choosing": held_out[: len(held_out) // 2], "confirming": held_out[len(held_out) // 2 :]}
    widest = max(MEASURED_K)
    exact = {name: _exact_scores(vectors, rows, held_out, widest) for name, rows in rows_of.items()}
    measured: list[MeasuredRecall] = []
    breadths = _breadths(kind, index)
    shown = np.ones(num_rows, bool)
    shown[held_out] = False
    selector = None if kind == "hnsw" else selector_of(np.packbits(shown, bitorder="little"))
    for k in MEASURED_K:
        if k > num_rows - len(held_out):
            continue

        def recall(breadth: int, name: str, k: int = k) -> float:
            return _recall(kind, index, vectors, rows_of[name], exact[name], k, breadth, selector)

        found = _smallest(breadths, recall, recall_target)
        if found is None:
            break
        measured.append(MeasuredRecall(k=k, breadth=found[0], recall=round(found[1], 6)))
    if not measured:
        return None
    return IndexReport(
        kind=kind,
        parameters=parameters,
        recall_target=recall_target,
        measured=tuple(measured),
        num_queries=len(held_out),
        oracle=ORACLE,
    )


def _smallest(breadths: list[int], recall: Callable[[int, str], float], target: float) -> tuple[int, float] | None:
    """The smallest breadth that the choosing half accepts and the other confirms, with the latter's recall."""
    for breadth in breadths:
        if recall(breadth, "choosing") >= target:
            confirmed = recall(breadth, "confirming")
            if confirmed >= target:
                return breadth, confirmed
    return None


def _breadths(kind: IndexKind, index: Any) -> list[int]:
    """Breadths to try, ascending, in steps of about 1.4."""
    most = MAX_HNSW_BREADTH if kind == "hnsw" else max(1, index.nlist // MIN_LISTS_LEFT_OUT)
    steps = {round(2 ** (step / 2)) for step in range(2 * int(math.log2(most)) + 1)}
    return sorted({*(step for step in steps if step <= most), most})


def _add(index: Any, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Add rows under their own numbers, in an order that has nothing to do with them."""
    shuffled = np.random.default_rng(0).permutation(rows)
    for start in range(0, len(shuffled), ADD_ROWS):
        chosen = shuffled[start : start + ADD_ROWS]
        index.add_with_ids(np.ascontiguousarray(vectors[chosen]), chosen)


def _exact_scores(
    vectors: NDArray[np.float32], rows: NDArray[np.int64], held_out: NDArray[np.int64], k: int
) -> NDArray[np.float32]:
    """Scores (Q, K) of the exact neighbours of stored rows among those not held out; fewer rows give fewer columns."""
    faiss.cvar.distance_compute_blas_threshold = 1
    num_found = min(2 * k + 64, len(vectors))
    scores, found = faiss.knn(vectors[rows], vectors, num_found, faiss.METRIC_INNER_PRODUCT)
    scores[np.isin(found, held_out)] = -np.inf
    best: NDArray[np.float32] = -np.sort(-scores, axis=1)[:, :k]
    return best


def _recall(
    kind: IndexKind,
    index: Any,
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    exact: NDArray[np.float32],
    k: int,
    breadth: int,
    selector: Any | None,
) -> float:
    queries = np.ascontiguousarray(vectors[rows])
    asked = min(proposals(kind, k + 1), len(vectors))
    _, found = index.search(queries, asked, params=search_parameters(kind, breadth, selector))
    scores = np.einsum("qd,qkd->qk", queries, vectors[np.maximum(found, 0)])
    scores[found < 0] = -np.inf
    best = -np.sort(-scores, axis=1)[:, :k]
    last = exact[:, k - 1 : k]
    return float((best >= last - 2 * TIE_TOLERANCE * np.maximum(1, np.abs(last))).mean())
