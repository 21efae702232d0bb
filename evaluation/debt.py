"""What a chain of compatible updates owes: cost and tax of its next generations, forecast from what was measured.

Every further predecessor adds a term to the loss of each training step, and a cache of embeddings. Both grow in a
straight line (one matrix product and one read per predecessor), so that a straight line is fitted; a tax is forecast by
the mean of its steps so far. Where too little was measured there is no forecast: None, never a guess.
"""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class MeasuredTraining(BaseModel):
    """One training of the lineage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_predecessors: int = Field(description="Predecessors in its constraints.")
    num_images: int = Field(description="Training images.")
    epochs: int = Field(description="Passes over them.")
    seconds: float = Field(description="Of all its steps, on all workers together as one clock saw it.")

    @property
    def seconds_per_image(self) -> float:
        """Seconds of one image in one epoch."""
        return self.seconds / max(self.num_images * self.epochs, 1)


class StepCost(BaseModel):
    """The straight line through the cost of a step: base + per_predecessor x K, seconds per image and epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: float
    per_predecessor: float

    def ratio(self, num_predecessors: float) -> float:
        """Cost of a step against one without predecessors."""
        return 1.0 + self.per_predecessor * num_predecessors / self.base


class ForecastGeneration(BaseModel):
    """What is expected of a generation that is not trained yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ordinal: int
    num_predecessors: int
    num_images: int = Field(description="Grown by the mean growth of the trainings so far.")
    step_ratio: float | None = Field(description="Cost of a step against one without predecessors.")
    training_s: float | None = Field(description="Seconds of its training.")
    cache_bytes: int | None = Field(description="Stored embeddings of all its predecessors.")
    tax_points: float | None = Field(description="Points of self-test below an unconstrained chain.")


def fitted_step_cost(trainings: Sequence[MeasuredTraining]) -> StepCost | None:
    """Fit the line by least squares; None where all trainings had as many predecessors. The slope is at least 0.

    >>> measured = [MeasuredTraining(num_predecessors=k, num_images=100, epochs=1, seconds=10 + k) for k in (0, 1, 2)]
    >>> round(fitted_step_cost(measured).ratio(10), 2)
    2.0
    """
    counts = np.array([training.num_predecessors for training in trainings], float)
    costs = np.array([training.seconds_per_image for training in trainings], float)
    if len(np.unique(counts)) < 2 or not (costs > 0).all():
        return None
    slope, base = np.polyfit(counts, costs, 1)
    if slope < 0 or base <= 0:
        slope, base = 0.0, float(costs.mean())
    return StepCost(base=float(base), per_predecessor=float(slope))


def forecast(
    trainings: Sequence[MeasuredTraining],
    taxes: Sequence[float],
    *,
    next_ordinal: int,
    num_predecessors: int,
    bytes_per_image: float | None,
    num_generations: int = 5,
) -> list[ForecastGeneration]:
    """Forecast the next generations, each a predecessor of the one after it.

    `trainings` in order; `taxes` (points) of the generations in order, as far as they were measured; bytes_per_image:
    of one stored embedding.
    """
    cost = fitted_step_cost(trainings)
    growth = 0.0
    if len(trainings) > 1:
        growth = (trainings[-1].num_images - trainings[0].num_images) / (len(trainings) - 1)
    step_of_tax = (taxes[-1] - taxes[0]) / (len(taxes) - 1) if len(taxes) > 1 else math.nan
    found = []
    for place in range(num_generations):
        count = num_predecessors + place
        images = round(trainings[-1].num_images + growth * (place + 1)) if trainings else 0
        seconds = None
        if cost is not None:
            seconds = images * trainings[-1].epochs * (cost.base + cost.per_predecessor * count)
        found.append(
            ForecastGeneration(
                ordinal=next_ordinal + place,
                num_predecessors=count,
                num_images=images,
                step_ratio=None if cost is None else cost.ratio(count),
                training_s=seconds,
                cache_bytes=None if bytes_per_image is None else round(bytes_per_image * images * count),
                tax_points=None if math.isnan(step_of_tax) else taxes[-1] + step_of_tax * (place + 1),
            )
        )
    return found
