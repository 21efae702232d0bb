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
