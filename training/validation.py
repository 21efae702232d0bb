"""The dev part of a training: recall@1 while it runs, early stopping, and the share of interpolation that it calls for.

Queries and gallery are the dev images themselves, each one's own row excluded. Right at 1 is exact: the best score
among the images of the query's identity must be higher than every other score; a tie is wrong, and so is an image
without a direction. Images whose identity has no other dev image are searched but do not search.

Shapes: N dev images, Q of them queries, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.choosing import RULE, Option, choose
from graceful.training.encoder import embed
from graceful.training.finishing import calibrate, interpolate, mixed
from graceful.training.generation import Preprocessing
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.manifest import read_classes
from graceful.training.material import open_images
from graceful.training.pace import Course
from graceful.training.pixels import Images, Look
from graceful.training.predecessors import load_predecessors
from graceful.training.starting import Parent, Trainee
from graceful.training.step import Run, buffers_put_back
from graceful.training.weighing import DualWeights

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the parent that are tried, in weights and in vectors."""
CALIBRATED_AT_EPOCHS = 1024
"""Images that batch norm is calibrated on at the end of an epoch, at most; the final network gets all of them."""
SELF = "dev"
"""Name in a progress line of recall@1 of the network in training against its own dev vectors."""


@dataclass(frozen=True)
class Dev:
    """Dev images, their identities, and what predecessors made of them."""

    images: Images
    identities: Tensor  # (N,) int64, on the device
    references: dict[str, Tensor]  # generation id to unit vectors (N, d_k), on the device
    max_flips: float | None

    def vectors(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype | None,
        block: int = 512,
    ) -> Tensor:
        """Return the unit vectors (N, d) of the dev images; zero rows for those without a direction."""
        network.eval()
        rows = torch.arange(len(self.identities)).split(block)
        parts = [embed(network, pixels, preprocessing, device, dtype) for pixels in self.images.blocks(rows)]
        return torch.cat(parts).nan_to_num(0.0)

    def right(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """Return which of the Q queries are right at 1 (bool): query vectors (N, d) against gallery vectors (N, d_k).

        The gallery may be narrower: queries are then cut to its width and normalised again.
        """
        return right_at_1(queries, gallery, self.identities)

    def option(self, value: float, vectors: Tensor, champion: str) -> Option:
        """Return what vectors (N, d) come to: their self-test, and their flips against the champion.

        Flips are the larger of two: with everything re-embedded, and with new queries on the champion's vectors. Both
        count queries that the champion gets right on its own vectors.
        """
        theirs = self.references[champion]
        before, full = self.right(theirs, theirs), self.right(vectors, vectors)
        none = self.right(vectors, theirs)
        flips = max(float((before & ~after).float().mean()) for after in (full, none))
        return Option(value=value, self_test=float(full.float().mean()), flips=flips)


def right_at_1(queries: Tensor, gallery: Tensor, identities: Tensor, block: int = 1024) -> Tensor:
    """Return which queries are right at 1, (Q,) bool, of N rows whose identity (N,) has a second row.

    `queries` (N, d) and `gallery` (N, d_k), d_k <= d, rows of unit length or zero, row i of both the same image.
    """
    if gallery.shape[1] < queries.shape[1]:
        queries = functional.normalize(queries[:, : gallery.shape[1]], dim=1)
    found = []
    for rows in _queries(identities).split(block):
        scores = queries[rows] @ gallery.T
        scores.scatter_(1, rows[:, None], -torch.inf)
        same = identities[rows, None] == identities[None, :]
        best = scores.masked_fill(~same, -torch.inf).amax(dim=1)
        found.append(best > scores.masked_fill(same, -torch.inf).amax(dim=1))
    return torch.cat(found)


def _queries(identities: Tensor) -> Tensor:
    _, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    return torch.nonzero(counts[inverse] > 1).squeeze(1)


def load_dev(job: TrainingJob, device: torch.device, scratch: Path) -> Dev | None:
    """Open the dev images of a job and read its predecessors' vectors of them; None for a job without a dev part.

    Raises: MisalignedCacheError, ChangedImagesError, UsageError where no dev image has another of its identity, or two
    have the same identity and there is no other.
    """
    if job.dev is None:
        return None
    names, identities = read_classes(job.dev.manifest_uri)
    if len(names) < 2 or not len(_queries(torch.from_numpy(identities))):
        raise UsageError(
            f"training {job.name}: expected dev images of two identities and two images of one, found "
            f"{len(identities)} of {len(names)}; give evaluation.dev more images"
        )
    folder = scratch / "dev"
    folder.mkdir()
    limit = job.config.pixel_memory_mib
    stored = load_predecessors(job.dev.predecessors, identities, names, device, folder, limit)
    references = {
        name: group.embeddings[:, place].to(device, torch.float32)
        for group in stored.groups
        for place, name in enumerate(group.generation_ids)
    }
    images = open_images(job, job.dev.manifest_uri, Look.of(job.config.preprocessing), device, folder)
    return Dev(images, torch.from_numpy(identities).to(device), references, job.dev.max_flips)


class Validation:
    """What the end of an epoch looks at, and the best weights so far where a training may stop early."""

    def __init__(self, run: Run, dev: Dev | None, trainee: Trainee) -> None:
        self._run = run
        self.dev = dev
        self._trainee = trainee
        self._best: dict[str, Tensor] | None = None
        self._weights: DualWeights | None = None
        if dev is not None and run.job.config.predecessor_weights == "dual":
            own = {name: float(dev.right(of, of).double().mean()) for name, of in dev.references.items()}
            self._weights = DualWeights(run.material.predecessors, own)

    def look(self, course: Course) -> dict[str, float]:
        """Return recall@1 on the dev part: of the network, and of its queries on every predecessor's vectors.

        Appends the first to the course's curve, by which a training may stop and take its best epoch; the mixture's
        epochs after it are made in any case. Batch norm is calibrated for the look and put back: the training goes on
        as if nobody had looked. The same on every rank, and all ranks call it. Empty without a dev part.
        """
        if self.dev is None:
            return {}
        run, network = self._run, self._trainee.plain()
        with buffers_put_back(network):
            vectors = self._calibrated_vectors(network, min(run.job.config.calibration_images, CALIBRATED_AT_EPOCHS))
        galleries = {SELF: vectors, **{f"{SELF} on {name}": g for name, g in self.dev.references.items()}}
        values = torch.stack([self.dev.right(vectors, gallery).double().mean() for gallery in galleries.values()])
        if run.world_size > 1:
            dist.broadcast(values, 0)
        found = dict(zip(galleries, values.tolist(), strict=True))
        if self._weights is not None:
            moved = self._weights.ascend({name: found[f"{SELF} on {name}"] for name in self.dev.references})
            found |= {f"weight of {name}": weight for name, weight in moved.items()}
        if course.mixing_from is not None:
            return found
        curve = course.dev
        curve.append(found[SELF])
        if run.job.config.patience is not None and best_epoch(curve) == len(curve) - 1:
            self._best = {name: tensor.detach().clone() for name, tensor in self._trainee.state_dict().items()}
        return found

    def take_best(self) -> None:
        """Give the trainee the weights of the best epoch, where they were kept."""
        if self._best is not None:
            self._trainee.load_state_dict(self._best)

    def choose_share(self, parent: Parent) -> tuple[float, dict[str, Any]]:
        """Return the share of interpolation that the rule takes, and what was looked at, for the card.

        Every share in SHARES is interpolated, calibrated and measured on the dev part; the network is as before then.
        """
        assert self.dev is not None, "refused by TrainingJob"
        run, network = self._run, self._trainee.plain()
        trained = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        options = []
        for share in SHARES:
            network.load_state_dict(trained)
            interpolate(network, parent.state, share)
            vectors = self._calibrated_vectors(network, run.job.config.calibration_images)
            options.append(self.dev.option(share, vectors, parent.card.generation_id))
        network.load_state_dict(trained)
        return self._chosen(options)

    def choose_mixture(self, parent_id: str) -> tuple[float, dict[str, Any]]:
        """Return the share of the parent's vectors that the rule takes, and what was looked at, for the card."""
        assert self.dev is not None, "refused by TrainingJob"
        run, network = self._run, self._trainee.plain()
        with buffers_put_back(network):
            own = self._calibrated_vectors(network, run.job.config.calibration_images)
        theirs = self.dev.references[parent_id]
        return self._chosen([self.dev.option(share, mixed(own, theirs, share), parent_id) for share in SHARES])

    def _chosen(self, options: Sequence[Option]) -> tuple[float, dict[str, Any]]:
        """Return the value that the rule takes, rank 0's on every rank, and what is told of it."""
        assert self.dev is not None
        run = self._run
        chosen = torch.tensor(choose(options, self.dev.max_flips).value, dtype=torch.float64, device=run.device)
        if run.world_size > 1:
            dist.broadcast(chosen, 0)
        told = {
            "chosen": float(chosen),
            "rule": RULE,
            "max_flips": self.dev.max_flips,
            "options": [option.model_dump() for option in options],
        }
        return float(chosen), told

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the course."""
        weights = {} if self._weights is None else self._weights.state_dict()
        return {**({} if self._best is None else {"best": self._best}), **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._best = state.get("best")
        if self._weights is not None:
            self._weights.load_state_dict(state)

    def _calibrated_vectors(self, network: nn.Module, num_images: int) -> Tensor:
        assert self.dev is not None
        run = self._run
        sample = run.material.sample(num_images, run.job.config.seed)
        calibrate(network, sample, run.job.config.preprocessing, run.device, run.dtype)
        return self.dev.vectors(network, run.job.config.preprocessing, run.device, run.dtype)


def best_epoch(curve: Sequence[float]) -> int:
    """Return the epoch (from 0) of the highest value, the earliest of several."""
    return max(range(len(curve)), key=lambda epoch: (curve[epoch], -epoch))


def has_stalled(curve: Sequence[float], config: TrainingConfig) -> bool:
    """Whether a training stops after these epochs: `patience` epochs without a better one, and `min_epochs` done."""
    if config.patience is None or len(curve) < max(config.min_epochs, 1):
        return False
    return len(curve) - 1 - best_epoch(curve) >= config.patience
