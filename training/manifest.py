"""Labelled images and the manifest that every training worker reads: one row (source, label, content_sha256) each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import resolve, writing

MANIFEST_FORMAT_VERSION = 1
_GROUP_ROWS = 65536


class DatasetNotFoundError(GracefulError, FileNotFoundError):
    """The file or folder of a data set is not there."""


@dataclass(frozen=True)
class LabelledImages:
    """The rows of a training set; all fields are aligned, `unreadable` lists what was left out."""

    sources: list[str]
    labels: NDArray[np.str_]
    content_sha256: list[str]
    attributes: dict[str, NDArray[np.str_]] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: NDArray[Any]) -> "LabelledImages":
        """Return the given rows (indices or a mask)."""
        chosen = np.arange(len(self))[rows]
        return LabelledImages(
            sources=[self.sources[i] for i in chosen],
            labels=self.labels[chosen],
            content_sha256=[self.content_sha256[i] for i in chosen],
            attributes={name: values[chosen] for name, values in self.attributes.items()},
            unreadable=self.unreadable,
        )


def write_manifest(uri: str, images: LabelledImages) -> None:
    """Write the rows as a Parquet file (source, label, content_sha256)."""
    table = pa.table(
        {
            "source": pa.array(images.sources, pa.string()),
            "label": pa.array(images.labels.tolist(), pa.string()),
            "content_sha256": pa.array(images.content_sha256, pa.string()),
        }
    ).replace_schema_metadata({"format_version": str(MANIFEST_FORMAT_VERSION)})
    with writing(uri) as stream:
        pq.write_table(table, stream, row_group_size=_GROUP_ROWS)


def read_manifest(uri: str) -> LabelledImages:
    """Read what `write_manifest` wrote. Raises UnknownFormatError, DatasetNotFoundError."""
    with _opened(uri) as manifest:
        table = manifest.read()
    return LabelledImages(
        sources=table["source"].to_pylist(),
        labels=np.array(table["label"].to_pylist(), dtype=np.str_),
        content_sha256=table["content_sha256"].to_pylist(),
    )


def scan_manifest(uri: str, columns: Sequence[str], block_rows: int = 16384) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a manifest block by block, so that no more than a row group is in memory.

    Raises: UnknownFormatError, DatasetNotFoundError.
    """
    with _opened(uri) as manifest:
        yield from manifest.iter_batches(batch_size=block_rows, columns=list(columns))


def count_images(uri: str) -> int:
    """Return the number of images of a manifest. Raises UnknownFormatError, DatasetNotFoundError."""
    with _opened(uri) as manifest:
        return int(manifest.metadata.num_rows)


def read_classes(uri: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sorted labels of a manifest, and for each image (N,) which of them it has.

    Raises: UnknownFormatError, DatasetNotFoundError.
    """
    seen: dict[str, int] = {}
    found = [np.zeros(0, np.int64)]
    for block in scan_manifest(uri, ["label"]):
        coded = block.column(0).dictionary_encode()
        numbers = [seen.setdefault(name, len(seen)) for name in coded.dictionary.to_pylist()]
        found.append(np.array(numbers, np.int64)[coded.indices.to_numpy()])
    names = sorted(seen)
    places = np.empty(len(names), np.int64)
    places[[seen[name] for name in names]] = np.arange(len(names))
    return names, places[np.concatenate(found)]


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    file_system, path = resolve(uri)
    if file_system.get_file_info(path).type != pafs.FileType.File:
        raise DatasetNotFoundError(f"reading a manifest: expected a file, found none (at {uri})")
    with pq.ParquetFile(file_system.open_input_file(path)) as manifest:
        version = (manifest.schema_arrow.metadata or {}).get(b"format_version", b"none").decode()
        if version != str(MANIFEST_FORMAT_VERSION):
            raise UnknownFormatError(
                f"reading a manifest: expected format {MANIFEST_FORMAT_VERSION}, found {version} (at {uri}); use the "
                "program version that wrote it"
            )
        yield manifest
