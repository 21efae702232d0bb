"""Looks at a team's own pictures before anything is configured: what is there, what is wrong, what would suit it.

Reads every image once and changes nothing. The evaluation it proposes is drawn by content hash, so that no image ever
changes sides when the data grow.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.evaluation.intervals import FEW_CLUSTERS
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.power import queries_for_margin, queries_for_nfr
from graceful.files import exists
from graceful.training.datasets import DatasetConfig, is_held_out, list_images
from graceful.training.folders import Folder, find_source, list_folder
from graceful.training.generation import Preprocessing
from graceful.training.images import decode, image_column, read_payloads
from graceful.training.measure import Measured, measure
from graceful.training.rows import FILE_COLUMNS, csv_header, open_parquet, parquet_files

SHARES = (0.2, 0.25, 0.3, 0.4)
"""Shares to hold out: the first under which few queries are the only one of their label."""

_LONELY = 0.1  # this share of queries may be without a second image of their label
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
_LABEL_COLUMNS = ("label", "labels", "class", "category", "identity", "fine_label", "name")
_SIZES = (8, 16, 24, 28, 32, 48, 64)  # what the small network suits; a larger one is a choice for a GPU
_SAMPLE = 500  # images that mean and std are measured on
_BLOCK = 256  # images that are in memory at once
_STEPS = 300  # of a first training
_ICC = 0.2  # assumed likeness of one identity's queries; also the floor that the bounds use with few identities
_CHANGED = 0.05  # assumed share of queries whose answer changes


class InspectionError(GracefulError):
    """There is nothing at this place that could be trained and judged on."""


@dataclass(frozen=True)
class Needed:
    """What the limits of a policy ask for, if an update breaks half of what they allow. None: no reachable number."""

    identities: int
    for_flips: int | None
    for_quality: int | None


@dataclass(frozen=True)
class Proposal:
    """A configuration that suits the images. Counts are of readable images."""

    image_size: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    batch_size: int
    epochs: int
    share: float
    num_training: int
    num_training_labels: int
    num_queries: int
    num_identities: int
    max_unreadable_share: float
    needed: Needed


@dataclass(frozen=True)
class Inspection:
    """What lies at a place. `labels` counts the readable images of each label; sizes are (width, height)."""

    source: Literal["parquet", "folder", "csv"]
    paths: tuple[str, ...]
    label_columns: tuple[str, ...]
    labels: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...]
    num_copies: int
    copies: tuple[tuple[str, str], ...]
    num_contradictions: int
    loose: tuple[str, ...]
    links_left_out: tuple[str, ...]
    other_files: Mapping[str, int]
    smallest: tuple[int, int]
    median_side: int
    largest: tuple[int, int]
    num_grey: int
    proposal: Proposal

    @property
    def num_images(self) -> int:
        """Readable images."""
        return sum(self.labels.values())


def inspect_images(
    place: str,
    *,
    label: str | None = None,
    policy: RolloutPolicy = RolloutPolicy(),
    on_images: Callable[[int], None] | None = None,
) -> Inspection:
    """Look at a folder of images, a flat one with a CSV file, a Parquet file or a folder of them.

    `label` names the column of labels; by default the one that is called so. Raises InspectionError.
    """
    if not exists(place):
        raise InspectionError(f"looking at the pictures: expected a folder or file, found none (at {place})")
    source, found = find_source(place)
    listed = list_folder(place) if source != "parquet" and os.path.isdir(place) else Folder()
    paths = _split_folders(found, listed) if source == "folder" else (found,)
    columns = () if source == "folder" else (label or _label_column(source, found),)
    config = DatasetConfig(source=source, path=paths, label_columns=columns or ("label",))
    sources, labels = list_images(config)
    if not sources:
        raise InspectionError(_nothing(place, listed))
    digests, measured = _read(sources, on_images)
    readable = np.array([entry.reason is None for entry in measured], bool)
    copies, contradictions = _copies(sources, labels, digests, readable)
    sides = [(entry.width, entry.height) for entry in measured if entry.reason is None]
    short = sorted(min(side) for side in sides)
    num_grey = sum(entry.is_grey for entry in measured if entry.reason is None)
    used = set(sources)
    return Inspection(
        source=source,
        paths=paths,
        label_columns=columns,
        labels=dict(sorted(Counter(labels[readable].tolist()).items())),
        unreadable=tuple((s, entry.reason) for s, entry in zip(sources, measured, strict=True) if entry.reason),
        num_copies=len(copies),
        copies=tuple(copies[:3]),
        num_contradictions=contradictions,
        loose=tuple(image for image in listed.images if image not in used),
        links_left_out=tuple(listed.links_left_out),
        other_files=dict(Counter(os.path.splitext(o)[1].lower() or "no suffix" for o in listed.others if o != found)),
        smallest=min(sides, key=min, default=(0, 0)),
        median_side=short[len(short) // 2] if short else 0,
        largest=max(sides, key=max, default=(0, 0)),
        num_grey=num_grey,
        proposal=_propose(
            place, sources, labels, digests, readable, short, num_grey == int(readable.sum()), policy
        ),
    )  # fmt: skip


def needed_queries(policy: RolloutPolicy, queries_per_identity: float) -> Needed:
    """Queries that the limits of a policy need, before anything is measured.

    Assumed: an update flips half of what is allowed, changes 5 % of the answers and loses nothing, and queries of one
    identity are alike (ICC 0.2). Fewer than 50 identities widen the bounds further.

    >>> needed_queries(RolloutPolicy(max_nfr=0.02, quality_margin_points=2.0), 1.0)
    Needed(identities=50, for_flips=1091, for_quality=773)
    """
    effect = 1 + max(queries_per_identity - 1, 0.0) * _ICC
    flips, quality = None, None
    if policy.max_nfr is not None:
        flips = queries_for_nfr(
            policy.max_nfr, policy.max_nfr / 2, alpha=policy.alpha, power=policy.power, design_effect=effect
        )
    if policy.quality_margin_points is not None:
        quality = queries_for_margin(
            0.0,
            float(np.sqrt(_CHANGED)),
            policy.quality_margin_points / 100,
            alpha=policy.alpha,
            power=policy.power,
            design_effect=effect,
        )
    return Needed(FEW_CLUSTERS, flips, quality)


def _split_folders(place: str, listed: Folder) -> tuple[str, ...]:
    """The folder, or its train, test, ... folders where it has only such and they hold the labels."""
    tops = {label.partition("/")[0] for label in listed.labels if label}
    nested = all("/" in label for label in listed.labels if label)
    if tops and nested and tops <= _SPLITS:
        return tuple(os.path.join(place, top) for top in sorted(tops))
    return (place,)


def _label_column(source: str, place: str) -> str:
    """The column of labels: one that is called so, or the only one that holds texts or whole numbers."""
    if source == "csv":
        names = csv_header(place)
        fitting = [name for name in names if name not in FILE_COLUMNS]
    else:
        file = parquet_files([place])[0]
        with open_parquet(file) as reader:
            schema = reader.schema_arrow
        names, image = schema.names, image_column(schema, file)
        fitting = [field.name for field in schema if field.name != image and _names_something(field.type)]
    known = [name for name in _LABEL_COLUMNS if name in fitting]
    if not known and len(fitting) != 1:
        raise InspectionError(
            f"looking at the pictures: expected a column of labels ({', '.join(_LABEL_COLUMNS)}), found {names} (in "
            f"{place}); name it with --label"
        )
    return known[0] if known else fitting[0]


def _names_something(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _nothing(place: str, listed: Folder) -> str:
    if listed.loose:
        return (
            f"looking at the pictures: expected one sub-folder per label, found {len(listed.loose)} images beside each "
            f"other (in {place}); sort them into folders, or put a CSV file with the columns file,label beside them"
        )
    if any(other.endswith(".arrow") for other in listed.others):
        return (
            f"looking at the pictures: expected images or Parquet files, found Arrow files (in {place}); save the data "
            "set with to_parquet(...)"
        )
    return f"looking at the pictures: expected images, found none (in {place}); check the path"


def _read(sources: list[str], on_images: Callable[[int], None] | None) -> tuple[list[str], list[Measured]]:
    """Hash and decode every image."""
    digests: list[str] = []
    measured: list[Measured] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(sources), _BLOCK):
            failures: dict[int, str] = {}
            payloads = read_payloads(sources[start : start + _BLOCK], failures)
            digests += pool.map(lambda payload: hashlib.sha256(payload).hexdigest(), payloads)
            looked = list(pool.map(measure, payloads))
            measured += [
                Measured(0, 0, False, failures[place]) if place in failures else entry
                for place, entry in enumerate(looked)
            ]
            if on_images is not None:
                on_images(len(payloads))
    return digests, measured


def _copies(
    sources: Sequence[str], labels: NDArray[np.str_], digests: Sequence[str], readable: NDArray[np.bool_]
) -> tuple[list[tuple[str, str]], int]:
    """Images with the same bytes as an earlier one, and how many of them have another label."""
    first: dict[str, int] = {}
    copies, contradictions = [], 0
    for place in np.flatnonzero(readable).tolist():
        one = first.setdefault(digests[place], place)
        if one != place:
            copies.append((sources[one], sources[place]))
            contradictions += bool(labels[one] != labels[place])
    return copies, contradictions


def _propose(
    place: str,
    sources: list[str],
    labels: NDArray[np.str_],
    digests: list[str],
    readable: NDArray[np.bool_],
    short_sides: list[int],
    all_grey: bool,
    policy: RolloutPolicy,
) -> Proposal:
    share, training, queries = _sides(labels, digests, readable)
    if len(set(labels[training].tolist())) < 2 or not queries.any():
        counts = Counter(labels[readable].tolist())
        raise InspectionError(
            "looking at the pictures: expected at least two labels with some five images each, found "
            f"{int(readable.sum())} readable images of {len(counts)} labels (in {place}); add images, or sort them by "
            "label"
        )
    num_training, num_queries = int(training.sum()), int(queries.sum())
    num_identities = len(set(labels[queries].tolist()))
    image_size = max((size for size in _SIZES if size <= short_sides[len(short_sides) // 2]), default=_SIZES[0])
    channels: Literal[1, 3] = 1 if all_grey else 3
    mean, std = _mean_and_std([sources[i] for i in np.flatnonzero(training)], image_size, channels)
    batch_size = 64 if num_training < 2000 else 256
    held_out = np.array([is_held_out(digest, share) for digest in digests], bool)
    worst = max(float((~readable)[side].mean()) for side in (held_out, ~held_out))
    return Proposal(
        image_size=image_size,
        channels=channels,
        mean=mean,
        std=std,
        augmentation="affine" if all_grey else "crop_flip",
        batch_size=batch_size,
        epochs=int(np.clip(np.ceil(_STEPS * batch_size / num_training), 6, 30)),
        share=share,
        num_training=num_training,
        num_training_labels=len(set(labels[training].tolist())),
        num_queries=num_queries,
        num_identities=num_identities,
        max_unreadable_share=max(0.01, float(np.ceil(worst * 100) / 100)),
        needed=needed_queries(policy, num_queries / num_identities),
    )


def _sides(
    labels: NDArray[np.str_], digests: Sequence[str], readable: NDArray[np.bool_]
) -> tuple[float, NDArray[np.bool_], NDArray[np.bool_]]:
    """A share to hold out, and the images to train on and to ask about, each with a second one of its label."""
    for share in SHARES:
        held_out = np.array([is_held_out(digest, share) for digest in digests], bool) & readable
        queries, training = _with_a_mate(labels, held_out), _with_a_mate(labels, readable & ~held_out)
        if queries.sum() >= (1 - _LONELY) * held_out.sum() and queries.any():
            break
    return share, training, queries


def _with_a_mate(labels: NDArray[np.str_], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, inverse, counts = np.unique(labels[mask], return_inverse=True, return_counts=True)
    found = mask.copy()
    found[mask] = counts[inverse] >= 2
    return found


def _mean_and_std(
    sources: list[str], image_size: int, channels: Literal[1, 3]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on the 0 to 1 scale, on a sample."""
    chosen = np.random.default_rng(0).permutation(len(sources))[:_SAMPLE]
    neutral = Preprocessing(image_size=image_size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    sums, squares, count = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(chosen), _BLOCK):
        for payload in read_payloads([sources[i] for i in chosen[start : start + _BLOCK]]):
            pixels = decode(payload, neutral).astype(np.float64) / 255
            sums += pixels.sum(axis=(1, 2))
            squares += (pixels**2).sum(axis=(1, 2))
            count += pixels[0].size
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-4))
    return tuple(round(float(value), 3) for value in mean), tuple(round(float(value), 3) for value in std)
