"""The optimiser of LQF: momentum on gradients that are preconditioned by the curvature at w0, computed once.

With a squared loss the problem is quadratic, and its Gauss-Newton matrix H = E[J^T J] is the same all along the
training; with a softmax it is that up to the curvature of the softmax, which is smaller: steps are larger. For the
matrix of a layer it is approximated by a Kronecker product A x G of the layer's inputs and the gradients of its outputs
(K-FAC: Martens and Grosse, 2015, 1503.05671; convolutions: Grosse and Martens, 2016, 1602.01407), for everything else
(biases, norms, grouped convolutions) by its diagonal. J is that of the logits s <f_lin, W_c>; products with J^T come
from random logits of unit variance, which the squared loss's curvature (the identity) calls for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.training.linear import Linearised


@dataclass
class _Factors:
    """Sums over images of one layer's outer products, or of one parameter's squared gradients."""

    inputs: Tensor | None = None  # (n, n), n inputs of an output, over images and positions
    outputs: Tensor | None = None  # (m, m), m outputs, over images and positions
    num_positions: float = 1.0
    diagonal: Tensor | None = None


class Curvature:
    """The approximate inverse of H at w0, parameter by parameter, in the order of `Linearised.change`."""

    def __init__(
        self, network: Linearised, rows: Tensor, scale: float, batches: Iterable[Tensor], damping: float
    ) -> None:
        """Estimate H from `batches` of images (B, channels, size, size); rows (C, d) of unit length.

        damping: added to the factors, relative to their mean eigenvalue.
        """
        generator = torch.Generator().manual_seed(0)
        base, named = network.base, dict(network.base.named_parameters())
        layers = {f"{name}.weight".lstrip("."): module for name, module in base.named_modules() if _is_a_matrix(module)}
        found = {name: _Factors() for name in named}
        num_images = 0
        for parameter in named.values():
            parameter.requires_grad_(True)
        for images in batches:
            with _watched(layers, found):
                values = base(images)
                noise = torch.randn(len(images), len(rows), generator=generator).to(values)
                along = scale * (noise @ rows.to(values)) / values.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
                gradients = torch.autograd.grad((values * along).sum(), list(named.values()))
            for name, gradient in zip(named, gradients, strict=True):
                if name not in layers:
                    squared, earlier = gradient.square(), found[name].diagonal
                    found[name].diagonal = squared if earlier is None else earlier + squared
            num_images += len(images)
        for parameter in named.values():
            parameter.requires_grad_(False)
        self._inverses = [_inverse(factors, num_images, damping) for factors in found.values()]

    def precondition(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients of the parameters by H^-1 times them."""
        for parameter, inverse in zip(parameters, self._inverses, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            if isinstance(inverse, Tensor):
                gradient.mul_(inverse)
            else:
                outputs, inputs = inverse
                flat = gradient.flatten(1)
                gradient.copy_((outputs @ flat @ inputs).view_as(gradient))


class QuadraticOptimizer(torch.optim.SGD):
    """Momentum on preconditioned gradients; `decay` is that of the distance to the predecessor, 0.5 decay |d|^2."""

    def __init__(
        self, change: list[nn.Parameter], others: list[nn.Parameter], curvature: Curvature, lr: float, decay: float
    ) -> None:
        """others: parameters of a head that is trained too; their gradients are taken as they are."""
        super().__init__([*change, *others], lr=lr, momentum=0.9)
        self._change, self._curvature, self._decay = change, curvature, decay

    def step(self, closure: Any = None) -> Any:
        """Precondition the gradients and take a step."""
        with torch.no_grad():
            for parameter in self._change:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=self._decay)
            self._curvature.precondition(self._change)
        return super().step(closure)


def _is_a_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )  # fmt: skip


@contextmanager
def _watched(layers: dict[str, nn.Module], found: dict[str, _Factors]) -> Iterator[None]:
    """Add up inputs and gradients of outputs of the layers while the network runs forward and backward."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        factors = found[name]

        def seen(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            rows = _patches(module, given[0].detach())
            product = rows.t() @ rows
            factors.inputs = product if factors.inputs is None else factors.inputs + product
            factors.num_positions = len(rows) / len(output)

            def came_back(gradient: Tensor) -> None:
                channels_last = gradient.movedim(1, -1) if isinstance(module, nn.Conv2d) else gradient
                rows = channels_last.flatten(0, -2)
                product = rows.t() @ rows
                factors.outputs = product if factors.outputs is None else factors.outputs + product

            output.register_hook(came_back)

        handles.append(module.register_forward_hook(seen))

    for name, module in layers.items():
        watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _patches(module: nn.Module, given: Tensor) -> Tensor:
    """Return what each output of a layer sees, (images x positions, inputs)."""
    if not isinstance(module, nn.Conv2d):
        return given.flatten(0, -2)
    unfolded = functional.unfold(given, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return unfolded.transpose(1, 2).flatten(0, 1)


def _inverse(factors: _Factors, num_images: int, damping: float) -> Tensor | tuple[Tensor, Tensor]:
    """Return the damped inverses (outputs (m, m), inputs (n, n)), or that of a diagonal."""
    if factors.diagonal is not None:
        diagonal = factors.diagonal / num_images
        return 1 / (diagonal + damping * diagonal.mean().clamp(min=1e-12))
    assert factors.inputs is not None
    assert factors.outputs is not None
    inputs, outputs = factors.inputs / num_images, factors.outputs / (num_images * factors.num_positions)
    return _damped_inverse(outputs, damping**0.5), _damped_inverse(inputs, damping**0.5)


def _damped_inverse(factor: Tensor, damping: float) -> Tensor:
    level = factor.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.inv(factor + damping * level * torch.eye(len(factor)).to(factor))
