"""The replay flow: a whole history of generations on growing data, each trained, judged and rolled out for real.

Generation t sees the first `counts[t]` values of the growing column (classes, alphabets). The production gallery is
ingested before the first update. Unconstrained control chains may be trained beside the history; they never serve, and
are measured as pure galleries on the same evaluation set.
"""

import hashlib
import json
import time
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from graceful.evaluation.flips import nfr_matrix
from graceful.evaluation.matrix import average_compatibility, average_multimodel, matrix_from_outcomes
from graceful.evaluation.outcomes import SERVED, fraction_state, pair_state
from graceful.evaluation.retrieval import metric_of
from graceful.files import exists, join, read_json, write_json
from graceful.flows.runtime.progress import Progress
from graceful.flows.runtime.session import Session, open_session
from graceful.flows.settings.config import ConfigError, Control, PipelineConfig, ReplayConfig
from graceful.flows.store.claim import claim
from graceful.flows.store.evaluation_set import load_evaluation_set
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import Overridden, UpdateStarted
from graceful.flows.store.items import item_table
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import train as making
from graceful.flows.update.bench import Bench
from graceful.flows.update.diagnosis import classification_nfr, constrained_pairs, matrices, tax_points
from graceful.flows.update.order import Step, UpdateResult, plain, update
from graceful.flows.update.serving import ingest
from graceful.training.datasets import DatasetConfig, column_values, load_images
from graceful.training.job import TrainingConfig


class GenerationLine(BaseModel):
    """One generation of a replay, as it is printed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    outcome: str
    summary: str
    fraction: float | None
    overridden: bool
    num_classes: int
    num_training_images: int
    self_test: float
    served_before: float | None
    served_after: float | None
    nfr: float | None
    tax_points: float | None
    seconds: float


class ControlResult(BaseModel):
    """One unconstrained chain, measured as pure galleries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    matrix: list[list[float | None]]
    nfr_between_neighbours: list[float]
    ac: float | None
    am: float
    seconds: float


class ReplayResult(BaseModel):
    """What a history came to; every number is a share in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str
    lines: list[GenerationLine]
    generations: list[str]
    matrix: list[list[float | None]]
    nfr: list[list[float]]
    classification_nfr: list[list[float]] | None
    ac: float | None
    am: float
    controls: list[ControlResult]
    champion: str | None
    report: str
    seconds: float


def replay(config: PipelineConfig, root: str, progress: Progress, step: Step = plain) -> ReplayResult:
    """Replay a history in a workspace; run again, it goes on where it stopped. Each update takes `order.update`."""
    history = replay_table(config)
    started = time.monotonic()
    Workspace(root).create()
    with open_session(root, config, progress) as session, claim(root, "a replay"):
        gallery = history.gallery or config.evaluation.gallery or config.evaluation.queries
        step("ingest gallery", lambda: _ingest_gallery(session, gallery))
        results, lines = [], []
        for count, values in zip(history.counts, growing_values(config), strict=True):
            at = time.monotonic()
            grown = session.with_config(_restricted(config, values))
            result = update(grown, claimed=True, serve_anyway=history.when_not_served == "order_backfill", step=step)
            results.append(result)
            lines.append(_line(session, result, time.monotonic() - at))
            progress.say(line_text(lines[-1], count, history.grow_by))
        controls = [
            step(f"control chain: {name}", lambda name=name: measure_control(session, results, name))  # type: ignore[misc]
            for name in history.controls
        ]
        return _result(session, results, lines, controls, time.monotonic() - started)


def replay_table(config: PipelineConfig) -> ReplayConfig:
    """The history that a configuration describes. Raises ConfigError where there is none."""
    if config.replay is None:
        raise ConfigError("replaying: expected a [replay] table in the configuration, found none; see examples/")
    return config.replay


def growing_values(config: PipelineConfig) -> list[list[Any]]:
    """Values of the growing column that each generation sees."""
    history = replay_table(config)
    values = column_values(config.training_data, history.grow_by)
    if history.seed is not None:
        order = np.random.default_rng(history.seed).permutation(len(values))
        values = [values[place] for place in order]
    counts = history.counts
    if list(counts) != sorted(set(counts)) or counts[0] < 1 or counts[-1] > len(values):
        raise ConfigError(
            f"replaying: expected ascending replay.counts between 1 and {len(values)} (values of "
            f"{history.grow_by}), found {list(counts)}"
        )
    return [values[:count] for count in counts]


def line_text(line: GenerationLine, count: int, column: str) -> str:
    """One line of what was trained and decided."""
    parts = [
        f"{line.candidate}  {count} x {column}, {line.num_training_images:,} images",
        f"self-test {100 * line.self_test:.1f} %",
        f"[bold]{line.outcome}[/bold]"
        + (f" {line.fraction:.0%}" if line.outcome == "COMPATIBLE_ROLLOUT" else "")
        + (", backfill ordered all the same" if line.overridden else ""),
    ]
    if line.nfr is not None:
        parts.append(f"NFR {100 * line.nfr:.2f} %")
    if line.served_before is not None and line.served_after is not None:
        parts.append(f"served {100 * line.served_before:.1f} -> {100 * line.served_after:.1f} %")
    if line.tax_points is not None:
        parts.append(f"tax {line.tax_points:+.1f} points")
    return "  |  ".join([*parts, f"{line.seconds:.0f} s"])


def _ingest_gallery(session: Session, gallery: DatasetConfig) -> int:
    """Put the production gallery's images into the gallery; they are embedded when the first generation serves."""
    items = item_table(load_images(gallery))
    result, _ = ingest(session.workspace, items, unit_rows=session.config.gallery.unit_rows)
    return result.added


def measure_control(session: Session, steps: list[UpdateResult], control: Control) -> ControlResult:
    """Train an unconstrained chain on the manifests of the history's updates, and measure it pair by pair."""
    started = time.monotonic()
    recipe = control_recipe(session.config.training, control)
    registry, workspace = session.workspace.registry, session.workspace
    members: list[str] = []
    parent_uri = None
    for result in steps:
        frozen = registry.events(UpdateStarted, result.update_key)[0].payload
        done = join(workspace.update_uri(result.update_key), f"{control}.json")
        key = hashlib.sha256(json.dumps([recipe.model_dump(mode="json"), parent_uri]).encode()).hexdigest()
        if exists(done) and read_json(done)["key"] == key:
            name = str(read_json(done)["generation"])
        else:
            job = making.training_job(session, frozen, recipe, control.replace("_", "-"), parent_uri, ())
            name = making.train(session, job).generation_id
            write_json(done, {"key": key, "generation": name})
        members.append(name)
        parent_uri = workspace.generation_uri(name)
    evaluation_set = load_evaluation_set(session.config.evaluation)
    for name in members:
        making.embed_images(session, name, *evaluation_set.images)
    bench = Bench(
        evaluation_set,
        {name: workspace.cache(name).read(evaluation_set.queries.content_sha256) for name in members},
        {name: workspace.cache(name).read(evaluation_set.gallery.content_sha256) for name in members},
    )
    bench.measure_pairs([(query, gallery) for i, query in enumerate(members) for gallery in members[: i + 1]])
    matrix = matrix_from_outcomes(bench.outcomes(), members)
    flips = nfr_matrix(bench.outcomes(), [pair_state(name, name) for name in members])
    return ControlResult(
        name=control,
        matrix=_plain(matrix.values),
        nfr_between_neighbours=[float(flips[i, i + 1]) for i in range(len(members) - 1)],
        ac=_number(average_compatibility(matrix)),
        am=average_multimodel(matrix),
        seconds=time.monotonic() - started,
    )


def control_recipe(recipe: TrainingConfig, control: Control) -> TrainingConfig:
    """The unconstrained recipe of a control chain."""
    changes = {
        "from_scratch": {"start": "scratch", "rows_from_parent": False},
        "fine_tuned": {"start": "parent", "rows_from_parent": False},
        "fine_tuned_initialised": {"start": "parent", "rows_from_parent": True},
    }[control]
    return recipe.without_constraints().model_copy(update=changes)


def _restricted(config: PipelineConfig, values: list[Any]) -> PipelineConfig:
    where = {**config.training_data.where, replay_table(config).grow_by: tuple(values)}
    data = DatasetConfig.model_validate({**config.training_data.model_dump(), "where": where})
    return config.model_copy(update={"training_data": data})


def _line(session: Session, result: UpdateResult, seconds: float) -> GenerationLine:
    evaluation = read_evaluation(result.evaluation)
    outcomes, evidence = evaluation.outcomes, evaluation.evidence
    metric, k = evidence.metric, evidence.k
    acted = result.outcome in ("COMPATIBLE_ROLLOUT", "FULL_BACKFILL")
    fraction = 1.0 if result.fraction is None else result.fraction
    shown = [s for s in evidence.states if s.scope == "overall" and s.fraction == fraction]
    after = fraction_state(fraction)
    own = metric_of(outcomes, pair_state(result.candidate, result.candidate), metric, k)
    tax = tax_points(evaluation, result.candidate, result.paragon) if result.paragon else None
    return GenerationLine(
        candidate=result.candidate,
        outcome=result.outcome,
        summary=result.summary,
        fraction=result.fraction,
        overridden=bool(session.workspace.registry.events(Overridden, result.update_key)),
        num_classes=result.num_classes,
        num_training_images=result.num_training_images,
        self_test=own,
        served_before=metric_of(outcomes, SERVED, metric, k) if SERVED in outcomes.first_rank else None,
        served_after=metric_of(outcomes, after, metric, k) if acted else None,
        nfr=shown[0].nfr if shown else None,
        tax_points=tax,
        seconds=seconds,
    )


def _result(
    session: Session,
    results: list[UpdateResult],
    lines: list[GenerationLine],
    controls: list[ControlResult],
    seconds: float,
) -> ReplayResult:
    registry = session.workspace.registry
    last = read_evaluation(results[-1].evaluation)
    matrix, nfr = matrices(registry, last.outcomes, results[-1].candidate, last.policy.k, last.policy.metric)
    pairs = constrained_pairs(registry, matrix.generations)
    classified = classification_nfr(last.outcomes, matrix.generations)
    return ReplayResult(
        root=session.workspace.root,
        lines=lines,
        generations=list(matrix.generations),
        matrix=_plain(matrix.values),
        nfr=nfr.tolist(),
        classification_nfr=None if classified is None else classified.tolist(),
        ac=_number(average_compatibility(matrix, pairs)) if pairs else None,
        am=average_multimodel(matrix),
        controls=controls,
        champion=registry.serving().champion,
        report=results[-1].report,
        seconds=seconds,
    )


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
