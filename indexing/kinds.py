"""Approximate indexes over immutable rows: how each kind is built, and how wide it must search to keep its promise.

Invariant: an approximate index is used only with a breadth (nprobe, efSearch) whose recall was measured, on the rows
themselves, to reach the target. Half of a sample of stored vectors, each with itself excluded, chooses the breadth; the
other half confirms it. The oracle is exact search over the same rows. A neighbour whose score ties with the last exact
one counts as found.

What an index proposes is scored again from the vectors themselves (see `indexing.search`), so compressed kinds are asked
for more rows than wanted, and every kind returns exact scores.

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

from graceful.indexing.exact import TIE_TOLERANCE
from graceful.indexing.index_choice import IndexKind, IndexReport, MeasuredRecall

_log = logging.getLogger("graceful.search")

NUM_QUERIES = 1_000
MEASURED_K = (10, 100)
ORACLE = "exact inner products over the same rows, the query's own row left out"
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


def build_index(kind: IndexKind, vectors: NDArray[np.float32], seed: int = 0) -> tuple[Any, dict[str, int]]:
    """Build an index of one approximate kind over vectors (N, D); return it with its parameters.

    Raises:
        ValueError: the rows are too few, or of a width that the kind cannot take.
    """
    num_rows, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD_BREADTH
        index.add(vectors)
        return index, {"links": HNSW_LINKS, "build_breadth": HNSW_BUILD_BREADTH}
    num_lists = num_lists_for(num_rows)
    if num_rows < 2 * num_lists or num_lists < 2:
        raise ValueError(f"building {kind}: expected more rows, found {num_rows}; use a flat index")
    quantizer = faiss.IndexFlatIP(width)
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
    """Build an approximate index that reaches the target on these rows, or say in one warning why search stays exact."""
    try:
        index, parameters = build_index(kind, vectors, seed)
        report = measure(kind, index, parameters, vectors, recall_target, seed=seed)
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
    return index, report


def num_lists_for(num_rows: int) -> int:
    """Inverted lists for so many rows: about 4 sqrt(N), a power of two, at least 32 rows in each."""
    wanted = 2 ** round(math.log2(max(1.0, 4 * math.sqrt(num_rows))))
    return max(1, min(wanted, num_rows // 32))


def search_parameters(index: Any, breadth: int, selector: Any | None = None) -> Any:
    """FAISS's parameters for a search of this breadth among the rows that the selector lets through."""
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=breadth, **({"sel": selector} if selector else {}))
    return faiss.SearchParametersIVF(nprobe=breadth, **({"sel": selector} if selector else {}))


def proposals(kind: IndexKind, k: int) -> int:
    """How many rows to ask an index for when k are wanted."""
    return k * PROPOSED[kind]


def measure(
    kind: IndexKind,
    index: Any,
    parameters: dict[str, int],
    vectors: NDArray[np.float32],
    recall_target: float,
    *,
    num_queries: int = NUM_QUERIES,
    seed: int = 0,
) -> IndexReport | None:
    """Find the smallest breadth that reaches the target at each K; None where the first K has none.

    Where a further K has none, it is not in the report, and such searches are answered exactly.
    """
    num_rows = len(vectors)
    chosen = np.random.default_rng(seed + 1).permutation(num_rows)[: min(num_queries, num_rows)]
    rows_of = {"choosing": chosen[: len(chosen) // 2], "confirming": chosen[len(chosen) // 2 :]}
    widest = max(MEASURED_K)
    exact = {name: _exact_scores(vectors, rows, widest) for name, rows in rows_of.items()}
    measured: list[MeasuredRecall] = []
    breadths = _breadths(index)
    for k in MEASURED_K:
        if k >= num_rows:
            continue

        def recall(breadth: int, name: str, k: int = k) -> float:
            return _recall(kind, index, vectors, rows_of[name], exact[name], k, breadth)

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
        num_queries=len(chosen),
        oracle=ORACLE,
    )


def _smallest(
    breadths: list[int], recall: Callable[[int, str], float], target: float
) -> tuple[int, float] | None:
    """The smallest breadth that the choosing half accepts and the confirming half confirms, with the latter's recall."""
    for breadth in breadths:
        if recall(breadth, "choosing") >= target:
            confirmed = recall(breadth, "confirming")
            if confirmed >= target:
                return breadth, confirmed
    return None


def _breadths(index: Any) -> list[int]:
    """Breadths to try, ascending, in steps of about 1.4."""
    most = MAX_HNSW_BREADTH if isinstance(index, faiss.IndexHNSW) else max(1, index.nlist // MIN_LISTS_LEFT_OUT)
    steps = {round(2 ** (step / 2)) for step in range(0, 2 * int(math.log2(most)) + 1)}
    return sorted({*(step for step in steps if step <= most), most})


def _exact_scores(vectors: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> NDArray[np.float32]:
    """Scores (Q, K) of the exact neighbours of stored rows, themselves left out; fewer rows give fewer columns."""
    faiss.cvar.distance_compute_blas_threshold = 1
    num_found = min(k + 1, len(vectors))
    scores, found = faiss.knn(vectors[rows], vectors, num_found, faiss.METRIC_INNER_PRODUCT)
    return _without_own(scores, found, rows)[:, :k]


def _without_own(
    scores: NDArray[np.float32], found: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Drop each query's own row, or the last column where it was not among the found."""
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True
    return scores[~own].reshape(len(scores), -1)


def _recall(
    kind: IndexKind,
    index: Any,
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    exact: NDArray[np.float32],
    k: int,
    breadth: int,
) -> float:
    queries = np.ascontiguousarray(vectors[rows])
    asked = min(proposals(kind, k + 1), len(vectors))
    _, found = index.search(queries, asked, params=search_parameters(index, breadth))
    scores = np.einsum("qd,qkd->qk", queries, vectors[np.maximum(found, 0)])
    scores[(found < 0) | (found == rows[:, None])] = -np.inf
    best = -np.sort(-scores, axis=1)[:, :k]
    last = exact[:, k - 1 : k]
    return float((best >= last - 2 * TIE_TOLERANCE * np.maximum(1, np.abs(last))).mean())
