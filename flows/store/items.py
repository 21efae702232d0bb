"""Turns images into items of the gallery, under ids that name the collection and never collide silently.

An id is `collection/path below it` for a folder, with `#row` for Parquet files in it, and `collection#row` for a single
Parquet file. What an image is the same as,
though, its source says: a source that is there keeps its id, however it is ingested again, and an id that belongs to
another source is a clash and refused.
"""

import os
from collections.abc import Sequence

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import resolve
from graceful.indexing.items import Items, not_deleted
from graceful.training.images import split_source
from graceful.training.manifest import LabelledImages

_SHOWN = 3


class ItemClashError(GracefulError):
    """Two different images would have the same item id."""


def item_id_of(source: str, below: str | None = None, prefix: str | None = None) -> str:
    """Id of an item made from where its image is: file name and row, or the path below a folder.

    >>> item_id_of("/data/omniglot/evaluation.parquet#12")
    'evaluation#12'
    >>> item_id_of("/photos/2024/cat.jpg"), item_id_of("/photos/2024/cat.jpg", "/photos")
    ('cat.jpg', '2024/cat.jpg')
    >>> item_id_of("/photos/cat#1.jpg", "/photos", "pets"), item_id_of("/data/a.parquet#2", prefix="pets")
    ('pets/cat#1.jpg', 'pets#2')
    """
    place, row, _ = split_source(source)
    name = os.path.basename(place) if below is None else os.path.relpath(place, below)
    if row is None:
        return name if prefix is None else f"{prefix}/{name}"
    stem = os.path.splitext(name)[0]
    if prefix is not None:
        stem = prefix if below is None else f"{prefix}/{stem}"
    return f"{stem}#{row}"


def ids_below(place: str, sources: Sequence[str], prefix: str | None = None) -> list[str]:
    """Ids of the images found at a place that was named: an image, a folder, a Parquet file or a folder of those.

    By default the prefix is the folder's name, for a single image that of the folder it lies in, and a Parquet file's
    name without its suffix.

    >>> ids_below("/data/photos/", ["/data/photos/a/1.png"]), ids_below("/data/photos/1.png", ["/data/photos/1.png"])
    (['photos/a/1.png'], ['photos/1.png'])
    >>> ids_below("/data/train.parquet", ["/data/train.parquet#0"])
    ['train#0']
    """
    if "://" not in place:
        place = resolve(place)[1]
    if place.endswith(".parquet"):
        return [item_id_of(source, prefix=prefix) for source in sources]
    folder = os.path.dirname(place) if list(sources) == [place] or place.endswith(".csv") else place.rstrip("/")
    return [item_id_of(source, folder, prefix or os.path.basename(folder)) for source in sources]


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


def settle_ids(items: pa.Table, stored: Items, *, replace: bool = False) -> pa.Table:
    """Items as they may be ingested: a source named twice comes once, a source in the gallery keeps the id it has.

    `stored` are the gallery's items. `replace` lets an image take over the id of another source.

    Raises: ItemClashError, where one id would belong to two different images.
    """
    items = items.take(pa.array(_first_of_each(items["source"].to_pylist())))
    there = stored.with_sources(items["source"].combine_chunks())
    id_of = dict(zip(there["source"].to_pylist(), there["item_id"].to_pylist(), strict=True))
    sources, ids = items["source"].to_pylist(), items["item_id"].to_pylist()
    ids = [id_of.get(source, item_id) for source, item_id in zip(sources, ids, strict=True)]
    digests = items["content_sha256"].to_pylist()
    _refuse(_clashes_within(ids, sources), "within the batch", "give each collection a name with --prefix")
    if not replace:
        live = not_deleted(stored.find(ids))
        known = {
            row["item_id"]: (row["source"], row["content_sha256"])
            for row in live.select(["item_id", "source", "content_sha256"]).to_pylist()
        }
        taken = [
            (item_id, known[item_id][0], source)
            for item_id, source, digest in zip(ids, sources, digests, strict=True)
            if item_id in known and known[item_id][0] != source and known[item_id][1] != digest
        ]
        _refuse(
            taken, "in the gallery", "name this collection with --prefix, or say --replace if it is meant to replace"
        )
    return items.set_column(items.schema.get_field_index("item_id"), "item_id", pa.array(ids, pa.string()))


def _first_of_each(values: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for place, value in enumerate(values):
        first.setdefault(value, place)
    return list(first.values())


def _clashes_within(ids: Sequence[str], sources: Sequence[str]) -> list[tuple[str, str, str]]:
    source_of: dict[str, str] = {}
    found = []
    for item_id, source in zip(ids, sources, strict=True):
        if source_of.setdefault(item_id, source) != source:
            found.append((item_id, source_of[item_id], source))
    return found


def _refuse(clashes: Sequence[tuple[str, str, str]], where: str, remedy: str) -> None:
    if clashes:
        shown = "; ".join(f"{item_id} is {one} and {other}" for item_id, one, other in clashes[:_SHOWN])
        raise ItemClashError(
            f"ingesting items: expected each id to be one image, found {len(clashes)} that two images would have "
            f"{where} ({shown}{'; ...' if len(clashes) > _SHOWN else ''}); {remedy}"
        )
