"""Text towers for tests: from class names to the class means that are stored beside a generation, and broken ones."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graceful.training.encoder import read_classifier
from graceful.training.generation import read_card


def by_class(generation_uri: str, width: int, noise: float = 0.0, version: int = 1):
    """The class mean of the class that is the last word; another text has a vector of its own that means nothing."""
    del version
    stored = read_classifier(generation_uri)
    assert stored is not None
    means = dict(zip(read_card(generation_uri).classes, stored[2].numpy(), strict=True))

    def encode(text: str) -> NDArray[np.float64]:
        chance = np.random.default_rng([*text.encode()]).normal(size=width) / np.sqrt(width)
        mean = means.get(text.split()[-1])
        return chance if mean is None else mean + noise * chance

    return lambda texts: np.stack([3.0 * encode(text) for text in texts])  # of no unit length


def chance(width: int):
    """Knows nothing: every text has a vector, and it has nothing to do with what the text says."""
    return lambda texts: np.stack([np.random.default_rng([7, *text.encode()]).normal(size=width) for text in texts])


def from_file(generation_uri: str, width: int, weights: str):
    """`by_class`, its vectors' values moved along by a number that is read from a file, as weights would be."""
    tower, places = by_class(generation_uri, width), json.loads(Path(weights).read_text())
    return lambda texts: np.roll(tower(texts), places, axis=1)


BUILT = {"times": 0}


def almost_the_same(generation_uri: str, width: int):
    """`by_class`, each time it is built a little differently, as other processors compute."""
    BUILT["times"] += 1
    tower, drift = by_class(generation_uri, width), 1e-4 * BUILT["times"]
    return lambda texts: tower(texts) + drift * np.sin(np.arange(width))


def cannot_say(generation_uri: str, width: int):
    """`by_class` that raises where a text contains "raise", and has no vector where it contains "nothing"."""
    tower = by_class(generation_uri, width)

    def encode(texts: list[str]) -> NDArray[np.float64]:
        if any("raise" in text for text in texts):
            raise RuntimeError("no such token")
        found = tower(texts)
        found[["nothing" in text for text in texts]] = np.nan
        return found

    return encode


def narrow(width: int):
    return lambda texts: np.ones((len(texts), width - 1))


def flat(width: int):
    return lambda texts: np.ones(width * len(texts))


def words(width: int):
    return lambda texts: np.array([["a"] * width for _ in texts])


def not_a_number(width: int):
    tower = chance(width)
    return lambda texts: np.where(np.arange(len(texts))[:, None] == 1, np.nan, tower(texts))


def zero(width: int):
    return lambda texts: np.zeros((len(texts), width), np.float32)


def always_the_same(width: int):
    return lambda texts: np.ones((len(texts), width), np.float32)


def of_its_place(width: int):
    """A text's vector depends on where it stands among others."""
    return lambda texts: np.random.default_rng(0).normal(size=(len(texts), width))


def raises():
    def encode(texts: list[str]):
        raise MemoryError("no room\nfor weights")

    return encode


def raises_when_built():
    raise FileNotFoundError("weights.bin")


def is_nothing():
    return None
