"""A few real steps of a training, in this process, without leaving anything: what a step takes and what it costs.

The same material, network, constraints and step as in `loop.train_worker`; the weights are thrown away.
"""

import contextlib
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from graceful.training.encoder import arithmetic
from graceful.training.job import TrainingJob
from graceful.training.loop import prepared
from graceful.training.material import load_material
from graceful.training.progress import TrailReporter
from graceful.training.starting import build_trainee, check_start, load_parent
from graceful.training.step import Run, steps_per_epoch

_MOST_STEPS = 50


@dataclass(frozen=True)
class Rehearsal:
    """What a training's steps took on this machine, one worker alone."""

    device: str
    precision: str
    compiled: bool
    num_predecessors: int
    batch_images: int  # of one worker
    step_s: float  # median
    load_s_per_image: float  # reading and decoding, before the first step
    memory_mib: int  # peak: of the GPU where there is one, else of the whole process


def rehearse(job: TrainingJob, least_steps: int = 3, least_s: float = 2.0) -> Rehearsal:
    """Take a step to warm up, then steps that are timed, on the job's own images; nothing is stored.

    On a GPU where the job wants one and there is one. At least `least_steps` and until `least_s` seconds have passed,
    but not more than 50.

    Raises: what `loop.train_worker` raises before its first step.
    """
    config = job.config
    device = torch.device("cuda" if job.use_gpu and torch.cuda.is_available() else "cpu")
    dtype = arithmetic(config.arithmetic, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.ExitStack() as opened:
        scratch = opened.enter_context(tempfile.TemporaryDirectory(prefix="graceful-rehearsal-"))
        check_start(job)
        started = time.perf_counter()
        material = opened.enter_context(contextlib.closing(load_material(job, device, Path(scratch))))
        load_s = time.perf_counter() - started
        run = Run(job, TrailReporter(scratch, job.name), 0, 1, device, dtype, material)
        steps = steps_per_epoch(run)
        parent = load_parent(job, material, device, dtype)
        trainee = build_trainee(config, len(material.classes), parent)
        trainee.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        seconds: list[float] = []
        with prepared(run, trainee, parent is not None, steps * config.epochs) as (stepper, is_compiled):
            batch = next(material.batches(config.seed, 0, steps, 0, 1))
            most = min(_MOST_STEPS, steps * config.epochs)  # the schedule has no more
            while len(seconds) < most and (len(seconds) <= least_steps or sum(seconds) < least_s):
                started = time.perf_counter()
                loss = stepper.take(batch, 0, len(seconds))["loss"]
                float(loss)  # waits for a GPU
                seconds.append(time.perf_counter() - started)
        return Rehearsal(
            device=str(device),
            precision=str(dtype or torch.float32).removeprefix("torch."),
            compiled=is_compiled,
            num_predecessors=len(material.predecessors),
            batch_images=len(batch.rows),
            step_s=statistics.median(seconds[1:] or seconds),
            load_s_per_image=load_s / len(material),
            memory_mib=_peak_mib(device),
        )


def _peak_mib(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) // 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
