"""Near copies: re-encoded pictures are known, different ones are not, and what says too little has no hash."""

import io

import numpy as np
import pytest
from PIL import Image

from graceful.training.copies import has_near_copy, hash_pictures, picture_hash


def picture(seed: int, size: int = 160) -> Image.Image:
    """Soft blobs of colour: as much detail as a photo that was reduced."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bits_of(payloads: list[bytes]) -> np.ndarray:
    found = [picture_hash(payload) for payload in payloads]
    assert all(bits is not None for bits in found)
    return np.array(found)


COPIES = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=60),
    "smaller": lambda image: encoded(image.resize((90, 90)), "JPEG", quality=85),
    "larger": lambda image: encoded(image.resize((300, 300)), "WEBP", quality=70),
    "grey": lambda image: encoded(image.convert("L")),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_picture_encoded_otherwise_is_a_near_copy_and_another_one_is_not(name) -> None:
    originals = [picture(seed) for seed in range(40)]
    queries = bits_of([COPIES[name](image) for image in originals[:20]])
    gallery = bits_of([encoded(image) for image in originals[:10] + originals[20:]])
    near = has_near_copy(queries, gallery, [f"q{i}" for i in range(20)], [f"g{i}" for i in range(30)])
    assert near.tolist() == [True] * 10 + [False] * 10


def test_the_same_content_is_the_own_item_and_no_copy() -> None:
    bits = bits_of([encoded(picture(seed)) for seed in range(5)])
    names = [f"c{i}" for i in range(5)]
    assert not has_near_copy(bits, bits, names, names).any()
    assert has_near_copy(bits, bits[[0, 0]], names, ["c0", "other"]).tolist() == [True, False, False, False, False]


def test_small_flat_and_broken_pictures_have_no_hash(tmp_path) -> None:
    paper = Image.new("L", (105, 105), 255)
    paper.paste(0, (50, 20, 53, 80))
    assert picture_hash(encoded(paper)) is None
    assert picture_hash(encoded(picture(0, size=28))) is None
    assert picture_hash(b"no picture") is None
    (tmp_path / "good.png").write_bytes(encoded(picture(1)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    sources = [str(tmp_path / name) for name in ("good.png", "broken.png", "missing.png")]
    assert hash_pictures(sources)[1].tolist() == [True, False, False]
