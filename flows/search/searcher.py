"""GallerySearcher: an encoder, a view and an index, for applications. No Prefect, no Ray.

The searcher reads the serving state, publishes an index snapshot of the champion's view when there is none for that
state of the gallery, and searches it. Invariant: an answer comes whole from one `ServedSnapshot`: the query is encoded
by the generation whose view is searched, never by another, also while `refresh` moves on.
"""

import hashlib
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import exists, join, read_json, write_json
from graceful.flows.store.workspace import Workspace
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.indexing.gallery import GalleryVersion, View
from graceful.indexing.search import (
    FlatSearcher,
    SegmentRows,
    open_snapshot,
    prune_snapshots,
    publish_snapshot,
    read_manifest,
)
from graceful.training.encoder import SourceEncoder, open_encoder
from graceful.training.images import UnreadableImageError, decode

_KEPT_S = 3600.0


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
            if self._served and self._served.snapshot_id == _snapshot_id(
                generation, now, registry.readable(generation)
            ):
                return False
            view = self._workspace.view(generation)
            known = self._served.encoder if self._served and self._served.generation == generation else None
            encoder = known or open_encoder(self._workspace.generation_uri(generation))
            snapshot_id = publish_view(self._workspace, generation, view, encoder.card.prefix_widths)
            columns = (view.items[name].to_pylist() for name in ("item_id", "source", "label"))
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


def publish_view(workspace: Workspace, query_generation: str, view: View, prefix_widths: Sequence[int] = ()) -> str:
    """Publish an index snapshot of a view unless it is there; segments of the newest snapshot are reused."""
    snapshot_id = _snapshot_id(query_generation, view.version, view.readable)
    root = workspace.index_location()
    if exists(join(root, snapshot_id, "manifest.json")):
        return snapshot_id
    newest = join(root, "newest.json")
    reuse = None
    if exists(newest):
        previous = join(root, read_json(newest)["snapshot"])
        reuse = read_manifest(previous) if exists(join(previous, "manifest.json")) else None
    rows = []
    for generation in view.readable:
        positions = view.owned_by(generation)
        if len(positions):
            rows.append(_segment_rows(view, generation, positions))
    version = {"items": view.version.items, "vectors": view.version.vectors}
    try:
        publish_snapshot(root, snapshot_id, query_generation, version, rows, reuse, prefix_widths=prefix_widths)
    except FileExistsError:
        return snapshot_id  # another process was faster; the name says what is in it
    write_json(newest, {"snapshot": snapshot_id})
    _prune(root)
    return snapshot_id


def _prune(root: str) -> None:
    """Remove snapshots that nobody opens any more: all but the newest of each query generation, after an hour."""
    newest: dict[str, Path] = {}
    for manifest in sorted(Path(root).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        newest[manifest.parent.name.rpartition("-")[0]] = manifest.parent
    with suppress(FileNotFoundError):  # another process prunes as well
        prune_snapshots(root, [path.name for path in newest.values()], older_than_s=_KEPT_S)


def _snapshot_id(query_generation: str, version: GalleryVersion, readable: Sequence[str]) -> str:
    content = f"{query_generation}/{version.items}/{version.vectors}/{','.join(readable)}"
    return f"{query_generation}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _segment_rows(view: View, generation: str, positions: NDArray[np.int64]) -> SegmentRows:
    return SegmentRows(
        generation,
        view.item_ids[positions],
        view.revisions[positions],
        lambda chosen: view.vectors(positions[chosen]),
    )
