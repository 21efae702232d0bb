"""The per-worker training loop in plain PyTorch: one process, or one of several under a process group.

The same function runs in this process, under Ray Train and in tests. Everything random in a step comes from
(seed, epoch, step, rank), so a run that is killed and resumed from a checkpoint ends with the same weights as one that
was not (on the same hardware with the same number of workers). Losses and batch norm are those of the global batch
(distributed.py): how many workers share it changes the result by rounding and by their own draws of the augmentation.
"""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graceful.errors import GracefulError, UsageError
from graceful.training.distributed import share_weight, synchronised_batch_norm
from graceful.training.encoder import named_dtype, save_generation, sixteen_bit_type
from graceful.training.finishing import calibrate, interpolate, interpolate_rows, sum_by_class
from graceful.training.generation import GenerationCard
from graceful.training.job import TrainingJob
from graceful.training.material import Material, load_material, seed_of
from graceful.training.objective import Objective
from graceful.training.pixels import training_batch
from graceful.training.progress import Reporter
from graceful.training.starting import Parent, Trainee, build_trainee, load_parent


class TrainingDivergedError(GracefulError):
    """The loss is no longer finite."""


class TrainingDeadlineError(GracefulError):
    """The training did not end in time; the same job goes on from its last checkpoint."""


@dataclass(frozen=True)
class _Run:
    """One worker's part in one training."""

    job: TrainingJob
    report: Reporter
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype | None  # 16-bit type of the network's arithmetic
    material: Material


def train_worker(
    job: TrainingJob,
    report: Reporter,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    deadline: float | None = None,
) -> GenerationCard | None:
    """Train one generation; rank 0 stores it and returns its card, the other ranks return None.

    deadline: seconds since the epoch, looked at after every epoch, when its checkpoint is complete.
    With world_size > 1 the caller has set up torch's process group. Resumes from `report.latest()`.

    Raises: SingleImageClassError, ChangedImagesError, MisalignedCacheError, IncompatibleParentError,
    TrainingDivergedError, TrainingDeadlineError.
    """
    device = device or torch.device("cpu")
    config = job.config
    dtype = sixteen_bit_type(device) if config.precision == "auto" else named_dtype(config.precision)
    with tempfile.TemporaryDirectory(prefix="graceful-training-") as scratch:
        material = load_material(job, device, Path(scratch))
        run = _Run(job, report, rank, world_size, device, dtype, material)
        torch.manual_seed(config.seed)
        parent = load_parent(job, material, device, dtype)
        trainee = build_trainee(config, len(material.classes), parent)
        trainee.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with synchronised_batch_norm(trainee):
            seconds = _run_epochs(run, trainee, parent is not None, deadline)
        return _finish(run, trainee, parent, seconds)


def _run_epochs(run: _Run, trainee: Trainee, from_parent: bool, deadline: float | None) -> float:
    """Train all epochs that the latest checkpoint has not seen; return the seconds of all of them."""
    config, material = run.job.config, run.material
    steps = math.ceil(len(material) / config.batch_size)
    smallest = len(material) // steps
    if smallest < run.world_size:
        raise UsageError(
            f"training {run.job.name}: expected an image of every batch for each of {run.world_size} workers, found "
            f"batches of {smallest} ({len(material)} images in batches of at most {config.batch_size}); raise "
            "batch_size or use fewer workers"
        )
    max_lr = config.max_lr if from_parent and config.start == "parent" else config.first_max_lr
    optimizer = torch.optim.AdamW(_parameter_groups(trainee, config.weight_decay), lr=max_lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps * config.epochs)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    stateful: dict[str, Any] = {"trainee": trainee, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    first_epoch, seconds = 0, 0.0
    saved = run.report.latest()
    if saved is not None:
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        first_epoch, seconds = saved["epoch"] + 1, saved["seconds"]
    model: nn.Module = trainee
    if run.world_size > 1:
        model = DistributedDataParallel(trainee, device_ids=[run.device] if run.device.type == "cuda" else None)
    objective = Objective(config, material, run.device)
    for epoch in range(first_epoch, config.epochs):
        started = time.perf_counter()
        model.train()
        sums: dict[str, Tensor] = {}
        for step, batch in enumerate(material.batches(config.seed, epoch, steps, run.rank, run.world_size)):
            own = seed_of(config.seed, epoch, run.rank, step)
            torch.manual_seed(own)  # dropout, if the network has any, draws from torch's own generator
            generator = torch.Generator().manual_seed(own)
            shared = torch.Generator().manual_seed(seed_of(config.seed, epoch, None, step + 1))
            images = training_batch(batch.pixels, config.preprocessing, config.augmentation, generator, run.device)
            labels = batch.labels.to(run.device)
            embeddings, task = model(images, labels, run.dtype)
            task = task * share_weight(len(labels), batch.total)
            terms = {"task": task, **objective.terms(embeddings, labels, batch, shared)}
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        is_late = deadline is not None and time.time() > deadline and epoch + 1 < config.epochs
        means, any_late = _agree(run, {name: value / steps for name, value in sums.items()}, is_late)
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingDivergedError(
                f"training {run.job.name}: expected a finite loss, found {means} (epoch {epoch}); lower max_lr or use "
                "float32"
            )
        elapsed = time.perf_counter() - started
        seconds += elapsed
        metrics = {"epoch": epoch, "epochs": config.epochs, **means, "seconds": round(elapsed, 3)}
        metrics["images_per_s"] = round(len(material) / elapsed, 1)
        state = {name: part.state_dict() for name, part in stateful.items()}
        run.report.report(metrics, {"epoch": epoch, "seconds": seconds, **state} if run.rank == 0 else None)
        if any_late:
            raise TrainingDeadlineError(
                f"training {run.job.name}: expected to end before its deadline, found it at epoch {epoch + 1} of "
                f"{config.epochs}; run the same job again to go on from there"
            )
    return seconds


def _agree(run: _Run, means: dict[str, Tensor], is_late: bool) -> tuple[dict[str, float], bool]:
    """Average the epoch's losses over the ranks; late is what any rank finds late, so that all stop together."""
    values = torch.stack([*means.values(), torch.tensor(float(is_late), device=run.device)])
    if run.world_size > 1:
        dist.all_reduce(values)
    numbers = (values / run.world_size).tolist()
    return dict(zip(means, numbers, strict=False)), numbers[-1] > 0


def _finish(run: _Run, trainee: Trainee, parent: Parent | None, seconds: float) -> GenerationCard | None:
    """Interpolate with the parent, calibrate, compute class means, store: every rank computes, rank 0 writes."""
    started = time.perf_counter()
    job, config, material, network = run.job, run.job.config, run.material, trainee.network
    preprocessing, device, dtype = config.preprocessing, run.device, run.dtype
    rows = trainee.head.rows.detach()
    if parent is not None and config.interpolation > 0:
        interpolate(network, parent.state, config.interpolation)
        rows = interpolate_rows(rows, parent.rows, config.interpolation)
    sample = material.sample(config.calibration_images, config.seed)
    calibrated = calibrate(network, sample, preprocessing, device, dtype)
    share = material.clean(run.rank, run.world_size)
    means = sum_by_class(network, share, len(material.classes), preprocessing, device, dtype)
    if run.world_size > 1:
        dist.all_reduce(means)
    if run.rank != 0:
        return None
    narrower = {group.width for group in material.predecessors.groups if group.width < config.width}
    uri, card = save_generation(
        job.output_uri,
        network,
        ordinal=job.ordinal,
        backbone=config.backbone,
        preprocessing=preprocessing,
        width=config.width,
        classifier=(material.classes, rows, means),
        prefix_widths=tuple(sorted({*config.prefix_widths, *narrower})),
        parent=parent.card.generation_id if parent is not None else None,
        predecessors=tuple(reference.generation_id for reference in job.predecessors if config.constraints),
        calibrated_images=calibrated,
        training={
            "name": job.name,
            "images": len(material),
            "classes": len(material.classes),
            "epochs": config.epochs,
            "seed": config.seed,
            "seconds": round(seconds + time.perf_counter() - started, 2),
            "workers": run.world_size,
            "precision": str(dtype or torch.float32).removeprefix("torch."),
            "interpolation": config.interpolation if parent is not None else 0.0,
            "constraints": [entry.name for entry in config.constraints] if len(material.predecessors) else [],
        },
    )
    run.report.finish(uri, card)
    return card


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels, but not biases and norms."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
