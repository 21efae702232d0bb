"""Publishes an evaluation: the report beside it, and matrix, decision and report link as artifacts of the flow UI.

Artifact keys are stable (`<pipeline>-decision`, ...), so that the UI shows their history from update to update.
"""

import base64
import datetime
import math

import numpy as np
from numpy.typing import NDArray
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.context import FlowRunContext, TaskRunContext

from graceful.evaluation.captions import decision_markdown, matrix_markdown
from graceful.evaluation.flips import nfr_matrix
from graceful.evaluation.matrix import (
    CompatibilityMatrix,
    average_compatibility,
    average_multimodel,
    compatibility_tax,
    matrix_from_outcomes,
    update_gain,
)
from graceful.evaluation.outcomes import Outcomes, classify_state, pair_state
from graceful.evaluation.report import evidence_curve_png, matrix_png, render_report
from graceful.evaluation.retrieval import metric_of
from graceful.files import is_remote, join, write_bytes
from graceful.flows.store.evaluations import Evaluation
from graceful.flows.store.registry import Registry
from graceful.flows.update.freeze import FrozenUpdate
from graceful.flows.update.steps import UpdateRun
from graceful.training.generation import ordinal_of


def publish(run: UpdateRun, evaluation: Evaluation) -> str:
    """Write report.html into the evaluation's folder and leave the artifacts; returns the report's location."""
    location = run.workspace.evaluation_uri(run.evaluation_id())
    matrix, nfr = matrices(run.registry, evaluation.outcomes, evaluation.evidence.candidate, evaluation.policy.k)
    page = render_report(
        evaluation.evidence,
        evaluation.decision,
        evaluation.policy,
        matrix=matrix,
        nfr=nfr,
        outcomes=evaluation.outcomes,
        lineage=lineage_rows(run.registry),
        extras={"What the lineage has become": diagnosis(run.registry, evaluation, matrix)},
    )
    report = join(location, "report.html")
    write_bytes(report, page.encode())
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        _leave_artifacts(run.session.config.name, evaluation, matrix, report)
    return report


def matrices(
    registry: Registry, outcomes: Outcomes, candidate: str, k: int
) -> tuple[CompatibilityMatrix, NDArray[np.float64]]:
    """Compatibility matrix and NFR between the self-tests of all generations measured in an evaluation."""
    measured = [name for name in registry.generations() if pair_state(name, name) in outcomes.first_rank]
    generations = sorted({*measured, candidate}, key=ordinal_of)
    states = [pair_state(name, name) for name in generations]
    return matrix_from_outcomes(outcomes, generations, k=k), nfr_matrix(outcomes, states, k=k)


def classification_nfr(outcomes: Outcomes, generations: tuple[str, ...]) -> NDArray[np.float64] | None:
    """NFR in classification between all generations; None where nothing can be classified (open-set)."""
    states = [classify_state(name) for name in generations]
    if any(state not in outcomes.first_rank or not outcomes.first_rank[state].any() for state in states):
        return None
    return nfr_matrix(outcomes, states)


def constrained_pairs(registry: Registry, generations: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs (generation, predecessor) that a training constraint tied."""
    frozen = {
        event.update_key: FrozenUpdate.model_validate(event.payload) for event in registry.events("update_started")
    }
    pairs = []
    for event in registry.events("trained"):
        if event.generation in generations and event.update_key in frozen:
            pairs += [(event.generation, k) for k in frozen[event.update_key].predecessors if k in generations]
    return pairs


def diagnosis(registry: Registry, evaluation: Evaluation, matrix: CompatibilityMatrix) -> list[dict[str, str]]:
    """Published scores of the lineage: AC, AM, update gain and tax against a paragon, where one was trained."""
    outcomes, evidence = evaluation.outcomes, evaluation.evidence
    rows = [
        {"score": "AC over constrained pairs", "value": _text(_constrained_ac(registry, matrix))},
        {"score": "AM", "value": _percent(average_multimodel(matrix))},
    ]
    for event in registry.events("decided"):
        paragon = event.payload.get("paragon")
        if event.generation != evidence.candidate or not paragon:
            continue
        best = metric_of(outcomes, pair_state(paragon, paragon), evidence.metric, evidence.k)
        own = metric_of(outcomes, pair_state(evidence.candidate, evidence.candidate), evidence.metric, evidence.k)
        rows.append({"score": "Compatibility tax (points)", "value": f"{100 * compatibility_tax(own, best):+.2f}"})
        if evidence.champion is not None:
            old = metric_of(outcomes, pair_state(evidence.champion, evidence.champion), evidence.metric, evidence.k)
            cross = metric_of(outcomes, pair_state(evidence.candidate, evidence.champion), evidence.metric, evidence.k)
            rows.append({"score": "Update gain", "value": _text(update_gain(cross, old, best))})
    return rows


def lineage_rows(registry: Registry) -> list[dict[str, str]]:
    """One row per event that a person wants to see."""
    shown = {
        "trained",
        "adopted",
        "decided",
        "promoted",
        "rolled_back",
        "plan_completed",
        "overridden",
        "retired",
    }
    return [
        {
            "when": datetime.datetime.fromtimestamp(event.at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "event": event.kind,
            "generation": event.generation,
            "what": str(event.payload.get("outcome", "")),
        }
        for event in registry.events()
        if event.kind in shown
    ]


def _constrained_ac(registry: Registry, matrix: CompatibilityMatrix) -> float:
    pairs = constrained_pairs(registry, matrix.generations)
    return average_compatibility(matrix, pairs) if pairs else math.nan


def _leave_artifacts(name: str, evaluation: Evaluation, matrix: CompatibilityMatrix, report: str) -> None:
    create_markdown_artifact(
        key=f"{name}-compatibility-matrix",
        markdown=f"{matrix_markdown(matrix)}\n\n{_picture('matrix', matrix_png(matrix, dpi=90))}",
        description="Queries by the row's generation on the gallery of the column's",
    )
    curve = ""
    if evaluation.evidence.states:
        curve = _picture("curve", evidence_curve_png(evaluation.evidence, evaluation.decision, dpi=90))
    create_markdown_artifact(
        key=f"{name}-decision",
        markdown=f"{decision_markdown(evaluation.decision)}\n\n{curve}",
        description=evaluation.decision.outcome,
    )
    link = report if is_remote(report) else f"file://{report}"
    create_link_artifact(key=f"{name}-report", link=link, description="The whole report, one offline page")


def _picture(label: str, png: bytes) -> str:
    return f"![{label}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _text(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{100 * value:.2f} %"
