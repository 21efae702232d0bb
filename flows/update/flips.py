"""Explains negative flips: for every search that works now and would fail, the right answer that is lost, the wrong one
that takes its place, whose vector that is, by how much it wins, and why.

Computed while a candidate is judged, from the same vectors and the same owners as the ranks: later the gallery has
moved on. The result is one row per search and state, `FLIPS`, which lies beside the evaluation as flips.parquet.

Shapes: Q queries, N gallery rows, F flipped queries of one state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.evaluation.evidence import OVERALL, Evidence
from graceful.evaluation.outcomes import SERVED, Outcomes, compare, pair_state, right
from graceful.flows.store.evaluations import FLIPS
from graceful.flows.update.bench import Bench
from graceful.flows.update.query_log import UNREADABLE
from graceful.indexing.exact import comparable_queries, top_k
from graceful.indexing.index_choice import IndexKind
from graceful.indexing.kinds import approximate_rows

MODEL, MIXED, UNREADABLE_ROWS, INDEX = "model", "mixed gallery", "unreadable rows", "approximate index"
"""Why a search flips: it also fails in a gallery of the candidate alone; only beside older vectors; the rows that
answer it cannot be read in this state; or exact search answers it, and the index that serves does not. The decision is
about exact search, so that flips of the last kind come on top of its numbers."""

_BLOCK_SCORES = 16 * 2**20


@dataclass(frozen=True)
class Answers:
    """The best relevant and the best irrelevant row (F,) of each query with their scores; -1 and -inf for none."""

    right: NDArray[np.int64]
    right_score: NDArray[np.float32]
    wrong: NDArray[np.int64]
    wrong_score: NDArray[np.float32]


def explain_flips(
    bench: Bench, outcomes: Outcomes, evidence: Evidence, kind: IndexKind = "flat", recall_target: float = 1.0
) -> pa.Table:
    """Every negative flip of every state that the evidence judges or hopes for; no row for a first generation.

    `kind` and `recall_target` are of the index that serves; those that are its fault are found by an index of that kind
    over the evaluation's rows.
    """
    states = [s.state for s in (*evidence.states, *evidence.hoped_states) if s.scope == OVERALL]
    wanted = [state for state in dict.fromkeys(states) if state in bench.owners]
    codes = _codes(bench) if wanted else None
    tables = [_explain(bench, outcomes, evidence, state, codes) for state in wanted if codes is not None]
    if codes is not None and kind != "flat":
        search = _Index(kind, recall_target)
        before = _found(bench, str(evidence.champion), SERVED, codes, evidence.k, search)
        for state in wanted:
            pair = compare(outcomes, SERVED, state, k=evidence.k)
            lost = before & ~_found(bench, evidence.candidate, state, codes, evidence.k, search)
            queries = np.flatnonzero(pair.counted)[pair.right_before & pair.right_after]
            tables.append(_rows(bench, outcomes, evidence, state, codes, queries[lost[queries]], INDEX))
    return pa.concat_tables(tables) if tables else FLIPS.empty_table()


class Codes(NamedTuple):
    """Identities and items of gallery rows (N,) and queries (Q,) as whole numbers; an unknown identity is negative."""

    row_identities: NDArray[np.int64]
    query_identities: NDArray[np.int64]
    row_items: NDArray[np.int64]
    query_items: NDArray[np.int64]


def best_answers(bench: Bench, query_generation: str, state: str, queries: NDArray[np.int64], codes: Codes) -> Answers:
    """Search a measured state again with some of its queries (F,), each one's own item left out."""
    owners = bench.owners[state]
    wanted, own = codes.query_identities[queries], codes.query_items[queries]
    num_rows = len(owners)
    found = Answers(
        np.full(len(queries), -1), np.full(len(queries), -np.inf, np.float32),
        np.full(len(queries), -1), np.full(len(queries), -np.inf, np.float32),
    )  # fmt: skip
    block = max(1, _BLOCK_SCORES // max(num_rows, 1))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = _scores(bench, query_generation, owners, queries[part])
        scores[own[part, None] == codes.row_items[None, :]] = -np.inf
        relevant = (wanted[part, None] == codes.row_identities[None, :]) & (wanted[part, None] >= 0)
        for rows, best, mask in (
            (found.right, found.right_score, ~relevant),
            (found.wrong, found.wrong_score, relevant),
        ):
            masked = np.where(mask, -np.inf, scores)
            top = masked.argmax(axis=1)
            best[part] = masked[np.arange(len(top)), top]
            rows[part] = np.where(np.isfinite(best[part]), top, -1)
    return found


def _explain(bench: Bench, outcomes: Outcomes, evidence: Evidence, state: str, codes: Codes) -> pa.Table:
    k = evidence.k
    pair = compare(outcomes, SERVED, state, k=k)
    queries = np.flatnonzero(pair.counted)[pair.right_before & ~pair.right_after]
    own = pair_state(evidence.candidate, evidence.candidate)
    pure = right(outcomes, own, k)[queries] if own in outcomes.first_rank else np.zeros(len(queries), bool)
    rank_after = outcomes.first_rank[state][queries]
    cause = np.where(rank_after == 0, UNREADABLE_ROWS, np.where(pure, MIXED, MODEL))
    return _rows(bench, outcomes, evidence, state, codes, queries, cause)


def _rows(
    bench: Bench,
    outcomes: Outcomes,
    evidence: Evidence,
    state: str,
    codes: Codes,
    queries: NDArray[np.int64],
    cause: NDArray[np.str_] | str,
) -> pa.Table:
    chosen = bench.evaluation_set
    before = best_answers(bench, str(evidence.champion), SERVED, queries, codes)
    after = best_answers(bench, evidence.candidate, state, queries, codes)
    rank_after = outcomes.first_rank[state][queries]
    margin = after.wrong_score - after.right_score
    sources, labels = np.array(chosen.gallery.sources), chosen.gallery.labels
    return pa.table(
        {
            "query": outcomes.query_ids[queries],
            "identity": outcomes.identities[queries],
            "state": np.full(len(queries), state),
            "rank_before": outcomes.first_rank[SERVED][queries],
            "rank_after": pa.array(rank_after, mask=rank_after == 0),
            "right_item": _at(sources, before.right),
            "right_owner": _at(bench.owners[SERVED], before.right),
            "wrong_item": _at(sources, after.wrong),
            "wrong_identity": _at(labels, after.wrong),
            "wrong_owner": _at(bench.owners[state], after.wrong),
            "margin": pa.array(margin, mask=~np.isfinite(margin)),
            "cause": np.broadcast_to(cause, len(queries)),
        },
        schema=FLIPS,
    )


class _Index(NamedTuple):
    """The kind of index that serves, and the recall that it promises."""

    kind: IndexKind
    recall_target: float


def _found(bench: Bench, query_generation: str, state: str, codes: Codes, k: int, search: _Index) -> NDArray[np.bool_]:
    """Which queries (Q,) find a relevant row among the first k through such an index, a part for each generation.

    As in service: each part proposes its best rows, and all of them are ranked by their exact scores.
    """
    owners, num_queries = bench.owners[state], len(codes.query_items)
    num_own = int(np.bincount(codes.row_items).max(initial=1))  # copies of the query itself, which are left out
    rows, scores = [], []
    for owner in sorted(set(owners.tolist()) - {UNREADABLE}):
        mine = np.flatnonzero(owners == owner)
        stored = np.ascontiguousarray(bench.gallery_vectors[owner][mine])
        prefixes = tuple(bench.prefix_widths.get(query_generation, ()))
        asked = comparable_queries(bench.query_vectors[query_generation], stored.shape[1], prefixes)
        wanted = min(k + num_own, len(mine))
        proposed = approximate_rows(search.kind, stored, asked, wanted, search.recall_target)
        if proposed is None:
            proposed = top_k(asked, stored, wanted)[1]
        score = np.einsum("qd,qkd->qk", asked, stored[np.maximum(proposed, 0)])
        taken = mine[np.maximum(proposed, 0)]
        score[(proposed < 0) | (codes.row_items[taken] == codes.query_items[:, None])] = -np.inf
        rows.append(taken)
        scores.append(score)
    if not rows:
        return np.zeros(num_queries, np.bool_)
    all_rows, all_scores = np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    top, known = np.take_along_axis(all_rows, best, 1), np.take_along_axis(all_scores, best, 1) > -np.inf
    relevant = (codes.row_identities[top] == codes.query_identities[:, None]) & (codes.query_identities[:, None] >= 0)
    found: NDArray[np.bool_] = (relevant & known).any(axis=1)
    return found


def _scores(
    bench: Bench, query_generation: str, owners: NDArray[np.str_], queries: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores (F, N) of some queries against every row of a mixed gallery; -inf where a row cannot be read."""
    vectors = bench.query_vectors[query_generation][queries]
    scores = np.full((len(queries), len(owners)), -np.inf, np.float32)
    for owner in sorted(set(owners.tolist()) - {UNREADABLE}):
        mine = np.flatnonzero(owners == owner)
        stored = bench.gallery_vectors[owner][mine]
        prefixes = tuple(bench.prefix_widths.get(query_generation, ()))
        scores[:, mine] = comparable_queries(vectors, stored.shape[1], prefixes) @ stored.T
    return scores


def _codes(bench: Bench) -> Codes:
    rows, queries = bench.evaluation_set.gallery, bench.evaluation_set.queries
    row_identities, query_identities = _numbered(rows.labels, queries.labels)
    row_items, query_items = _numbered(np.array(rows.content_sha256), np.array(queries.content_sha256))
    return Codes(row_identities, np.where(queries.labels == "", -1, query_identities), row_items, query_items)


def _numbered(left: NDArray[np.str_], other: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two columns of text as whole numbers that are equal where the texts are."""
    numbers = np.unique(np.concatenate([left, other]), return_inverse=True)[1].astype(np.int64)
    return numbers[: len(left)], numbers[len(left) :]


def _at(values: NDArray[np.str_], rows: NDArray[np.int64]) -> pa.Array:
    """Values at rows; null where there is no row."""
    taken: Iterable[str | None] = (None if row < 0 else str(values[row]) for row in rows)
    return pa.array(list(taken), pa.string())
