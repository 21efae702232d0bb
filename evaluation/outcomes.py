"""The per-query record that every number of an evaluation is computed from.

One row per query and *system state*: the rank of the first relevant item and the average precision. Rankings come in
as the ranks of the relevant gallery rows; embeddings never come here. States are plain names, composed and parsed only
by the functions below:

    served                  what production serves now: the champion's queries on today's view
    fraction/0.25           the candidate's queries, 25 % of the gallery re-embedded in the chosen order, after the rows
                            of `Question.wave_zero` were
    fraction/0.25/after/<k>+<l>   the same after the rows of generations k and l were, whatever was decided
    pair/<q>/<g>            queries by generation q on a gallery that g embedded alone (diagnosis)
    classify/<g>            classification by generation g: retrieval over its classifier rows
    live/<q>/<k>            queries by q on the served rows that generation k owns (certificates)

Invariant: all arrays of one `Outcomes` have the same length Q and the same query order, so that states can be compared
query by query. A query without a relevant row in a state has first rank 0 and average precision NaN there: "not
measurable", which is not the same as wrong; `compare` says what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.changed import LogAnswers

SERVED = "served"
Metric = Literal["recall@k", "mAP"]
METRICS: tuple[Metric, ...] = ("recall@k", "mAP")
SLICE_PREFIX = "slice_"
NOTHING = "nothing"  # an empty wave 0, in a state's name


class State(NamedTuple):
    """A parsed state name. Fields that do not belong to the kind are None."""

    kind: str
    fraction: float | None = None
    query_generation: str | None = None
    gallery_generation: str | None = None
    wave_zero: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outcomes:
    """What happened to each of Q queries in each state.

    `clusters` is what a bootstrap resamples (usually the identity). `first_rank` is 1-based, 0 where not measurable;
    `average_precision` is NaN where not measurable. Both hold the same states. `log`: further queries, of which only
    the answers are known, and labels where those changed.
    """

    query_ids: NDArray[Any]
    identities: NDArray[Any]
    clusters: NDArray[Any]
    slices: Mapping[str, NDArray[Any]]
    first_rank: Mapping[str, NDArray[np.int32]]
    average_precision: Mapping[str, NDArray[np.float32]]
    log: LogAnswers | None = None

    def __post_init__(self) -> None:
        for name in ("query_ids", "identities", "clusters"):
            object.__setattr__(self, name, _text(getattr(self, name)))
        object.__setattr__(self, "slices", {name: _text(values) for name, values in self.slices.items()})
        ranks = {state: np.asarray(values, np.int32) for state, values in self.first_rank.items()}
        object.__setattr__(self, "first_rank", ranks)
        precisions = {state: np.asarray(values, np.float32) for state, values in self.average_precision.items()}
        object.__setattr__(self, "average_precision", precisions)
        if set(ranks) != set(precisions):
            found = sorted(set(ranks) ^ set(precisions))
            raise ValueError(
                f"building outcomes: expected first_rank and average_precision of the same states, found only one of "
                f"them for {found}; give both"
            )
        if len(set(self.query_ids.tolist())) != len(self.query_ids):
            raise ValueError("building outcomes: expected every query_id once, found repetitions; make them unique")
        columns = {"identities": self.identities, "clusters": self.clusters}
        columns |= {f"slices[{name!r}]": values for name, values in self.slices.items()}
        columns |= {f"first_rank[{state!r}]": values for state, values in ranks.items()}
        columns |= {f"average_precision[{state!r}]": values for state, values in precisions.items()}
        for name, values in columns.items():
            if values.shape != self.query_ids.shape:
                raise ValueError(
                    f"building outcomes: expected {name} of shape {self.query_ids.shape} like query_ids, found "
                    f"{values.shape}; one entry per query, in the order of query_ids"
                )
        for state in ranks:
            parse_state(state)
            with np.errstate(invalid="ignore"):
                outside = (precisions[state] < 0) | (precisions[state] > 1 + 1e-6)
            if outside.any():
                raise ValueError(
                    f"building outcomes: expected average precisions in [0, 1], found "
                    f"{precisions[state][outside][0]:g} in state {state!r}; make both with outcome_from_ranks"
                )
            if ((ranks[state] > 0) != np.isfinite(precisions[state])).any() or (ranks[state] < 0).any():
                raise ValueError(
                    f"building outcomes: expected average_precision to be NaN exactly where first_rank is 0, found "
                    f"otherwise in state {state!r}; make both with outcome_from_ranks"
                )

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of all states, in the order in which they were given."""
        return tuple(self.first_rank)


class Comparison(NamedTuple):
    """Two states query by query, over the `counted` queries; every array has their length."""

    counted: NDArray[np.bool_]  # (Q,) which queries of the outcomes take part
    before: NDArray[np.float64]  # metric in the state before
    after: NDArray[np.float64]  # metric in the state after; 0 where it lost its relevant rows
    right_before: NDArray[np.bool_]
    right_after: NDArray[np.bool_]
    num_lost: int  # measurable before, not after: counted as wrong after


def fraction_state(fraction: float, wave_zero: Sequence[str] | None = None) -> str:
    """Name the state in which the candidate queries and `fraction` of the gallery is re-embedded.

    `wave_zero` names the owners whose rows were re-embedded before, where it is not the way that was decided.

    >>> fraction_state(0.25), fraction_state(1.0), fraction_state(0)
    ('fraction/0.25', 'fraction/1', 'fraction/0')
    >>> fraction_state(0.25, ["g2", "g1"]), fraction_state(0.25, [])
    ('fraction/0.25/after/g1+g2', 'fraction/0.25/after/nothing')
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"naming a fraction state: expected a fraction in [0, 1], found {fraction}")
    way = "" if wave_zero is None else f"/after/{'+'.join(sorted(wave_zero)) or NOTHING}"
    return f"fraction/{float(fraction):.6g}{way}"


def pair_state(query_generation: str, gallery_generation: str) -> str:
    """Name the state of queries by one generation on a pure gallery of another."""
    return f"pair/{query_generation}/{gallery_generation}"


def classify_state(generation: str) -> str:
    """Name the state of classification by one generation."""
    return f"classify/{generation}"


def live_state(query_generation: str, owner_generation: str) -> str:
    """Name the state of queries by one generation on the served rows that `owner_generation` owns."""
    return f"live/{query_generation}/{owner_generation}"


def parse_state(name: str) -> State:
    """Take a state name apart.

    >>> parse_state("live/g2/g1")
    State(kind='live', fraction=None, query_generation='g2', gallery_generation='g1', wave_zero=None)
    """
    kind, *rest = name.split("/")
    if kind == SERVED and not rest:
        return State(SERVED)
    if kind == "fraction" and (len(rest) == 1 or (len(rest) == 3 and rest[1] == "after")):
        fraction = _number(rest[0])
        owners = None if len(rest) == 1 else tuple(rest[2].split("+")) if rest[2] != NOTHING else ()
        if fraction is not None and 0 <= fraction <= 1 and fraction_state(fraction, owners) == name:
            return State(kind, fraction=fraction, wave_zero=owners)
    if kind in ("pair", "live") and len(rest) == 2 and all(rest):
        return State(kind, query_generation=rest[0], gallery_generation=rest[1])
    if kind == "classify" and len(rest) == 1 and rest[0]:
        return State(kind, query_generation=rest[0])
    raise ValueError(
        f"reading a state name: expected served, fraction/<0..1>, pair/<q>/<g>, classify/<g> or live/<q>/<k>, found "
        f"{name!r}; compose names with the functions of evaluation.outcomes"
    )


def outcome_from_ranks(
    offsets: NDArray[np.integer[Any]], ranks: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """First rank and average precision per query from the ranks of its relevant rows.

    `ranks[offsets[q]:offsets[q + 1]]` are the 1-based, ascending ranks of query q's relevant rows. AP = mean_i i / r_i
    over all of them. A query without relevant rows gets (0, NaN).

    >>> outcome_from_ranks(np.array([0, 2, 2, 3]), np.array([1, 4, 5]))  # AP: (1/1 + 2/4) / 2, none, 1/5
    (array([1, 0, 5], dtype=int32), array([0.75,  nan, 0.2 ], dtype=float32))
    """
    offsets, ranks = check_ranks(offsets, ranks)
    counts = np.diff(offsets)
    has_relevant = counts > 0
    first_rank = np.zeros(len(counts), np.int32)
    first_rank[has_relevant] = ranks[offsets[:-1][has_relevant]]
    average_precision = np.full(len(counts), np.nan, np.float32)
    if len(ranks):
        position = np.arange(1, len(ranks) + 1) - np.repeat(offsets[:-1], counts)
        sums = np.add.reduceat(position / ranks, offsets[:-1][has_relevant])
        average_precision[has_relevant] = sums / counts[has_relevant]
    return first_rank, average_precision


def check_ranks(
    offsets: NDArray[np.integer[Any]], ranks: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return both as int64 after checking that they describe ascending 1-based ranks per query."""
    starts = np.asarray(offsets).astype(np.int64)
    values = np.asarray(ranks).astype(np.int64)
    if not len(starts) or starts[0] != 0 or starts[-1] != len(values) or (np.diff(starts) < 0).any():
        raise ValueError(
            f"reading ranks: expected offsets that rise from 0 to {len(values)}, one more than queries, found "
            f"{starts[:3].tolist()} ... {starts[-1:].tolist()}"
        )
    inside = np.ones(len(values), np.bool_)
    inside[starts[:-1][starts[:-1] < len(values)]] = False
    if len(values) and (values.min() < 1 or (np.diff(values)[inside[1:]] <= 0).any()):
        raise ValueError("reading ranks: expected 1-based ranks, ascending within each query, found others; sort them")
    return starts, values


def measured(outcomes: Outcomes, state: str) -> NDArray[np.bool_]:
    """Which queries (Q,) have a relevant row in this state; none when the state was not evaluated."""
    if state not in outcomes.first_rank:
        return np.zeros(len(outcomes), np.bool_)
    return outcomes.first_rank[state] > 0


def right(outcomes: Outcomes, state: str, k: int = 1) -> NDArray[np.bool_]:
    """Which queries (Q,) have a relevant item in the top k. False where not measurable: combine with `measured`."""
    _known(outcomes, state)
    rank = outcomes.first_rank[state]
    return (rank > 0) & (rank <= k)


def metric_values(outcomes: Outcomes, state: str, metric: Metric = "recall@k", k: int = 1) -> NDArray[np.float64]:
    """Per-query metric (Q,), higher is better, NaN where not measurable. Its mean over queries is the metric."""
    if metric not in METRICS:
        raise ValueError(f"computing a metric: expected one of {METRICS}, found {metric!r}")
    if metric == "mAP":
        _known(outcomes, state)
        return outcomes.average_precision[state].astype(np.float64)
    return np.where(measured(outcomes, state), right(outcomes, state, k).astype(np.float64), np.nan)


def compare(
    outcomes: Outcomes,
    before: str,
    after: str,
    *,
    metric: Metric = "recall@k",
    k: int = 1,
    within: NDArray[np.bool_] | None = None,
) -> Comparison:
    """Pair two states query by query.

    A query that is measurable before takes part. If its relevant rows are gone after (unreadable, image lost), it
    counts as wrong after, with metric 0: a loss is never hidden by leaving it out. A query that is not measurable
    before has no baseline and stays out, so that the state after gets no credit for it.
    """
    counted = measured(outcomes, before) if within is None else measured(outcomes, before) & within
    lost = counted & ~measured(outcomes, after)
    value_after = metric_values(outcomes, after, metric, k)
    value_after[lost] = 0.0
    return Comparison(
        counted=counted,
        before=metric_values(outcomes, before, metric, k)[counted],
        after=value_after[counted],
        right_before=right(outcomes, before, k)[counted],
        right_after=right(outcomes, after, k)[counted],
        num_lost=int(lost.sum()),
    )


def to_columns(outcomes: Outcomes) -> dict[str, NDArray[Any]]:
    """Long format, one row per state and query: state, query_id, identity, cluster, slice_<name>..., both numbers."""
    repeat = len(outcomes.states)
    columns: dict[str, NDArray[Any]] = {
        "state": np.repeat(np.array(outcomes.states, np.str_), len(outcomes)),
        "query_id": np.tile(outcomes.query_ids, repeat),
        "identity": np.tile(outcomes.identities, repeat),
        "cluster": np.tile(outcomes.clusters, repeat),
    }
    for name, values in outcomes.slices.items():
        columns[SLICE_PREFIX + name] = np.tile(values, repeat)
    empty_rank, empty_precision = np.zeros(0, np.int32), np.zeros(0, np.float32)
    columns["first_rank"] = np.concatenate([empty_rank, *outcomes.first_rank.values()])
    columns["average_precision"] = np.concatenate(
        [empty_precision, *(outcomes.average_precision[state] for state in outcomes.states)]
    )
    return columns


def from_columns(columns: Mapping[str, NDArray[Any] | Sequence[Any]]) -> Outcomes:
    """Rebuild outcomes from `to_columns`. Rows may come in any order; every state must hold every query once."""
    state, query_id = _text(columns["state"]), _text(columns["query_id"])
    states = list(dict.fromkeys(state.tolist()))
    query_ids = np.array(list(dict.fromkeys(query_id.tolist())), np.str_)
    if len(state) != len(states) * len(query_ids):
        raise ValueError(
            f"reading outcomes: expected {len(states)} states x {len(query_ids)} queries = "
            f"{len(states) * len(query_ids)} rows, found {len(state)}; every state holds every query once"
        )
    sorter = np.argsort(query_ids)
    column_of_row = sorter[np.searchsorted(query_ids, query_id, sorter=sorter)] if len(query_ids) else np.zeros(0, int)
    rows: dict[str, NDArray[np.int64]] = {}
    for name in states:
        row = np.flatnonzero(state == name)
        ordered = np.full(len(query_ids), -1, np.int64)
        ordered[column_of_row[row]] = row
        if (ordered < 0).any():
            raise ValueError(
                f"reading outcomes: expected every query once in state {name!r}, found "
                f"{str(query_ids[ordered < 0][0])!r} missing and another one repeated"
            )
        rows[name] = ordered
    first = rows[states[0]] if states else np.zeros(0, np.int64)
    rank, precision = np.asarray(columns["first_rank"]), np.asarray(columns["average_precision"])
    return Outcomes(
        query_ids=query_ids,
        identities=_text(columns["identity"])[first],
        clusters=_text(columns["cluster"])[first],
        slices={
            name.removeprefix(SLICE_PREFIX): _text(values)[first]
            for name, values in columns.items()
            if name.startswith(SLICE_PREFIX)
        },
        first_rank={name: rank[row] for name, row in rows.items()},
        average_precision={name: precision[row] for name, row in rows.items()},
    )


def _text(values: Any) -> NDArray[Any]:
    return np.asarray(values).astype(np.str_)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _known(outcomes: Outcomes, state: str) -> None:
    if state not in outcomes.first_rank:
        raise ValueError(f"reading outcomes: state {state!r} was not evaluated, found {list(outcomes.states)}")
