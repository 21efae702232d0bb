"""Labelled images and the manifest that every training worker reads: one row (source, label, content_sha256) each."""

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
        pq.write_table(table, stream)


def read_manifest(uri: str) -> LabelledImages:
    """Read what `write_manifest` wrote. Raises UnknownFormatError, DatasetNotFoundError."""
    file_system, path = resolve(uri)
    if file_system.get_file_info(path).type != pafs.FileType.File:
        raise DatasetNotFoundError(f"reading a manifest: expected a file, found none (at {uri})")
    table = pq.read_table(path, filesystem=file_system)
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(MANIFEST_FORMAT_VERSION):
        raise UnknownFormatError(
            f"reading a manifest: expected format {MANIFEST_FORMAT_VERSION}, found {version} (at {uri}); use the "
            "program version that wrote it"
        )
    return LabelledImages(
        sources=table["source"].to_pylist(),
        labels=np.array(table["label"].to_pylist(), dtype=np.str_),
        content_sha256=table["content_sha256"].to_pylist(),
    )
