"""Evaluation sets: queries and gallery with identities, clusters and slices, stored once and never changed.

A set's id is the digest of its rows, so that an evaluation names exactly what it was made on. Stored as one Parquet
file with a column `role` (query, gallery); the gallery's rows are images whose production counterparts, found by
content, say which generation owns them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graceful.files import exists, join, read_json, resolve, write_json
from graceful.flows.store.dev_set import DevConfig, set_aside
from graceful.training.copies import has_near_copy, hash_pictures
from graceful.training.datasets import DatasetConfig, EmptyDatasetError, assert_disjoint, load_images
from graceful.training.known import KnownImages
from graceful.training.manifest import LabelledImages
from graceful.training.texts import LabelledTexts

FORMAT_VERSION = "1"


class EvaluationConfig(BaseModel):
    """Which images are queries and which are the gallery that they search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    set: str | None = Field(
        default=None,
        description="Folder of a set that 'graceful evalset create' made, {root}/evalsets/<name>: stands for queries, "
        "gallery and log.",
    )
    part: Literal["dev", "test"] = Field(
        default="test", description="Of such a set: dev to choose by, test to judge by; no identity is in both."
    )
    queries: DatasetConfig = Field(description="Images that are searched with; their labels are the identities.")
    gallery: DatasetConfig | None = Field(
        default=None, description="Images that are searched; by default the queries, each one's own item excluded."
    )
    log: DatasetConfig | None = Field(
        default=None,
        description="Further queries, without labels: only those whose answer an update changes are ever labelled, see "
        "'graceful evalset label'.",
    )
    dev: DevConfig | None = Field(
        default=None,
        description="Images that choices are made on: neither trained on nor reported. training.patience and "
        'training.interpolation = "dev" or mixture = "dev" need it.',
    )
    protocol: Literal["open_set", "closed_set"] = Field(
        description="open_set: no identity of it may be in the training set; closed_set: no image of it may be."
    )
    shared_images: Literal["refuse", "drop_from_training"] = Field(
        default="refuse",
        description="closed_set: what to do with training images that are evaluation images too; dropped ones are "
        "counted in every result.",
    )
    cluster: str | None = Field(
        default=None, description="Attribute whose values are resampled together; by default the identity."
    )
    slices: tuple[str, ...] = Field(default=(), description="Attributes of the queries that are reported as slices.")

    @model_validator(mode="before")
    @classmethod
    def _stands_for(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("set"), str):
            return values
        rows: dict[str, Any] = {"source": "csv", "label_columns": ("identity",)}
        part = {"part": (values.get("part", "test"),)}
        return {
            "queries": {**rows, "path": join(values["set"], "queries.csv"), "where": part},
            "gallery": {**rows, "path": join(values["set"], "gallery.csv")},
            **values,
        }


@dataclass(frozen=True)
class EvaluationSet:
    """Q queries, N gallery rows, and L queries of a log, whose identities nobody knows.

    Where queries and gallery are the same rows, a query's own item is excluded. `log_clusters` is None where the
    configuration names no column.
    """

    set_id: str
    queries: LabelledImages
    gallery: LabelledImages
    clusters: NDArray[np.str_]
    slices: dict[str, NDArray[np.str_]]
    log: LabelledImages | None = None
    log_clusters: NDArray[np.str_] | None = None
    log_slices: dict[str, NDArray[np.str_]] = field(default_factory=dict)

    @property
    def images(self) -> tuple[list[str], list[str]]:
        """Content hashes and sources of every image that every generation embeds, each image once."""
        return _each_once(self.queries, self.gallery)

    @property
    def images_with_log(self) -> tuple[list[str], list[str]]:
        """The same and the log, which only the champion and the candidate embed."""
        return _each_once(self.queries, self.gallery, *([self.log] if self.log else []))


def load_evaluation_set(config: EvaluationConfig, known: KnownImages | None = None) -> EvaluationSet:
    """Find the images of an evaluation set; `known` ones are not read. Raises the errors of `load_images`."""
    wanted = tuple(dict.fromkeys([*config.slices, *([config.cluster] if config.cluster else [])]))
    attributes = tuple(dict.fromkeys([*config.queries.attributes, *wanted]))
    queries = load_images(config.queries.model_copy(update={"attributes": attributes}), known)
    gallery = queries if config.gallery is None else load_images(config.gallery, known)
    clusters = queries.labels if config.cluster is None else queries.attributes[config.cluster]
    slices = {name: queries.attributes[name] for name in config.slices}
    log = load_log(config, wanted, known)
    set_id = _digest(queries, gallery, clusters, slices, log)
    if log is None:
        return EvaluationSet(set_id, queries, gallery, clusters, slices)
    log_clusters = None if config.cluster is None else log.attributes[config.cluster]
    log_slices = {name: log.attributes[name] for name in config.slices}
    return EvaluationSet(set_id, queries, gallery, clusters, slices, log, log_clusters, log_slices)


def with_texts(evaluation_set: EvaluationSet, texts: LabelledTexts) -> EvaluationSet:
    """Return the same gallery, searched by labelled texts instead of images: an evaluation set of its own.

    Raises: EmptyDatasetError, where no text names a label of the gallery.
    """
    gallery = evaluation_set.gallery
    if not set(texts.labels.tolist()) & set(gallery.labels.tolist()):
        raise EmptyDatasetError(
            f"searching the evaluation gallery with texts: expected labels that it has, such as "
            f"{', '.join(repr(label) for label in sorted(set(gallery.labels.tolist()))[:3])}, found "
            f"{', '.join(repr(label) for label in sorted(set(texts.labels.tolist()))[:3])}; correct label_columns"
        )
    queries = LabelledImages(texts.sources, texts.labels, texts.content_sha256)
    set_id = _digest(queries, gallery, texts.clusters, {})
    return EvaluationSet(set_id, queries, gallery, texts.clusters, {})


def load_log(
    config: EvaluationConfig, attributes: Sequence[str] = (), known: KnownImages | None = None
) -> LabelledImages | None:
    """The queries of the log, without labels; None where there is no log."""
    named = log_of(config)
    if named is None:
        return None
    wanted = tuple(dict.fromkeys([*named.attributes, *attributes]))
    return load_images(named.model_copy(update={"label_columns": (), "attributes": wanted}), known)


def log_of(config: EvaluationConfig) -> DatasetConfig | None:
    """The log that is configured, or that of the named set."""
    if config.log is not None or config.set is None:
        return config.log
    place = join(config.set, "log.csv")
    return DatasetConfig(source="csv", path=place, label_columns=()) if exists(place) else None


def separate(
    config: EvaluationConfig, training_images: LabelledImages, evaluation_set: EvaluationSet
) -> tuple[LabelledImages, int]:
    """Keep training away from what it is judged by; returns the images to train on, and how many were dropped.

    Raises: OverlapError, where identities (open set) or images (closed set) are shared and not to be dropped.
    """
    if config.protocol == "closed_set" and config.shared_images == "drop_from_training":
        shared = {*evaluation_set.queries.content_sha256, *evaluation_set.gallery.content_sha256}
        keep = np.array([digest not in shared for digest in training_images.content_sha256], bool)
        training_images = training_images.take(keep)
        num_dropped = int((~keep).sum())
    else:
        num_dropped = 0
    by: Literal["identity", "image"] = "identity" if config.protocol == "open_set" else "image"
    for images in (evaluation_set.queries, evaluation_set.gallery):
        assert_disjoint(training_images, images, by=by)
    if evaluation_set.log is not None:
        assert_disjoint(training_images, evaluation_set.log, by="image")
    return training_images, num_dropped


def with_dev(
    config: EvaluationConfig,
    images: LabelledImages,
    evaluation_set: EvaluationSet,
    known: KnownImages | None = None,
) -> tuple[LabelledImages, LabelledImages | None]:
    """Part the images left for training (of `separate`) into those to train on and the dev part, if one is configured.

    Of dev images of their own, `known` ones are not read.

    An identity of the dev part may lie in the gallery of an open set, as one that no query looks for.

    Raises: what `set_aside` raises, and OverlapError where the dev part shares identities with the queries (open set)
    or images with queries or gallery (closed set).
    """
    if config.dev is None:
        return images, None
    kept, dev = set_aside(config.dev, config.protocol, images, known)
    if config.protocol == "open_set":
        assert_disjoint(dev, evaluation_set.queries, by="identity")
    else:
        for judging in (evaluation_set.queries, evaluation_set.gallery):
            assert_disjoint(dev, judging, by="image")
    if evaluation_set.log is not None:
        assert_disjoint(dev, evaluation_set.log, by="image")
    return kept, dev


def evaluation_set_uri(root: str, set_id: str) -> str:
    """Location of a stored set."""
    return join(root, "evaluation_sets", set_id)


def named_in_set(location: str) -> set[str]:
    """Content hashes of the images of a stored set."""
    filesystem, path = resolve(join(location, "rows.parquet"))
    return set(pq.read_table(path, columns=["content_sha256"], filesystem=filesystem)["content_sha256"].to_pylist())


def queries_of_set(root: str, set_id: str) -> tuple[set[str], set[str]]:
    """Clusters and content hashes of the queries of a stored set."""
    filesystem, path = resolve(join(evaluation_set_uri(root, set_id), "rows.parquet"))
    rows = pq.read_table(path, columns=["role", "cluster", "content_sha256"], filesystem=filesystem)
    rows = rows.filter(pc.equal(rows["role"], "query"))
    return set(rows["cluster"].to_pylist()), set(rows["content_sha256"].to_pylist())


def save_evaluation_set(root: str, evaluation_set: EvaluationSet) -> str:
    """Store a set below `root` unless it is there; returns its location."""
    location = evaluation_set_uri(root, evaluation_set.set_id)
    if not exists(join(location, "rows.parquet")):
        filesystem, path = resolve(location)
        filesystem.create_dir(path, recursive=True)
        parts = [
            _rows("query", evaluation_set.queries, evaluation_set.clusters, evaluation_set.slices),
            _rows("gallery", evaluation_set.gallery, evaluation_set.gallery.labels, {}),
        ]
        if (log := evaluation_set.log) is not None:
            clusters = log.labels if evaluation_set.log_clusters is None else evaluation_set.log_clusters
            parts.append(_rows("log", log, clusters, evaluation_set.log_slices))
        table = pa.concat_tables(parts, promote_options="default")
        table = table.replace_schema_metadata({"format_version": FORMAT_VERSION})
        pq.write_table(table, f"{path}/rows.parquet", filesystem=filesystem)
    return location


def near_copy_share(root: str, evaluation_set: EvaluationSet) -> float | None:
    """Share of the queries that have a near copy in the gallery: any model finds it, and the share says nothing.

    None where no picture tells (small or nearly flat ones, or none that can be decoded). Found once per stored set.
    """
    location = join(evaluation_set_uri(root, evaluation_set.set_id), "near_copies.json")
    if not exists(location):
        queries, gallery = evaluation_set.queries, evaluation_set.gallery
        bits, known = hash_pictures(queries.sources)
        rows, rows_known = (bits, known) if gallery is queries else hash_pictures(gallery.sources)
        contents, stored = np.array(queries.content_sha256), np.array(gallery.content_sha256)
        near = has_near_copy(bits[known], rows[rows_known], contents[known].tolist(), stored[rows_known].tolist())
        counts = {"queries": len(queries), "with_hash": int(known.sum()), "with_near_copy": int(near.sum())}
        write_json(location, counts)
    counted = read_json(location)
    return counted["with_near_copy"] / counted["queries"] if counted["with_hash"] else None


def sources_in_set(location: str) -> dict[str, str]:
    """Where the images of a stored set are, by content hash."""
    filesystem, path = resolve(join(location, "rows.parquet"))
    rows = pq.read_table(path, columns=["content_sha256", "source"], filesystem=filesystem)
    return dict(zip(rows["content_sha256"].to_pylist(), rows["source"].to_pylist(), strict=True))


def _each_once(*parts: LabelledImages) -> tuple[list[str], list[str]]:
    unique = {
        digest: source for images in parts for digest, source in zip(images.content_sha256, images.sources, strict=True)
    }
    return list(unique), list(unique.values())


def _rows(
    role: str, images: LabelledImages, clusters: NDArray[np.str_], slices: dict[str, NDArray[np.str_]]
) -> pa.Table:
    return pa.table(
        {
            "role": [role] * len(images),
            "source": images.sources,
            "content_sha256": images.content_sha256,
            "identity": images.labels.tolist(),
            "cluster": clusters.tolist(),
            **{f"slice_{name}": values.tolist() for name, values in slices.items()},
        }
    )


def _digest(
    queries: LabelledImages,
    gallery: LabelledImages,
    clusters: NDArray[np.str_],
    slices: dict[str, NDArray[np.str_]],
    log: LabelledImages | None = None,
) -> str:
    parts: Sequence[object] = (
        queries.content_sha256, queries.labels.tolist(), gallery.content_sha256, gallery.labels.tolist(),
        clusters.tolist(), {name: values.tolist() for name, values in sorted(slices.items())},
        *([] if log is None else [log.content_sha256, {n: v.tolist() for n, v in sorted(log.attributes.items())}]),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
