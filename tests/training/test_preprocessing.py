"""Resizing and cropping against torchvision's own transforms of the same picture, pixel by pixel."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from graceful.training.generation import Preprocessing
from graceful.training.images import UnreadableImageError, decode

SIZES = ((40, 40), (61, 33), (33, 62), (300, 47), (20, 97), (24, 24), (7, 5), (1023, 768))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth scene with noise: every pixel and every filter shows."""
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    scene = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(scene + rng.integers(-40, 41, scene.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def reading(channels: int = 3, size: int = 24, **fields: Any) -> Preprocessing:
    return Preprocessing(
        image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels, jpeg="full", **fields
    )


def as_pixels(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("channels", [1, 3])
def test_shorter_side_and_squash_are_those_of_torchvision(channels: int, interpolation: Any) -> None:
    mode = v2.InterpolationMode(interpolation)
    for width, height in SIZES:
        image = picture(width, height, "L" if channels == 1 else "RGB")
        for resized in (24, 27, 36):
            cut = v2.CenterCrop(24)
            expected = as_pixels(cut(v2.Resize(resized, mode)(image)))
            wanted = reading(channels, resize="shorter_side", resize_size=resized, interpolation=interpolation)
            np.testing.assert_array_equal(decode(encoded(image), wanted), expected)
            expected = as_pixels(cut(v2.Resize((resized, resized), mode)(image)))
            wanted = reading(channels, resize_size=resized, interpolation=interpolation)
            np.testing.assert_array_equal(decode(encoded(image), wanted), expected)


@pytest.mark.parametrize(("channels", "color"), [(1, (9,)), (3, (250, 3, 77))])
def test_a_picture_smaller_than_the_crop_is_padded_as_torchvision_pads_in_the_given_color(
    channels: int, color: tuple[int, ...]
) -> None:
    for width, height in SIZES:
        image = picture(width, height, "L" if channels == 1 else "RGB")
        small = v2.Resize(17)(image)
        left, top = max(0, (24 - small.width) // 2), max(0, (24 - small.height) // 2)
        right, bottom = max(0, (25 - small.width) // 2), max(0, (25 - small.height) // 2)
        expected = v2.CenterCrop(24)(v2.Pad([left, top, right, bottom], fill=color)(small))
        wanted = reading(channels, resize="shorter_side", resize_size=17, padding_color=color)
        np.testing.assert_array_equal(decode(encoded(image), wanted), as_pixels(expected))


def test_fit_keeps_all_of_a_picture_in_its_shape_between_borders_of_the_background() -> None:
    for width, height in ((48, 12), (12, 48)):
        upright = height > width
        seen = decode(encoded(Image.new("RGB", (width, height), (10, 20, 30))), reading(resize="fit", background=200))
        inside = np.zeros((24, 24), dtype=bool)
        inside[9:15] = True  # 24 x 6, in the middle
        inside = inside.T if upright else inside
        for channel, level in zip(seen, (10, 20, 30), strict=True):
            np.testing.assert_array_equal(channel, np.where(inside, level, 200))


@pytest.mark.parametrize("resize", ["squash", "shorter_side", "fit"])
def test_a_jpeg_is_read_in_full_only_where_that_is_promised(resize: Any) -> None:
    image = picture(1024, 768)
    payload = encoded(image, "JPEG", quality=95)
    full = Image.open(io.BytesIO(payload)).convert("RGB")
    exact, quick = (
        decode(payload, reading(resize=resize).model_copy(update={"jpeg": jpeg})) for jpeg in ("full", "reduced")
    )
    np.testing.assert_array_equal(exact, decode(encoded(full), reading(resize=resize)))
    assert not np.array_equal(quick, exact)
    assert np.abs(quick.astype(int) - exact).mean() < 3


def test_a_strip_that_would_become_too_large_is_refused_before_it_is_resized() -> None:
    strip = encoded(Image.new("L", (1, 400_000)))
    with pytest.raises(UnreadableImageError, match=r"is too long: expected at most .*24x9600000"):
        decode(strip, reading(1, resize="shorter_side"))
    for resize in ("fit", "squash"):
        assert decode(strip, reading(1, resize=resize)).shape == (1, 24, 24)
