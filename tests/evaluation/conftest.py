"""Outcomes with planted truths: every query is right or wrong in `served`, and flips with known rates afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graceful.evaluation.evidence import Evidence, Question
from graceful.evaluation.gathering import gather_evidence
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy

FRACTIONS = RolloutPolicy().fractions
QUICK = RolloutPolicy(num_resamples=300)


def plant(
    *,
    num_queries: int = 4000,
    queries_per_cluster: int = 1,
    losses: Mapping[float, int] | int = 0,
    wins: Mapping[float, int] | int = 0,
    owners: Mapping[str, tuple[int, int]] | None = None,
    baseline_right: float = 0.7,
    slices: Mapping[str, Any] | None = None,
    candidate: str = "g2",
    champion: str = "g1",
) -> Outcomes:
    """Plant exact numbers of losses and wins per fraction, and (losses, wins) per live owner.

    The first queries are right in `served`; losses are taken from their end, wins from the start of the wrong ones.
    """
    num_right = int(num_queries * baseline_right)
    before = np.arange(num_queries) < num_right
    owners = {champion: (0, 0)} if owners is None else owners
    states = {SERVED: before, pair_state(candidate, candidate): before}
    for fraction in FRACTIONS:
        states[fraction_state(fraction)] = flip(before, _at(losses, fraction), _at(wins, fraction))
    for owner, (lost, won) in owners.items():
        states[live_state(champion, owner)] = before
        states[live_state(candidate, owner)] = flip(before, lost, won)
    ranks = {state: np.where(right, 1, 7).astype(np.int32) for state, right in states.items()}
    cluster = np.arange(num_queries) // queries_per_cluster
    return Outcomes(
        query_ids=np.array([f"q{i}" for i in range(num_queries)]),
        identities=np.array([f"c{c}" for c in cluster]),
        clusters=np.array([f"c{c}" for c in cluster]),
        slices=dict(slices or {}),
        first_rank=ranks,
        average_precision={state: (1 / rank).astype(np.float32) for state, rank in ranks.items()},
    )


def with_states(outcomes: Outcomes, states: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Outcomes:
    """Outcomes with further states: name -> (first_rank, average_precision)."""
    ranks = {name: rank for name, (rank, _) in states.items()}
    precisions = {name: precision for name, (_, precision) in states.items()}
    return replace(
        outcomes,
        first_rank={**outcomes.first_rank, **ranks},
        average_precision={**outcomes.average_precision, **precisions},
    )


def flip(before: np.ndarray, num_losses: int, num_wins: int) -> np.ndarray:
    """Turn the last right answers wrong and the first wrong ones right."""
    num_right = int(before.sum())
    after = before.copy()
    after[num_right - num_losses : num_right] = False
    after[num_right : num_right + num_wins] = True
    return after


def _at(numbers: Mapping[float, int] | int, fraction: float) -> int:
    return numbers if isinstance(numbers, int) else numbers.get(fraction, 0)


def gather(outcomes: Outcomes, policy: RolloutPolicy = QUICK, **kwargs: object) -> Evidence:
    """Evidence about g2 against g1, which owns the whole gallery; `kwargs` say what is different."""
    fields: dict[str, object] = {
        "order": "farthest",
        "live_owners": {"g1": 1.0},
        "candidate": "g2",
        "champion": "g1",
    }
    return gather_evidence(outcomes, policy, Question.model_validate({**fields, **kwargs}))


@pytest.fixture
def planted() -> Callable[..., Outcomes]:
    return plant
