"""Chains of generations for the comparison of methods: trained by the project's own jobs, kept as vectors.

`python -m benchmarks.chains FOLDER` trains what is missing, chain by chain, on fixed subsets of Omniglot and CIFAR-100
(GRACEFUL_DATA), each chain once for every seed; `python -m benchmarks.comparison FOLDER` measures them. A subset, so
that a chain takes about a minute of one core; `--full` takes the sizes of examples/omniglot.toml and cifar100.toml.
Omniglot is also cut into long chains, of ten generations and of thirty, one alphabet each.

What a chain leaves: for every generation its unit vectors of the evaluation images, those of up to 3,000 training
images by itself and by the one before it, its classifier rows, and the processor seconds of its training.
"""

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.live import live_predecessors
from graceful.indexing.embedding_files import write_embedding_file
from graceful.training.datasets import DatasetConfig, column_values, load_images
from graceful.training.encoder import open_encoder, read_classifier
from graceful.training.generation import PredecessorRef
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, read_manifest, write_manifest

SEEDS = (1, 2, 3)
SAMPLE = 3_000
MAX_NFR = 0.05  # the limit of examples/omniglot.toml and cifar100.toml


@dataclass(frozen=True)
class Data:
    """A growing training set, and the images that all its generations are judged on."""

    name: str
    counts: tuple[int, ...]
    recipe: dict[str, Any]
    full: dict[str, Any]
    """What the recipe of the example has instead."""
    is_closed: bool = False
    chains: tuple[str, ...] | None = None
    """Those that are trained on it; None: all."""

    def training(self, count: int, full: bool) -> LabelledImages:
        """The images of one generation."""
        return load_images(training_config(self, count, full))

    def evaluation(self) -> tuple[LabelledImages, LabelledImages | None]:
        """Queries and gallery; None: the queries are the gallery, their own item left out."""
        root = os.environ["GRACEFUL_DATA"]
        if self.is_closed:
            where = {"source": "parquet", "path": f"{root}/cifar100/test.parquet", "label_columns": ["fine_name"]}
            return load_images(DatasetConfig.model_validate({**where, "max_per_label": 40})), None
        drawers = ({"min": 1, "max": 5}, {"min": 11, "max": 15})
        base = {"source": "parquet", "path": f"{root}/omniglot/evaluation.parquet"}
        base["label_columns"] = ["alphabet", "character"]
        queries, gallery = (
            load_images(DatasetConfig.model_validate({**base, "where": {"drawer": drawer}})) for drawer in drawers
        )
        return queries, gallery

    def in_dev(self, images: LabelledImages) -> NDArray[np.bool_]:
        """Which evaluation images choices are made on: those of half of the identities, or half of the images."""
        if self.is_closed:
            return np.array([int(digest[8:12], 16) % 2 == 0 for digest in images.content_sha256])
        names = np.unique(images.labels)
        chosen = set(np.random.default_rng(5).permutation(names)[: len(names) // 2].tolist())
        return np.array([label in chosen for label in images.labels])


OMNIGLOT = Data(
    "omniglot",
    (6, 12, 18, 24, 30),
    {
        "width": 128, "epochs": 6, "batch_size": 96, "mixture": 0.0, "max_lr": 1e-3,
        "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [16, 32, 64, 128]}},
        "preprocessing": {"image_size": 20, "channels": 1, "mean": [0.92], "std": [0.22]},
        "augmentation": {"kind": "affine"},
    },
    {
        "batch_size": 256, "backbone": {"name": "small_cnn"},
        "preprocessing": {"image_size": 28, "channels": 1, "mean": [0.92], "std": [0.22]},
    },
)  # fmt: skip
CIFAR = Data(
    "cifar100",
    (20, 40, 60, 80, 100),
    {
        "width": 128, "epochs": 8, "batch_size": 96, "mixture": 0.0, "max_lr": 1e-3,
        "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [16, 32, 64, 128]}},
        "preprocessing": {"image_size": 32, "channels": 3, "mean": [0.507, 0.487, 0.441], "std": [0.267, 0.256, 0.276]},
        "augmentation": {"kind": "crop_flip"},
    },
    {"batch_size": 256, "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [32, 32, 64, 128]}}},
    is_closed=True,
)  # fmt: skip
LONG = (
    "ract alone, b = 0.5",
    "initialised",
    "ract alone, b = 0.5, latest two",
    "ract alone, summed, b = 0.5",
    "ract alone, summed by need, b = 0.5",
    "ract alone, b = 0.7",
    "ract alone, b = 0.5, rate 0.002",
    "ract alone, b = 0.5, rate 0.003",
    "initialised, rate 0.003",
    "ract alone, summed, b = 0.5, rate 0.003",
    "ract alone, weight 2, b = 0.5, rate 0.003",
    "ract alone, weight 4, b = 0.5, rate 0.003",
    "ract alone, weight 8, b = 0.5, rate 0.003",
    "ract alone, a = 0",
    "ours, a = 0, b = 0.5",
    "ours, a = 0.4",
)
TEN = replace(OMNIGLOT, name="omniglot-10", counts=tuple(range(3, 31, 3)), chains=LONG)
THIRTY = replace(OMNIGLOT, name="omniglot-30", counts=tuple(range(1, 31)), chains=LONG)
DATA = {data.name: data for data in (OMNIGLOT, CIFAR, TEN, THIRTY)}


@dataclass(frozen=True)
class Chain:
    """A recipe that is trained generation by generation."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    without_parent: bool = False
    latest: int | None = None
    """How many predecessors it is trained against, the others being retired; None: all."""
    is_live: bool = False
    """Whether the predecessors' networks run in every step."""


def _only(*constraints: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"constraints": list(constraints), **changes}


CROSS = {"name": "cross_contrast", "reduction": "sum"}
RACT = {"name": "ract", "reduction": "mean"}
# The papers' balance: 0.1 CE + 0.9 HOC; 5 CE with label smoothing + 10 CE of the prefix + 5 of its distance.
HOC = {"name": "hoc", "weight": 0.9, "reduction": "mean"}
SIMPLEX = {"name": "simplex", "weight": 0.1}
OCA = {"name": "oca", "against": "latest"}
ROTATED = {"name": "additive_margin", "rotation": True, "label_smoothing": 0.1, "weight": 5.0}
OURS = (CROSS, RACT)
CHAINS = {
    chain.name: chain
    for chain in (
        Chain("ours, a = 0", _only(*OURS, interpolation=0.0)),
        Chain("initialised", _only(interpolation=0.0)),
        Chain("from scratch", _only(start="scratch", rows_from_parent=False, interpolation=0.0), without_parent=True),
        Chain("ours, a = 0.4", _only(*OURS, interpolation=0.4)),
        Chain("hoc, fixed simplex", _only(HOC, interpolation=0.0, head=SIMPLEX, width=512)),
        Chain("oca, against the latest", _only(OCA, interpolation=0.0, head=ROTATED)),
        Chain("mixbct", _only({"name": "mixbct"}, interpolation=0.0)),
        Chain("ours, a = 0, b = 0.5", _only(*OURS, interpolation=0.0, mixture=0.5)),
        Chain("ours, a = 0, b = 0.5, weight 50", _only(*OURS, interpolation=0.0, mixture=0.5, mixture_weight=50.0)),
        Chain("initialised, b = 0.5", _only(interpolation=0.0, mixture=0.5)),
        Chain("bct alone, a = 0", _only({"name": "bct"}, interpolation=0.0)),
        Chain("ract alone, a = 0", _only(RACT, interpolation=0.0)),
        Chain("ract alone, b = 0.5", _only(RACT, interpolation=0.0, mixture=0.5)),
        Chain("ract alone, summed, b = 0.5", _only({**RACT, "reduction": "sum"}, interpolation=0.0, mixture=0.5)),
        Chain(
            "ract alone, summed by need, b = 0.5",
            _only({**RACT, "reduction": "sum"}, interpolation=0.0, mixture=0.5, predecessor_weights="dual"),
        ),
        Chain("ract alone, b = 0.7", _only(RACT, interpolation=0.0, mixture=0.7)),
        Chain("ract alone, b = 0.5, latest two", _only(RACT, interpolation=0.0, mixture=0.5), latest=2),
        Chain("ract alone, a = 0, live predecessors", _only(RACT, interpolation=0.0), is_live=True),
        Chain("ract alone, b = 0.5, twice the epochs", _only(RACT, interpolation=0.0, mixture=0.5, epochs=2.0)),
        Chain("ract alone, a = 0.2", _only(RACT, interpolation=0.2)),
        Chain("ract alone, a on dev", _only(RACT, interpolation="dev")),
        Chain("ract alone, b on dev", _only(RACT, interpolation=0.0, mixture="dev")),
        Chain("l2", _only({"name": "l2"}, interpolation=0.0)),
        Chain("bct with uncertainty, a = 0", _only({"name": "bct", "uncertainty": True}, interpolation=0.0)),
        Chain("repulsion, a = 0", _only({"name": "repulsion"}, interpolation=0.0)),
        Chain(
            "class margin with focal distillation, a = 0",
            _only({"name": "focal_kl", "against": "latest"}, interpolation=0.0, head={"new_class_margin": 2.0}),
        ),
        Chain("cross contrast alone, a = 0", _only(CROSS, interpolation=0.0)),
        Chain("initialised, twice the epochs", _only(interpolation=0.0, epochs=2.0)),
        Chain(
            "from scratch, twice the epochs",
            _only(start="scratch", rows_from_parent=False, interpolation=0.0, epochs=2.0),
            without_parent=True,
        ),
        Chain("ract alone, b = 0.5, rate 0.003", _only(RACT, interpolation=0.0, mixture=0.5, max_lr=3e-3)),
        Chain("ract alone, b = 0.5, rate 0.002", _only(RACT, interpolation=0.0, mixture=0.5, max_lr=2e-3)),
        Chain("ract alone, b = 0.5, rate 0.005", _only(RACT, interpolation=0.0, mixture=0.5, max_lr=5e-3)),
        Chain(
            "ract alone, summed, b = 0.5, rate 0.003",
            _only({**RACT, "reduction": "sum"}, interpolation=0.0, mixture=0.5, max_lr=3e-3),
        ),
        *(
            Chain(
                f"ract alone, weight {weight}, b = 0.5, rate 0.003",
                _only({**RACT, "weight": float(weight)}, interpolation=0.0, mixture=0.5, max_lr=3e-3),
            )
            for weight in (2, 4, 8)
        ),
        Chain("initialised, b = 0.5, rate 0.003", _only(interpolation=0.0, mixture=0.5, max_lr=3e-3)),
        Chain("initialised, rate 0.003", _only(interpolation=0.0, max_lr=3e-3)),
    )
}


def vectors_file(folder: Path, data: Data, chain: Chain, seed: int) -> Path:
    """Where the vectors of a chain are."""
    return folder / data.name / f"{chain.name.replace(' ', '_').replace(',', '')}-seed{seed}.npz"


def train_chain(folder: Path, data: Data, chain: Chain, seed: int, full: bool = False) -> Path:
    """Train a chain, or find it trained; returns the file of its vectors."""
    place = vectors_file(folder, data, chain, seed)
    if place.exists():
        return place
    kept: dict[str, Any] = {}
    queries, gallery = data.evaluation()
    predecessors: list[PredecessorRef] = []
    parent: str | None = None
    for number, count in enumerate(data.counts, start=1):
        manifest = folder / data.name / f"manifest-{count}.parquet"
        if not manifest.exists():
            write_manifest(str(manifest), data.training(count, full))
        images = read_manifest(str(manifest))
        started = time.process_time()
        recipe = {**data.recipe, **(data.full if full else {}), **chain.changes, "seed": seed}
        if isinstance(recipe["epochs"], float):
            recipe["epochs"] = int(recipe["epochs"] * data.recipe["epochs"])
        known = predecessors[-chain.latest :] if chain.latest is not None else predecessors
        references = [reference_to(folder, data, f"{count}", reference, images) for reference in known]
        dev = partial(dev_part, folder, data, queries, gallery, known)
        live = chain.is_live and bool(references)
        job = training_job(folder / data.name, manifest, recipe, number, parent, references, dev, live)
        with live_predecessors() if live else contextlib.nullcontext():
            card = run_training(job)
        uri = f"{job.output_uri}/{card.generation_id}"
        kept[f"seconds/{number}"] = time.process_time() - started
        encode = open_encoder(uri)
        for part, shown in (("queries", queries), ("gallery", gallery)):
            if shown is not None:
                kept[f"{part}/{number}"] = vectors_of(encode, shown.sources)
        stored = read_classifier(uri)
        assert stored is not None
        kept[f"rows/{number}"], kept[f"classes/{number}"] = stored[1].numpy(), np.array(stored[0].classes)
        sample = np.random.default_rng(number).permutation(len(images))[:SAMPLE]
        kept[f"sample/{number}"] = np.array(images.content_sha256)[sample]
        chosen = [images.sources[i] for i in sample]
        kept[f"training/{number}/{number}"] = vectors_of(encode, chosen)
        if predecessors:
            kept[f"training/{number}/{number - 1}"] = vectors_of(open_encoder(predecessors[-1].generation_uri), chosen)
        predecessors.append(PredecessorRef(generation_id=card.generation_id, generation_uri=uri, embeddings_uri=""))
        parent = None if chain.without_parent else uri
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(place, **kept)
    return place


def training_config(data: Data, count: int, full: bool) -> DatasetConfig:
    root = os.environ["GRACEFUL_DATA"]
    if data.is_closed:
        path, column, labels = f"{root}/cifar100/train.parquet", "fine_name", ["fine_name"]
        further: dict[str, Any] = {"max_per_label": 200 if full else 50}
    else:
        path, column, labels = f"{root}/omniglot/background.parquet", "alphabet", ["alphabet", "character"]
        further = {}
    whole = {"source": "parquet", "path": path, "label_columns": labels}
    names = column_values(DatasetConfig.model_validate(whole), column)[:count]
    where: dict[str, Any] = {column: names}
    if not data.is_closed and not full:
        where["character"] = [name for alphabet in names for name in _characters(whole, alphabet)[:14]]
    return DatasetConfig.model_validate({**whole, "where": where, **further})


def _characters(whole: dict[str, Any], alphabet: str) -> list[str]:
    return column_values(DatasetConfig.model_validate({**whole, "where": {"alphabet": [alphabet]}}), "character")


def training_job(
    folder: Path,
    manifest: Path,
    recipe: dict[str, Any],
    number: int,
    parent: str | None,
    references: list[PredecessorRef],
    dev: Callable[[], DevPart],
    live: bool = False,
) -> TrainingJob:
    """The job of generation `number`; what is asked of `dev` is what a recipe chooses on, where it chooses."""
    config = TrainingConfig.model_validate(
        recipe if parent is not None else {**recipe, "start": "scratch", "interpolation": 0.0, "mixture": 0.0}
    )
    # The first generation is the same for every chain of one recipe: named by what goes into it, it is trained once.
    what = [
        config.model_dump(mode="json"),
        parent,
        [reference.generation_id for reference in references],
        manifest.name,
    ]
    if number == 1:
        shown = config.model_copy(update={"constraints": (), "rows_from_parent": True, "mixture": 0.0})
        what[0] = shown.model_dump(mode="json")
    if live:
        what.append("live")
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return TrainingJob(
        config=config, name=f"g{number}-{digest}", manifest_uri=str(manifest), output_uri=str(folder / "generations"),
        ordinal=number, parent_uri=parent, predecessors=tuple(references), storage_uri=str(folder / "runs"),
        dev=dev() if config.needs_dev else None,
    )  # fmt: skip


def dev_part(
    folder: Path,
    data: Data,
    queries: LabelledImages,
    gallery: LabelledImages | None,
    predecessors: list[PredecessorRef],
) -> DevPart:
    shown = [part.take(data.in_dev(part)) for part in (queries, gallery) if part is not None]
    images = LabelledImages(
        sources=[source for part in shown for source in part.sources],
        labels=np.concatenate([part.labels for part in shown]),
        content_sha256=[digest for part in shown for digest in part.content_sha256],
    )
    manifest = folder / data.name / "dev.parquet"
    write_manifest(str(manifest), images)
    references = tuple(reference_to(folder, data, "dev", reference, images) for reference in predecessors)
    return DevPart(manifest_uri=str(manifest), predecessors=references, max_flips=MAX_NFR)


def reference_to(folder: Path, data: Data, name: str, known: PredecessorRef, images: LabelledImages) -> PredecessorRef:
    place = folder / data.name / "caches" / f"{known.generation_id}-{name}.parquet"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        vectors = vectors_of(open_encoder(known.generation_uri), images.sources)
        write_embedding_file(str(place), pa.table({"content_sha256": images.content_sha256}), vectors)
    return known.model_copy(update={"embeddings_uri": str(place)})


def vectors_of(encode: Any, sources: list[str]) -> np.ndarray:
    vectors, failures = encode(sources)
    assert not failures, failures
    return np.asarray(vectors, np.float32)


def main() -> None:
    """Train every chain that is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=sorted(DATA), action="append")
    parser.add_argument("--chain", choices=sorted(CHAINS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--full", action="store_true", help="The sizes of the examples, for a machine with a GPU.")
    wanted = parser.parse_args()
    for name in wanted.chain or CHAINS:
        for seed in wanted.seed or SEEDS:
            for data in wanted.data or DATA:
                chosen = DATA[data].chains
                if name not in (chosen or CHAINS) or (chosen is None and CHAINS[name].latest is not None):
                    continue
                started = time.process_time()
                train_chain(wanted.folder, DATA[data], CHAINS[name], seed, wanted.full)
                print(f"{data}, {name}, seed {seed}: {time.process_time() - started:.0f} s of processor", flush=True)


if __name__ == "__main__":
    main()
