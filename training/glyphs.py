"""Glyphs: made-up alphabets, drawn by the code. Nothing is downloaded, and there are as many as a decision needs.

An alphabet has a hand: the anchors that its strokes run between, how many strokes a character has, how round they are,
how they lean and with what pen they are written. A character is a list of strokes. A drawing of it moves every control
point a little, then the whole character, and presses the pen more or less.

The same seed gives the same pixels. An alphabet depends on the seed and its number, a character also on those before it
in its alphabet, a drawing on its character: a longer list starts with the shorter one. Coordinates lie in the unit
square, x to the right, y downwards. Shapes: n drawings, K control points of a stroke, P points on it.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 20

# Fewest and most strokes, and control points of each: few long strokes, or several short ones.
_COMPLEXITIES = (((1, 2), (3, 5)), ((2, 3), (2, 4)), ((3, 4), (2, 3)))
_INVENTED = 4  # characters to choose the next one from
_POINTS_PER_STROKE = 64
_INK = 1.0

# How drawings of a character differ: standard deviations, lengths as shares of the image's side. Sized so that raw
# pixels find the nearest of 96 class means about half the time.
_CONTROL_JITTER = 0.04
_SHIFT = 0.06
_TURN_DEGREES = 10.0
_STRETCH = 0.10
_PRESSURE = 0.12
_PAPER = 8.0  # of 255 greys


@dataclass(frozen=True)
class Hand:
    """How the characters of one alphabet are written."""

    anchors: NDArray[np.float64]
    num_strokes: tuple[int, int]
    num_controls: tuple[int, int]
    roundness: float
    lean: float
    nib: tuple[float, float]


@dataclass(frozen=True)
class Character:
    """Strokes of one character: control points (K, 2) each, K by stroke."""

    strokes: tuple[NDArray[np.float64], ...]


def draw_alphabet(alphabet: int, num_characters: int, num_drawings: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw the first characters of an alphabet: grey images (num_characters, num_drawings, IMAGE_SIZE, IMAGE_SIZE)."""
    hand = hand_of(alphabet, seed)
    characters = characters_of(alphabet, num_characters, seed)
    return np.stack(
        [
            draw_character(character, hand, num_drawings, np.random.default_rng([seed, alphabet, 2, number]))
            for number, character in enumerate(characters)
        ]
    )


def hand_of(alphabet: int, seed: int = 0) -> Hand:
    """The hand of an alphabet: anchors on a grid or on rings, and a manner of its own."""
    rng = np.random.default_rng([seed, alphabet, 0])
    width, height = int(rng.integers(3, 5)), int(rng.integers(3, 5))
    if rng.random() < 0.6:
        across, down = np.meshgrid(np.linspace(0.2, 0.8, width), np.linspace(0.15, 0.85, height))
        anchors = np.stack([across.ravel(), down.ravel()], axis=1)
    else:
        angles = 2 * np.pi * (np.arange(7) + rng.random()) / 7
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        anchors = 0.5 + np.concatenate([0.35 * ring, 0.15 * ring[::2], np.zeros((1, 2))])
    num_strokes, num_controls = _COMPLEXITIES[int(rng.integers(len(_COMPLEXITIES)))]
    return Hand(
        anchors=anchors + rng.normal(0, 0.02, anchors.shape),
        num_strokes=num_strokes,
        num_controls=num_controls,
        roundness=float(rng.choice([0.0, 0.6, 1.2])),
        lean=float(rng.uniform(-0.25, 0.25)),
        nib=(float(rng.uniform(0.024, 0.040)), float(rng.uniform(0.024, 0.040))),
    )


def characters_of(alphabet: int, count: int, seed: int = 0) -> list[Character]:
    """The first `count` characters of an alphabet: each the least like those before it of a few that were invented."""
    hand = hand_of(alphabet, seed)
    rng = np.random.default_rng([seed, alphabet, 1])
    characters: list[Character] = []
    pictures = np.zeros((count, IMAGE_SIZE**2))
    while len(characters) < count:
        invented = [_invent(hand, rng) for _ in range(_INVENTED)]
        likeness = np.stack([_picture(character, hand) for character in invented])
        best = int(np.argmin((likeness @ pictures.T).max(axis=1)))
        pictures[len(characters)] = likeness[best]
        characters.append(invented[best])
    return characters


def draw_character(character: Character, hand: Hand, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a character `count` times, each time a little differently: grey images (n, IMAGE_SIZE, IMAGE_SIZE)."""
    angles = np.radians(rng.normal(0, _TURN_DEGREES, count))
    turn = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=1).reshape(count, 2, 2)
    stretch = 1 + rng.normal(0, _STRETCH, (count, 1, 2))
    shift = rng.normal(0, _SHIFT, (count, 1, 2))
    strokes = []
    for controls in character.strokes:
        moved = controls + rng.normal(0, _CONTROL_JITTER, (count, *controls.shape))
        strokes.append((moved - 0.5) * stretch @ turn + 0.5 + shift)
    pressure = np.exp(rng.normal(0, _PRESSURE, (count, 1)))
    grey = 255 * (1 - ink_of(strokes, hand, pressure)) + rng.normal(0, _PAPER, (count, IMAGE_SIZE, IMAGE_SIZE))
    return np.round(np.clip(grey, 0, 255)).astype(np.uint8)


def ink_of(strokes: list[NDArray[np.float64]], hand: Hand, pressure: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ink (n, IMAGE_SIZE, IMAGE_SIZE) in [0, 1] of strokes with control points (n, K, 2) each; `pressure` is (n, 1).

    The pen leaves a Gaussian spot at every point, as heavy as the stroke is long there: a line is equally dark whatever
    its length. ink = 1 - exp(-sum of spots). A spot is a column times a row, so that all of them are one matrix
    product. Float64 throughout: processors that round the last bit otherwise still give the same 256 greys.
    """
    curves = [_curve(controls.shape[1], hand.roundness) @ controls for controls in strokes]
    lengths = [np.linalg.norm(np.gradient(curve, axis=1), axis=2) for curve in curves]
    points = np.concatenate(curves, axis=1)
    points[..., 0] -= hand.lean * (points[..., 1] - 0.5)
    pixels = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    across, down = (
        np.exp(-0.5 * ((points[..., axis, None] - pixels) / (width * pressure[..., None])) ** 2)
        for axis, width in enumerate(hand.nib)
    )
    weight = _INK * np.concatenate(lengths, axis=1) / np.sqrt(hand.nib[0] * hand.nib[1])
    return 1 - np.exp(-(down * weight[..., None]).transpose(0, 2, 1) @ across)


def _invent(hand: Hand, rng: np.random.Generator) -> Character:
    """A character at random: strokes between anchors, none of which a stroke visits twice."""
    strokes = []
    for _ in range(rng.integers(hand.num_strokes[0], hand.num_strokes[1] + 1)):
        count = int(rng.integers(hand.num_controls[0], hand.num_controls[1] + 1))
        strokes.append(hand.anchors[rng.permutation(len(hand.anchors))[:count]])
    return Character(tuple(strokes))


def _picture(character: Character, hand: Hand) -> NDArray[np.float64]:
    """The clean character as a unit vector, drawn with a broad pen: what is near on paper is alike."""
    ink = ink_of([controls[None] for controls in character.strokes], hand, np.full((1, 1), 2.0)).ravel()
    return np.asarray(ink / np.linalg.norm(ink))


@functools.cache
def _curve(num_controls: int, roundness: float) -> NDArray[np.float64]:
    """Matrix (P, K) from control points to a curve through them.

    Cubic Hermite segments whose tangents are `roundness` times the central differences: 1 is a Catmull-Rom spline. 0
    gives straight lines with corners.
    """
    at = np.linspace(0, num_controls - 1, _POINTS_PER_STROKE)
    segment = np.minimum(at.astype(int), num_controls - 2)
    t = (at - segment)[:, None]
    each = np.eye(num_controls)
    start, end = each[segment], each[segment + 1]
    if roundness == 0:
        return (1 - t) * start + t * end
    tangent = roundness * np.asarray(np.gradient(each, axis=0))
    share = t * t * (3 - 2 * t)
    bend = t * (1 - t) ** 2 * tangent[segment] - t**2 * (1 - t) * tangent[segment + 1]
    return (1 - share) * start + share * end + bend
