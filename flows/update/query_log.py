"""What a query log is answered in every state that is judged, beside the queries that have an identity.

Labels are looked up, never guessed. The order of the log is that of its contents' hashes, which nothing that is
measured depends on, and which a log that grows keeps. A query's own item, known by content, is not an answer to it.

What queries are alike in is, unless the configuration names a column, the identity that a label found, else the one
that is shown now. A negative flip was right before, so the two are the same for everything that is lost.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.changed import NOTHING_SHOWN, ChangedAnswersError, LogAnswers
from graceful.evaluation.outcomes import SERVED
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.labels import IDENTITY, AnswerLabels
from graceful.indexing.exact import top_k

ITEM = "item:"
UNREADABLE = ""
"""Owner of a row that cannot be read: it is left out of the gallery that is searched."""


class QueryLog:
    """The log of an evaluation set with the vectors of who answers it, and the answers gathered so far.

    `query_vectors` maps a generation to (L, D) in the log's own order, `gallery_vectors` to (N, D).
    """

    def __init__(
        self,
        evaluation_set: EvaluationSet,
        query_vectors: Mapping[str, NDArray[np.float32]],
        gallery_vectors: Mapping[str, NDArray[np.float32]],
        prefix_widths: Mapping[str, Sequence[int]],
        *,
        k: int,
        labels: AnswerLabels,
    ) -> None:
        log, gallery = evaluation_set.log, evaluation_set.gallery
        assert log is not None
        self._set, self._k, self._labels = evaluation_set, k, labels
        self._order = labelling_order(log.content_sha256)
        self._query_vectors = {name: vectors[self._order] for name, vectors in query_vectors.items()}
        self._gallery_vectors, self._prefix_widths = gallery_vectors, prefix_widths
        self._hashes = [log.content_sha256[i] for i in self._order]
        place = {digest: row for row, digest in reversed(list(enumerate(gallery.content_sha256)))}
        self._own = np.array([place.get(digest, -1) for digest in self._hashes], np.int64)
        self._keys = np.array(
            [
                f"{IDENTITY}{label}" if label else f"{ITEM}{digest}"
                for label, digest in zip(gallery.labels.tolist(), gallery.content_sha256, strict=True)
            ],
            dtype=object,
        )
        self._answers: dict[str, NDArray[np.str_]] = {}
        self._items: dict[str, NDArray[np.str_]] = {}

    def show(self, state: str, query_generation: str, owners: NDArray[np.str_]) -> None:
        """Answer every query by one generation on a gallery of these owners (N,)."""
        best = self._best(query_generation, owners)
        digests = self._set.gallery.content_sha256
        self._answers[state] = np.array([self._answer(rows) for rows in best.tolist()], np.str_)
        self._items[state] = np.array(
            [" ".join(digests[row] for row in rows if row >= 0) for rows in best.tolist()], np.str_
        )

    def answers(self) -> LogAnswers:
        """All states shown so far, with what is known about their answers."""
        log, clusters = self._set.log, self._set.log_clusters
        assert log is not None
        identities = self._labels.identities
        verdicts = {
            state: np.array(
                [self._labels.verdict(q, a, identities) for q, a in zip(self._hashes, shown.tolist(), strict=True)],
                np.int8,
            )
            for state, shown in self._answers.items()
        }
        if clusters is not None:
            alike = clusters[self._order]
        else:
            served = self._answers.get(SERVED, np.array([f"{ITEM}{q}" for q in self._hashes]))
            alike = np.array(
                [
                    identities.get(query, shown.removeprefix(IDENTITY) or f"{ITEM}{query}")
                    for query, shown in zip(self._hashes, served.tolist(), strict=True)
                ],
                np.str_,
            )
        return LogAnswers(
            query_ids=np.array(self._hashes, np.str_),
            clusters=alike,
            k=self._k,
            slices={name: values[self._order] for name, values in self._set.log_slices.items()},
            answers=dict(self._answers),
            verdicts=verdicts,
            items=dict(self._items),
        )

    def _answer(self, rows: Sequence[int]) -> str:
        shown = sorted({str(self._keys[row]) for row in rows if row >= 0})
        if not shown:
            return NOTHING_SHOWN
        return shown[0] if self._k == 1 else json.dumps(shown)

    def _best(self, query_generation: str, owners: NDArray[np.str_]) -> NDArray[np.int64]:
        """The best k rows (L, k) of a mixed gallery, best first, -1 where it has fewer; ties by the lower row."""
        queries, k = self._query_vectors[query_generation], self._k
        scores = np.full((len(queries), 0), 0, np.float32)
        found = np.full((len(queries), 0), -1, np.int64)
        for owner in sorted(set(owners.tolist()) - {UNREADABLE}):
            rows = np.flatnonzero(owners == owner)
            place = np.full(len(owners) + 1, -1, np.int64)
            place[rows] = np.arange(len(rows))
            part, local = top_k(
                queries,
                self._gallery_vectors[owner][rows],
                k,
                exclude=place[self._own],
                prefix_widths=tuple(self._prefix_widths.get(query_generation, ())),
            )
            scores = np.hstack([scores, np.nan_to_num(part, nan=-np.inf)])
            found = np.hstack([found, np.where(local >= 0, rows[local], len(owners))])
        if not scores.shape[1]:
            return np.full((len(queries), k), -1, np.int64)
        order = np.lexsort((found, -scores), axis=1)[:, :k]
        best = np.take_along_axis(found, order, axis=1)
        return np.where(best < len(owners), best, -1)


def check_log(evaluation_set: EvaluationSet, metric: str, k: int) -> None:
    """Refuse, before anything is trained, a log that this policy cannot be asked about. Raises ChangedAnswersError."""
    if evaluation_set.log is None:
        return
    if metric != "recall@k":
        raise ChangedAnswersError(
            f"judging a query log: expected policy.metric = 'recall@k', found {metric!r}: it depends on more than the "
            "answers that are shown; change it, or leave out evaluation.log"
        )
    if k > 1 and evaluation_set.log_clusters is None:
        raise ChangedAnswersError(
            f"judging a query log: expected evaluation.cluster where policy.k is {k}, found none: which of {k} "
            "items is right is not asked, so what queries are alike in has to be a column of the log"
        )


def labelling_order(hashes: Sequence[str]) -> NDArray[np.int64]:
    """The order (L,) in which a log is labelled: at random, and the same for ever, whatever comes to it later."""
    keys = [hashlib.sha256(digest.encode()).hexdigest() for digest in hashes]
    return np.array(sorted(range(len(keys)), key=lambda i: (keys[i], i)), np.int64)
