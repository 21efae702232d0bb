"""A super-net: the largest network of a space, whose parts are all the others and share its weights.

It is a backbone like any other, so that the loop trains it, on Ray and in this process, under a variant's constraints
against cached vectors, and resumes it. Only its forward pass in training differs: it runs two random networks and the
largest in turn, so that a step of `MICRO_BATCHES` micro-batches trains each of the three on a third of the batch. The
random ones are within the search's limits and near them: what is looked for is there. The sandwich rule (Yu and Huang,
ICCV 2019, 1903.05134) has the smallest network in every step instead, which then is better than its shared weights let
any other be (docs/howto/edge.md has figures). In evaluation it is the largest.

A narrower network takes the first channels, a shallower one the first convolutions of a block, a smaller kernel the
middle of the largest. Batch norm statistics fit one network only: those of a part are calibrated before it is used.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from graceful.training.architecture import Architecture, SearchConfig, Space
from graceful.training.backbones import SmallCnn
from graceful.training.generation import BackboneSpec
from graceful.training.job import TrainingConfig

MICRO_BATCHES = 3
"""Two random networks and the largest, which is last: every weight has a gradient then, as several workers wait for."""


class ElasticCnn(SmallCnn):
    """The largest `small_cnn` of a space, with the state of one. Arguments are the fields of `Space`, and limits.

    In training every rank draws the random networks from torch's own generator: any of the space where there is no
    limit on multiply-adds or parameters. Batch norm sees a rank's own images.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        image_size: int,
        block_widths: Sequence[Sequence[int]],
        depths: Sequence[int],
        kernels: Sequence[int],
        image_sizes: Sequence[int],
        max_multiply_adds: int | None = None,
        max_parameters: int | None = None,
    ) -> None:
        values = {"block_widths": block_widths, "depths": depths, "kernels": kernels, "image_sizes": image_sizes}
        self.space = Space.model_validate(values)
        largest = self.space.largest
        super().__init__(width, channels, image_size, largest.block_widths, largest.depths, largest.kernels)
        self._turn = 0
        self._limits = (max_multiply_adds, max_parameters)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings (n, d): of the largest network, or in training of the one whose turn it is."""
        if not self.training:
            return super().forward(images)
        turn, self._turn = self._turn, (self._turn + 1) % MICRO_BATCHES
        return self.run_part(self.space.largest if turn == MICRO_BATCHES - 1 else self._draw(), images)

    def _draw(self) -> Architecture:
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        channels, width = layers_of(self)[0][0][0].in_channels, self.projection.out_features

        def share(architecture: Architecture) -> float:
            found = (architecture.multiply_adds(channels, width), architecture.num_parameters(channels, width))
            return max(cost / limit for cost, limit in zip(found, self._limits, strict=True) if limit is not None)

        is_limited = any(limit is not None for limit in self._limits)
        return self.space.draw_near(share, rng) if is_limited else self.space.draw(rng)

    def run_part(self, architecture: Architecture, images: Tensor) -> Tensor:
        """Return a part's embeddings (n, d) with the batch's own statistics; larger images are made smaller first."""
        size, features = architecture.image_size, images
        if images.shape[-1] != size:
            features = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        a = architecture
        for layers, width, depth, kernel in zip(layers_of(self), a.block_widths, a.depths, a.kernels, strict=True):
            for convolution, norm in layers[:depth]:
                weight = _part(convolution.weight, width, features.shape[1], kernel)
                features = functional.conv2d(features, weight, padding=kernel // 2)
                scale, shift = norm.weight[:width], norm.bias[:width]
                features = functional.batch_norm(features, None, None, scale, shift, training=True, eps=norm.eps)
                features = functional.relu(features, inplace=True)
            if size >= 2:
                features, size = functional.max_pool2d(features, 2), size // 2
        features = features.mean(dim=(2, 3))
        return functional.linear(features, self.projection.weight[:, : features.shape[1]], self.projection.bias)

    def part(self, architecture: Architecture) -> SmallCnn:
        """Return a part as a network of its own, with a copy of its weights; its batch norm is to be calibrated."""
        a, channels = architecture, layers_of(self)[0][0][0].in_channels
        found = SmallCnn(self.projection.out_features, channels, a.image_size, a.block_widths, a.depths, a.kernels)
        with torch.no_grad():
            for own, shared in zip(layers_of(found), layers_of(self), strict=True):
                for (convolution, norm), (whole, whole_norm) in zip(own, shared, strict=False):
                    out, into, kernel, _ = convolution.weight.shape
                    convolution.weight.copy_(_part(whole.weight, out, into, kernel))
                    norm.weight.copy_(whole_norm.weight[:out])
                    norm.bias.copy_(whole_norm.bias[:out])
            found.projection.weight.copy_(self.projection.weight[:, : found.projection.in_features])
            found.projection.bias.copy_(self.projection.bias)
        return found


def supernet_recipe(recipe: TrainingConfig, config: SearchConfig) -> TrainingConfig:
    """Return the training of the super-net of a search for a variant that is trained by `recipe`.

    A step trains three networks, each on as many images as a step of the variant; the input is of the largest size.
    """
    space = config.at(recipe.preprocessing.image_size)
    name = f"{__name__}:{ElasticCnn.__name__}"
    limits = {"max_multiply_adds": config.max_multiply_adds, "max_parameters": config.max_parameters}
    changes = {
        "backbone": BackboneSpec(name=name, kwargs={**space.model_dump(mode="json"), **limits}),
        "initial_weights": None,
        "preprocessing": recipe.preprocessing.at_size(space.largest.image_size),
        "epochs": config.epochs or recipe.epochs,
        "batch_size": MICRO_BATCHES * recipe.batch_size,
        "accumulation": MICRO_BATCHES,
        "compile": "off",
    }
    return recipe.model_copy(update=changes)


def layers_of(network: SmallCnn) -> list[list[tuple[nn.Conv2d, _BatchNorm]]]:
    """Return the convolutions of each block with their batch norms."""
    convolutions = [module for module in network.blocks if isinstance(module, nn.Conv2d)]
    norms = [module for module in network.blocks if isinstance(module, _BatchNorm)]
    pairs = iter(zip(convolutions, norms, strict=True))
    return [[next(pairs) for _ in range(depth)] for depth in network.depths]


def _part(weight: Tensor, out: int, into: int, kernel: int) -> Tensor:
    """Return the first channels of a kernel (out, in, k, k), and its middle."""
    margin = (weight.shape[2] - kernel) // 2
    return weight[:out, :into, margin : margin + kernel, margin : margin + kernel]
