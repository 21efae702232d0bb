"""Fewer flips by training: ordinary updates, focal distillation, LQF and weight interpolation beside each other.

`python -m benchmarks.congruent FOLDER` trains a predecessor and then one update in every way, for 5 and 10 images a
class and for all, on the subsets of `benchmarks.chains` (GRACEFUL_DATA), and writes benchmarks/results-congruent.json;
`python -m benchmarks.tables` makes the tables of docs/howto/congruent.md of it. What is trained is kept in FOLDER.

The predecessor knows the classes of the second generation of a chain, the update those of the fourth. Every update
takes as many steps. Choices (the share of the parent's weights, a learning rate) are made on dev, and what is printed
comes from test; flips of the classifier are counted on held-out images of the classes that the predecessor knows.
"""

import argparse
import datetime
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.chains import (
    CIFAR,
    OMNIGLOT,
    OURS,
    RACT,
    SEEDS,
    Data,
    dev_part,
    reference_to,
    training_job,
    vectors_of,
)
from benchmarks.comparison import summary
from benchmarks.harness import processor
from benchmarks.ways import Part, parts
from graceful.training.datasets import DatasetConfig, column_values, load_images
from graceful.training.encoder import open_encoder, read_classifier
from graceful.training.generation import PredecessorRef
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest

RESULTS = Path(__file__).with_name("results-congruent.json")
DATA = {data.name: data for data in (OMNIGLOT, CIFAR)}
STEP, LAST = 1, 3  # places in a chain's counts: the predecessor's classes, and the update's
AMOUNTS: dict[str, int | None] = {"5 images": 5, "10 images": 10, "all": None}
FOLDS = {"5 images": 4, "10 images": 2, "all": 1}  # epochs, so that every update takes about as many steps
CHARACTERS, DRAWERS = 14, 15  # of each alphabet; the drawers after these are held out
SLOPE = 0.1


@dataclass(frozen=True)
class Way:
    """A way of training an update."""

    name: str
    changes: dict[str, Any]
    constrained: bool = False
    from_parent: bool = True
    slope: float = SLOPE
    amounts: tuple[str, ...] = tuple(AMOUNTS)
    tried: tuple[dict[str, Any], ...] = ({},)
    """Further changes, of which those with the best self-test on dev are taken."""


FOCAL = {"name": "focal_kl", "against": "latest"}
BARE: dict[str, Any] = {"constraints": [], "mixture": 0.0}
ABLATED = ("10 images",)
WAYS = (
    Way("from scratch", {**BARE, "start": "scratch", "rows_from_parent": False}, from_parent=False),
    Way("fine tuned", BARE),
    Way("fine tuned, learning rate on dev", BARE, tried=tuple({"max_lr": rate} for rate in (3e-4, 1e-3, 3e-3))),
    Way("fine tuned, weights interpolated, a on dev", {**BARE, "interpolation": "dev"}, constrained=True),
    Way("recipe R", {"constraints": OURS, "mixture": 0.0}, constrained=True),
    Way("recipe R, focal distillation", {"constraints": [*OURS, FOCAL], "mixture": 0.0}, constrained=True),
    Way("recipe R, mixture", {"constraints": OURS, "mixture": 0.5}, constrained=True),
    Way("RACT alone", {"constraints": [RACT], "mixture": 0.0}, constrained=True),
    Way("RACT alone, mixture (the default)", {"constraints": [RACT], "mixture": 0.5}, constrained=True),
    Way("RACT alone, focal distillation", {"constraints": [RACT, FOCAL], "mixture": 0.0}, constrained=True),
    Way("LQF", {**BARE, "lqf": {}}),
    Way("LQF, learning rate on dev", BARE, tried=tuple({"lqf": {"max_lr": rate}} for rate in (0.03, 0.1, 0.3))),
    Way("LQF, squared loss", {**BARE, "lqf": {"loss": "squared"}}),
    Way("LQF without leaky ReLU", {**BARE, "lqf": {}}, slope=0.0, amounts=ABLATED),
    Way("LQF without K-FAC", {**BARE, "lqf": {"optimizer": "adam"}}, amounts=ABLATED),
)


def images_of(data: Data, count: int, per_class: int | None, held_out: bool) -> LabelledImages:
    """Training images of the first `count` alphabets or classes, or images of the same classes that none trains on."""
    root = os.environ["GRACEFUL_DATA"]
    if data.is_closed:
        path, labels, column = f"{root}/cifar100/{{}}.parquet", ["fine_name"], "fine_name"
        most: int | None = 40 if held_out else per_class or 50
    else:
        path, labels, column = f"{root}/omniglot/background.parquet", ["alphabet", "character"], "alphabet"
        most = None if held_out else per_class
    whole = {"source": "parquet", "path": path.format("train"), "label_columns": labels}
    names = column_values(DatasetConfig.model_validate(whole), column)[:count]
    where: dict[str, Any] = {column: names}
    if not data.is_closed:
        chosen = [column_values(_within(whole, name), "character")[:CHARACTERS] for name in names]
        where["character"] = sorted({character for characters in chosen for character in characters})
        where["drawer"] = {"min": DRAWERS + 1, "max": 20} if held_out else {"min": 1, "max": DRAWERS}
    source = {**whole, "path": path.format("test" if held_out else "train"), "where": where}
    return load_images(DatasetConfig.model_validate({**source, **({"max_per_label": most} if most else {})}))


def _within(whole: dict[str, Any], alphabet: str) -> DatasetConfig:
    return DatasetConfig.model_validate({**whole, "where": {"alphabet": [alphabet]}})


class Bench:
    """One data set: the predecessors and updates that were trained on it, and what they are judged by."""

    def __init__(self, folder: Path, data: Data) -> None:
        self.folder, self.data = folder, data
        (folder / data.name).mkdir(parents=True, exist_ok=True)
        self.queries, self.gallery = data.evaluation()
        self._parts = parts(data, self.queries, self.gallery)
        self._encoded: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._held_out = images_of(data, data.counts[STEP], None, held_out=True)

    def measured(self, way: Way, amount: str, seed: int) -> dict[str, float]:
        """One update; shares of 1, and the processor seconds of its training."""
        first = self._predecessor(way.slope, seed)
        manifest, images = self._manifest(LAST, AMOUNTS[amount])
        known = PredecessorRef(generation_id=first.rsplit("/", 1)[1], generation_uri=first, embeddings_uri="")
        references = []
        if way.constrained:
            references.append(reference_to(self.folder, self.data, f"congruent-{amount}", known, images))
        epochs = self.data.recipe["epochs"] * FOLDS[amount]
        recipe = {**self._recipe(way.slope, seed), "epochs": epochs, **way.changes}
        dev = partial(dev_part, self.folder, self.data, self.queries, self.gallery, [known])
        place, parent = self.folder / self.data.name, first if way.from_parent else None
        started, made = time.process_time(), []
        for further in way.tried:
            job = training_job(place, manifest, {**recipe, **further}, 2, parent, references, dev)
            made.append(f"{job.output_uri}/{run_training(job).generation_id}")
        seconds = time.process_time() - started
        chosen = max(made, key=self._on_dev)
        return {**self._judged(first, chosen), "seconds": seconds}

    def _predecessor(self, slope: float, seed: int) -> str:
        manifest, _ = self._manifest(STEP, None)
        recipe = {**self._recipe(slope, seed), **BARE, "epochs": 2 * self.data.recipe["epochs"]}
        dev = partial(dev_part, self.folder, self.data, self.queries, self.gallery, [])
        job = training_job(self.folder / self.data.name, manifest, recipe, 1, None, [], dev)
        return f"{job.output_uri}/{run_training(job).generation_id}"

    def _recipe(self, slope: float, seed: int) -> dict[str, Any]:
        backbone = self.data.recipe["backbone"]
        leaky = {**backbone, "kwargs": {**backbone["kwargs"], "negative_slope": slope}}
        return {**self.data.recipe, "interpolation": 0.0, "backbone": leaky, "seed": seed}

    def _manifest(self, place: int, per_class: int | None) -> tuple[Path, LabelledImages]:
        images = images_of(self.data, self.data.counts[place], per_class, held_out=False)
        path = self.folder / self.data.name / f"congruent-{self.data.counts[place]}-{per_class or 'all'}.parquet"
        if not path.exists():
            write_manifest(str(path), images)
        return path, images

    def _judged(self, first: str, second: str) -> dict[str, float]:
        test = self._parts["test"]
        (old_queries, old_rows), (queries, rows) = self._vectors(first, test), self._vectors(second, test)
        before, after = test.right(old_queries @ old_rows.T), test.right(queries @ rows.T)
        crossed = test.right(queries @ old_rows.T)
        was, is_now = self._classified(first), self._classified(second)
        return {
            "self_test": float(after.mean()),
            "gain": float(after.mean() - before.mean()),
            "cross_test": float(crossed.mean()),
            "cross_gain": float(crossed.mean() - before.mean()),
            "nfr": float((before & ~after).mean()),
            "classified": float(is_now.mean()),
            "classifier_nfr": float((was & ~is_now).mean()),
        }

    def _on_dev(self, generation: str) -> float:
        dev = self._parts["dev"]
        queries, rows = self._vectors(generation, dev)
        return float(dev.right(queries @ rows.T).mean())

    def _vectors(self, generation: str, part: Part) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of queries and gallery of one part; every generation is encoded once."""
        if generation not in self._encoded:
            encode = open_encoder(generation)
            queries = vectors_of(encode, self.queries.sources)
            gallery = queries if self.gallery is None else vectors_of(encode, self.gallery.sources)
            self._encoded[generation] = queries, gallery
        queries, gallery = self._encoded[generation]
        return queries[part.queries], gallery[part.gallery]

    def _classified(self, generation: str) -> NDArray[np.bool_]:
        """Which held-out images a generation's own classifier names rightly, among all classes that it knows."""
        stored = read_classifier(generation)
        assert stored is not None
        classes, rows = np.array(stored[0].classes), stored[1].numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        best = (vectors_of(open_encoder(generation), self._held_out.sources) @ rows.T).argmax(axis=1)
        return np.asarray(classes[best] == self._held_out.labels)


def main() -> None:
    """Train and measure every update that is not in the results yet; with --way anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", choices=[way.name for way in WAYS], action="append", help="Only these; others stay.")
    parser.add_argument("--data", choices=DATA, action="append", help="Only these; others stay.")
    parser.add_argument("--amount", choices=sorted(AMOUNTS), action="append", help="Only these; others stay.")
    wanted = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    benches = {data: Bench(wanted.folder, DATA[data]) for data in wanted.data or DATA}
    for amount in wanted.amount or AMOUNTS:
        for data, bench in benches.items():
            for way in WAYS:
                if amount not in way.amounts or (wanted.way and way.name not in wanted.way):
                    continue
                key = {"data": data, "images": amount, "way": way.name}
                others = [row for row in stored["rows"] if any(row[name] != value for name, value in key.items())]
                if not wanted.way and len(others) < len(stored["rows"]):
                    continue
                found = summary([bench.measured(way, amount, seed) for seed in SEEDS])
                print(key, json.dumps(found), flush=True)
                today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
                about = {"measured": today, "hardware": f"{os.cpu_count()} x {processor()}"}
                stored = {"rows": [*others, {**key, **about, **found}]}
                RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
