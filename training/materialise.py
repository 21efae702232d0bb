"""Writes data sets that come as arrays (digits, drawn glyphs, torchvision's sets) once, as Parquet files with PNGs.

From then on they are read like any other Parquet file, so that every image has a source "path#row".
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from graceful.errors import UsageError
from graceful.files import writing
from graceful.training.glyphs import draw_alphabet
from graceful.training.images import encode_png

NUM_ALPHABETS, NUM_CHARACTERS, NUM_DRAWINGS = 44, 30, 12

_ROWS_PER_GROUP = 1000


def materialise_digits(path: str) -> str:
    """Write scikit-learn's bundled digits (1,797 images, 8x8 grey) to `path` unless they are there; return the path.

    Columns: image (PNG), label "0" to "9", instance (0, 1, ... inside each label).
    """
    if Path(path).exists():
        return path
    from sklearn.datasets import load_digits  # bundled with the package: nothing is downloaded

    digits = load_digits()
    pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    labels = [str(label) for label in digits.target]
    seen: dict[str, int] = {}
    instances = []
    for label in labels:
        instances.append(seen.get(label, 0))
        seen[label] = instances[-1] + 1
    _write(path, [encode_png(image) for image in pixels], labels, {"instance": pa.array(instances, pa.int64())})
    return path


def materialise_glyphs(path: str, shape: tuple[int, int, int] = (NUM_ALPHABETS, NUM_CHARACTERS, NUM_DRAWINGS)) -> str:
    """Draw made-up alphabets (see `glyphs`) to `path` unless they are there; return the path.

    `shape`: how many alphabets, characters of each, drawings of each character; by default 15,840 images, 20x20 grey.
    Columns: image (PNG), label "alphabet/character" (both two digits), alphabet, character and instance (0, 1, ...).
    """
    if Path(path).exists():
        return path
    images = np.concatenate([draw_alphabet(alphabet, *shape[1:]) for alphabet in range(shape[0])])
    alphabets, characters, instances = (place.ravel() for place in np.indices(shape))
    _write(
        path,
        [encode_png(image) for image in images.reshape(-1, *images.shape[-2:])],
        [f"{alphabet:02d}/{character:02d}" for alphabet, character in zip(alphabets, characters, strict=True)],
        {
            "alphabet": pa.array(alphabets, pa.int64()),
            "character": pa.array(characters, pa.int64()),
            "instance": pa.array(instances, pa.int64()),
        },
    )
    return path


def materialise_torchvision(name: str, root: str, train: bool) -> str:
    """Write a labelled torchvision set, downloaded to `root` before, to a Parquet file there; return its path."""
    path = os.path.join(os.path.abspath(root), f"{name.lower()}-{'train' if train else 'test'}.parquet")
    if Path(path).exists():
        return path
    import torchvision  # takes seconds to load, and only this source needs it

    factory = getattr(torchvision.datasets, name, None)
    if factory is None:
        raise UsageError(f"reading a torchvision data set: expected a class of torchvision.datasets, found {name!r}")
    dataset = factory(root=root, train=train, download=False)
    names = [str(entry) for entry in getattr(dataset, "classes", [])]
    payloads, labels = [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        payloads.append(encode_png(np.asarray(image)))
        labels.append(names[int(target)] if names else str(target))
    _write(path, payloads, labels, {})
    return path


def _write(path: str, payloads: list[bytes], labels: list[str], further: dict[str, pa.Array]) -> None:
    image = pa.StructArray.from_arrays(
        [pa.array(payloads, pa.binary()), pa.nulls(len(payloads), pa.string())], names=["bytes", "path"]
    )
    table = pa.table({"image": image, "label": pa.array(labels, pa.string()), **further})
    with writing(path) as stream:
        pq.write_table(table, stream, row_group_size=_ROWS_PER_GROUP)
