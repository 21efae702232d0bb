"""What a step of LQF costs beside an ordinary one: time in turn in one process, memory each in a process of its own."""

import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Ratio, paired, ratio_of
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.job import AugmentationConfig, LqfConfig, TrainingConfig, TrainingJob
from graceful.training.linear import Linearised, SquaredHead
from graceful.training.material import Material
from graceful.training.pixels import Held
from graceful.training.predecessors import Predecessors
from graceful.training.progress import TrailReporter
from graceful.training.starting import Trainee, build_trainee
from graceful.training.step import Run, Stepper

_BATCH, _CLASSES, _STEPS, _PAIRS = 256, 100, 2, 5
_CPU = torch.device("cpu")


def lqf_step() -> list[Ratio]:
    """A step of the linear expansion with squared loss and K-FAC / a step of the same network without constraints."""
    torch.set_num_threads(1)
    told = f"small CNN, 28x28, batch {_BATCH}, 128-d, {_CLASSES} classes, float32, one thread"
    with tempfile.TemporaryDirectory() as folder:
        ordinary, linear = (_stepper(folder, is_linear) for is_linear in (False, True))
        for run, stepper in (ordinary, linear):
            _seconds(run, stepper)  # the first steps allocate
        spent = paired(
            "lqf_step_time", partial(_seconds, *ordinary), partial(_seconds, *linear), pairs=_PAIRS, at_most=2.2,
            note=f"processor seconds of {_STEPS} steps; {told}; the curvature, taken once, not counted",
        )  # fmt: skip
    pairs = [(_peak_mib(False), _peak_mib(True)) for _ in range(3)]
    needed = ratio_of("lqf_step_memory", pairs, at_most=2.2, note=f"memory that the first two steps add; {told}")
    return [spent, needed]


def _stepper(folder: str, is_linear: bool) -> tuple[Run, Stepper]:
    recipe = TrainingConfig(
        backbone=BackboneSpec(name="small_cnn", kwargs={"negative_slope": 0.1}),
        preprocessing=Preprocessing(image_size=28, channels=1, mean=(0.3,), std=(0.37,)),
        augmentation=AugmentationConfig(kind="affine"),
        batch_size=_BATCH,
        constraints=(),
        mixture=0.0,
        lqf=LqfConfig(max_lr=1e-6, curvature_images=32) if is_linear else None,
    )
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4 * _BATCH) % _CLASSES
    pixels = torch.randint(0, 256, (len(labels), 1, 28, 28), dtype=torch.uint8, generator=generator)
    material = Material(
        [f"{c:03d}" for c in range(_CLASSES)], labels, Held(pixels), Predecessors([], labels.numpy(), _CPU)
    )
    job = TrainingJob(
        config=recipe, name="step", manifest_uri=str(Path(folder) / "none.parquet"), output_uri=folder, ordinal=1,
        storage_uri=folder,
    )  # fmt: skip
    run = Run(job, TrailReporter(folder, job.name), 0, 1, _CPU, None, material)
    trainee = build_trainee(recipe, _CLASSES, None)
    if is_linear and recipe.lqf is not None:
        head = SquaredHead(recipe.head, recipe.lqf.target, _CLASSES, recipe.width)
        trainee = Trainee(Linearised(trainee.network), head)
    trainee.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return run, Stepper(run, trainee, max_lr=1e-3, total_steps=10_000)


def _seconds(run: Run, stepper: Stepper) -> float:
    spent = 0.0
    for step, batch in enumerate(run.material.batches(0, 0, _STEPS, 0, 1)):
        started = time.process_time()
        stepper.take(batch, 0, step)
        spent += time.process_time() - started
    return spent


def _peak_mib(is_linear: bool) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_mib, (is_linear,))


def _added_mib(is_linear: bool) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, stepper = _stepper(folder, is_linear)
        Path("/proc/self/clear_refs").write_text("5")  # what was needed to load the libraries does not count
        before = _status_kib("VmRSS")
        for step, batch in zip(range(2), run.material.batches(0, 0, _STEPS, 0, 1), strict=False):
            stepper.take(batch, 0, step)
        return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))
