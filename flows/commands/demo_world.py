"""A world without training: encoders of known geometry over images that exist only as names.

A source `synthetic:<identity>/<image>` is encoded as the identity's direction plus the image's own deviation; a
generation may rotate the space, add its own noise, or lose planted identities. Everything is a function of names and
seeds: the demo and the tests know what must come out. Shapes: n images, D width.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.indexing.embed import EmbeddedUnit, EmbedUnit, embed_units
from graceful.training.manifest import LabelledImages

WIDTH = 24


@dataclass(frozen=True)
class SyntheticGeneration:
    """Geometry of one generation. `spread` is the images' deviation within an identity, before this model's noise."""

    generation_id: str
    rotation_seed: int | None = None
    noise: float = 0.0
    spread: float = 0.35
    lost: frozenset[str] = frozenset()
    unreadable: frozenset[str] = frozenset()
    width: int = WIDTH

    def encode(self, sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Vectors (n, D) of unit norm, and failures by index."""
        rows, failures = [], {}
        rotation = None
        if self.rotation_seed is not None:
            rotation = np.linalg.qr(np.random.default_rng(self.rotation_seed).standard_normal((WIDTH, WIDTH)))[0]
        for index, source in enumerate(sources):
            identity, image = source.removeprefix("synthetic:").split("/")
            if source in self.unreadable:
                failures[index] = "cannot be read"
            base = _normal(f"lost/{self.generation_id}/{source}" if identity in self.lost else f"identity/{identity}")
            row = base + self.spread * _normal(f"image/{identity}/{image}")
            row = row + self.noise * _normal(f"noise/{self.generation_id}/{identity}/{image}")
            rows.append(row @ rotation if rotation is not None else row)
        vectors = np.asarray(rows, np.float32).reshape(len(sources), WIDTH)[:, : self.width]
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[list(failures)] = np.nan
        return vectors.astype(np.float32), failures


def open_synthetic(
    generation: SyntheticGeneration,
) -> Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]:
    """The encoder factory that workers run."""
    return generation.encode


class SyntheticModels:
    """Encoders by generation id: the `embed_with` of a workspace."""

    def __init__(self, *generations: SyntheticGeneration) -> None:
        self.generations = {generation.generation_id: generation for generation in generations}
        self.before_unit: Callable[[EmbedUnit], None] = lambda unit: None  # noqa: ARG005
        self.num_embedded = 0

    def add(self, generation: SyntheticGeneration) -> None:
        """Make a generation known."""
        self.generations[generation.generation_id] = generation

    def __call__(self, generation_id: str) -> Callable[..., None]:
        """How to embed with a generation."""

        def embed(units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
            opened = functools.partial(open_synthetic, self.generations[generation_id])
            for unit in units:
                self.before_unit(unit)
                self.num_embedded += len(unit.sources)
                embed_units([unit], opened, on_unit=on_unit)

        return embed


def item_row(item_id: str, identity: str, image: str) -> dict[str, str]:
    """One row of an ingest."""
    source = f"synthetic:{identity}/{image}"
    digest = hashlib.sha256(source.encode()).hexdigest()
    return {"item_id": item_id, "source": source, "content_sha256": digest, "label": identity, "attributes": "{}"}


def labelled(identities: Iterable[str], images: Iterable[str]) -> tuple[LabelledImages, pa.Table]:
    """The same images of every identity: as an evaluation takes them, and as rows of an ingest."""
    names = list(images)
    rows = [item_row(f"{identity}-{image}", identity, image) for identity in identities for image in names]
    found = LabelledImages(
        sources=[row["source"] for row in rows],
        labels=np.array([row["label"] for row in rows]),
        content_sha256=[row["content_sha256"] for row in rows],
    )
    return found, pa.Table.from_pylist(rows)


@functools.lru_cache(maxsize=200_000)
def _normal(name: str, width: int = WIDTH) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    values: NDArray[np.float32] = np.random.default_rng(seed).standard_normal(width).astype(np.float32) / np.sqrt(width)
    values.flags.writeable = False
    return values
