"""The per-worker training loop in plain PyTorch: one process, or one of several under a process group.

The same function runs in this process, under Ray Train and in tests. Everything random in epoch e comes from
(seed, epoch, rank), so a run that is killed and resumed from an epoch's checkpoint ends with the same weights as one
that was not (on the same hardware with the same number of workers).

Loss: task + sum over constraints of weight x (sum or mean over predecessors k of weight_k C_k). Predecessors take part
through stored embeddings and rows only.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from graceful.errors import GracefulError
from graceful.training.backbones import build_backbone, load_initial_weights
from graceful.training.constraints import CONSTRAINTS
from graceful.training.datasets import check_trainable
from graceful.training.encoder import (
    autocast,
    named_dtype,
    open_network,
    read_classifier,
    save_generation,
    sixteen_bit_type,
)
from graceful.training.finishing import calibrate, interpolate, interpolate_rows, sum_by_class
from graceful.training.generation import GenerationCard
from graceful.training.heads import Head, build_head, initialise_rows
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.manifest import LabelledImages, read_manifest
from graceful.training.pixels import decode_all, training_batch
from graceful.training.predecessors import Predecessors, load_predecessors, synthesise_rows
from graceful.training.progress import Reporter


class TrainingDivergedError(GracefulError):
    """The loss is no longer finite."""


class TrainingDeadlineError(GracefulError):
    """The training did not end in time; the same job goes on from its last checkpoint."""


class IncompatibleParentError(GracefulError):
    """The parent cannot give what the recipe takes from it."""


class Trainee(nn.Module):
    """Network and head in one module, so that gradients of both are averaged over the workers."""

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, d) float32, not normalised, and the task loss."""
        with autocast(images.device, dtype):
            embeddings = self.network(images)
        embeddings = embeddings.float()
        return embeddings, self.head(embeddings, labels)


@dataclass(frozen=True)
class _Material:
    """What a worker trains on."""

    images: LabelledImages
    classes: list[str]
    labels: Tensor  # (N,) int64 into classes
    pixels: Tensor  # (N, channels, size, size) uint8
    predecessors: Predecessors


@dataclass(frozen=True)
class _Run:
    """One worker's part in one training."""

    job: TrainingJob
    report: Reporter
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype | None  # 16-bit type of the network's arithmetic
    material: _Material


@dataclass(frozen=True)
class _Parent:
    card: GenerationCard
    state: dict[str, Tensor]
    class_means: Tensor  # (C, d) over the current training set
    rows: Tensor  # (C, d) its own, the class mean where it has none


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
        material = _load_material(job, device, Path(scratch))
        run = _Run(job, report, rank, world_size, device, dtype, material)
        torch.manual_seed(config.seed)
        parent = _load_parent(run)
        trainee = _build_trainee(config, material, parent)
        trainee.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        seconds = _run_epochs(run, trainee, parent is not None, deadline)
        return _finish(run, trainee, parent, seconds)


def _load_material(job: TrainingJob, device: torch.device, scratch: Path) -> _Material:
    images = read_manifest(job.manifest_uri)
    check_trainable(images)
    names, labels = np.unique(images.labels, return_inverse=True)
    labels = labels.astype(np.int64)
    classes = names.tolist()
    pixels = decode_all(images, job.config.preprocessing, scratch, job.config.pixel_memory_mib)
    constrained = job.predecessors if job.config.constraints else ()
    predecessors = load_predecessors(constrained, labels, classes, device, scratch)
    widest = max((group.width for group in predecessors.groups), default=0)
    if widest > job.config.width:
        raise IncompatibleParentError(
            f"training {job.name}: expected a width of at least {widest}, that of its widest predecessor, found "
            f"{job.config.width}; widths may grow but not shrink"
        )
    return _Material(images, classes, torch.from_numpy(labels), pixels, predecessors)


def _load_parent(run: _Run) -> _Parent | None:
    """Read what the recipe takes from the parent; class means from its cache, or in one pass over the clean images."""
    job, config, material = run.job, run.job.config, run.material
    takes_weights = config.start == "parent"
    if job.parent_uri is None or not (takes_weights or config.rows_from_parent):
        return None
    card, network = open_network(job.parent_uri, run.device)
    same_network = card.backbone == config.backbone and config.preprocessing.takes_weights_of(card.preprocessing)
    if card.width != config.width or (takes_weights and not same_network):
        raise IncompatibleParentError(
            f"training {job.name}: expected a parent with the same backbone, preprocessing and width, found "
            f"{card.backbone.name}, {card.width} wide (in {job.parent_uri}); set start = 'scratch', interpolation = 0 "
            "and, for another width, rows_from_parent = false"
        )
    means = material.predecessors.class_means_of(card.generation_id)
    if means is None:
        pixels = material.pixels
        if not config.preprocessing.takes_weights_of(card.preprocessing):
            raise IncompatibleParentError(
                f"training {job.name}: expected the parent {card.generation_id} among the predecessors, because its "
                "preprocessing differs from this training's, found it missing; add it or set rows_from_parent = false"
            )
        means = sum_by_class(
            network, pixels, material.labels, len(material.classes), card.preprocessing, run.device, run.dtype
        )
    means = functional.normalize(means.float(), dim=1).cpu()
    stored = read_classifier(job.parent_uri)
    rows = means if stored is None else synthesise_rows(stored[0].classes, stored[1], material.classes, means)
    return _Parent(card, {name: tensor.clone() for name, tensor in network.state_dict().items()}, means, rows)


def _build_trainee(config: TrainingConfig, material: _Material, parent: _Parent | None) -> Trainee:
    """Build network and head and give them their first weights."""
    network = build_backbone(
        config.backbone, config.width, config.preprocessing.channels, config.preprocessing.image_size
    )
    if parent is not None and config.start == "parent":
        network.load_state_dict(parent.state, strict=True)
    elif config.initial_weights is not None:
        load_initial_weights(network, config.backbone, config.initial_weights)
    head = build_head(config.head.name, len(material.classes), config.width, config.head.scale, config.head.margin)
    if parent is not None and config.rows_from_parent:
        head.set_rows(initialise_rows(parent.class_means))
    return Trainee(network, head)


def _run_epochs(run: _Run, trainee: Trainee, from_parent: bool, deadline: float | None) -> float:
    """Train all epochs that the latest checkpoint has not seen; return the seconds of all of them."""
    config, material = run.job.config, run.material
    steps = math.ceil(len(material.images) / config.batch_size)
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
    constraints = [(entry, CONSTRAINTS[entry.name](**entry.parameters)) for entry in config.constraints]
    for epoch in range(first_epoch, config.epochs):
        started = time.perf_counter()
        model.train()
        sums: dict[str, Tensor] = {}
        generator, batches = _epoch_draws(run, epoch, steps)
        for rows in batches:
            pixels = material.pixels.index_select(0, rows)
            images = training_batch(pixels, config.preprocessing, config.augmentation, generator, run.device)
            labels = material.labels[rows].to(run.device)
            embeddings, task = model(images, labels, run.dtype)
            terms = {"task": task, **_constraint_terms(constraints, material, embeddings, labels, rows, generator)}
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
        metrics["images_per_s"] = round(len(material.images) / elapsed, 1)
        state = {name: part.state_dict() for name, part in stateful.items()}
        run.report.report(metrics, {"epoch": epoch, "seconds": seconds, **state} if run.rank == 0 else None)
        if any_late:
            raise TrainingDeadlineError(
                f"training {run.job.name}: expected to end before its deadline, found it at epoch {epoch + 1} of "
                f"{config.epochs}; run the same job again to go on from there"
            )
    return seconds


def _epoch_draws(run: _Run, epoch: int, steps: int) -> tuple[torch.Generator, list[Tensor]]:
    """Return this rank's generator and its rows of every global batch; the batches are the same for any world size."""
    seed = run.job.config.seed
    own, shared = (int(np.random.SeedSequence([seed, epoch, who]).generate_state(1)[0]) for who in (run.rank + 1, 0))
    torch.manual_seed(own)  # dropout, if the network has any, draws from torch's own generator
    order = torch.randperm(len(run.material.images), generator=torch.Generator().manual_seed(shared))
    batches = [batch[run.rank :: run.world_size] for batch in order.tensor_split(steps)]
    return torch.Generator().manual_seed(own), batches


def _agree(run: _Run, means: dict[str, Tensor], is_late: bool) -> tuple[dict[str, float], bool]:
    """Average the epoch's losses over the ranks; late is what any rank finds late, so that all stop together."""
    values = torch.stack([*means.values(), torch.tensor(float(is_late), device=run.device)])
    if run.world_size > 1:
        dist.all_reduce(values)
    numbers = (values / run.world_size).tolist()
    return dict(zip(means, numbers, strict=False)), numbers[-1] > 0


def _constraint_terms(
    constraints: Sequence[tuple[Any, Any]],
    material: _Material,
    embeddings: Tensor,
    labels: Tensor,
    rows: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return each constraint's weighted loss over all predecessors."""
    predecessors = material.predecessors
    if not len(predecessors):
        return {}
    every_class = torch.arange(len(material.classes), device=embeddings.device)
    terms: dict[str, Tensor] = {}
    for entry, constraint in constraints:
        ref_labels = every_class
        if constraint.reference == "rows":
            references = [group.rows for group in predecessors.groups]
        elif constraint.reference == "instances":
            references = predecessors.draw_instances(generator)
        else:
            references, ref_labels = predecessors.of_batch(rows), labels
        losses = [
            (constraint(embeddings, labels, reference, ref_labels) * group.weights).sum()
            for group, reference in zip(predecessors.groups, references, strict=True)
        ]
        total = torch.stack(losses).sum() * entry.weight
        terms[entry.name] = total / len(predecessors) if entry.reduction == "mean" else total
    return terms


def _finish(run: _Run, trainee: Trainee, parent: _Parent | None, seconds: float) -> GenerationCard | None:
    """Interpolate with the parent, calibrate, compute class means, store: every rank computes, rank 0 writes."""
    started = time.perf_counter()
    job, config, material, network = run.job, run.job.config, run.material, trainee.network
    preprocessing, device, dtype = config.preprocessing, run.device, run.dtype
    rows = trainee.head.rows.detach()
    if parent is not None and config.interpolation > 0:
        interpolate(network, parent.state, config.interpolation)
        rows = interpolate_rows(rows, parent.rows, config.interpolation)
    calibrated = calibrate(
        network, material.pixels, preprocessing, device, dtype, config.calibration_images, config.seed
    )
    share = (run.rank, run.world_size)
    means = sum_by_class(
        network, material.pixels, material.labels, len(material.classes), preprocessing, device, dtype, share
    )
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
            "images": len(material.images),
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
