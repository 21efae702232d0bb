"""Encoders from elsewhere, as a user's own package would hold them. Named "factories:..." in the tests."""

import torch
from torch import Tensor, nn


class Flat(nn.Module):
    """A linear map of the pixels."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(pixels)
        self.linear = nn.Linear(pixels, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class BreaksOnBright(Flat):
    """A linear map that gives NaN for bright images and zero for dark ones."""

    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        level = images.mean(dim=(1, 2, 3))[:, None]
        return torch.where(level > 1.5, torch.nan, torch.where(level < -0.8, torch.zeros(()), outputs))


def flat(image_size: int, channels: int, features: int = 12) -> nn.Module:
    return Flat(channels * image_size**2, features)


def breaks_on_bright(image_size: int, channels: int) -> nn.Module:
    return BreaksOnBright(channels * image_size**2, 12)


class Absolute:
    """A constraint of one's own: mean_i sum_j |n_ij - o_ij|^power."""

    reference = "batch"

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        fresh = nn.functional.normalize(embeddings[:, : ref_emb.shape[-1]], dim=1)
        return (fresh - ref_emb).abs().pow(self.power).sum(dim=2).mean(dim=1)


class Twice(Flat):
    """A network with an inner layer of the embedding's width."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__(pixels, width)
        self.last = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(super().forward(images))


def twice(image_size: int, channels: int, width: int) -> nn.Module:
    return Twice(channels * image_size**2, width)


class Batchwise(Flat):
    """A network whose norm always takes the statistics of the batch."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__(pixels, width)
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(super().forward(images))


def batchwise(image_size: int, channels: int, width: int) -> nn.Module:
    return Batchwise(channels * image_size**2, width)
