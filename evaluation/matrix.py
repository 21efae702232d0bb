"""The compatibility matrix M[t, k]: queries by generation t on the gallery of generation k, and what is read from it.

Generations are ordered, oldest first; index 0 is the first one. NaN is "not measured": it never counts as 0 and never
passes. Higher is better. The published criterion, AC and update gain are reported; the gate is elsewhere
(`evaluation.decision`).

Shen et al., CVPR 2020 (criterion, update gain); Biondi et al., TPAMI 2023 and CVPR 2024 (AC, AM); Biondi et al., CL2R,
2022 (BC, FC); Pan et al., AdvBCT, CVPR 2023 (P_up, P_comp, P1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.outcomes import Metric, Outcomes, pair_state
from graceful.evaluation.retrieval import metric_of


@dataclass(frozen=True)
class CompatibilityMatrix:
    """`values[t, k]` (G, G) float64 = metric of queries by generation t on the pure gallery of generation k."""

    generations: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, np.float64))
        expected = (len(self.generations), len(self.generations))
        if self.values.shape != expected or len(set(self.generations)) != len(self.generations):
            raise ValueError(
                f"building a compatibility matrix: expected {expected} values for distinct generations, found "
                f"{self.values.shape} for {self.generations}"
            )

    @property
    def self_tests(self) -> NDArray[np.float64]:
        """M[t, t] (G,)."""
        return self.values.diagonal()


class AdvBctScores(NamedTuple):
    """Scores in [0, 1]; 0.5 is "as good as the reference"."""

    p_up: float
    p_comp: float
    p_1: float


def matrix_from_outcomes(
    outcomes: Outcomes, generations: Sequence[str], *, metric: Metric = "recall@k", k: int = 1
) -> CompatibilityMatrix:
    """Collect all measured pair/<t>/<k> states; the others stay NaN."""
    values = [[metric_of(outcomes, pair_state(t, g), metric, k) for g in generations] for t in generations]
    return CompatibilityMatrix(tuple(generations), np.array(values, np.float64).reshape(len(values), len(values)))


def criterion(matrix: CompatibilityMatrix) -> NDArray[np.float64]:
    """Whether M[t, k] > M[k, k], strict, for t > k (G, G): 1 met, 0 not met, NaN elsewhere and where not measured.

    >>> criterion(CompatibilityMatrix(("a", "b"), np.array([[0.5, np.nan], [0.6, 0.7]])))
    array([[nan, nan],
           [ 1., nan]])
    """
    values = matrix.values
    reference = np.broadcast_to(matrix.self_tests, values.shape)
    met = (values > reference).astype(np.float64)
    later = np.tri(len(values), k=-1, dtype=np.bool_)
    return np.where(later & ~np.isnan(values) & ~np.isnan(reference), met, np.nan)


def average_compatibility(matrix: CompatibilityMatrix, pairs: Iterable[tuple[str, str]] | None = None) -> float:
    """AC: share of pairs (t, k), t later than k, that meet the criterion.

    `pairs` restricts it, for instance to those where k was a predecessor of t. NaN when there is no pair, and when
    one of the pairs was not measured: a hole in the matrix is not a pass.

    >>> average_compatibility(CompatibilityMatrix(("a", "b"), np.array([[0.5, np.nan], [0.6, 0.7]])))
    1.0
    """
    index = {generation: i for i, generation in enumerate(matrix.generations)}
    if pairs is None:
        chosen = [(t, k) for t in range(len(index)) for k in range(t)]
    else:
        chosen = [(index[t], index[k]) for t, k in pairs]
    if any(t <= k for t, k in chosen):
        raise ValueError("computing AC: expected pairs (later, earlier), found others; order them as (t, k) with t > k")
    met = criterion(matrix)
    return float(np.mean([met[t, k] for t, k in chosen])) if chosen else np.nan


def average_multimodel(matrix: CompatibilityMatrix) -> float:
    """AM: mean of the measured entries with t >= k (self-tests and cross-tests by later generations).

    >>> average_multimodel(CompatibilityMatrix(("a", "b"), np.array([[0.5, np.nan], [0.6, 0.7]]))).__round__(3)
    0.6
    """
    values = matrix.values[np.tri(len(matrix.generations), dtype=np.bool_)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def update_gain(cross_test: float, predecessor_self_test: float, paragon_self_test: float) -> float:
    """(M[t, k] - M[k, k]) / (M* - M[k, k]): the share of a full backfill's gain had without one.

    NaN when the paragon is no better than the predecessor.

    >>> round(update_gain(0.6, 0.5, 0.7), 3)
    0.5
    """
    room = paragon_self_test - predecessor_self_test
    return (cross_test - predecessor_self_test) / room if room > 0 else np.nan


def compatibility_tax(self_test: float, paragon_self_test: float) -> float:
    """M* - M[t, t]: what the constraints cost the candidate's own quality. Lower is better; negative is a gain."""
    return paragon_self_test - self_test


def backward_compatibility(matrix: CompatibilityMatrix) -> float:
    """CL2R BC = 1/(T-1) sum_{k<T} (M[T, k] - M[k, k]): the last generation on every earlier gallery."""
    if len(matrix.generations) < 2:
        return np.nan
    return float(np.mean(matrix.values[-1, :-1] - matrix.self_tests[:-1]))


def forward_compatibility(matrix: CompatibilityMatrix) -> float:
    """CL2R FC = 1/(T-1) sum_{t=2..T} (M[t, t-1] - M[t, t]): each generation on its neighbour's gallery; at most 0 as
    a rule, and closer to 0 is better.
    """
    if len(matrix.generations) < 2:
        return np.nan
    return float(np.mean(matrix.values.diagonal(-1) - matrix.self_tests[1:]))


def advbct_scores(
    self_tests: NDArray[Any] | Sequence[float],
    paragons: NDArray[Any] | Sequence[float],
    cross_tests: NDArray[Any] | Sequence[float],
    predecessor_self_tests: NDArray[Any] | Sequence[float],
) -> AdvBctScores:
    """Scores of one update over several test sets, given entry by entry in one unit.

    P_up = mean sigmoid((M(t,t) - M*) / M*), P_comp = mean sigmoid((M(t,k) - M(k,k)) / (M* - M(k,k))), P1 = mean of the
    harmonic means per test set.
    """
    own, best, cross, old = (
        np.asarray(x, np.float64) for x in (self_tests, paragons, cross_tests, predecessor_self_tests)
    )
    up = _sigmoid(np.divide(own - best, best, out=np.full_like(best, np.nan), where=best > 0))
    room = best - old
    comp = _sigmoid(np.divide(cross - old, room, out=np.full_like(best, np.nan), where=room > 0))
    if not len(up):
        return AdvBctScores(np.nan, np.nan, np.nan)
    return AdvBctScores(float(up.mean()), float(comp.mean()), float((2 * up * comp / (up + comp)).mean()))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))
