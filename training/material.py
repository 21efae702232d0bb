"""What a worker trains on: images with their classes, handed out batch by batch, and what predecessors say of them.

Everything random in a step comes from (seed, epoch, step, rank), so that a step is the same whenever it is drawn. A
global batch is the same for any number of workers; each rank gets its share of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graceful.training.datasets import check_trainable
from graceful.training.job import TrainingJob
from graceful.training.manifest import read_manifest
from graceful.training.pixels import decode_all
from graceful.training.predecessors import Predecessors, load_predecessors


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch of B images."""

    rows: Tensor  # (B,) int64, rows of the manifest
    labels: Tensor  # (B,) int64 into the classes, on the CPU
    pixels: Tensor  # (B, channels, size, size) uint8, on the CPU
    total: int  # images of the global batch

    def micro_batches(self, count: int, world_size: int) -> list["Batch"]:
        """Cut a rank's share into `count` shares of smaller global batches, none of them empty on any rank."""
        if count == 1:
            return [self]
        ends = [part[-1] + 1 for part in np.array_split(np.arange(self.total // world_size), count)]
        ends[-1] = len(self.rows)  # one image more where the batch does not go round
        parts = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            is_last = end == ends[-1]
            total = (self.total if is_last else end * world_size) - start * world_size
            own = slice(start, end)
            parts.append(Batch(self.rows[own], self.labels[own], self.pixels[own], total))
        return parts


@dataclass(frozen=True)
class Material:
    """The training set of one worker: all of it, decoded, in memory or in a memory-mapped scratch file."""

    classes: list[str]
    labels: Tensor  # (N,) int64 into classes
    pixels: Tensor  # (N, channels, size, size) uint8
    predecessors: Predecessors

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, seed: int, epoch: int, steps: int, rank: int, world_size: int, first_step: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's share of each of the epoch's `steps` global batches, from `first_step` on.

        Rank r holds the images r, r + world_size, ... of a global batch (`distributed.gather_rows` puts them back).
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed_of(seed, epoch, None)))
        for batch in order.tensor_split(steps)[first_step:]:
            yield self._take(batch[rank::world_size], len(batch))

    def clean(self, rank: int, world_size: int, block: int = 512) -> Iterator[Batch]:
        """Yield this rank's share of all images once, in blocks."""
        for rows in torch.arange(rank, len(self), world_size).split(block):
            yield self._take(rows, len(rows))

    def sample(self, num_images: int, seed: int, block: int = 256) -> Iterator[Batch]:
        """Yield a random `num_images` (all if there are fewer) in equal batches; the same on every rank."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:num_images]
        for rows in chosen.tensor_split(max(1, len(chosen) // block)):
            yield self._take(rows, len(rows))

    def _take(self, rows: Tensor, total: int) -> Batch:
        return Batch(rows, self.labels[rows], self.pixels.index_select(0, rows), total)


def load_material(job: TrainingJob, device: torch.device, scratch: Path) -> Material:
    """Read manifest, images and predecessors of a training.

    Raises: SingleImageClassError, ChangedImagesError, MisalignedCacheError, and what reading images raises.
    """
    images = read_manifest(job.manifest_uri)
    check_trainable(images)
    names, labels = np.unique(images.labels, return_inverse=True)
    labels = labels.astype(np.int64)
    classes = names.tolist()
    pixels = decode_all(images, job.config.preprocessing, scratch, job.config.pixel_memory_mib)
    predecessors = load_predecessors(job.taking_part, labels, classes, device, scratch)
    return Material(classes, torch.from_numpy(labels), pixels, predecessors)


def seed_of(seed: int, epoch: int, rank: int | None, step: int = 0) -> int:
    """Return the seed of what is random in a step of an epoch: of one rank, or (None) of what all ranks share."""
    who = 0 if rank is None else rank + 1
    return int(np.random.SeedSequence([seed, epoch, who, step]).generate_state(1)[0])
