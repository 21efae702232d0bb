"""Linear quadratic fine-tuning (LQF): train the first-order expansion of the predecessor's network, not the network.

Achille et al., "LQF: Linear Quadratic Fine-Tuning", CVPR 2021, 2012.11140. With w0 the weights of the predecessor and d
the change that is trained,

    f_lin(x) = (f_w0(x) + J_w0(x) d) / |f_w0(x)|

is linear in d, and with the paper's squared loss against fixed classifier rows the training is a quadratic problem,
whose curvature does not depend on d (curvature.py). The network runs in evaluation mode: batch norm is the fixed affine
map that the predecessor serves with.

What is stored is the ordinary network at w0 + d: it differs from f_lin by the second order of d, and everything else
(encoders, later generations that start from it, exports) needs to know nothing of an expansion.

Shapes: B images, C classes, d width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from graceful.errors import UsageError
from graceful.training.heads import Head
from graceful.training.job import HeadConfig
from graceful.training.sampling import ClassSample

_AT_ONCE = {"cpu": 64}  # images, by type of device: few stay in the caches of a processor
_AT_MOST = 1024


class Linearised(nn.Module):
    """The expansion of a network around the weights that it has. Only `change` is trained."""

    def __init__(self, network: nn.Module) -> None:
        """Take over `network`, which is the parent's.

        Raises: UsageError for a network whose output on an image depends on the rest of the batch.
        """
        super().__init__()
        check_linearisable(network)
        self.base = network.requires_grad_(False).eval()
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # in place, derivatives are copied once more
        self.change = nn.ParameterList([torch.zeros_like(parameter) for parameter in network.parameters()])

    def train(self, mode: bool = True) -> "Linearised":
        """Set the mode of everything but the network, which stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return f_lin (B, d), of unit length where nothing has changed; in float32 whatever the precision around."""
        # An image's output depends on no other: in parts, what derivatives need is not held for all images at once.
        at_once = _AT_ONCE.get(images.device.type, _AT_MOST)
        return torch.cat([self._expanded(part) for part in images.split(at_once)])

    def _expanded(self, images: Tensor) -> Tensor:
        point = {name: parameter.detach().requires_grad_() for name, parameter in self.base.named_parameters()}
        with torch.autocast(images.device.type, enabled=False), forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(at, along.detach())
                for (name, at), along in zip(point.items(), self.change, strict=True)
            }
            value, slope = forward_ad.unpack_dual(functional_call(self.base, dual, (images,)))
        assert slope is not None
        slope = _Along.apply((value,), tuple(point.values()), slope.detach(), *self.change)
        value = value.detach()
        return (value + slope) / value.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def moved(self) -> nn.Module:
        """Return a copy of the ordinary network at w0 + d, in evaluation mode."""
        network = copy.deepcopy(self.base)
        with torch.no_grad():
            for parameter, change in zip(network.parameters(), self.change, strict=True):
                parameter.add_(change)
        return network


class _Along(torch.autograd.Function):
    """J d, known already, whose gradient for d is J^T of what comes back: an ordinary backward pass at w0.

    Differentiating the forward derivative itself would give the same and walk through both passes.
    """

    @staticmethod
    def forward(ctx: Any, value: tuple[Tensor], point: tuple[Tensor, ...], slope: Tensor, *_change: Tensor) -> Tensor:
        """Return `slope` (B, d); `value` holds f_w0 (B, d) and its graph over `point`."""
        ctx.value, ctx.point = value, point
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return J^T times the gradient (B, d), a tensor for every part of the change."""
        return None, None, None, *torch.autograd.grad(ctx.value, ctx.point, gradients, materialize_grads=True)


def centred(rows: Tensor) -> Tensor:
    """Return the directions of rows (C, d) less what all of them have in common, of unit length."""
    directions = functional.normalize(rows, dim=1)
    return functional.normalize(directions - directions.mean(dim=0), dim=1)


class SquaredHead(Head):
    """The quadratic loss of LQF: mean_i 0.5 sum_c (s <f_i, W_c> - alpha [c = y_i])^2, with fixed unit rows W.

    alpha: `lqf.target`, 15 in the paper, for logits of the scale s. Embeddings are not normalised, so that the loss is
    quadratic in them. Rows are class means less their mean over the classes, normalised: what all classes have in
    common is left as it was, instead of being driven to 0 by the many classes that an image is not of. In a sample of
    classes each of the others counts for those that it stands for.
    """

    def __init__(self, config: HeadConfig, target: float, num_classes: int, width: int) -> None:
        super().__init__(config, num_classes, width)
        self.target = target
        self.weight.requires_grad_(False)

    def set_rows(self, rows: Tensor) -> None:
        """Replace all rows by `rows` (C, d), unit vectors, less their mean. Raises UsageError."""
        super().set_rows(centred(rows))

    def forward(self, embeddings: Tensor, labels: Tensor, sample: ClassSample | None = None) -> Tensor:
        """Return the mean loss times the head's weight, in float32; 0 for an empty batch."""
        if not len(labels):
            return embeddings.sum() * 0.0
        rows, targets, counts = self.weight, labels, torch.ones(())
        if sample is not None:
            rows = rows.index_select(0, sample.classes)
            targets = torch.searchsorted(sample.classes, labels)
            counts = sample.offsets.exp()
        logits = self.config.scale * (embeddings @ functional.normalize(rows, dim=1).t())
        wanted = self.target * functional.one_hot(targets, len(rows))
        return self.config.weight * 0.5 * ((logits - wanted).square() * counts.to(logits)).sum(dim=1).mean()


def check_linearisable(network: nn.Module) -> None:
    """Refuse a network with batch norm that has no statistics of its own.

    Raises: UsageError.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UsageError(
                f"linearising a network: expected batch norm with running statistics, found {name} without, which "
                "normalises by the batch in training mode always, so that the network has no expansion for one image; "
                "use track_running_stats = True or another norm, or train without [training.lqf]"
            )
