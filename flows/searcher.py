"""GallerySearcher: an encoder, a view and an index, for applications. No Prefect, no Ray.

The searcher reads the serving state, publishes an index snapshot of the champion's view when there is none for that
state of the gallery, and searches it. A search encodes with the generation whose view it searches, never another.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flows.workspace import Workspace
from indexing.embed import EncodeSources
from indexing.gallery import View
from indexing.search import SearchResult, SegmentRows, SwappableSearcher, publish_snapshot, read_manifest
from indexing.storage import exists, join, read_json, write_json
from training.encoder import open_encoder


class NothingServedError(RuntimeError):
    """No generation serves yet."""


class UnreadableQueryError(RuntimeError):
    """A query image could not be embedded."""


@dataclass(frozen=True)
class Hit:
    """One item found, best first; `generation` is the one whose vector it was found by."""

    item_id: str
    score: float
    generation: str
    source: str
    label: str


class GallerySearcher:
    """Searches what production serves; safe to use from several threads. `refresh` follows the serving state."""

    def __init__(self, workspace: Workspace, query_generation: str | None = None) -> None:
        """Open the champion's view, or that of a named generation (an old client, a canary)."""
        self._workspace = workspace
        self._pinned = query_generation
        self._lock = threading.Lock()
        self._encode: tuple[str, EncodeSources] | None = None
        self._items: dict[str, tuple[str, str]] = {}
        self._searcher: SwappableSearcher | None = None
        self.generation = ""
        self.snapshot_id = ""
        self.refresh()

    def refresh(self) -> bool:
        """Follow the serving state and the gallery; True when another snapshot serves now."""
        with self._lock:
            generation = self._pinned or self._workspace.registry.serving().champion
            if generation is None:
                raise NothingServedError(
                    "searching: expected a serving generation, found none; run 'graceful update' first"
                )
            view = self._workspace.view(generation)
            snapshot_id = publish_view(self._workspace, generation, view)
            if snapshot_id == self.snapshot_id:
                return False
            folder = join(self._workspace.index_location(), snapshot_id)
            if self._encode is None or self._encode[0] != generation:
                self._encode = (generation, open_encoder(self._workspace.generation_uri(generation)))
            if self._searcher is None:
                self._searcher = SwappableSearcher(folder)
            else:
                self._searcher.swap(folder)
            columns = (view.items[name].to_pylist() for name in ("item_id", "source", "label"))
            self._items = {item_id: (source, label) for item_id, source, label in zip(*columns, strict=True)}
            self.generation, self.snapshot_id = generation, snapshot_id
            return True

    def search_images(self, sources: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode images and return the best `k` items of each."""
        assert self._encode is not None
        vectors, failures = self._encode[1](sources)
        if failures:
            index, reason = next(iter(failures.items()))
            raise UnreadableQueryError(f"searching: image {sources[index]} {reason}; give a readable image")
        return self.search_vectors(vectors, k)

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the best `k` items for query vectors (n, D) of the serving generation."""
        assert self._searcher is not None
        items = self._items
        found: SearchResult = self._searcher.search(vectors, k)
        return [
            [
                Hit(str(item), float(score), str(generation), *items.get(str(item), ("", "")))
                for item, score, generation in zip(*row, strict=True)
                if item is not None
            ]
            for row in zip(found.item_ids, found.scores, found.generations, strict=True)
        ]


def publish_view(workspace: Workspace, query_generation: str, view: View) -> str:
    """Publish an index snapshot of a view unless it is there; segments of the newest snapshot are reused."""
    content = f"{query_generation}/{view.version.items}/{view.version.vectors}/{','.join(view.readable)}"
    snapshot_id = f"{query_generation}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
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
    publish_snapshot(root, snapshot_id, query_generation, version, rows, reuse)
    write_json(newest, {"snapshot": snapshot_id})
    return snapshot_id


def _segment_rows(view: View, generation: str, positions: NDArray[np.int64]) -> SegmentRows:
    return SegmentRows(
        generation,
        view.item_ids[positions],
        view.revisions[positions],
        lambda chosen: view.vectors(positions[chosen]),
    )
