"""What the queries of a log are answered, state by state: only one whose answer changed can flip, or needs a label.

An *answer* is the identity of the top item, or the set of those in the top k: two items of one identity are one answer,
right or wrong together. An item without an identity is an answer of its own, and so is showing nothing, which is never
right. Whether a query is right is a property of query and answer alone; equal answers are therefore right together,
and "changed" is a superset of the flips.

The queries of a log stand in a random order that was fixed before anything was labelled. What is judged is its
*beginning*: all queries before the first changed one whose answers are not both labelled. There every difference is
known, from a label or because nothing changed, so the bounds are those that labelling every query of the beginning
would give: the same numbers, at the same error level, with no share of alpha for the changed share. The beginning ends
before the next changed query, which is inverse sampling: m changed queries among n is an unbiased share (Haldane,
Biometrika 33, 1945). A bound on the changed share times one on the flip rate among changed queries (double sampling,
Neyman, JASA 33, 1938) is not used: an identity that is lost as a whole has more changed queries than others, and its
weight is not what it is among the clusters of a labelled sample; see docs/statistics.md.

Average precision depends on more than the top answers, so mAP cannot be judged so. Shapes: L queries of the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.evaluation.intervals import share_bounds

UNKNOWN, WRONG, RIGHT, UNCLEAR = -1, 0, 1, 2
"""What a label says about one answer to one query. UNCLEAR: a person looked and could not tell; counted as a loss."""

NOTHING_SHOWN = ""
"""Answer of a state in which nothing can be read."""

Pair = tuple[str, str]
"""Names of two states, before and after."""


class ChangedAnswersError(GracefulError, ValueError):
    """This question cannot be answered from answers and labels of changed queries."""


@dataclass(frozen=True)
class LogAnswers:
    """Answers to L queries of a log, in the random order in which they are labelled.

    `answers` maps a state to what it shows, `verdicts` to UNKNOWN, WRONG, RIGHT or UNCLEAR for each of those answers.
    `clusters` is what a bootstrap resamples, `k` the depth of the answers. `items` names, for a person to look at, the
    items behind each answer, best first, separated by blanks.
    """

    query_ids: NDArray[Any]
    clusters: NDArray[Any]
    k: int
    slices: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    answers: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    verdicts: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)
    items: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.answers) != set(self.verdicts):
            found = sorted(set(self.answers) ^ set(self.verdicts))
            raise ValueError(f"answers to a log: expected answers and verdicts of the same states, found {found} alone")
        columns = {"clusters": self.clusters, **self.slices, **self.answers}
        columns |= {f"verdicts of {state}": values for state, values in self.verdicts.items()}
        columns |= {f"items of {state}": values for state, values in self.items.items()}
        for name, values in columns.items():
            if len(values) != len(self.query_ids):
                raise ValueError(
                    f"answers to a log: expected {len(self.query_ids)} entries of {name}, found {len(values)}"
                )

    def __len__(self) -> int:
        return len(self.query_ids)

    def has(self, pair: Pair) -> bool:
        """Whether both states were asked."""
        return pair[0] in self.answers and pair[1] in self.answers


class LabelsNeeded(NamedTuple):
    """What judging so many queries takes: labels as expected, and at most (at the error level of the bound)."""

    num_queries: int
    expected: int
    at_most: int


def changed(log: LogAnswers, pair: Pair) -> NDArray[np.bool_]:
    """Which queries (L,) are answered otherwise after than before: all that can flip.

    >>> answers = {"served": np.array(["a", "b", ""]), "fraction/0": np.array(["a", "c", ""])}
    >>> unknown = dict.fromkeys(answers, np.full(3, UNKNOWN, np.int8))
    >>> log = LogAnswers(np.arange(3), np.arange(3), 1, {}, answers, unknown)
    >>> changed(log, ("served", "fraction/0")).tolist()
    [False, True, False]
    """
    return np.asarray(log.answers[pair[0]] != log.answers[pair[1]])


def unsettled(log: LogAnswers, pair: Pair) -> NDArray[np.bool_]:
    """Which changed queries (L,) have an answer that nobody has labelled; showing nothing needs no label."""
    needed = np.zeros(len(log), np.bool_)
    for state in pair:
        needed |= (log.verdicts[state] == UNKNOWN) & (log.answers[state] != NOTHING_SHOWN)
    return changed(log, pair) & needed


def in_any(
    log: LogAnswers, pairs: Iterable[Pair], of: Callable[[LogAnswers, Pair], NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Which queries (L,) are `changed` or `unsettled` in any of the pairs of states."""
    found = np.zeros(len(log), np.bool_)
    for pair in pairs:
        found |= of(log, pair)
    return found


def beginning(log: LogAnswers, pairs: Iterable[Pair]) -> int:
    """How many queries of the log are settled in all pairs of states, from the first one on."""
    found = in_any(log, pairs, unsettled)
    return int(np.argmax(found)) if found.any() else len(log)


def log_differences(
    log: LogAnswers, pair: Pair, *, metric: str, k: int, within: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Right after less right before (L,), in {-1, 0, 1}; NaN behind the beginning, and outside `within`.

    An unclear answer is taken at its worst: right before, wrong after.

    Raises:
        ChangedAnswersError: the metric is not recall, or the answers are of another depth.
    """
    if metric != "recall@k":
        raise ChangedAnswersError(
            f"judging a query log: expected the metric recall@k, found {metric}: average precision depends on more "
            "than the top answer; set policy.metric, or leave out evaluation.log"
        )
    if k != log.k:
        raise ChangedAnswersError(
            f"judging a query log: expected answers of depth {k}, found those of depth {log.k}; run 'graceful update "
            "--again', which asks again"
        )
    differences = np.full(len(log), np.nan)
    if not log.has(pair):
        return differences
    before, after = log.verdicts[pair[0]], log.verdicts[pair[1]]
    right_before = (before == RIGHT) | (before == UNCLEAR)
    value = np.where(changed(log, pair), (after == RIGHT) * 1.0 - right_before, 0.0)
    counted = np.arange(len(log)) < beginning(log, [pair])
    counted &= True if within is None else within
    differences[counted] = value[counted]
    return differences


def next_to_label(log: LogAnswers, pairs: Sequence[Pair], num_queries: int) -> list[tuple[int, str, str]]:
    """What to label so that the first `num_queries` of the log are settled: (query, answer before, after), in order.

    One entry per query and two answers, however many pairs of states show them.
    """
    end = min(num_queries, len(log))
    wanted: dict[tuple[int, str, str], None] = {}
    found = {pair: unsettled(log, pair)[:end] for pair in pairs}
    for query in np.flatnonzero(np.logical_or.reduce(list(found.values()))) if found else ():
        for pair in pairs:
            if found[pair][query]:
                shown = (str(log.answers[state][query]) for state in pair)
                wanted.setdefault((int(query), *shown))  # type: ignore[arg-type]
    return list(wanted)


def labels_needed(log: LogAnswers, pairs: Sequence[Pair], num_queries: int, *, alpha: float = 0.05) -> LabelsNeeded:
    """How many of `num_queries` queries like those of the log would have to be labelled; all of them otherwise.

    The share is that of queries that change in any of the pairs, with its exact upper bound over clusters.
    """
    bounds = share_bounds(in_any(log, pairs, changed), log.clusters, alpha)
    share = bounds.value if len(log) else 1.0
    return LabelsNeeded(
        num_queries, math.ceil(num_queries * share - 1e-9), math.ceil(num_queries * bounds.upper - 1e-9)
    )


def log_columns(log: LogAnswers) -> dict[str, NDArray[Any]]:
    """As columns: query_id, cluster, slice_<name>, answer/<state>, verdict/<state>, items/<state>; one row a query."""
    return {
        "query_id": log.query_ids,
        "k": np.full(len(log), log.k, np.int64),
        "cluster": log.clusters,
        **{f"slice_{name}": values for name, values in log.slices.items()},
        **{f"answer/{state}": values for state, values in log.answers.items()},
        **{f"verdict/{state}": values for state, values in log.verdicts.items()},
        **{f"items/{state}": values for state, values in log.items.items()},
    }


def log_from_columns(columns: Mapping[str, NDArray[Any]]) -> LogAnswers:
    """Rebuild what `log_columns` gave."""

    def named(prefix: str) -> dict[str, NDArray[Any]]:
        return {name.removeprefix(prefix): values for name, values in columns.items() if name.startswith(prefix)}

    return LogAnswers(
        query_ids=columns["query_id"],
        clusters=columns["cluster"],
        k=int(columns["k"][0]) if len(columns["k"]) else 1,
        slices=named("slice_"),
        answers=named("answer/"),
        verdicts={state: np.asarray(values, np.int8) for state, values in named("verdict/").items()},
        items=named("items/"),
    )
