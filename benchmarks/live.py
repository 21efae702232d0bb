"""Predecessors that run: in every step their networks embed its very images, instead of stored vectors of clean ones.

What training never does here, because its cost grows with the chain; for the comparison with what it does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from graceful.training import loop
from graceful.training.augmentation import training_batch
from graceful.training.encoder import open_network
from graceful.training.material import Batch
from graceful.training.step import Run, Stepper


class LiveStepper(Stepper):
    """A stepper that overwrites the stored vectors of a step's images by what the networks say of the augmented ones.

    For a training in this process, in memory, whose predecessors have the trainee's preprocessing.
    """

    def __init__(self, run: Run, *others: Any) -> None:
        super().__init__(run, *others)
        uris = {known.generation_id: known.generation_uri for known in run.job.predecessors}
        self._live = [
            (group, [open_network(uris[name], run.device)[1].eval() for name in group.generation_ids])
            for group in run.material.predecessors.groups
        ]

    def _terms(
        self, part: Batch, share: float, generator: torch.Generator, shared: torch.Generator
    ) -> dict[str, Tensor]:
        run, config = self._run, self._run.job.config
        drawn = generator.get_state()
        images = training_batch(part.pixels, config.preprocessing, config.augmentation, generator, run.device)
        generator.set_state(drawn)  # the step draws the same images again
        with torch.no_grad():
            for group, networks in self._live:
                for place, network in enumerate(networks):
                    group.embeddings[part.rows, place] = torch.nn.functional.normalize(network(images), dim=1)
        return super()._terms(part, share, generator, shared)


@contextmanager
def live_predecessors() -> Iterator[None]:
    """Trainings in the block run their predecessors."""
    with patch.object(loop, "Stepper", LiveStepper):
        yield
