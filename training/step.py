"""One optimiser step: a global batch in micro-batches, forward, backward, clipping, optimiser, schedule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from graceful.errors import UsageError
from graceful.training.augmentation import training_batch
from graceful.training.curvature import Curvature, QuadraticOptimizer
from graceful.training.distributed import share_weight
from graceful.training.encoder import normalise
from graceful.training.job import TrainingJob
from graceful.training.linear import Linearised
from graceful.training.material import Batch, Material, seed_of
from graceful.training.objective import Objective
from graceful.training.progress import Reporter
from graceful.training.starting import Trainee


@dataclass(frozen=True)
class Run:
    """One worker's part in one training."""

    job: TrainingJob
    report: Reporter
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype | None  # 16-bit type of the network's arithmetic
    material: Material


def steps_per_epoch(run: Run) -> int:
    """Return the number of global batches of an epoch; every rank has an image of every micro-batch.

    Raises: UsageError where the images do not go round.
    """
    config, num_images = run.job.config, len(run.material)
    steps = math.ceil(num_images / config.batch_size)
    smallest = num_images // steps
    if smallest < run.world_size * config.accumulation:
        raise UsageError(
            f"training {run.job.name}: expected an image of every micro-batch for each worker ({run.world_size} "
            f"workers, {config.accumulation} micro-batches), found batches of {smallest} ({num_images} images in "
            f"batches of at most {config.batch_size}); raise batch_size, or use fewer workers or micro-batches"
        )
    return steps


class FurtherTerm(Protocol):
    """A term of the loss beside task and constraints."""

    def term(self, images: Tensor, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted mean over B images: as the network sees them, their embeddings (B, d), their rows."""


class Stepper:
    """Network, head, constraints and optimiser of one training, moved one step at a time."""

    def __init__(
        self, run: Run, trainee: Trainee, max_lr: float, total_steps: int, further: FurtherTerm | None = None
    ) -> None:
        config = run.job.config
        self._run, self._further = run, further
        self.trainee = trainee
        self._objective = Objective(config, run.material, run.device)
        self._optimizer, max_lr = build_optimizer(run, trainee, max_lr)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, max_lr=max_lr, total_steps=total_steps)
        self._scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self._stateful: dict[str, Any] = {
            "trainee": trainee, "optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler,
        }  # fmt: skip
        self._model: nn.Module = trainee

    def distribute(self) -> None:
        """Average gradients over the ranks from here on; every rank starts from rank 0's weights."""
        if self._run.world_size > 1:
            on_gpu = self._run.device.type == "cuda"
            self._model = DistributedDataParallel(self.trainee, device_ids=[self._run.device] if on_gpu else None)

    def take(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """Take one step on this rank's share of a global batch; return the terms of the loss, detached, by name.

        The mean of a term over the ranks is that of the global batch. With several micro-batches a constraint that
        compares the images of a batch with each other, and batch norm, see one micro-batch (of all ranks) at a time.
        """
        run, config = self._run, self._run.job.config
        own = seed_of(config.seed, epoch, run.rank, step)
        torch.manual_seed(own)  # dropout, if the network has any, draws from torch's own generator
        generator = torch.Generator().manual_seed(own)
        shared = torch.Generator().manual_seed(seed_of(config.seed, epoch, None, step + 1))
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        parts = batch.micro_batches(config.accumulation, run.world_size)
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            waiting = isinstance(self._model, DistributedDataParallel) and not is_last
            with self._model.no_sync() if waiting else nullcontext():  # type: ignore[operator]
                terms = self._terms(part, part.total / batch.total, generator, shared)
                loss = torch.stack(list(terms.values())).sum()
                self._scaler.scale(loss).backward()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        if config.max_gradient_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.trainee.parameters(), config.max_gradient_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        return sums

    def rehearse(self, batch: Batch) -> None:
        """Run a step's forward and backward pass, and leave nothing behind: no gradient, no statistics."""
        self.trainee.train()
        with buffers_put_back(self.trainee):
            try:
                part = batch.micro_batches(self._run.job.config.accumulation, self._run.world_size)[0]
                terms = self._terms(part, 1.0, torch.Generator(), torch.Generator())
                torch.stack(list(terms.values())).sum().backward()
            finally:
                self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on; the same on every rank."""
        return {name: part.state_dict() for name, part in self._stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another stepper's state."""
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])

    def _terms(
        self, part: Batch, share: float, generator: torch.Generator, shared: torch.Generator
    ) -> dict[str, Tensor]:
        run, config = self._run, self._run.job.config
        images = training_batch(part.pixels, config.preprocessing, config.augmentation, generator, run.device)
        labels = part.labels.to(run.device)
        draw = self._objective.draw(labels, part, shared)
        embeddings, task = self._model(images, labels, run.dtype, draw)
        terms = {"task": task * share_weight(len(labels), part.total)}
        terms |= self._objective.terms(embeddings, labels, part, shared, draw, self.trainee.head)
        if self._further is not None:
            found = self._further.term(images, embeddings, part.rows)
            terms["mixture"] = found * share_weight(len(labels), part.total)
        return terms if share == 1.0 else {name: value * share for name, value in terms.items()}


def build_optimizer(run: Run, trainee: Trainee, max_lr: float) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimiser of a recipe and its peak learning rate; LQF's takes the curvature at the parent first."""
    config, network, lqf = run.job.config, trainee.network, run.job.config.lqf
    if not isinstance(network, Linearised) or lqf is None or lqf.optimizer == "adam":
        return torch.optim.AdamW(_parameter_groups(trainee, config.weight_decay), lr=max_lr, fused=True), max_lr
    sample = run.material.sample(lqf.curvature_images, config.seed)
    images = (normalise(part.pixels.to(run.device), config.preprocessing) for part in sample)
    rows = functional.normalize(trainee.head.rows.detach(), dim=1)
    curvature = Curvature(network, rows, config.head.scale, images, lqf.damping)
    rest = [parameter for parameter in trainee.head.parameters() if parameter.requires_grad]
    return QuadraticOptimizer(list(network.change), rest, curvature, lqf.peak_lr, lqf.decay), lqf.peak_lr


@contextmanager
def buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Leave a module's buffers (the statistics of batch norm) as they were before the block."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels, but not biases and norms."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
