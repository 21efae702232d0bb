"""GallerySearcher: an encoder, a view and an index, for applications. No Prefect, no Ray.

The searcher reads the serving state, publishes an index snapshot of the champion's view when there is none for that
state of the gallery, and searches it. Invariant: an answer comes whole from one `ServedSnapshot`: the query is encoded
by the generation whose view is searched, never by another, also while `refresh` moves on.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import join
from graceful.flows.search.views import publish_view, snapshot_id_of
from graceful.flows.store.workspace import Workspace
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.indexing.search import FlatSearcher, open_snapshot
from graceful.training.encoder import SourceEncoder, open_encoder
from graceful.training.images import UnreadableImageError, decode

__all__ = ["GallerySearcher", "Hit", "NothingServedError", "ServedSnapshot", "UnreadableQueryError", "publish_view"]


class NothingServedError(GracefulError):
    """No generation serves yet."""


class UnreadableQueryError(GracefulError):
    """A query image could not be embedded."""


@dataclass(frozen=True)
class Hit:
    """One item found, best first; `generation` is the one whose vector it was found by."""

    item_id: str
    score: float
    generation: str
    source: str
    label: str


@dataclass(frozen=True)
class ServedSnapshot:
    """What one answer comes from: a generation's encoder and an index of what that generation sees."""

    generation: str
    snapshot_id: str
    rows_by_generation: dict[str, int]
    num_unreadable: int
    encoder: SourceEncoder = field(repr=False)
    index: FlatSearcher = field(repr=False)
    items: dict[str, tuple[str, str]] = field(repr=False)

    @property
    def width(self) -> int:
        """Width D of query vectors."""
        return self.encoder.card.width

    def search_images(self, sources: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode images by name and return the best `k` items of each.

        Raises:
            UnreadableQueryError: an image cannot be read, decoded or embedded.
        """
        vectors, failures = self.encoder(sources)
        if failures:
            index, reason = next(iter(failures.items()))
            raise UnreadableQueryError(f"searching: image {sources[index]} {reason}; give a readable image")
        return self.search_vectors(vectors, k)

    def search_payload(self, payload: bytes, k: int = 10) -> list[Hit]:
        """Encode one image given as its bytes and return the best `k` items.

        Raises:
            UnreadableQueryError: the bytes cannot be decoded or embedded.
        """
        try:
            pixels = decode(payload, self.encoder.card.preprocessing)
        except UnreadableImageError as error:
            raise UnreadableQueryError(f"searching: the image {error}; give a readable image") from None
        vectors = self.encoder.encode_pixels(np.stack([pixels]))
        if not np.isfinite(vectors).all():
            raise UnreadableQueryError("searching: the image has no finite embedding; give another image")
        return self.search_vectors(vectors, k)[0]

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the best `k` items for query vectors (n, D) made by this generation; they are scaled to unit length.

        Raises:
            WidthMismatchError, NonFiniteEmbeddingError: not vectors of this generation.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise WidthMismatchError(
                f"searching as {self.generation}: expected query vectors of width {self.width}, found shape "
                f"{vectors.shape}; encode queries with {self.generation}"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise NonFiniteEmbeddingError(
                "searching: expected finite query vectors that are not zero, found NaN, infinity or zero; encode again"
            )
        found = self.index.search((vectors / norms).astype(np.float32), k)
        return [
            [
                Hit(str(item), float(score), str(generation), *self.items.get(str(item), ("", "")))
                for item, score, generation in zip(*row, strict=True)
                if item is not None
            ]
            for row in zip(found.item_ids, found.scores, found.generations, strict=True)
        ]


class GallerySearcher:
    """Searches what production serves; safe to use from several threads. `refresh` follows the serving state."""

    def __init__(self, workspace: Workspace, query_generation: str | None = None) -> None:
        """Open the champion's view, or that of a named generation (an old client, a canary)."""
        self._workspace = workspace
        self._pinned = query_generation
        self._lock = threading.Lock()
        self._served: ServedSnapshot | None = None
        self.refresh()

    @property
    def served(self) -> ServedSnapshot:
        """What is served now; take it once per request."""
        assert self._served is not None
        return self._served

    @property
    def generation(self) -> str:
        """The generation that encodes queries now."""
        return self.served.generation

    @property
    def snapshot_id(self) -> str:
        """The index snapshot that is searched now."""
        return self.served.snapshot_id

    def refresh(self) -> bool:
        """Follow the serving state and the gallery; True when another snapshot serves now. If it fails, the old stays.

        When nothing has moved this reads two versions and the certificates, no view.
        """
        with self._lock:
            registry = self._workspace.registry
            generation = self._pinned or registry.serving().champion
            if generation is None:
                raise NothingServedError(
                    "searching: expected a serving generation, found none; run 'graceful update' first"
                )
            now = self._workspace.gallery.version()
            if self._served and self._served.snapshot_id == snapshot_id_of(
                generation, now, registry.readable(generation)
            ):
                return False
            view = self._workspace.view(generation)
            known = self._served.encoder if self._served and self._served.generation == generation else None
            encoder = known or open_encoder(self._workspace.generation_uri(generation))
            snapshot_id = publish_view(self._workspace, generation, view, encoder.card.prefix_widths)
            items = view.items(["item_id", "source", "label"])
            columns = (items[name].to_pylist() for name in items.column_names)
            self._served = ServedSnapshot(
                generation=generation,
                snapshot_id=snapshot_id,
                rows_by_generation=view.rows_by_generation(),
                num_unreadable=len(view.unreadable()),
                encoder=encoder,
                index=open_snapshot(join(self._workspace.index_location(), snapshot_id)),
                items={item_id: (source, label) for item_id, source, label in zip(*columns, strict=True)},
            )
            return True

    def search_images(self, sources: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode images and return the best `k` items of each; see `ServedSnapshot.search_images`."""
        return self.served.search_images(sources, k)

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the best `k` items for query vectors (n, D) of the serving generation."""
        return self.served.search_vectors(vectors, k)
