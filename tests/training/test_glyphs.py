"""Drawn glyphs: the same every time, told apart, varied, and neither trivial nor hopeless to recognise."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.generation import Preprocessing
from graceful.training.glyphs import IMAGE_SIZE, characters_of, draw_alphabet, draw_character, hand_of
from graceful.training.images import decode, read_payloads
from graceful.training.materialise import materialise_glyphs

SHAPE = (8, 12, 10)  # alphabets, characters, drawings


@pytest.fixture(scope="module")
def drawings() -> NDArray[np.float64]:
    """Ink (identities, drawings, pixels) of unit length, the mean picture taken away."""
    ink = 255.0 - np.concatenate([draw_alphabet(alphabet, *SHAPE[1:]) for alphabet in range(SHAPE[0])])
    return unit(ink.reshape(*ink.shape[:2], -1))


def unit(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = ink - ink.mean(axis=(0, 1))
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    first = draw_alphabet(3, 5, 4)
    assert first.shape == (5, 4, IMAGE_SIZE, IMAGE_SIZE)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw_alphabet(3, 5, 4))
    assert not np.array_equal(first, draw_alphabet(3, 5, 4, seed=1))


def test_a_longer_list_of_characters_starts_with_the_shorter_one() -> None:
    assert np.array_equal(draw_alphabet(3, 7, 4)[:5], draw_alphabet(3, 5, 4))


def test_every_character_is_told_apart_from_every_other() -> None:
    clean = []
    for alphabet in range(SHAPE[0]):
        hand = hand_of(alphabet)
        for character in characters_of(alphabet, 15):
            many = draw_character(character, hand, 6, np.random.default_rng(0))
            clean.append(255.0 - many.mean(axis=0).ravel())
    pictures = np.stack(clean) / np.linalg.norm(clean, axis=1, keepdims=True)
    likeness = pictures @ pictures.T
    np.fill_diagonal(likeness, 0)
    assert likeness.max() < 0.99


def test_drawings_of_one_character_differ_but_less_than_characters_do(drawings: NDArray[np.float64]) -> None:
    within = np.einsum("cip,cjp->cij", drawings, drawings)
    same = within[:, ~np.eye(SHAPE[2], dtype=bool)]
    across = drawings[:, 0] @ drawings[:, 0].T
    other = across[~np.eye(len(across), dtype=bool)]
    assert same.max() < 0.995  # no drawing is a copy
    assert same.mean() > other.mean() + 0.3


def test_nearest_mean_of_raw_pixels_is_far_above_chance_and_far_from_perfect(drawings: NDArray[np.float64]) -> None:
    means = drawings[:, 5:].mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    found = (drawings[:, :5] @ means.T).argmax(axis=2)
    share = float((found == np.arange(len(drawings))[:, None]).mean())
    assert 0.3 < share < 0.7  # chance is 1 %


def test_hands_write_differently() -> None:
    """An alphabet's own ink, averaged, is nearer to another half of itself than to any other alphabet."""
    ink = 255.0 - np.stack([draw_alphabet(alphabet, 12, 8) for alphabet in range(SHAPE[0])])
    halves = [ink[:, :, start::2].mean(axis=(1, 2)).reshape(SHAPE[0], -1) for start in (0, 1)]
    apart = np.linalg.norm(halves[0][:, None] - halves[1][None], axis=2)
    assert (apart.argmin(axis=1) == np.arange(SHAPE[0])).all()


def test_glyphs_are_written_once_with_the_same_bytes_and_right_counts(tmp_path: Path) -> None:
    first, second = str(tmp_path / "deep" / "a.parquet"), str(tmp_path / "b.parquet")
    for path in (first, second):
        assert materialise_glyphs(path, (3, 4, 5)) == path
    assert Path(first).read_bytes() == Path(second).read_bytes()
    written = Path(first).stat().st_mtime_ns
    materialise_glyphs(first, (3, 4, 5))
    assert Path(first).stat().st_mtime_ns == written


def test_glyphs_are_read_like_any_set(tmp_path: Path) -> None:
    path = materialise_glyphs(str(tmp_path / "glyphs.parquet"), (3, 4, 5))
    where = {"alphabet": {"min": 1}, "instance": {"max": 2}}
    config = DatasetConfig.model_validate(
        {"source": "glyphs", "path": path, "where": where, "attributes": ["alphabet", "instance"]}
    )
    images = load_images(config)
    assert len(images) == 2 * 4 * 3
    assert len(set(images.content_sha256)) == len(images)
    assert sorted(set(images.labels.tolist())) == [f"{a:02d}/{c:02d}" for a in (1, 2) for c in range(4)]
    assert sorted(set(images.attributes["alphabet"].tolist())) == ["1", "2"]
    preprocessing = Preprocessing(image_size=IMAGE_SIZE, channels=1, mean=(0.82,), std=(0.31,))
    row = int(images.sources[0].rpartition("#")[2])
    drawn = draw_alphabet(row // 20, 4, 5)[row % 20 // 5, row % 5]
    assert np.array_equal(decode(read_payloads(images.sources[:1])[0], preprocessing)[0], drawn)
