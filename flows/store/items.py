"""Turns images into items of the gallery."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from graceful.training.manifest import LabelledImages


def item_id_of(source: str, below: str | None = None) -> str:
    """Id of an item made from where its image is: file name and row, or the path below a folder.

    >>> item_id_of("/data/omniglot/evaluation.parquet#12")
    'evaluation#12'
    >>> item_id_of("/photos/2024/cat.jpg"), item_id_of("/photos/2024/cat.jpg", "/photos")
    ('cat.jpg', '2024/cat.jpg')
    """
    place, _, row = source.partition("#")
    if row:
        return f"{Path(place).stem}#{row}"
    return Path(place).name if below is None else os.path.relpath(place, below)


def item_table(images: LabelledImages, item_ids: Sequence[str] | None = None) -> pa.Table:
    """What `Gallery.ingest` takes: one row per image."""
    return pa.table(
        {
            "item_id": list(item_ids) if item_ids is not None else [item_id_of(source) for source in images.sources],
            "source": images.sources,
            "content_sha256": images.content_sha256,
            "label": images.labels.tolist(),
            "attributes": ["{}"] * len(images),
        }
    )
