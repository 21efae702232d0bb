"""From vectors to outcomes: what production serves now, what it would serve, and the diagnosis around it.

Everything decided about is a state that would really be served: the candidate's queries on the gallery as the reading
rule would show it at each fraction of the plan. Pure galleries (the compatibility matrix) are diagnosis.

An evaluation row is owned by the generation that owns its production counterpart, found by content; one without a
counterpart counts as ingested just now, by the champion.

Shapes: Q queries, N rows of the evaluation gallery, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graceful.evaluation.outcomes import (
    SERVED,
    Metric,
    Outcomes,
    classify_state,
    fraction_state,
    live_state,
    outcome_from_ranks,
    pair_state,
)
from graceful.evaluation.retrieval import chance
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.update.query_log import UNREADABLE, QueryLog
from graceful.indexing.exact import RelevantRanks, rank_states
from graceful.indexing.gallery import View
from graceful.indexing.matching import match_rows
from graceful.indexing.planner import OrderInputs, nearest_mean_distance, num_chosen, random_key, rank_items


@dataclass(frozen=True)
class Classifier:
    """A generation's unit classifier rows (C, d) with their class names, and unit class means (C, d)."""

    classes: tuple[str, ...]
    rows: NDArray[np.float32]
    class_means: NDArray[np.float32]


@dataclass
class Bench:
    """An evaluation set with the vectors of every generation that takes part, and the outcomes gathered so far.

    `query_vectors` and `gallery_vectors` map a generation to (Q, D) and (N, D). `prefix_widths` as on the cards.
    """

    evaluation_set: EvaluationSet
    query_vectors: Mapping[str, NDArray[np.float32]]
    gallery_vectors: Mapping[str, NDArray[np.float32]]
    prefix_widths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    first_rank: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    average_precision: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    owners: dict[str, NDArray[np.str_]] = field(default_factory=dict)
    """Owner (N,) of each row in every mixed state that was measured."""
    log: QueryLog | None = None

    def outcomes(self) -> Outcomes:
        """All states measured so far."""
        chosen = self.evaluation_set
        return Outcomes(
            query_ids=np.array(chosen.queries.sources),
            identities=chosen.queries.labels,
            clusters=chosen.clusters,
            slices=dict(chosen.slices),
            first_rank=dict(self.first_rank),
            average_precision=dict(self.average_precision),
            log=None if self.log is None else self.log.answers(),
        )

    def chance(self, metric: Metric, k: int) -> float | None:
        """What a model that knows nothing would reach on a gallery of every row."""
        chosen = self.evaluation_set
        matches = match_rows(
            chosen.queries.labels,
            chosen.gallery.labels,
            chosen.queries.content_sha256,
            chosen.gallery.content_sha256,
        )
        num_rows = matches.num_rows - np.diff(matches.own_offsets)
        return chance(np.diff(matches.relevant_offsets), num_rows, metric, k)

    def comparable(self, query_generation: str, gallery_generation: str) -> bool:
        """Whether queries of one generation can be scored against vectors of another: by their widths."""
        width = self.query_vectors[query_generation].shape[1]
        stored = self.gallery_vectors[gallery_generation].shape[1]
        return stored == width or stored in self.prefix_widths.get(query_generation, ())

    def measure_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Pure galleries: every pair (query, gallery generation) that can be compared, in stacked products."""
        ranked = self._rank([pair for pair in pairs if self.comparable(*pair)], None, {})
        for (query, gallery), ranks in ranked.items():
            self._store(pair_state(query, gallery), ranks)

    def measure_served(self, champion: str, owners: NDArray[np.str_]) -> None:
        """What production serves now: the champion's queries on today's owners (N,)."""
        self._store(SERVED, self._rank_mixes(champion, {SERVED: owners})[SERVED])
        self._ask_log(SERVED, champion, owners)

    def measure_live(self, query_generation: str, owners: NDArray[np.str_], live: Sequence[str]) -> None:
        """Queries of one generation on the rows of each live owner alone: the ground of certificates.

        A live owner without a single evaluation row is measured on nothing: no query is measurable, no certificate
        can be issued.
        """
        for owner in live:
            state = live_state(query_generation, owner)
            if not (owners == owner).any():
                self.measure_nothing(state)
                continue
            if not self.comparable(query_generation, owner):
                # Such a query finds nothing there: every answer is wrong.
                self.first_rank[state] = np.full(len(self.evaluation_set.queries), len(owners) + 1, np.int32)
                self.average_precision[state] = np.zeros(len(self.evaluation_set.queries), np.float32)
                continue
            ranks = self._rank([(query_generation, owner)], owners == owner, {})
            self._store(state, ranks[query_generation, owner])
            # Whether one owner among several has a row for a query is not known without the query's identity.
            if {*owners.tolist()} <= {owner, UNREADABLE}:
                self._ask_log(state, query_generation, owners)

    def measure_nothing(self, state: str) -> None:
        """No query is measurable in this state: nothing can be said by it."""
        num_queries = len(self.evaluation_set.queries)
        self.first_rank[state] = np.zeros(num_queries, np.int32)
        self.average_precision[state] = np.full(num_queries, np.nan, np.float32)

    def measure_fractions(
        self,
        candidate: str,
        owners: NDArray[np.str_],
        ranking: NDArray[np.int64],
        fractions: Sequence[float],
        wave_zero: Sequence[str] | None = None,
    ) -> None:
        """The candidate's queries with growing parts of the gallery re-embedded.

        `owners` (N,) as the candidate's view would show them before anything is re-embedded; unreadable rows are wave
        0 and belong to the candidate in every state. `ranking` (N,) lists rows in plan order, wave 0 first.
        `wave_zero` names the owners of it in the states' names, where this is not the way that is decided.
        """
        num_first = int((owners == UNREADABLE).sum())
        mixes = {}
        for fraction in fractions:
            mixed = owners.copy().astype(object)
            mixed[ranking[: num_chosen(len(owners), num_first, fraction)]] = candidate
            mixes[fraction_state(fraction, wave_zero)] = mixed.astype(np.str_)
        for state, ranks in self._rank_mixes(candidate, mixes).items():
            self._store(state, ranks)
            self._ask_log(state, candidate, mixes[state])

    def measure_classification(self, generation: str, classifier: Classifier) -> None:
        """Classification as retrieval over classifier rows; identities that are no class are not measurable."""
        queries = self.evaluation_set.queries
        ranked = rank_states(
            {generation: self.query_vectors[generation]},
            {generation: classifier.rows},
            [(generation, generation)],
            queries.labels,
            np.array(classifier.classes),
        )
        self._store(classify_state(generation), ranked[generation, generation])

    def _rank_mixes(self, query_generation: str, mixes: Mapping[str, NDArray[np.str_]]) -> dict[str, RelevantRanks]:
        """Rank states of one query generation; those with the same readable rows share their products."""
        self.owners.update(mixes)
        groups: dict[bytes, list[str]] = {}
        for state, owners in mixes.items():
            groups.setdefault((owners != UNREADABLE).tobytes(), []).append(state)
        ranked: dict[str, RelevantRanks] = {}
        for states in groups.values():
            readable = mixes[states[0]] != UNREADABLE
            pairs = [(query_generation, state) for state in states]
            found = self._rank(pairs, readable, {state: mixes[state][readable] for state in states})
            ranked.update({state: found[query_generation, state] for state in states})
        return ranked

    def _rank(
        self,
        pairs: list[tuple[str, str]],
        rows: NDArray[np.bool_] | None,
        mixes: dict[str, NDArray[np.str_]],
    ) -> dict[tuple[str, str], RelevantRanks]:
        chosen = self.evaluation_set
        needed = {owner for owners in mixes.values() for owner in set(owners.tolist())}
        needed |= {gallery for _, gallery in pairs if gallery not in mixes}
        take: Callable[[NDArray], NDArray] = (lambda values: values) if rows is None else (lambda values: values[rows])
        return rank_states(
            {query: self.query_vectors[query] for query in {query for query, _ in pairs}},
            {name: take(self.gallery_vectors[name]) for name in sorted(needed)},
            pairs,
            chosen.queries.labels,
            take(chosen.gallery.labels),
            # A copy of the query is its own item wherever it lies.
            np.array(chosen.queries.content_sha256),
            take(np.array(chosen.gallery.content_sha256)),
            mixes=mixes,
            prefix_widths={query: tuple(self.prefix_widths.get(query, ())) for query in self.query_vectors},
        )

    def _ask_log(self, state: str, query_generation: str, owners: NDArray[np.str_]) -> None:
        if self.log is not None:
            self.log.show(state, query_generation, owners)

    def _store(self, state: str, ranks: RelevantRanks) -> None:
        first_rank, average_precision = outcome_from_ranks(ranks.offsets, ranks.ranks)
        self.first_rank[state], self.average_precision[state] = first_rank, average_precision


def production_owners(evaluation_set: EvaluationSet, view: View, otherwise: str) -> NDArray[np.str_]:
    """Owner (N,) of each evaluation row: that of its production counterpart in the view, else `otherwise`."""
    hashes = view.column("content_sha256")
    position = pc.fill_null(pc.index_in(pa.array(evaluation_set.gallery.content_sha256), value_set=hashes), -1)
    place = position.to_numpy()
    names = np.array([*view.readable, UNREADABLE])
    owners = np.full(len(place), otherwise, dtype=names.dtype if len(otherwise) <= names.itemsize // 4 else object)
    found = place >= 0
    owners[found] = names[view.owner[place[found]]]
    return owners.astype(np.str_)


def plan_ranking(
    evaluation_set: EvaluationSet,
    owners: NDArray[np.str_],
    generations: Sequence[str],
    order: str,
    seed: int,
    gallery_vectors: Mapping[str, NDArray[np.float32]],
    classifiers: Mapping[str, Classifier],
) -> NDArray[np.int64]:
    """Rank the evaluation gallery by the same order as the plan ranks production; unreadable rows come first."""
    age = {generation: place for place, generation in enumerate(generations)}
    distance = None
    if order == "class_distance":
        distance = np.full(len(owners), np.nan, np.float32)
        for owner in set(owners.tolist()) & set(classifiers):
            mine = owners == owner
            distance[mine] = nearest_mean_distance(gallery_vectors[owner][mine], classifiers[owner].class_means)
    inputs = OrderInputs(
        # By content, as good as any id, and the same wherever the data lie.
        random_key(evaluation_set.gallery.content_sha256, seed),
        np.array([age.get(str(owner), -1) for owner in owners], np.int64),
        distance,
    )
    return rank_items(order, inputs, owners == UNREADABLE)
