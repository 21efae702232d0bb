"""What a rank makes of its batches, without the rest of a training: cheap to import where a rank starts."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from graceful.training.job import TrainingJob
from graceful.training.material import Batch, load_material


def digest_of(batches: Iterable[Batch]) -> list[str]:
    """Digests of rows, pixels and labels of batches."""
    parts = [(batch.rows, batch.pixels, batch.labels) for batch in batches]
    return [hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest() for batch in parts]


def batches_of_rank(rank: int, num_ranks: int, job: TrainingJob, folder: str) -> tuple[list[str], list[str]]:
    """Digests of a rank's batches of the first epoch, and what lies in its own scratch folder."""
    scratch = Path(folder) / f"scratch-{rank}"
    scratch.mkdir()
    material = load_material(job, torch.device("cpu"), scratch)
    try:
        digests = digest_of(material.batches(0, 0, 3, rank, num_ranks))
    finally:
        material.close()
    return digests, sorted(path.name for path in scratch.iterdir())
