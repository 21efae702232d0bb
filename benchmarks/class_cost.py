"""What predecessors cost a step where there are many classes: ten predecessors against none, in processor time."""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Ratio, paired
from graceful.training.generation import Preprocessing
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.material import Material
from graceful.training.pixels import Held
from graceful.training.predecessors import PredecessorGroup, Predecessors
from graceful.training.progress import TrailReporter
from graceful.training.starting import build_trainee
from graceful.training.step import Run, Stepper

_NUM_PREDECESSORS, _WIDTH, _BATCH, _STEPS = 10, 128, 256, 4
_CPU = torch.device("cpu")


def step_cost_classes() -> list[Ratio]:
    """A step of the default recipe with 10 predecessors / one without constraints, at 10, 1,000 and 100,000 classes.

    Synthetic pixels and vectors, at least one image a class. Head and optimiser over all rows are part of both sides.
    """
    torch.set_num_threads(1)
    return [_at(num_classes) for num_classes in (10, 1_000, 100_000)]


def _at(num_classes: int) -> Ratio:
    recipe = TrainingConfig(
        preprocessing=Preprocessing(image_size=28, channels=1, mean=(0.3,), std=(0.37,)),
        augmentation=AugmentationConfig(kind="affine"),
        batch_size=_BATCH,
    )
    with tempfile.TemporaryDirectory() as folder:
        bare = _stepper(folder, recipe.without_constraints(), num_classes, 0)
        constrained = _stepper(folder, recipe, num_classes, _NUM_PREDECESSORS)
        for run, stepper in (bare, constrained):
            _seconds(run, stepper)  # the first steps allocate
        return paired(
            f"step_cost_classes_{num_classes}",
            partial(_seconds, *bare),
            partial(_seconds, *constrained),
            pairs=9,
            at_most=1.10,
            note=f"processor seconds of {_STEPS} steps, one thread; small CNN, 28x28, batch 256, 128-d, head of "
            f"{num_classes:,} rows under AdamW on both sides, classes sampled by default",
        )


def _stepper(folder: str, recipe: TrainingConfig, num_classes: int, num_predecessors: int) -> tuple[Run, Stepper]:
    num_images = max(num_classes, 4 * _BATCH)
    labels = torch.arange(num_images) % num_classes
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 1, 28, 28), dtype=torch.uint8, generator=generator)
    groups = []
    if num_predecessors:
        vectors = torch.randn(num_images, num_predecessors, _WIDTH, dtype=torch.float16, generator=generator)
        vectors /= vectors.norm(dim=2, keepdim=True)
        unused = torch.zeros(()).expand(num_predecessors, num_classes, _WIDTH)  # RACT compares with stored vectors
        names = tuple(f"g{number:03d}-{number:06x}" for number in range(1, num_predecessors + 1))
        groups = [PredecessorGroup(names, torch.ones(num_predecessors), vectors, unused, unused, unused[:, :, 0])]
    predecessors = Predecessors(groups, labels.numpy().astype(np.int64), _CPU)
    material = Material([f"{c:06d}" for c in range(num_classes)], labels, Held(pixels), predecessors)
    job = TrainingJob(
        config=recipe,
        name=f"classes-{num_classes}-{num_predecessors}",
        manifest_uri=str(Path(folder) / "none.parquet"),
        output_uri=folder,
        ordinal=1,
        storage_uri=folder,
    )
    run = Run(job, TrailReporter(folder, job.name), 0, 1, _CPU, None, material)
    trainee = build_trainee(recipe, num_classes, None).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return run, Stepper(run, trainee, max_lr=1e-3, total_steps=10_000)


def _seconds(run: Run, stepper: Stepper) -> float:
    batches = run.material.batches(0, 0, len(run.material) // _BATCH, 0, 1)
    spent = 0.0
    for step, batch in zip(range(_STEPS), batches, strict=False):
        started = time.process_time()
        stepper.take(batch, 0, step)
        spent += time.process_time() - started
    return spent
