"""Training sets: which images, with which labels, from Parquet files, folders, torchvision or the bundled digits.

Whatever the origin, a training set ends as a manifest: one row (source, label, content_sha256) per image, in a Parquet
file that every worker reads. Images that cannot be decoded are left out, listed, and refused above a stated share.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graceful.errors import GracefulError, UsageError
from graceful.training.known import KnownImages, examine
from graceful.training.manifest import LabelledImages
from graceful.training.materialise import materialise_digits, materialise_glyphs, materialise_torchvision
from graceful.training.rows import Rows, as_text, csv_rows, folder_rows, parquet_rows


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


Where = dict[str, tuple[str | int | float | bool, ...] | ValueRange]
"""Column -> its allowed values, or the range of them."""


class HoldOut(BaseModel):
    """A split: a share of all images drawn by their bytes, or `count` images of every label drawn with a seed.

    By content an image stays on its side for ever: data may grow, and copies of the same bytes fall on the same side.
    By label the draw is another one whenever a label gets images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: Literal["kept", "held_out"] = Field(description="Which side to load.")
    by: Literal["label", "content"] = Field(
        default="label", description="label: count images of each label; content: a share of all images, by their hash."
    )
    count: int | None = Field(default=None, ge=1, description="by label: images of each label that are held out.")
    seed: int = Field(default=0, description="by label: seed of the draw; both sides must use the same.")
    share: float | None = Field(
        default=None, gt=0, lt=1, description="by content: share of all images that is held out."
    )

    @model_validator(mode="after")
    def _complete(self) -> "HoldOut":
        needed, other = ("share", "count") if self.by == "content" else ("count", "share")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise UsageError(
                f'split: expected {needed} and no {other} with by = "{self.by}", found share = {self.share} and count '
                f'= {self.count}; write {{ share = 0.2, by = "content", ... }} or {{ count = 5, ... }}'
            )
        return self

    def takes(self, content_sha256: str) -> bool:
        """Whether an image of this content is on the side to load; by label that is not known of one image."""
        if self.share is None:
            return True
        return is_held_out(content_sha256, self.share) == (self.part == "held_out")


class DatasetConfig(BaseModel):
    """Where a training set's images are and which of them to take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["parquet", "folder", "csv", "torchvision", "digits", "glyphs"] = Field(
        description="Kind of data set; glyphs are made-up alphabets that are drawn by the code."
    )
    path: str | tuple[str, ...] = Field(
        description="Parquet file or files, or a folder of them; image folder (its sub-folders are the labels; a "
        "symlinked folder is read once); CSV file with a header, whose rows name an image each; torchvision's root "
        "folder; the Parquet file that the bundled digits or the drawn glyphs are written to once."
    )
    torchvision_name: str | None = Field(default=None, description="Class in torchvision.datasets, such as CIFAR100.")
    torchvision_train: bool = Field(default=True, description="Its training part; false takes the test part.")
    image_column: str | None = Field(
        default=None,
        description="Image column; by default image, or the only one. Of a CSV file: the column with the image's path, "
        "by default file, file_name, filename, path or image.",
    )
    label_columns: tuple[str, ...] = Field(
        default=("label",), description="Joined with / to the label; none for images without labels."
    )
    where: Where = Field(default_factory=dict, description="Column to its allowed values, or to {min, max}.")
    attributes: tuple[str, ...] = Field(default=(), description="Further columns to keep, as slices.")
    split: HoldOut | None = Field(default=None, description="Take one side of a split.")
    min_per_label: int | None = Field(
        default=None, ge=1, description="Leave out labels with fewer readable images than this, last of all."
    )
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


def load_images(config: DatasetConfig, known: KnownImages | None = None) -> LabelledImages:
    """Find the images of a data set, decode each once to see that it can be, and hash its bytes.

    With `known`, an image that an earlier reading saw and whose file has not changed since is not read again.

    Order: by file, then by row (or by name in a folder). A split by label and `max_per_label` are drawn from the rows
    that pass `where`, before any image is read; so they do not depend on which images are broken. A split by content
    comes before `max_per_label`, and only images of the wanted side are decoded.

    Raises: DatasetNotFoundError, EmptyDatasetError, UnreadableImagesError.
    """
    read = _read(config, known)
    unreadable = [(read.sources[i], reason) for i, reason in sorted(read.reasons.items())]
    if len(unreadable) > config.max_unreadable_share * len(read.sources):
        raise UnreadableImagesError(
            f"loading images: expected at most {config.max_unreadable_share:.2%} unreadable, found {len(unreadable)} "
            f"of {len(read.sources)} ({_named(unreadable)}); repair them or raise max_unreadable_share"
        )
    readable = np.array([i for i in range(len(read.sources)) if i not in read.reasons], dtype=np.int64)
    if not len(readable):
        raise EmptyDatasetError(
            f"loading images: expected at least one, found {len(unreadable)} unreadable ({_named(unreadable)}); repair "
            "them"
        )
    readable = readable[_common(read.labels[readable], config.min_per_label)]
    if not len(readable):
        raise EmptyDatasetError(
            f"loading images: expected a label with at least min_per_label = {config.min_per_label} images, found none "
            f"(in {', '.join(config.paths)}); add images or lower it"
        )
    return LabelledImages(
        sources=[read.sources[i] for i in readable],
        labels=read.labels[readable],
        content_sha256=[read.digests[i] for i in readable],
        attributes={name: as_text(read.columns[name][readable]) for name in config.attributes},
        unreadable=unreadable,
    )


def list_images(config: DatasetConfig) -> tuple[list[str], NDArray[np.str_]]:
    """Sources and labels of the rows that pass `where` and a split by label; no image is read, none is left out for it.

    Raises: DatasetNotFoundError, and ValueError where a column is missing.
    """
    candidates, chosen = _candidates(config)
    if config.split is None or config.split.by == "label":
        chosen = chosen[_draw(config, candidates.labels[chosen])]
        chosen = chosen[_common(candidates.labels[chosen], config.min_per_label)]
    return [candidates.sources[i] for i in chosen], candidates.labels[chosen]


def is_held_out(content_sha256: str, share: float) -> bool:
    """Whether an image is held out by its content alone: its first 32 bits, as a fraction, are below the share.

    >>> is_held_out("3fffffff" + 56 * "0", 0.25), is_held_out("40000000" + 56 * "0", 0.25)
    (True, False)
    """
    return int(content_sha256[:8], 16) / 2**32 < share


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
    candidates, chosen = _candidates(wanted)
    return sorted(set(candidates.columns[column][chosen].tolist()))


def check_trainable(images: LabelledImages) -> None:
    """Refuse a set that cannot be trained on: fewer than two classes, or a class with a single image.

    Raises: SingleImageClassError, EmptyDatasetError.
    """
    names, counts = np.unique(images.labels, return_counts=True)
    check_classes(names.tolist(), counts)


def check_classes(names: Sequence[str], counts: NDArray[np.int64]) -> None:
    """As `check_trainable`, by the number of images of each class.

    Raises: SingleImageClassError, EmptyDatasetError.
    """
    if len(names) < 2:
        raise EmptyDatasetError(f"checking the training set: expected at least 2 classes, found {len(names)}")
    lonely = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 1]
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
class _Read(Rows):
    """Rows of which all were read: their hashes, and why some cannot be decoded, by position."""

    digests: list[str]
    reasons: dict[int, str]


def _read(config: DatasetConfig, known: KnownImages | None) -> _Read:
    """Read the rows that pass `where`, split and max_per_label. Raises EmptyDatasetError where there are none."""
    rows, chosen = _candidates(config)
    if config.split is not None and config.split.by == "content":
        found = examine([rows.sources[i] for i in chosen], config.split.takes, known)
        reasons, digests = found.reasons, found.digests
        kept = np.flatnonzero([config.split.takes(digest) for digest in digests])
        kept = kept[_draw(config, rows.labels[chosen[kept]])]
        reasons = {place: reasons[was] for place, was in enumerate(kept.tolist()) if was in reasons}
        chosen, digests = chosen[kept], [digests[i] for i in kept]
    else:
        chosen = chosen[_draw(config, rows.labels[chosen])]
        found = examine([rows.sources[i] for i in chosen], lambda digest: True, known)  # noqa: ARG005
        reasons, digests = found.reasons, found.digests
    if not len(chosen):
        raise EmptyDatasetError(
            f"loading images: expected at least one, found none among {len(rows.sources)} rows that pass "
            f"where={config.where} and split (in {', '.join(config.paths)}); {_empty_remedy(config, rows)}"
        )
    columns = {name: values[chosen] for name, values in rows.columns.items()}
    return _Read([rows.sources[i] for i in chosen], rows.labels[chosen], columns, digests, reasons)


def _candidates(config: DatasetConfig) -> tuple[Rows, NDArray[np.int64]]:
    """All rows, and the positions of those that pass `where`."""
    rows = _all_rows(config)
    return rows, np.flatnonzero(where_mask(config.where, rows.columns, len(rows.sources)))


def _draw(config: DatasetConfig, labels: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Rows left by the split (unless it is by content) and then `max_per_label`."""
    mask = np.ones(len(labels), bool)
    if config.split is not None and config.split.count is not None:
        held_out = draw_per_label(labels, config.split.count, config.split.seed)
        mask = held_out if config.split.part == "held_out" else ~held_out
    if config.max_per_label is not None:
        mask[mask] = draw_per_label(labels[mask], config.max_per_label, config.seed)
    return mask


def _common(labels: NDArray[np.str_], fewest: int | None) -> NDArray[np.bool_]:
    """Rows of labels that have at least so many rows."""
    if fewest is None or not len(labels):
        return np.ones(len(labels), bool)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] >= fewest)


def _empty_remedy(config: DatasetConfig, candidates: Rows) -> str:
    if not candidates.sources and config.source == "folder":
        return "the sub-folders of an image folder are the labels, and images beside them are not used"
    if config.split is not None and config.split.part == "kept" and config.split.count is not None:
        return f"split holds out {config.split.count} images of each label: lower its count"
    return "check the filters"


def _named(unreadable: Sequence[tuple[str, str]], most: int = 3) -> str:
    """The first unreadable images with their reasons.

    >>> _named([("/a.png", "empty"), ("/b.png", "truncated")], 1)
    'first /a.png: empty; ...'
    """
    shown = "; ".join(f"{source}: {reason}" for source, reason in unreadable[:most])
    return f"first {shown}{'; ...' if len(unreadable) > most else ''}"


def _all_rows(config: DatasetConfig) -> Rows:
    further = tuple(dict.fromkeys([*config.where, *config.attributes]))
    if config.source == "folder":
        return folder_rows(config.paths, config.label_columns, further)
    if config.source == "csv":
        return csv_rows(config.paths, config.label_columns, further, config.image_column)
    paths = config.paths
    if config.source == "digits":
        paths = tuple(materialise_digits(path) for path in paths)
    elif config.source == "glyphs":
        paths = tuple(materialise_glyphs(path) for path in paths)
    elif config.source == "torchvision":
        name, train = str(config.torchvision_name), config.torchvision_train
        paths = tuple(materialise_torchvision(name, path, train) for path in paths)
    return parquet_rows(paths, config.label_columns, further, config.image_column)


def where_mask(where: Where, columns: Mapping[str, NDArray[Any]], num_rows: int) -> NDArray[np.bool_]:
    """Mask (num_rows,) of the rows whose columns have the values that `where` allows."""
    mask = np.ones(num_rows, dtype=bool)
    for name, rule in where.items():
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
