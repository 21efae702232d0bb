"""What a worker trains on: images with their classes, handed out batch by batch, and what predecessors say of them.

Everything random in a step comes from (seed, epoch, step, rank), so that a step is the same whenever it is drawn. A
global batch is the same for any number of workers; each rank gets its share of it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graceful.training.datasets import check_classes
from graceful.training.distributed import once_per_machine, world_size
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.manifest import count_images, read_classes, read_manifest
from graceful.training.pixels import Draw, Images, Look, Streamed, held
from graceful.training.predecessors import Predecessors, load_predecessors
from graceful.training.records import Records, write_records


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
    """The training set of one worker, held in memory or decoded as it is asked for."""

    classes: list[str]
    labels: Tensor  # (N,) int64 into classes
    images: Images
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
        batches = order.tensor_split(steps)[first_step:]
        return self._taken([(batch[rank::world_size], len(batch)) for batch in batches], (seed, epoch))

    def clean(self, rank: int, world_size: int, block: int = 512) -> Iterator[Batch]:
        """Yield this rank's share of all images once, in blocks."""
        return self._taken([(rows, len(rows)) for rows in torch.arange(rank, len(self), world_size).split(block)])

    def sample(self, num_images: int, seed: int, block: int = 256) -> Iterator[Batch]:
        """Yield a random `num_images` (all if there are fewer) in equal batches; the same on every rank."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:num_images]
        return self._taken([(rows, len(rows)) for rows in chosen.tensor_split(max(1, len(chosen) // block))])

    def close(self) -> None:
        """End what decodes the images."""
        self.images.close()

    def _taken(self, shares: list[tuple[Tensor, int]], draw: Draw | None = None) -> Iterator[Batch]:
        blocks = self.images.blocks([rows for rows, _ in shares], draw)
        # In this order: after the last share nothing more is asked of the blocks.
        for (rows, total), pixels in zip(shares, blocks, strict=False):
            yield Batch(rows, self.labels[rows], pixels, total)


def load_material(job: TrainingJob, device: torch.device, scratch: Path) -> Material:
    """Read manifest, images and predecessors of a training; close it afterwards.

    Raises: SingleImageClassError, MisalignedCacheError, and what `open_images` raises.
    """
    classes, labels = read_classes(job.manifest_uri)
    check_classes(classes, np.bincount(labels, minlength=len(classes)))
    limit = job.config.pixel_memory_mib
    predecessors = load_predecessors(job.taking_part, labels, classes, device, scratch, limit)
    look = Look.of(job.config.preprocessing, job.config.augmentation)
    images = open_images(job, job.manifest_uri, look, device, scratch)
    return Material(classes, torch.from_numpy(labels), images, predecessors)


def open_images(job: TrainingJob, manifest_uri: str, look: Look, device: torch.device, scratch: Path) -> Images:
    """Decode the images of a manifest, or open them for decoding while they are used if they are too large together.

    Raises: ChangedImagesError, UnreadableImageError, ScratchFullError, UsageError for transforms that do not fit.
    """
    if not is_streamed(job.config, look, count_images(manifest_uri)):
        return held(read_manifest(manifest_uri), look)
    folder = once_per_machine(partial(_written_records, manifest_uri, scratch))
    ahead = 2 * -(-job.config.batch_size // world_size())
    processes = decoding_processes(job)
    return Streamed(Records(folder, manifest_uri), look, processes, ahead, pinned=device.type == "cuda")


def is_streamed(config: TrainingConfig, look: Look, num_images: int) -> bool:
    """Whether so many images are decoded while they are used, because they are too large together to be held."""
    return look.size_bytes(num_images) > config.pixel_memory_mib * 2**20


def decoding_processes(job: TrainingJob) -> int:
    """Return how many processes of a worker decode images: what the job says, or its cores but one."""
    cores = job.cpus_per_worker if job.num_workers else len(os.sched_getaffinity(0))
    return job.decoding_processes or max(1, cores - 1)


def _written_records(manifest_uri: str, scratch: Path) -> str:
    write_records(manifest_uri, str(scratch))
    return str(scratch)


def seed_of(seed: int, epoch: int, rank: int | None, step: int = 0) -> int:
    """Return the seed of what is random in a step of an epoch: of one rank, or (None) of what all ranks share."""
    who = 0 if rank is None else rank + 1
    return int(np.random.SeedSequence([seed, epoch, who, step]).generate_state(1)[0])
