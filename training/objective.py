"""The loss of a training step: the task, and every constraint against every predecessor.

task + sum over constraints of weight x (sum or mean over predecessors k of weight_k C_k). Predecessors take part
through stored embeddings and rows only.

On several ranks a constraint that compares the images of a batch with each other sees the global batch, and every other
constraint a rank's own images, weighted by their number: the mean over the ranks is the loss of the global batch.
"""

from typing import Any

import torch
from torch import Tensor

from graceful.training.constraints import CONSTRAINTS
from graceful.training.distributed import gather_rows, share_weight
from graceful.training.job import TrainingConfig
from graceful.training.material import Batch, Material


class Objective:
    """The constraints of a recipe, ready to be applied to batches."""

    def __init__(self, config: TrainingConfig, material: Material, device: torch.device) -> None:
        self._predecessors = material.predecessors
        self._every_class = torch.arange(len(material.classes), device=device)
        self._constraints: list[tuple[Any, Any]] = [
            (entry, CONSTRAINTS[entry.name](**entry.parameters)) for entry in config.constraints
        ]

    def terms(self, embeddings: Tensor, labels: Tensor, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return each constraint's weighted loss over all predecessors, by name; empty without predecessors.

        `embeddings` (B, d) not normalised and `labels` (B,) on the device; `batch` holds the same B images, a rank's
        share. `generator` is in the same state on every rank.
        """
        predecessors = self._predecessors
        if not len(predecessors):
            return {}
        terms: dict[str, Tensor] = {}
        for entry, constraint in self._constraints:
            ref_labels, weight = self._every_class, entry.weight * share_weight(len(labels), batch.total)
            new, new_labels = embeddings, labels
            if constraint.reference == "rows":
                references = [group.rows for group in predecessors.groups]
            elif constraint.reference == "instances":
                references = predecessors.draw_instances(generator)
            else:
                new = gather_rows(embeddings, True, batch.total)
                new_labels = ref_labels = gather_rows(labels, False, batch.total)
                own = predecessors.of_batch(batch.rows)
                references = [gather_rows(o.transpose(0, 1), False, batch.total).transpose(0, 1) for o in own]
                weight = entry.weight  # the loss of the global batch, on every rank
            losses = [
                (constraint(new, new_labels, reference, ref_labels) * group.weights).sum()
                for group, reference in zip(predecessors.groups, references, strict=True)
            ]
            total = torch.stack(losses).sum() * weight
            terms[entry.name] = total / len(predecessors) if entry.reduction == "mean" else total
        return terms
