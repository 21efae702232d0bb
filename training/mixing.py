"""The last epochs of a training: the mixture of two generations, put into one encoder.

n((1 - b) f_t(x) + b f_(t-1)(x)) flips less than f_t alone and is read better by and from older generations (a mean of
two networks errs less than either, and it lies between their spaces), but a query would cost two encoder runs. So the
trained network is kept as the teacher, and for some more epochs, with a schedule of their own, the network learns the
task, its constraints and the mixture: w |n(f(x)) - n((1 - b) teacher(x) + b v)|^2, v the parent's stored vector of
the image. The parent was mixed with its own parent: shares of older generations fade as b, b^2, ...

Shapes: B images of a rank's share of a batch, d width.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graceful.training.encoder import autocast
from graceful.training.finishing import mixed
from graceful.training.starting import Trainee
from graceful.training.step import Run


class Mixture:
    """What the network is drawn to."""

    def __init__(
        self, run: Run, trainee: Trainee, parent_id: str, share: float, chosen: dict[str, Any] | None = None
    ) -> None:
        """Keep the trainee's network as it is as the teacher; `share` b of the parent, `chosen`: how, for the card."""
        self.share, self.chosen = share, chosen
        self._run, self._parent_id = run, parent_id
        self._teacher = copy.deepcopy(trainee.network).eval().requires_grad_(False)

    def term(self, images: Tensor, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted squared distance to the mixture, the mean over the images.

        `images` (B, channels, size, size) as the network sees them, `embeddings` (B, d) not normalised, `rows` (B,) of
        the training images.
        """
        with torch.no_grad(), autocast(images.device, self._run.dtype):
            own = functional.normalize(self._teacher(images).float(), dim=1)
        theirs = self._run.material.predecessors.vectors_of(self._parent_id, rows)
        target = mixed(own, theirs, self.share)
        weight = self._run.job.config.mixture_weight
        return weight * (functional.normalize(embeddings, dim=1) - target).square().sum(dim=1).mean()

    @classmethod
    def of(cls, run: Run, trainee: Trainee, parent_id: str, state: Mapping[str, Any]) -> "Mixture":
        """Return the one of a checkpoint; the trainee may have any weights."""
        found = cls(run, trainee, parent_id, state["share"], state["chosen"])
        found._teacher.load_state_dict(state["teacher"])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of these epochs must hold."""
        return {"share": self.share, "chosen": self.chosen, "teacher": self._teacher.state_dict()}
