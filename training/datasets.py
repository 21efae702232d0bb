"""Training sets: which images, with which labels, from Parquet files, folders, torchvision or the bundled digits.

Whatever the origin, a training set ends as a manifest: one row (source, label, content_sha256) per image, in a Parquet
file that every worker reads. Images that cannot be decoded are left out, listed, and refused above a stated share.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graceful.errors import GracefulError, UsageError
from graceful.files import resolve
from graceful.training.images import image_column, read_payloads, unreadable_reason
from graceful.training.manifest import DatasetNotFoundError, LabelledImages
from graceful.training.materialise import materialise_digits, materialise_torchvision

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class EmptyDatasetError(GracefulError):
    """No image is left after filtering."""


class UnreadableImagesError(GracefulError):
    """More images than allowed cannot be decoded."""


class SingleImageClassError(GracefulError):
    """A class has one image only: nothing can be learnt from it, and it cannot be evaluated."""


class OverlapError(GracefulError):
    """The training set and the evaluation set share identities or images."""


class ValueRange(BaseModel):
    """A closed interval of numbers; an end left out is open."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: float | None = Field(default=None, description="Smallest value allowed.")
    max: float | None = Field(default=None, description="Largest value allowed.")


class HoldOut(BaseModel):
    """A split inside every label: `count` images of it, drawn with the seed, against the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1, description="Images of each label that are held out.")
    part: Literal["kept", "held_out"] = Field(description="Which side to load.")
    seed: int = Field(default=0, description="Seed of the draw; both sides must use the same.")


class DatasetConfig(BaseModel):
    """Where a training set's images are and which of them to take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["parquet", "folder", "torchvision", "digits"] = Field(description="Kind of data set.")
    path: str | tuple[str, ...] = Field(
        description="Parquet file or files; image folder (its sub-folders are the labels); torchvision's root folder; "
        "the Parquet file that the bundled digits are written to once."
    )
    torchvision_name: str | None = Field(default=None, description="Class in torchvision.datasets, such as CIFAR100.")
    torchvision_train: bool = Field(default=True, description="Its training part; false takes the test part.")
    image_column: str | None = Field(default=None, description="Image column; by default image, or the only one.")
    label_columns: tuple[str, ...] = Field(
        default=("label",), description="Joined with / to the label; none for images without labels."
    )
    where: dict[str, tuple[str | int | float | bool, ...] | ValueRange] = Field(
        default_factory=dict, description="Column to its allowed values, or to {min, max}."
    )
    attributes: tuple[str, ...] = Field(default=(), description="Further columns to keep, as slices.")
    split: HoldOut | None = Field(default=None, description="Take one side of a split inside every label.")
    max_per_label: int | None = Field(
        default=None, ge=1, description="At most so many images of a label, drawn at random."
    )
    seed: int = Field(default=0, description="Seed of the draw for max_per_label.")
    max_unreadable_share: float = Field(default=0.01, ge=0, le=1, description="Share of undecodable images tolerated.")

    @model_validator(mode="after")
    def _complete(self) -> "DatasetConfig":
        if (self.source == "torchvision") != (self.torchvision_name is not None):
            raise UsageError('data set: torchvision_name belongs to source = "torchvision", and is needed there')
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The files or folders, always as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path


def load_images(config: DatasetConfig) -> LabelledImages:
    """Find the images of a data set, decode each once to see that it can be, and hash its bytes.

    Order: by file, then by row (or by name in a folder). The split and `max_per_label` are drawn from the rows that
    pass `where`, before any image is read; so they do not depend on which images are broken.

    Raises: DatasetNotFoundError, EmptyDatasetError, UnreadableImagesError.
    """
    candidates = _folder_rows(config) if config.source == "folder" else _parquet_rows(config)
    chosen = np.flatnonzero(_where_mask(config, candidates.columns))
    labels = candidates.labels[chosen]
    if config.split is not None:
        held_out = draw_per_label(labels, config.split.count, config.split.seed)
        keep = held_out if config.split.part == "held_out" else ~held_out
        chosen, labels = chosen[keep], labels[keep]
    if config.max_per_label is not None:
        keep = draw_per_label(labels, config.max_per_label, config.seed)
        chosen, labels = chosen[keep], labels[keep]
    if not len(chosen):
        raise EmptyDatasetError(
            f"loading images: expected at least one, found none among {len(candidates.labels)} rows that pass "
            f"where={config.where} and split (in {', '.join(config.paths)}); check the filters"
        )
    sources = [candidates.sources[i] for i in chosen]
    reasons, digests = _check_and_hash(sources)
    unreadable = [(sources[i], reason) for i, reason in sorted(reasons.items())]
    if len(unreadable) > config.max_unreadable_share * len(sources):
        raise UnreadableImagesError(
            f"loading images: expected at most {config.max_unreadable_share:.2%} unreadable, found {len(unreadable)} "
            f"of {len(sources)} (first {unreadable[0][0]}: {unreadable[0][1]}); repair them or raise "
            "max_unreadable_share"
        )
    readable = np.array([i for i in range(len(sources)) if i not in reasons], dtype=np.int64)
    if not len(readable):
        raise EmptyDatasetError(f"loading images: expected at least one, found {len(sources)} that cannot be decoded")
    return LabelledImages(
        sources=[sources[i] for i in readable],
        labels=labels[readable],
        content_sha256=[digests[i] for i in readable],
        attributes={name: _as_text(candidates.columns[name][chosen][readable]) for name in config.attributes},
        unreadable=unreadable,
    )


def draw_per_label(labels: NDArray[np.str_], count: int, seed: int) -> NDArray[np.bool_]:
    """Return a mask of at most `count` rows of every label; a label's draw does not depend on the other labels."""
    mask = np.zeros(len(labels), dtype=bool)
    order = np.argsort(labels, kind="stable")
    names, starts = np.unique(labels[order], return_index=True)
    for name, members in zip(names, np.split(order, starts[1:]), strict=True):
        stable = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8], "little")
        mask[np.random.default_rng([seed, stable]).permutation(members)[:count]] = True
    return mask


def column_values(config: DatasetConfig, column: str) -> list[Any]:
    """Return the distinct values of a column among the rows that pass `where`, sorted; no image is read."""
    wanted = config.model_copy(update={"attributes": (*config.attributes, column)})
    candidates = _folder_rows(wanted) if config.source == "folder" else _parquet_rows(wanted)
    return sorted(set(candidates.columns[column][_where_mask(config, candidates.columns)].tolist()))


def check_trainable(images: LabelledImages) -> None:
    """Refuse a set that cannot be trained on: fewer than two classes, or a class with a single image.

    Raises: SingleImageClassError, EmptyDatasetError.
    """
    names, counts = np.unique(images.labels, return_counts=True)
    if len(names) < 2:
        raise EmptyDatasetError(f"checking the training set: expected at least 2 classes, found {len(names)}")
    lonely = names[counts == 1].tolist()
    if lonely:
        raise SingleImageClassError(
            f"checking the training set: expected at least 2 images of each class, found {len(lonely)} classes with "
            f"one (such as {', '.join(lonely[:3])}); add images or exclude these classes with where"
        )


def assert_disjoint(
    train: LabelledImages, evaluation: LabelledImages, by: Literal["identity", "image"] = "identity"
) -> None:
    """Refuse an evaluation set that shares identities (labels) or images (content) with the training set.

    Raises: OverlapError, with examples.
    """
    if by == "identity":
        shared = sorted(set(train.labels.tolist()) & set(evaluation.labels.tolist()))
    else:
        known = dict(zip(train.content_sha256, train.sources, strict=True))
        pairs = zip(evaluation.content_sha256, evaluation.sources, strict=True)
        shared = [f"{source} = {known[digest]}" for digest, source in pairs if digest in known]
    if shared:
        noun = "identities" if by == "identity" else "images"
        raise OverlapError(
            f"checking that training and evaluation are disjoint: expected no common {noun}, found {len(shared)} (such "
            f"as {'; '.join(shared[:3])}); remove them from one of the two"
        )


@dataclass(frozen=True)
class _Candidates:
    """All rows of the files before filtering: no image has been read yet."""

    sources: list[str]
    labels: NDArray[np.str_]
    columns: Mapping[str, NDArray[Any]]


def _parquet_rows(config: DatasetConfig) -> _Candidates:
    paths: list[str] = []
    for path in config.paths:
        if config.source == "digits":
            materialise_digits(path)
            paths.append(path)
        elif config.source == "torchvision":
            paths.append(materialise_torchvision(str(config.torchvision_name), path, config.torchvision_train))
        else:
            paths.append(path)
    needed = list(dict.fromkeys([*config.label_columns, *config.where, *config.attributes]))
    sources: list[str] = []
    tables: list[pa.Table] = []
    for place in paths:
        file_system, path = resolve(place)
        if file_system.get_file_info(path).type != pafs.FileType.File:
            raise DatasetNotFoundError(
                f"loading images: expected a Parquet file, found none (at {place}); check the path"
            )
        with pq.ParquetFile(file_system.open_input_file(path)) as reader:
            schema = reader.schema_arrow
            missing = [
                name
                for name in (*needed, *([config.image_column] if config.image_column else []))
                if name not in schema.names
            ]
            if missing:
                raise UsageError(
                    f"loading images: expected the columns {missing}, found {schema.names} (in {place}); correct "
                    "label_columns, where, attributes or image_column"
                )
            default = "image" if "image" in schema.names else None
            column = config.image_column or image_column(schema, place)
            suffix = "" if column == default or config.image_column is None else f"@{column}"
            tables.append(reader.read(columns=needed))
            base = place if "://" in place else path
            sources += [f"{base}#{row}{suffix}" for row in range(reader.metadata.num_rows)]
    table = pa.concat_tables(tables, promote_options="default")
    columns = {name: np.array(table[name].to_pylist(), dtype=object) for name in needed}
    label_parts = [_as_text(columns[name]) for name in config.label_columns]
    if not label_parts:
        return _Candidates(sources, np.full(len(sources), "", dtype=np.str_), columns)
    labels = np.array(["/".join(parts) for parts in zip(*label_parts, strict=True)], dtype=np.str_)
    unlabelled = np.logical_or.reduce([columns[name] == None for name in config.label_columns])  # noqa: E711
    if unlabelled.any():
        first = sources[int(np.argmax(unlabelled))]
        raise UsageError(
            f"loading images: expected a label in every row, found {int(unlabelled.sum())} without (first {first}); "
            "fill or remove them"
        )
    return _Candidates(sources, labels, columns)


def _folder_rows(config: DatasetConfig) -> _Candidates:
    unknown = [name for name in (*config.label_columns, *config.where, *config.attributes) if name != "label"]
    if unknown:
        raise UsageError(
            f"loading images: expected only the column label in an image folder, found {sorted(set(unknown))}"
        )
    sources: list[str] = []
    labels: list[str] = []
    for place in config.paths:
        file_system, root = resolve(place)
        kind = file_system.get_file_info(root).type
        if kind == pafs.FileType.File and not config.label_columns:
            sources.append(place if "://" in place else root)
            labels.append("")
            continue
        if kind != pafs.FileType.Directory:
            raise DatasetNotFoundError(f"loading images: expected a folder, found none (at {place}); check the path")
        prefix = place[: len(place) - len(root)] if "://" in place and place.endswith(root) else ""
        for info in sorted(file_system.get_file_info(pafs.FileSelector(root, recursive=True)), key=lambda i: i.path):
            label = info.path[len(root) :].strip("/").rpartition("/")[0]
            wanted = bool(label) or not config.label_columns
            if info.type == pafs.FileType.File and wanted and info.path.lower().endswith(IMAGE_SUFFIXES):
                sources.append(f"{prefix}{info.path}")
                labels.append(label)
    label_array = np.array(labels, dtype=np.str_)
    return _Candidates(sources, label_array, {"label": label_array.astype(object)})


def _where_mask(config: DatasetConfig, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    mask = np.ones(len(next(iter(columns.values()))), dtype=bool)
    for name, rule in config.where.items():
        values = columns[name]
        if isinstance(rule, ValueRange):
            numbers = np.array([np.nan if value is None else float(value) for value in values])
            low = -np.inf if rule.min is None else rule.min
            high = np.inf if rule.max is None else rule.max
            mask &= (numbers >= low) & (numbers <= high)
        else:
            allowed = set(rule)
            mask &= np.array([value in allowed for value in values], dtype=bool)
    return mask


def _check_and_hash(sources: list[str], block: int = 1024) -> tuple[dict[int, str], list[str]]:
    reasons: dict[int, str] = {}
    digests: list[str] = []
    for start in range(0, len(sources), block):
        failures: dict[int, str] = {}
        payloads = read_payloads(sources[start : start + block], failures)
        for offset, payload in enumerate(payloads):
            digests.append(hashlib.sha256(payload).hexdigest())
            reason = failures.get(offset) or unreadable_reason(payload)
            if reason is not None:
                reasons[start + offset] = reason
    return reasons, digests


def _as_text(values: NDArray[Any]) -> NDArray[np.str_]:
    return np.array([str(value) for value in values], dtype=np.str_)
