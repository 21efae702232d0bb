"""What a lineage has become: matrices, published scores and history, from outcomes and registry. Diagnosis only.

No decision is made from these numbers; they are what papers report and what people ask first.
"""

import datetime
import math

import numpy as np
from numpy.typing import NDArray

from graceful.evaluation.flips import flips_against, nfr_matrix
from graceful.evaluation.matrix import (
    CompatibilityMatrix,
    average_compatibility,
    average_multimodel,
    compatibility_tax,
    matrix_from_outcomes,
    update_gain,
)
from graceful.evaluation.outcomes import Metric, Outcomes, classify_state, pair_state
from graceful.evaluation.retrieval import metric_of
from graceful.evaluation.ways import lived_states
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.store.events import (
    Decided,
    Held,
    Pending,
    PreviousReleased,
    Retired,
    Trained,
    UpdateCompleted,
    UpdateStarted,
)
from graceful.flows.store.registry import Registry
from graceful.training.generation import ordinal_of

_NOT_SHOWN = (UpdateStarted, UpdateCompleted, Held, Pending, PreviousReleased)


def matrices(
    registry: Registry, outcomes: Outcomes, candidate: str, k: int, metric: Metric = "recall@k"
) -> tuple[CompatibilityMatrix, NDArray[np.float64]]:
    """Compatibility matrix and NFR between the self-tests of all generations measured in an evaluation."""
    measured = [name for name in registry.generations() if pair_state(name, name) in outcomes.first_rank]
    generations = sorted({*measured, candidate}, key=ordinal_of)
    states = [pair_state(name, name) for name in generations]
    return matrix_from_outcomes(outcomes, generations, metric=metric, k=k), nfr_matrix(outcomes, states, k=k)


def classification_nfr(outcomes: Outcomes, generations: tuple[str, ...]) -> NDArray[np.float64] | None:
    """NFR in classification between all generations; None where nothing can be classified (open-set)."""
    states = [classify_state(name) for name in generations]
    if any(state not in outcomes.first_rank or not outcomes.first_rank[state].any() for state in states):
        return None
    return nfr_matrix(outcomes, states)


def constrained_pairs(registry: Registry, generations: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs (generation, predecessor) that a training constraint tied."""
    frozen = {event.update_key: event.payload for event in registry.events(UpdateStarted)}
    pairs = []
    for event in registry.events(Trained):
        if event.generation in generations and event.update_key in frozen:
            pairs += [(event.generation, k) for k in frozen[event.update_key].predecessors if k in generations]
    return pairs


def tax_points(evaluation: Evaluation, generation: str, paragon: str) -> float:
    """Points of the metric by which a paragon's self-test is above a generation's."""
    evidence = evaluation.evidence
    own, best = (
        metric_of(evaluation.outcomes, pair_state(name, name), evidence.metric, evidence.k)
        for name in (generation, paragon)
    )
    return 100 * compatibility_tax(own, best)


def diagnosis(registry: Registry, evaluation: Evaluation, matrix: CompatibilityMatrix) -> list[dict[str, str]]:
    """Published scores of the lineage: AC, AM, update gain and tax against a paragon, where one was trained."""
    outcomes, evidence = evaluation.outcomes, evaluation.evidence
    rows = [
        {"score": "AC over constrained pairs", "value": _text(_constrained_ac(registry, matrix))},
        {"score": "AM", "value": _percent(average_multimodel(matrix))},
    ]
    for event in registry.events(Decided):
        paragon = event.payload.paragon
        if event.generation != evidence.candidate or not paragon:
            continue
        tax = tax_points(evaluation, evidence.candidate, paragon)
        rows.append({"score": "Compatibility tax (points)", "value": f"{tax:+.2f}"})
        if evidence.champion is not None:
            best = metric_of(outcomes, pair_state(paragon, paragon), evidence.metric, evidence.k)
            old = metric_of(outcomes, pair_state(evidence.champion, evidence.champion), evidence.metric, evidence.k)
            cross = metric_of(outcomes, pair_state(evidence.candidate, evidence.champion), evidence.metric, evidence.k)
            rows.append({"score": "Update gain", "value": _text(update_gain(cross, old, best))})
    return rows


def flips_against_owners(evaluation: Evaluation) -> list[dict[str, str]]:
    """What would be lost of the answers of every generation that still owns readable rows, in its worst state."""
    evidence, policy = evaluation.evidence, evaluation.policy
    states = [state.state for state in lived_states(evidence, evaluation.decision, policy).states]
    owners = [name for name in evidence.live_owners if name != evidence.candidate]
    return [
        {
            "right with": row.generation,
            "wrong in": row.state,
            "queries": f"{row.num_queries:,}",
            "NFR": f"{_percent(row.nfr)} (at most {_percent(row.upper)})",
            "PFR": _percent(row.pfr),
        }
        for row in flips_against(evaluation.outcomes, owners, states, k=evidence.k, alpha=policy.alpha)
    ]


def lineage_rows(registry: Registry) -> list[dict[str, str]]:
    """One row per event that a person wants to see."""
    return [
        {
            "when": datetime.datetime.fromtimestamp(event.at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "event": event.kind,
            "generation": event.generation,
            "what": told(event.payload),
        }
        for event in registry.history()
        if not isinstance(event.payload, _NOT_SHOWN)
    ]


def told(happened: object) -> str:
    """What an event says beside its kind, in a few words: the outcome, the reason, who said so."""
    words = [str(getattr(happened, name, "")) for name in ("outcome", "ordered", "reason", "by")]
    if isinstance(happened, Retired) and not happened.reason:
        words = ["owns no readable row, has no supported client"]
    return ", ".join(word for word in words if word)


def _constrained_ac(registry: Registry, matrix: CompatibilityMatrix) -> float:
    pairs = constrained_pairs(registry, matrix.generations)
    return average_compatibility(matrix, pairs) if pairs else math.nan


def _text(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{100 * value:.2f} %"
