"""Decoding: photos as people see them, generations of before as they always did, nothing that fills the memory."""

import hashlib
import io
import resource
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from graceful.training import images
from graceful.training.generation import Preprocessing
from graceful.training.images import (
    MAX_PIXELS,
    UnreadableImageError,
    decode,
    encode_png,
    read_payloads,
    unreadable_reason,
)
from graceful.training.manifest import LabelledImages
from graceful.training.pixels import decode_all

RNG = np.random.default_rng(0)
SIZE = 16
COLOUR = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
ORIENTATION = 0x112
# How a camera that writes an orientation has turned what it saw.
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def reading(channels: int = 3, size: int = SIZE, **fields: Any) -> Preprocessing:
    values: dict[str, Any] = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return Preprocessing(image_size=size, channels=channels, **{**values, **fields})


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_image(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decoded pixels (channels, h, w) as (h, w, channels), or (h, w) for one channel."""
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def taken_with(orientation: int, scene: Image.Image, kind: str, **options: Any) -> bytes:
    """What a camera stores of a scene when held so."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    turn = TURNED[orientation]
    return encoded(scene if turn is None else scene.transpose(turn), kind, exif=tags, **options)


def with_tags(payload: bytes, *entries: bytes) -> bytes:
    """A JPEG with these 12-byte entries as its EXIF tags."""
    block = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    return encoded(Image.open(io.BytesIO(payload)), "JPEG", exif=b"Exif\0\0" + block, quality=100)


def png_of_zeros(width: int, height: int) -> bytes:
    """A grey PNG, made without ever holding its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_a_photo_is_upright_however_the_camera_was_held(orientation: int, kind: str, options: dict[str, Any]) -> None:
    scene = Image.fromarray(COLOUR[:10])
    upright = decode(encoded(scene), reading())
    np.testing.assert_array_equal(decode(taken_with(orientation, scene, kind, **options), reading()), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(400, 304), (401, 300)])  # read at an eighth, and as it is: an eighth leaves a rest
def test_a_large_jpeg_is_upright_and_close_to_the_scene(orientation: int, size: tuple[int, int]) -> None:
    scene = Image.fromarray(COLOUR).resize(size, Image.Resampling.BICUBIC)
    upright = decode(encoded(scene), reading()).astype(int)
    photo = decode(taken_with(orientation, scene, "JPEG", quality=95), reading())
    assert np.abs(photo - upright).mean() < 3
    assert np.abs(photo[:, ::-1] - upright).mean() > 30  # the measure tells a wrong way up from a right one


def test_damaged_tags_hide_neither_the_photo_nor_a_readable_orientation() -> None:
    scene = encoded(Image.fromarray(COLOUR))
    sideways = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    wrong_width = struct.pack("<HHI4s", 0x100, 2, 4, b"abc\0")  # text where a number belongs
    turned = decode(with_tags(scene, sideways), reading())
    np.testing.assert_array_equal(decode(with_tags(scene, sideways, wrong_width), reading()), turned)
    upright = decode(encoded(Image.open(io.BytesIO(scene)), "JPEG", quality=100), reading())
    assert not np.array_equal(turned, upright)
    no_tags = encoded(Image.fromarray(COLOUR), "JPEG", exif=b"Exif\0\0nonsense", quality=100)
    np.testing.assert_array_equal(decode(no_tags, reading()), upright)


# Depth


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind: str, channels: int) -> None:
    ramp = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    for channel in decode(encoded(Image.fromarray(ramp), kind), reading(channels)):
        levels = channel.reshape(-1).astype(int)
        assert (levels[0], levels[-1]) == (0, 255)
        np.testing.assert_array_equal(levels, np.rint(ramp.reshape(-1) / 257))
        assert (np.diff(levels) >= 0).all()


def test_a_sixteen_bit_copy_of_an_eight_bit_image_is_the_same_image() -> None:
    grey = COLOUR[:, :, 0]
    deep = encoded(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(as_image(decode(deep, reading(1))), grey)


@pytest.mark.parametrize(
    ("kind", "top", "factor"),
    [(np.int32, 65535, 1 / 257), (np.int32, 200, 1), (np.float32, 65535, 1 / 257), (np.float32, 200, 1)]
    + [(np.float32, 1, 255), (np.int32, 1, 1)],
)
def test_the_range_of_32_bit_grey_is_told_by_its_largest_value(kind: type, top: float, factor: float) -> None:
    ramp = np.linspace(0, top, SIZE * SIZE).astype(kind).reshape(SIZE, SIZE)
    levels = as_image(decode(encoded(Image.fromarray(ramp), "TIFF"), reading(1)))
    np.testing.assert_allclose(levels, ramp * factor, atol=0.51)


def test_values_outside_the_range_are_clipped_and_nan_is_black() -> None:
    values = np.full((SIZE, SIZE), 0.5, np.float32)
    values[0, :4] = [np.nan, -3.0, 1.0, -np.inf]
    levels = as_image(decode(encoded(Image.fromarray(values), "TIFF"), reading(1)))
    assert levels[0, :5].tolist() == [0, 0, 255, 0, 128]
    values[0, 0] = np.inf
    assert as_image(decode(encoded(Image.fromarray(values), "TIFF"), reading(1)))[0, 0] == 255


# Transparency and colour


def test_transparent_pixels_show_the_background() -> None:
    logo = np.zeros((SIZE, SIZE, 4), np.uint8)
    logo[4:12, 4:12, 3] = 255
    expected = np.where(logo[:, :, 3:] == 255, 0, 255).repeat(3, axis=2)
    payload = encoded(Image.fromarray(logo))
    np.testing.assert_array_equal(as_image(decode(payload, reading())), expected)
    np.testing.assert_array_equal(as_image(decode(payload, reading(1))), expected[:, :, 0])
    assert decode(payload, reading(background=0)).max() == 0
    logo[:, :, 3] = 128
    assert np.abs(decode(encoded(Image.fromarray(logo)), reading(background=200)).astype(int) - 100).max() <= 1


def test_every_form_of_transparency_is_seen() -> None:
    grey = COLOUR[:, :, 0] // 2  # dark, so that white is the background
    hidden = grey == grey[3, 3]
    expected = np.where(hidden, 255, grey)
    alpha = np.where(hidden, 0, 255).astype(np.uint8)
    key = int(grey[3, 3])
    palette = Image.fromarray(grey).convert("P")
    colour = Image.merge("RGBA", (*[Image.fromarray(grey)] * 3, Image.fromarray(alpha)))
    forms = {
        "LA": encoded(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))),
        "RGBA": encoded(colour),
        "WebP": encoded(colour, "WEBP", lossless=True),
        "L with a key": encoded(Image.fromarray(grey), transparency=key),
        "RGB with a key": encoded(Image.fromarray(grey).convert("RGB"), transparency=(key,) * 3),
        "palette": encoded(palette, transparency=key),
        "16 bit with a key": encoded(Image.fromarray(grey.astype(np.uint16) * 257), transparency=key * 257),
    }
    for name, payload in forms.items():
        np.testing.assert_array_equal(as_image(decode(payload, reading(1))), expected, err_msg=name)
        np.testing.assert_array_equal(decode(payload, reading(3))[1], expected, err_msg=name)


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    opaque = encoded(Image.fromarray(COLOUR).convert("RGBA"))
    np.testing.assert_array_equal(as_image(decode(opaque, reading())), COLOUR)


@pytest.mark.parametrize("decoding", ["photo", "plain"])
def test_other_colour_models_become_grey_or_rgb(decoding: str) -> None:
    scene = Image.fromarray(COLOUR).resize((64, 64), Image.Resampling.NEAREST)
    few = scene.quantize(64)
    cmyk = decode(encoded(scene.convert("CMYK"), "JPEG", quality=100), reading(3, 64, decoding=decoding))
    assert np.abs(as_image(cmyk).astype(int) - np.asarray(scene)).mean() < 5
    np.testing.assert_array_equal(
        decode(encoded(few), reading(decoding=decoding)),
        decode(encoded(few.convert("RGB")), reading(decoding=decoding)),
    )
    black_and_white = encoded(Image.fromarray(COLOUR[:, :, 0] > 127))
    assert set(np.unique(decode(black_and_white, reading(1, decoding=decoding)))) == {0, 255}


# What generations of before see


def test_plain_decoding_is_what_generations_of_before_were_trained_with() -> None:
    scene = Image.fromarray(COLOUR)
    plain = reading(decoding="plain")
    stored = np.asarray(scene.transpose(Image.Transpose.ROTATE_90))
    np.testing.assert_array_equal(as_image(decode(taken_with(6, scene, "PNG"), plain)), stored)
    transparent = scene.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(as_image(decode(encoded(transparent), plain)), COLOUR)
    deep = encoded(Image.fromarray(np.full((SIZE, SIZE), 30_000, np.uint16)))
    assert set(np.unique(decode(deep, reading(1, decoding="plain")))) == {255}


def test_eight_bit_images_without_orientation_and_alpha_are_the_same_under_both(digits: LabelledImages) -> None:
    for payload in read_payloads(digits.sources[:50]):
        for size in (8, 13):
            photo, plain = (decode(payload, reading(1, size, decoding=name)) for name in ("photo", "plain"))
            np.testing.assert_array_equal(photo, plain)
    noise = RNG.integers(0, 256, (105, 105, 3), dtype=np.uint8)
    for payload in (encode_png(noise), encode_png(noise[:, :, 0]), encoded(Image.fromarray(noise[:50, :50]), "JPEG")):
        for channels in (1, 3):
            photo, plain = (decode(payload, reading(channels, 28, decoding=name)) for name in ("photo", "plain"))
            np.testing.assert_array_equal(photo, plain)


# What is refused


@pytest.mark.parametrize("decoding", ["photo", "plain"])
@pytest.mark.parametrize("side", [13_300, 16_000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(decoding: str, side: int) -> None:
    payload = png_of_zeros(side, side)
    assert len(payload) < 2**20
    resident, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UnreadableImageError) as refused:
        decode(payload, reading(decoding=decoding))
    assert str(unreadable_reason(payload)) == str(refused.value)
    assert time.process_time() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 30_000  # KiB; its pixels are 170,000
    assert str(refused.value).startswith(f"is too large: expected at most {MAX_PIXELS:,} pixels, found ")


def test_the_limit_counts_pixels_and_takes_what_cameras_make(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 9_504 * 6_336 < MAX_PIXELS < 2 * 8_192 * 6_144
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    assert unreadable_reason(png_of_zeros(20, 10)) is None
    assert unreadable_reason(png_of_zeros(3, 67)) == "is too large: expected at most 200 pixels, found 3x67"


def test_a_format_that_decodes_before_it_tells_its_size_is_not_opened() -> None:
    content = png_of_zeros(9_000, 9_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content
    assert "expected one of JPEG, PNG" in str(unreadable_reason(icon))
    assert "expected one of JPEG, PNG" in str(unreadable_reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))


@pytest.mark.parametrize("decoding", ["photo", "plain"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_bytes_that_are_no_whole_image_are_refused_in_one_line(kind: str, decoding: str) -> None:
    scene = Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    payload = encoded(scene, kind)
    assert unreadable_reason(payload) is None
    for broken in (payload[: len(payload) // 2], payload[:20], b"", b"some text, no image", payload[20:]):
        with pytest.raises(UnreadableImageError) as refused:
            decode(broken, reading(decoding=decoding))
        message = str(refused.value)
        assert message == unreadable_reason(broken)
        assert "\n" not in message
        assert "BytesIO" not in message
        assert "0x" not in message
    assert unreadable_reason(None) == "no bytes"


def test_a_phones_picture_of_two_frames_is_read() -> None:
    scene = Image.fromarray(COLOUR)
    both = encoded(
        scene, "MPO", save_all=True, append_images=[scene.transpose(Image.Transpose.ROTATE_180)], quality=100
    )
    np.testing.assert_array_equal(decode(both, reading()), decode(encoded(scene, "JPEG", quality=100), reading()))


def test_a_training_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"text")
    source = str(tmp_path / "bad.png")
    manifest = LabelledImages([source], np.array(["a"]), [hashlib.sha256(b"text").hexdigest()])
    with pytest.raises(UnreadableImageError, match=f"{source} cannot be decoded"):
        decode_all(manifest, reading())


# Row groups in memory


@pytest.fixture
def group_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that counts the row groups read from disk; the cache takes two groups of `stored`."""
    count = [0]
    read = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, *arguments: Any, **options: Any) -> pa.Table:
        count[0] += 1
        return read(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return lambda: count[0]


def stored(tmp_path: Path, payloads: list[bytes]) -> list[str]:
    """One row group per image."""
    path = tmp_path / "groups.parquet"
    pq.write_table(pa.table({"image": pa.array(payloads, pa.binary())}), path, row_group_size=1)
    return [f"{path}#{row}" for row in range(len(payloads))]


def small_cache(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(images, "_GROUPS", images.group_cache(size))


def test_the_least_recently_used_row_group_leaves_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_reads: Callable[[], int]
) -> None:
    sources = stored(tmp_path, [bytes([row]) * 1000 for row in range(3)])
    small_cache(monkeypatch, 2500)
    for source, reads in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        assert read_payloads([sources[source]]) == [bytes([source]) * 1000]
        assert group_reads() == reads


def test_a_row_group_larger_than_the_cache_is_kept_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_reads: Callable[[], int]
) -> None:
    sources = stored(tmp_path, [b"a" * 100, b"b" * 5000])
    small_cache(monkeypatch, 1000)
    for source, reads in ((0, 1), (1, 2), (1, 2), (0, 3)):
        read_payloads([sources[source]])
        assert group_reads() == reads


def test_threads_share_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = [bytes([row]) * 1000 for row in range(20)]
    sources = stored(tmp_path, payloads)
    small_cache(monkeypatch, 5000)
    wrong: list[object] = []

    def read(seed: int) -> None:
        try:
            for row in np.random.default_rng(seed).integers(0, 20, 100):
                if read_payloads([sources[row]]) != [payloads[row]]:
                    wrong.append(row)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
