"""The same judgement from plain NumPy arrays, for whoever keeps no workspace: ranks in, decision and metrics out.

Everything starts at *first ranks*: for each of Q queries the 1-based rank of its first relevant gallery item in the
full ranking, 0 where the gallery holds none. Any retrieval system can count them; ties are settled against the query.
`graceful.relevant_ranks` counts them from embeddings and `graceful.outcome_from_ranks` reduces them to first ranks and
average precision. Nothing is read, written or drawn without a seed.

Shapes: Q queries, F fractions of the gallery, G generations. Ranks are integers; metrics and shares lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graceful.evaluation.backfill import BackfillCurve, curve_from_outcomes
from graceful.evaluation.decision import Decision, decide
from graceful.evaluation.evidence import Question
from graceful.evaluation.gathering import gather_evidence
from graceful.evaluation.matrix import CompatibilityMatrix, matrix_from_outcomes
from graceful.evaluation.outcomes import SERVED, Metric, Outcomes, fraction_state, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy

CHAMPION, CANDIDATE = "champion", "candidate"


def judge_outcomes(
    served: ArrayLike,
    backfilled: Mapping[float, ArrayLike],
    *,
    policy: RolloutPolicy | None = None,
    clusters: ArrayLike | None = None,
    slices: Mapping[str, ArrayLike] | None = None,
    served_precision: ArrayLike | None = None,
    backfilled_precision: Mapping[float, ArrayLike] | None = None,
    order: str = "random",
) -> Decision:
    """Decide about an update: roll out compatibly, backfill first, hold, or ask for more queries.

    The gallery is taken to be embedded by the champion alone, as in a first update.

    Args:
        served: (Q,) first ranks in what is served now: the champion's queries on the champion's gallery.
        backfilled: fraction of the gallery re-embedded -> (Q,) first ranks of the candidate's queries then. 0 is the
            champion's gallery as it is, 1 the candidate's own; both must be there.
        policy: limits, error level and metric; by default those of `RolloutPolicy`, judged at the fractions given. A
            fraction that the policy names and that is not given makes the decision HOLD.
        clusters: (Q,) what queries are alike in, usually the identity; by default every query is independent.
        slices: name -> (Q,) values, for `policy.required_slices`.
        served_precision: (Q,) average precision, NaN where the rank is 0; needed for the metric "mAP" alone.
        backfilled_precision: the same for every fraction.
        order: in which the gallery was re-embedded; it is only told again.

    Returns:
        The decision with every guard: limit, value, bound, n and verdict. Errors of several states and of NFR and
        quality are controlled together at `policy.alpha`; see `evaluation.gathering`.

    Raises:
        ValueError: shapes differ, a fraction is missing or outside [0, 1], or precision is missing for mAP.

    Source: quality, non-inferiority by a paired cluster bootstrap with max-t bands; NFR, Yan et al., CVPR 2021 (arXiv
    2011.09161) with Clopper-Pearson bounds on the effective sample (Korn and Graubard, 1998).

    >>> served = np.repeat([1, 9], [1400, 600])                   # recall@1 0.70
    >>> mixed = served.copy(); mixed[1400:1440] = 1               # 40 of 2,000 queries repaired, none broken
    >>> decision = judge_outcomes(served, {0: served, 0.5: mixed, 1: mixed})
    >>> decision.outcome, decision.fraction
    ('COMPATIBLE_ROLLOUT', 0.0)
    >>> broken = served.copy(); broken[:100] = 9                  # 5 % of the queries break on the champion's gallery
    >>> judge_outcomes(served, {0: broken, 1: mixed}).outcome
    'FULL_BACKFILL'
    """
    fractions = sorted(float(fraction) for fraction in backfilled)
    if not {0.0, 1.0} <= set(fractions):
        raise ValueError(
            f"judging outcomes: expected ranks at fraction 0 (the champion's gallery) and 1 (the candidate's own), "
            f"found {fractions}; give both"
        )
    policy = policy or RolloutPolicy(fractions=tuple(fractions))
    ranks = {float(fraction): values for fraction, values in backfilled.items()}
    precisions = {float(fraction): values for fraction, values in (backfilled_precision or {}).items()}
    states = {SERVED: (served, served_precision), live_state(CHAMPION, CHAMPION): (served, served_precision)}
    states |= {fraction_state(f): (ranks[f], precisions.get(f)) for f in fractions}
    states[live_state(CANDIDATE, CHAMPION)] = states[fraction_state(0)]
    states[pair_state(CANDIDATE, CANDIDATE)] = states[fraction_state(1)]
    outcomes = outcomes_from_ranks(states, metric=policy.metric, clusters=clusters, slices=slices)
    question = Question(candidate=CANDIDATE, champion=CHAMPION, order=order, live_owners={CHAMPION: 1.0}, wave_zero=())
    return decide(gather_evidence(outcomes, policy, question), policy)


def compatibility_matrix(
    first_rank: ArrayLike,
    generations: Sequence[str] | None = None,
    *,
    metric: Metric = "recall@k",
    k: int = 1,
    average_precision: ArrayLike | None = None,
) -> CompatibilityMatrix:
    """Collect the compatibility matrix M[t, k]: queries by generation t on the gallery of generation k, oldest first.

    Args:
        first_rank: (G, G, Q) first ranks. A pair that was not measured is all 0, and NaN in the matrix.
        generations: G names; by default g1, g2, ...
        metric: "recall@k" or "mAP".
        k: depth at which a query is right, for recall.
        average_precision: (G, G, Q), NaN where the rank is 0; needed for the metric "mAP" alone.

    Returns:
        (G, G) shares. `average_compatibility`, `average_multimodel` and `criterion` read it.

    Raises:
        ValueError: not of shape (G, G, Q), names that repeat, or precision is missing for mAP.

    Source: Shen et al., CVPR 2020 (arXiv 2003.11942); as a matrix, Biondi et al., TPAMI 2023.

    >>> ranks = np.array([[[1, 1, 9, 9], [0, 0, 0, 0]],           # the old model, on its own gallery only
    ...                   [[1, 1, 1, 9], [1, 1, 1, 1]]])          # the new model, on the old gallery and on its own
    >>> compatibility_matrix(ranks).values
    array([[0.5 ,  nan],
           [0.75, 1.  ]])
    """
    ranks = np.asarray(first_rank)
    if ranks.ndim != 3 or ranks.shape[0] != ranks.shape[1]:
        raise ValueError(
            f"collecting a compatibility matrix: expected first ranks of shape (generations, generations, queries), "
            f"found {ranks.shape}"
        )
    names = [f"g{t + 1}" for t in range(len(ranks))] if generations is None else list(generations)
    if len(names) != len(ranks):
        raise ValueError(f"collecting a compatibility matrix: expected {len(ranks)} names, found {len(names)}")
    precision = None if average_precision is None else np.asarray(average_precision)
    states = {
        pair_state(names[t], names[g]): (ranks[t, g], None if precision is None else precision[t, g])
        for t, g in np.ndindex(ranks.shape[:2])
    }
    outcomes = outcomes_from_ranks(states, metric=metric)
    return matrix_from_outcomes(outcomes, names, metric=metric, k=k)


def backfill_curve(
    served: ArrayLike,
    backfilled: Mapping[float, ArrayLike],
    *,
    metric: Metric = "recall@k",
    k: int = 1,
    served_precision: ArrayLike | None = None,
    backfilled_precision: Mapping[float, ArrayLike] | None = None,
) -> BackfillCurve:
    """Collect the backfill curve: the metric of the served view against the fraction that is re-embedded.

    Args:
        served: (Q,) first ranks in what is served now.
        backfilled: fraction -> (Q,) first ranks of the candidate's queries with that share of the gallery re-embedded.
        metric: "recall@k" or "mAP".
        k: depth at which a query is right, for recall.
        served_precision: (Q,) average precision; needed for the metric "mAP" alone.
        backfilled_precision: the same for every fraction.

    Returns:
        Fractions (F,) rising, values (F,), `auc` (mean over even fractions, NaN without both ends) and `dip` (how far
        the lowest point lies below what is served).

    Raises:
        ValueError: shapes differ, a fraction is outside [0, 1], or precision is missing for mAP.

    Source: Ramanujan et al., FCT, CVPR 2022; Jaeckle et al., FastFill, ICLR 2023.

    >>> curve = backfill_curve([1, 1, 9, 9], {0: [1, 9, 9, 9], 0.5: [1, 1, 1, 9], 1: [1, 1, 1, 1]})
    >>> curve.values.tolist(), round(curve.auc, 4), curve.dip
    ([0.25, 0.75, 1.0], 0.6667, 0.25)
    """
    ranks = {float(fraction): values for fraction, values in backfilled.items()}
    precisions = {float(fraction): values for fraction, values in (backfilled_precision or {}).items()}
    states = {SERVED: (served, served_precision)}
    states |= {fraction_state(fraction): (values, precisions.get(fraction)) for fraction, values in ranks.items()}
    outcomes = outcomes_from_ranks(states, metric=metric)
    return curve_from_outcomes(outcomes, sorted(ranks), metric=metric, k=k)


def outcomes_from_ranks(
    states: Mapping[str, tuple[ArrayLike, ArrayLike | None]],
    *,
    metric: Metric = "recall@k",
    clusters: ArrayLike | None = None,
    slices: Mapping[str, ArrayLike] | None = None,
) -> Outcomes:
    """Outcomes of Q numbered queries from state name -> (first ranks (Q,), average precision (Q,) or None).

    Without a precision the reciprocal rank stands in for it, which recall does not look at; "mAP" refuses it.

    >>> outcomes_from_ranks({"served": ([1, 0, 4], None)}).average_precision["served"].tolist()
    [1.0, nan, 0.25]
    """
    first_rank: dict[str, NDArray[Any]] = {}
    average_precision: dict[str, NDArray[Any]] = {}
    for state, (given, precision) in states.items():
        ranks = np.asarray(given)
        if ranks.dtype.kind not in "iu" and not (ranks.dtype.kind == "f" and (ranks == np.rint(ranks)).all()):
            raise ValueError(
                f"reading ranks: expected whole numbers, 0 where nothing is relevant, found {ranks.dtype} in state "
                f"{state!r}"
            )
        if precision is None and metric == "mAP":
            raise ValueError(f"reading ranks: expected average precision for the metric mAP, found none for {state!r}")
        first_rank[state] = ranks.astype(np.int32)
        reciprocal = np.divide(1.0, ranks, out=np.full(ranks.shape, np.nan), where=ranks > 0)
        average_precision[state] = reciprocal if precision is None else np.asarray(precision)
    num_queries = len(next(iter(first_rank.values()))) if first_rank else 0
    own = np.arange(num_queries).astype(np.str_)
    cluster = own if clusters is None else np.asarray(clusters).astype(np.str_)
    return Outcomes(
        query_ids=own,
        identities=cluster,
        clusters=cluster,
        slices={name: np.asarray(values).astype(np.str_) for name, values in (slices or {}).items()},
        first_rank=first_rank,
        average_precision=average_precision,
    )
