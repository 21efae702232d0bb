"""Publishes what a query generation sees as an index snapshot. No encoder, no torch: vectors that are stored."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graceful.files import exists, join, read_json, write_json
from graceful.flows.store.workspace import Workspace
from graceful.indexing.gallery import GalleryVersion, View
from graceful.indexing.snapshots import SegmentRows, prune_snapshots, publish_snapshot, read_manifest

_KEPT_S = 3600.0


def publish_view(workspace: Workspace, query_generation: str, view: View, prefix_widths: Sequence[int] = ()) -> str:
    """Publish an index snapshot of a view unless it is there; segments of the newest snapshot are reused."""
    snapshot_id = snapshot_id_of(query_generation, view.version, view.readable)
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


def snapshot_id_of(query_generation: str, version: GalleryVersion, readable: Sequence[str]) -> str:
    """Name of the index of one view: the same view has the same name everywhere."""
    content = f"{query_generation}/{version.items}/{version.vectors}/{','.join(readable)}"
    return f"{query_generation}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _segment_rows(view: View, generation: str, positions: NDArray[np.int64]) -> SegmentRows:
    return SegmentRows(
        generation,
        view.column("item_id", positions),
        view.revisions[positions],
        lambda chosen: view.vectors(positions[chosen]),
    )
