"""Training images as pixels: decoded once, kept as bytes in memory or in a memory-mapped file, changed by the batch.

Augmentation works on whole batches as tensors and draws only from the generator it is given.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from graceful.errors import GracefulError
from graceful.training.encoder import normalise
from graceful.training.generation import Preprocessing
from graceful.training.images import UnreadableImageError, decode, read_payloads
from graceful.training.job import AugmentationConfig
from graceful.training.manifest import LabelledImages


class ChangedImagesError(GracefulError):
    """An image is not the one that the manifest names."""


def decode_all(images: LabelledImages, preprocessing: Preprocessing, scratch: Path, memory_limit_mib: int) -> Tensor:
    """Return the pixels (N, channels, size, size) uint8 of all images, in a scratch file when above the limit.

    Raises: ChangedImagesError, UnreadableImageError.
    """
    shape = (len(images), preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    pixels: NDArray[np.uint8]
    if math.prod(shape) > memory_limit_mib * 2**20:
        pixels = np.memmap(scratch / "pixels.u8", dtype=np.uint8, mode="w+", shape=shape)
    else:
        pixels = np.empty(shape, dtype=np.uint8)
    for start in range(0, len(images), 1024):
        block = images.sources[start : start + 1024]
        for row, payload in enumerate(read_payloads(block), start):
            if hashlib.sha256(payload).hexdigest() != images.content_sha256[row]:
                raise ChangedImagesError(
                    f"reading training images: expected the content that the manifest names, found another (in "
                    f"{images.sources[row]}); write the manifest again"
                )
            try:
                pixels[row] = decode(payload, preprocessing)
            except UnreadableImageError as error:
                raise UnreadableImageError(
                    f"reading training images: {images.sources[row]} {error}; leave it out and write the manifest again"
                ) from error
    return torch.from_numpy(pixels)


def training_batch(
    pixels: Tensor,
    preprocessing: Preprocessing,
    augmentation: AugmentationConfig,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Return the network's input of a batch (B, channels, size, size) uint8, augmented."""
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
