"""Several workers as one: what a step computes on R ranks is what it computes on one, up to rounding.

Rank r holds the images r, r + R, r + 2R, ... of a global batch. The loss of a step is the mean over the ranks of what
each rank calls its loss, because that is what DistributedDataParallel's average of the gradients minimises. A mean over
a rank's own images is therefore weighted by `share_weight`; a loss of the gathered global batch, the same on every
rank, is not. Batch norm takes its statistics from the global batch (`synchronised_batch_norm`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graceful.errors import UsageError
from graceful.processes import process_space

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def world_size() -> int:
    """Return the number of ranks of torch's process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor, differentiable: bool, total: int | None = None) -> Tensor:
    """Return the rows (B, ...) of the global batch, in its order, from every rank's own rows (B_r, ...).

    With one rank the tensor itself. differentiable: the gradient of the sum of all ranks' losses flows back to the rank
    that owns a row. total: B where the caller knows it; otherwise the ranks ask one another. Every rank must call it.

    Raises: UsageError for a rank that does not hold its share.
    """
    num_ranks = world_size()
    if num_ranks == 1:
        return tensor
    if total is None:
        sizes = torch.tensor(len(tensor), device=tensor.device)
        dist.all_reduce(sizes)
        total = int(sizes)
    expected = len(range(dist.get_rank(), total, num_ranks))
    if len(tensor) != expected:
        raise UsageError(
            f"gathering a batch of {total} rows over {num_ranks} ranks: expected {expected} rows on rank "
            f"{dist.get_rank()}, found {len(tensor)}"
        )
    longest = -(-total // num_ranks)
    if expected < longest:
        tensor = torch.cat([tensor, tensor.new_zeros(longest - expected, *tensor.shape[1:])])
    gathered = _Gather.apply(tensor) if differentiable else _gather(tensor)
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def once_per_machine(make: Callable[[], str]) -> str:
    """Return what `make` returns, called on the first rank of every machine while the others wait for it.

    Every rank must call it; what `make` raises on one, every rank raises.
    """
    if world_size() == 1:
        return make()
    machines: list[Any] = [None] * world_size()
    dist.all_gather_object(machines, process_space())
    first = machines.index(machines[dist.get_rank()])
    made: tuple[str, Exception | None] = ("", None)
    if first == dist.get_rank():
        try:
            made = (make(), None)
        except Exception as error:
            made = ("", error)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, made)
    for _, refusal in found:
        if refusal is not None:
            raise refusal
    return str(found[first][0])


def own_rows(tensor: Tensor) -> Tensor:
    """Return this rank's rows (B_r, ...) of a global batch's (B, ...): what `gather_rows` puts together."""
    num_ranks = world_size()
    return tensor if num_ranks == 1 else tensor[dist.get_rank() :: num_ranks]


def share_weight(num_own: int, total: int) -> float:
    """Return the factor of a mean over a rank's own images, so that the ranks' mean is that of all images.

    >>> share_weight(8, 8)
    1.0
    """
    return num_own * world_size() / total


@contextmanager
def synchronised_batch_norm(module: nn.Module) -> Iterator[None]:
    """Let every batch norm of `module` normalise by the global batch inside this context; nothing with one rank.

    Parameters, buffers and the names of the state stay what they are, and so do the modules afterwards. A batch norm of
    a class of its own, whose forward is not torch's, is refused.

    Raises: UsageError.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if world_size() > 1:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    replaced.append((parent, name, child))
                    setattr(parent, name, _synchronised(child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            child.train(getattr(parent, name).training)
            setattr(parent, name, child)


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over the images of all ranks, on any device (torch.nn.SyncBatchNorm runs on GPUs only).

    Mean and variance are combined from every rank's count, mean and sum of squared deviations, which stays exact where
    the mean is large (Chan et al., 1979). Statistics are float32 whatever the precision around them.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs (n, C, ...)."""
        if not (self.training or self.running_mean is None):
            return super().forward(inputs)
        values = inputs.float()
        others = [axis for axis in range(values.ndim) if axis != 1]
        local_mean = values.mean(dim=others)
        deviations = (values - _along_channels(local_mean, values.ndim)).square().sum(dim=others)
        count = values.new_tensor([values.numel() / values.shape[1]])
        gathered = _Gather.apply(torch.cat([local_mean, deviations, count]))
        means, squares, counts = gathered.split([self.num_features, self.num_features, 1], dim=1)
        counts = counts.detach()
        number = counts.sum()
        mean = (means * counts).sum(dim=0) / number
        variance = (squares + (means - mean).square() * counts).sum(dim=0) / number
        self._remember(mean.detach(), variance.detach() * (number / (number - 1).clamp(min=1)))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        outputs = (values - _along_channels(mean, values.ndim)) * _along_channels(scale, values.ndim)
        if self.affine:
            outputs = outputs + _along_channels(self.bias, values.ndim)
        return outputs.to(inputs.dtype)

    def _check_input_dim(self, inputs: Tensor) -> None:
        """Take any number of dimensions."""

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def _synchronised(norm: _BatchNorm) -> nn.Module:
    """Return a module that shares the norm's parameters and buffers and synchronises over the ranks."""
    if type(norm) not in _PLAIN:
        raise UsageError(
            f"training on {world_size()} workers: expected torch's own batch norm, found {type(norm).__name__}, which "
            "cannot be synchronised; train on one worker, or use a network with torch.nn.BatchNorm or without batch "
            "norm"
        )
    on_gpu = norm.running_mean is not None and norm.running_mean.device.type == "cuda"
    kind = nn.SyncBatchNorm if on_gpu else SynchronisedBatchNorm
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(made, name, getattr(norm, name))
    return made.train(norm.training)


def _along_channels(values: Tensor, num_dimensions: int) -> Tensor:
    return values.view(1, -1, *[1] * (num_dimensions - 2))


def _gather(tensor: Tensor) -> Tensor:
    """Return the ranks' tensors of one shape, stacked (R, ...)."""
    gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered.view(world_size(), *tensor.shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        return _gather(tensor)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
