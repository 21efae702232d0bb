"""Random changes to training images.

`affine` and `crop_flip` work on whole batches as tensors and draw only from the generator they are given. `transforms`
are those of torchvision, or of your own, image by image, and draw from a seed of (seed, epoch, row): an image changes
the same way in whatever process and batch it is decoded.
"""

import difflib
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graceful.errors import UsageError, in_one_line
from graceful.training.choices import imported
from graceful.training.encoder import normalise
from graceful.training.generation import Preprocessing
from graceful.training.job import AugmentationConfig, TransformConfig

_TRANSFORMED = 1  # keeps these seeds apart from those of a step


class Transforms:
    """The transforms of a recipe, one after another: (channels, source, source) uint8 to (channels, size, size)."""

    def __init__(self, config: AugmentationConfig, preprocessing: Preprocessing) -> None:
        """Build them, and try them on a random image.

        Raises: UsageError for an unknown name or parameter, or for a result of another shape.
        """
        size = preprocessing.image_size
        self.shape = (preprocessing.channels, size, size)
        self._steps = [_build(entry, size) for entry in config.transforms]
        self._names = " then ".join(entry.name for entry in config.transforms)
        side = config.source_size or size
        example = torch.arange(preprocessing.channels * side * side, dtype=torch.int64) * 97 % 256
        try:
            with _drawing_apart():
                self._changed(example.to(torch.uint8).view(-1, side, side))
        except UsageError:
            raise
        except Exception as error:  # whatever a transform raises for an image that it cannot take
            raise UsageError(
                f"augmentation {self._names}: expected to change an image of {preprocessing.channels} x {side} x "
                f"{side} bytes, found {in_one_line(error)}; change its parameters or leave it out"
            ) from error

    def __call__(self, pixels: Tensor, rows: Sequence[int], seed: int, epoch: int) -> Tensor:
        """Return changed images (B, channels, size, size) uint8; `rows` are those of the manifest.

        Raises: UsageError where a result has another shape.
        """
        changed = pixels.new_empty((len(pixels), *self.shape))
        with _drawing_apart():
            for place, row in enumerate(rows):
                _draw_from(seed, epoch, int(row))
                changed[place] = self._changed(pixels[place])
        return changed

    def _changed(self, image: Tensor) -> Tensor:
        found: Any = image
        for step in self._steps:
            found = step(found)
        if not isinstance(found, Tensor) or found.dtype != torch.uint8 or tuple(found.shape) != self.shape:
            told = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"augmentation {self._names}: expected a tensor {self.shape} of torch.uint8, found {told}; end with a "
                "crop or resize to that size, and leave scaling to [training.preprocessing]"
            )
        return found


def source_look(config: AugmentationConfig, preprocessing: Preprocessing) -> Preprocessing:
    """Return how an image is decoded before its transforms: as for the network, or larger by `source_size`."""
    side = config.source_size
    if side is None:
        return preprocessing
    resized = preprocessing.resize_size
    larger = None if resized is None else max(side, round(resized * side / preprocessing.image_size))
    return preprocessing.model_copy(update={"image_size": side, "resize_size": larger})


def training_batch(
    pixels: Tensor,
    preprocessing: Preprocessing,
    augmentation: AugmentationConfig,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Return the network's input of a batch (B, channels, size, size) uint8, changed as a batch where that is asked."""
    if augmentation.kind == "crop_flip":
        pixels = crop_flip(pixels, augmentation.padding, augmentation.flip, generator)
    images = normalise(pixels.to(device, non_blocking=True), preprocessing)
    if augmentation.kind == "affine":
        images = affine(images, augmentation, generator)
    return images


def affine(images: Tensor, augmentation: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift every image by its own random amount; the border's colour continues outwards."""
    draws = torch.rand(len(images), 4, generator=generator) * 2 - 1
    angle = draws[:, 0] * math.radians(augmentation.rotation_degrees)
    zoom = 1 + draws[:, 1] * augmentation.scale
    shift = draws[:, 2:] * (2 * augmentation.shift)  # the sampling grid is 2 wide
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], dim=1), torch.stack([sine, cosine, shift[:, 1]], dim=1)], dim=1
    ).to(images.device)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def crop_flip(pixels: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Pad every image by reflection, cut a random window of the old size, mirror half of the windows."""
    num_images, _, height, width = pixels.shape
    tops = torch.randint(0, 2 * padding + 1, (num_images, 1), generator=generator)
    lefts = torch.randint(0, 2 * padding + 1, (num_images, 1), generator=generator)
    mirrored = torch.rand(num_images, 1, generator=generator) < (0.5 if flip else 0.0)
    rows = _reflect(tops + torch.arange(height) - padding, height)
    columns = torch.arange(width).expand(num_images, -1)
    columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = _reflect(lefts + columns - padding, width)
    images = torch.arange(num_images)[:, None, None]
    return pixels[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Fold positions outside 0 .. size-1 back inside, as a mirror at the outermost pixel would."""
    positions = positions.abs()
    return torch.where(positions > size - 1, 2 * (size - 1) - positions, positions).clamp(0, size - 1)


def _build(entry: TransformConfig, size: int) -> Callable[[Any], Any]:
    if ":" in entry.name:
        factory = imported("augmentation", entry.name)
    else:
        factory = _of_torchvision(entry.name)
    parameters = dict(entry.parameters)
    try:
        signature = inspect.signature(factory)
        if "size" in signature.parameters:
            parameters.setdefault("size", [size, size])
        signature.bind(**parameters)
        made: Callable[[Any], Any] = factory(**parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"augmentation {entry.name}: expected its own parameters, found {dict(entry.parameters)}: "
            f"{in_one_line(error)}"
        ) from error
    if not callable(made):
        raise UsageError(f"augmentation {entry.name}: expected something to call, found {type(made).__name__}")
    return made


def _of_torchvision(name: str) -> Callable[..., Any]:
    from torchvision.transforms import v2

    found = getattr(v2, name, None)
    if isinstance(found, type) and issubclass(found, v2.Transform):
        return found
    known = [key for key, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise UsageError(
        f"augmentation: expected package.module:factory or a name of torchvision.transforms.v2, found {name!r}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


@contextmanager
def _drawing_apart() -> Iterator[None]:
    """Leave the generators of torch, numpy and Python, which transforms draw from, as they were before the block."""
    python, old_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(old_numpy)


def _draw_from(seed: int, epoch: int, row: int) -> None:
    drawn = int(np.random.SeedSequence([seed, epoch, row, 0, _TRANSFORMED]).generate_state(1)[0])
    torch.manual_seed(drawn)
    np.random.seed(drawn)
    random.seed(drawn)
