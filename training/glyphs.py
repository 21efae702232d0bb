"""Glyphs: made-up alphabets, drawn by the code. Nothing is downloaded, and there are as many as a decision needs.

An alphabet has a hand: the anchors its strokes run between, how many strokes a character has, how round they are, how
they lean and with what pen they are written. A character is a list of strokes, told apart from every other character of
its alphabet when both are drawn cleanly. A drawing of it moves every control point a little, then the whole character,
and presses the pen more or less.

A character depends on the seed, its alphabet and nothing else: a longer list starts with the shorter one. Coordinates
lie in the unit square, x to the right, y downwards. Shapes: n drawings, P points of a character's strokes.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 20

# Fewest and most strokes, and control points of each: few long strokes, or several short ones.
_COMPLEXITIES = (((1, 2), (3, 5)), ((2, 3), (2, 4)), ((3, 4), (2, 3)))
_INVENTED = 4
_POINTS_PER_STROKE = 64
_CONTROL_JITTER = 0.04  # of the image's side, as all below
_SHIFT = 0.06
_TURN_DEGREES = 10.0
_STRETCH = 0.10
_PRESSURE = 0.12
_INK = 1.0
_PAPER = 8.0  # standard deviation of the paper's grey


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
    """Strokes of one character: control points (K, 2) each."""

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
    """Ink (n, IMAGE_SIZE, IMAGE_SIZE) in [0, 1] of strokes with control points (n, K, 2) each, `pressure` (n, 1).

    The pen leaves a Gaussian spot at every point of a stroke, as heavy as the stroke is long there, so that a line is
    equally dark whatever its length: ink = 1 - exp(-sum of spots). A spot is a product of a column and a row, so all of
    them together are one matrix product.
    """
    points = np.concatenate([_curve(controls.shape[1], hand.roundness) @ controls for controls in strokes], axis=1)
    lengths = [
        np.linalg.norm(np.gradient(_curve(controls.shape[1], hand.roundness) @ controls, axis=1), axis=2)
        for controls in strokes
    ]
    points[..., 0] -= hand.lean * (points[..., 1] - 0.5)
    pixels = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    across, down = (
        np.exp(-0.5 * ((points[..., axis, None] - pixels) / (nib * pressure[..., None])) ** 2)
        for axis, nib in enumerate(hand.nib)
    )
    nib = np.sqrt(hand.nib[0] * hand.nib[1])
    weight = _INK * np.concatenate(lengths, axis=1) / nib
    return 1 - np.exp(-(down * weight[..., None]).transpose(0, 2, 1) @ across)


def _invent(hand: Hand, rng: np.random.Generator) -> Character:
    """Strokes between neighbouring or far anchors, none of which is visited twice in a row."""
    strokes = []
    for _ in range(rng.integers(hand.num_strokes[0], hand.num_strokes[1] + 1)):
        count = int(rng.integers(hand.num_controls[0], hand.num_controls[1] + 1))
        strokes.append(hand.anchors[rng.permutation(len(hand.anchors))[:count]])
    return Character(tuple(strokes))


def _picture(character: Character, hand: Hand) -> NDArray[np.float64]:
    """The clean character as a unit vector, with a broad pen: what is near on paper is near here."""
    broad = np.full((1, 1), 2.0)
    ink = ink_of([controls[None] for controls in character.strokes], hand, broad).ravel()
    return np.asarray(ink / np.linalg.norm(ink))


@functools.cache
def _curve(num_controls: int, roundness: float) -> NDArray[np.float64]:
    """Matrix (points, controls) from control points to a curve through them: cubic, with tangents of `roundness`.

    Hermite segments with the central differences as tangents; 0 gives straight lines with corners, 1 Catmull-Rom.
    """
    at = np.linspace(0, num_controls - 1, _POINTS_PER_STROKE)
    segment = np.minimum(at.astype(int), num_controls - 2)
    t = (at - segment)[:, None]
    each = np.eye(num_controls)
    tangent = roundness * np.gradient(each, axis=0)
    start, end = each[segment], each[segment + 1]
    smooth = t * t * (3 - 2 * t)
    straight = (1 - t) * start + t * end
    if roundness == 0:
        return straight
    curved = (1 - smooth) * start + smooth * end
    curved += t * (1 - t) ** 2 * tangent[segment] - t**2 * (1 - t) * tangent[segment + 1]
    return curved
