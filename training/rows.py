"""All rows of a data set's files before filtering: a source, a label and further columns each; no image is read yet.

Image folders take their labels from the sub-folders, Parquet and CSV files from columns.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from graceful.errors import UsageError
from graceful.files import exists, join, list_files, read_bytes, resolve
from graceful.training.folders import list_folder
from graceful.training.images import image_column
from graceful.training.manifest import DatasetNotFoundError

FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
"""Columns of a CSV file that may name the image; the first that is there does."""


@dataclass(frozen=True)
class Rows:
    """Aligned sources and labels, and the columns that were asked for."""

    sources: list[str]
    labels: NDArray[np.str_]
    columns: Mapping[str, NDArray[Any]]


def folder_rows(paths: Sequence[str], label_columns: Sequence[str], further: Sequence[str]) -> Rows:
    """Images below folders; images in no sub-folder only without `label_columns`, and single files too then."""
    unknown = [name for name in (*label_columns, *further) if name != "label"]
    if unknown:
        raise UsageError(
            f"loading images: expected only the column label in an image folder, found {sorted(set(unknown))}"
        )
    sources: list[str] = []
    labels: list[str] = []
    for place in paths:
        file_system, root = resolve(place)
        kind = file_system.get_file_info(root).type
        if kind == pafs.FileType.File and not label_columns:
            sources.append(place if "://" in place else root)
            labels.append("")
            continue
        if kind != pafs.FileType.Directory:
            raise DatasetNotFoundError(f"loading images: expected a folder, found none (at {place}); check the path")
        listed = list_folder(place)
        wanted = [bool(label) or not label_columns for label in listed.labels]
        sources += [image for image, take in zip(listed.images, wanted, strict=True) if take]
        labels += [label for label, take in zip(listed.labels, wanted, strict=True) if take]
    label_array = np.array(labels, dtype=np.str_)
    return Rows(sources, label_array, {"label": label_array.astype(object)})


def parquet_rows(paths: Sequence[str], label_columns: Sequence[str], further: Sequence[str], image: str | None) -> Rows:
    """Rows of Parquet files, or of all Parquet files below a folder."""
    needed = list(dict.fromkeys([*label_columns, *further]))
    sources: list[str] = []
    tables: list[pa.Table] = []
    for place in parquet_files(paths):
        path = resolve(place)[1]
        with open_parquet(place) as reader:
            schema = reader.schema_arrow
            _require(schema.names, [*needed, *([image] if image else [])], place)
            default = "image" if "image" in schema.names else None
            column = image or image_column(schema, place)
            suffix = "" if column == default or image is None else f"@{column}"
            tables.append(reader.read(columns=needed))
            base = place if "://" in place else path
            sources += [f"{base}#{row}{suffix}" for row in range(reader.metadata.num_rows)]
    table = pa.concat_tables(tables, promote_options="default")
    columns = {name: np.array(table[name].to_pylist(), dtype=object) for name in needed}
    return Rows(sources, _labels(columns, label_columns, sources), columns)


def csv_rows(paths: Sequence[str], label_columns: Sequence[str], further: Sequence[str], image: str | None) -> Rows:
    """Rows of CSV files with a header: one column names an image, by its path from the CSV file's folder."""
    needed = list(dict.fromkeys([*label_columns, *further]))
    sources: list[str] = []
    values: dict[str, list[str | None]] = {name: [] for name in needed}
    for place in paths:
        file_system, path = resolve(place)
        if file_system.get_file_info(path).type != pafs.FileType.File:
            raise DatasetNotFoundError(f"loading images: expected a CSV file, found none (at {place}); check the path")
        reader = csv.DictReader(io.StringIO(_text_of(place), newline=""))
        names = list(reader.fieldnames or [])
        column = image or next((name for name in FILE_COLUMNS if name in names), None)
        if column is None:
            raise UsageError(
                f"loading images: expected a column that names the image ({', '.join(FILE_COLUMNS)}), found {names} "
                f"(in {place}); name it in image_column"
            )
        _require(names, [*needed, column], place)
        folder = os.path.dirname(place if "://" in place else path)
        for row in reader:
            named = row[column] or ""
            sources.append(named if named.startswith("/") or "://" in named else join(folder, named))
            for name in needed:
                values[name].append(row[name] or None)
    columns = {name: np.array(column, dtype=object) for name, column in values.items()}
    return Rows(sources, _labels(columns, label_columns, sources), columns)


def table_rows(
    source: Literal["parquet", "csv"], paths: Sequence[str], label_columns: Sequence[str], further: Sequence[str]
) -> Rows:
    """Rows of Parquet or CSV files that name no image: a source is the file and the number of the row in it.

    Raises: DatasetNotFoundError, UsageError.
    """
    needed = list(dict.fromkeys([*label_columns, *further]))
    sources: list[str] = []
    values: dict[str, list[Any]] = {name: [] for name in needed}
    for place in parquet_files(paths) if source == "parquet" else paths:
        if source == "parquet":
            with open_parquet(place) as reader:
                _require(reader.schema_arrow.names, needed, place)
                columns, num_rows = reader.read(columns=needed).to_pydict(), int(reader.metadata.num_rows)
        else:
            if not exists(place):
                raise DatasetNotFoundError(
                    f"loading texts: expected a CSV file, found none (at {place}); check the path"
                )
            table = csv.DictReader(io.StringIO(_text_of(place), newline=""))
            _require(list(table.fieldnames or []), needed, place)
            rows = list(table)
            columns, num_rows = {name: [row[name] or None for row in rows] for name in needed}, len(rows)
        sources += [f"{place}#{row}" for row in range(num_rows)]
        for name in needed:
            values[name] += columns[name]
    found = {name: np.array(column, dtype=object) for name, column in values.items()}
    return Rows(sources, _labels(found, label_columns, sources), found)


def parquet_files(paths: Sequence[str]) -> list[str]:
    """The Parquet files that are named, and those below folders that are. Raises DatasetNotFoundError."""
    found: list[str] = []
    for place in paths:
        file_system, path = resolve(place)
        kind = file_system.get_file_info(path).type
        below = [place] if kind == pafs.FileType.File else []
        if kind == pafs.FileType.Directory:
            below = [file for file in list_files(place) if file.endswith(".parquet")]
        if not below:
            raise DatasetNotFoundError(
                f"loading images: expected a Parquet file, found none (at {place}); check the path"
            )
        found += below
    return found


def open_parquet(place: str) -> pq.ParquetFile:
    """Open one Parquet file. Raises UsageError where it is none."""
    file_system, path = resolve(place)
    try:
        return pq.ParquetFile(file_system.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise UsageError(
            f"loading images: expected a Parquet file, found {' '.join(str(error).split())} (at {place}); write it anew"
        ) from error


def csv_header(place: str) -> list[str]:
    """Names of the columns of a CSV file. Raises UsageError where it is no text."""
    return list(csv.DictReader(io.StringIO(_text_of(place), newline="")).fieldnames or [])


def as_text(values: NDArray[Any]) -> NDArray[np.str_]:
    """Values as text."""
    return np.array([str(value) for value in values], dtype=np.str_)


def _text_of(place: str) -> str:
    try:
        return read_bytes(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"loading images: expected UTF-8, found {error} (in {place}); save it as UTF-8") from error


def _require(found: Sequence[str], wanted: Sequence[str], place: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(
            f"loading images: expected the columns {missing}, found {list(found)} (in {place}); correct "
            "label_columns, where, attributes, image_column or text_column"
        )


def _labels(
    columns: Mapping[str, NDArray[Any]], label_columns: Sequence[str], sources: Sequence[str]
) -> NDArray[np.str_]:
    """Label columns joined with /; empty without columns. Raises UsageError where a row has none."""
    parts = [as_text(columns[name]) for name in label_columns]
    if not parts:
        return np.full(len(sources), "", dtype=np.str_)
    unlabelled = np.logical_or.reduce([columns[name] == None for name in label_columns])  # noqa: E711
    if unlabelled.any():
        raise UsageError(
            f"loading images: expected a label in every row, found {int(unlabelled.sum())} without (first "
            f"{sources[int(np.argmax(unlabelled))]}); fill or remove them"
        )
    return np.array(["/".join(row) for row in zip(*parts, strict=True)], dtype=np.str_)
