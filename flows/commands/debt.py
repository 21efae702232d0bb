"""What the compatibility of the lineage will cost: a forecast, and what retiring each predecessor would buy."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from graceful.evaluation.debt import ForecastGeneration, MeasuredTraining, fitted_step_cost, forecast
from graceful.files import file_stats, join
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import Adopted, Decided, Trained, UpdateStarted
from graceful.flows.store.registry import Registry
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.flows.update.diagnosis import tax_points
from graceful.flows.update.predecessors import predecessors_of


class Carried(BaseModel):
    """A predecessor that the next generation would be trained against, or that is left out already."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: str
    takes_part: bool = Field(description="Whether the next training is constrained against it.")
    readable_rows: int = Field(description="Rows of the gallery that the champion reads of it.")
    is_supported: bool = Field(description="Whether gallery.supported_query_generations names it.")
    saves_training_s: float | None = Field(description="Seconds of the next training that leaving it out saves.")
    cache_bytes: int = Field(description="Of its stored embeddings.")


class Debt(BaseModel):
    """What `graceful debt` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    taxes: list[tuple[str, float]] = Field(description="Generation and its tax in points, where it was measured.")
    forecast: list[ForecastGeneration]
    predecessors: list[Carried]


def compatibility_debt(root: str, num_generations: int = 5) -> Debt:
    """Gather what the lineage measured, and forecast; nothing is trained, embedded or changed.

    Raises: what opening a workspace raises.
    """
    workspace, config = open_workspace(root), load_workspace_config(root)
    registry = workspace.registry
    trainings, taxes = _trainings(registry), _taxes(workspace)
    champion = registry.serving().champion
    rows = {} if champion is None else workspace.view(champion).rows_by_generation()
    taking_part = predecessors_of(workspace, config)
    sizes = {name: _cache_bytes(workspace, name) for name in registry.served_generations()}
    made = forecast(
        trainings,
        [tax for _, tax in taxes],
        next_ordinal=len(registry.generations()) + 1,
        num_predecessors=len(taking_part),
        bytes_per_image=_bytes_per_image([sizes[name] for name in taking_part], trainings),
        num_generations=num_generations,
    )
    cost = fitted_step_cost(trainings)
    saved = None
    if cost is not None and made:
        saved = cost.per_predecessor * made[0].num_images * trainings[-1].epochs
    return Debt(
        taxes=taxes,
        forecast=made,
        predecessors=[
            Carried(
                generation=name,
                takes_part=name in taking_part,
                readable_rows=int(rows.get(name, 0)),
                is_supported=name in config.gallery.supported_query_generations,
                saves_training_s=saved if name in taking_part else 0.0,
                cache_bytes=size,
            )
            for name, size in sizes.items()
        ],
    )


def _trainings(registry: Registry) -> list[MeasuredTraining]:
    frozen = {event.update_key: event.payload for event in registry.events(UpdateStarted)}
    adopted = {event.generation for event in registry.events(Adopted)}
    found: dict[str, MeasuredTraining] = {}
    for event in registry.events(Trained):
        summary: dict[str, Any] = event.payload.summary
        if event.generation in adopted or event.generation in found or "seconds" not in summary:
            continue
        tied = frozen[event.update_key].predecessors if summary["constraints"] else ()
        found[event.generation] = MeasuredTraining(
            num_predecessors=len(tied),
            num_images=summary["images"],
            epochs=summary["epochs"],
            seconds=summary["seconds"],
        )
    return list(found.values())


def _taxes(workspace: Workspace) -> list[tuple[str, float]]:
    found: dict[str, float] = {}
    for event in workspace.registry.events(Decided):
        paragon = event.payload.paragon
        if paragon is not None:
            evaluation = read_evaluation(workspace.evaluation_uri(event.payload.evaluation))
            found[event.generation] = tax_points(evaluation, event.generation, paragon)
    return list(found.items())


def _cache_bytes(workspace: Workspace, generation: str) -> int:
    return sum(size for _, size in file_stats(join(workspace.root, "caches", generation)).values())


def _bytes_per_image(sizes: list[int], trainings: list[MeasuredTraining]) -> float | None:
    """Of one predecessor's cache, by what the caches take now."""
    if not sizes or not trainings:
        return None
    return sum(sizes) / len(sizes) / trainings[-1].num_images
