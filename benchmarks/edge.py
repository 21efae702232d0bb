"""A small model in the space of a large one: three ways to choose its architecture, and what it loses.

`python -m benchmarks.edge FOLDER` trains two generations of a large network on subsets of Omniglot and of CIFAR-100
(GRACEFUL_DATA, as `benchmarks.chains`), then for each seed chooses an edge network with a 20th of its multiply-adds by
evolution in a super-net, by random search in the same super-net, and by a sweep of widths, each for about as many
seconds of processor. What each chose is trained alike, as a variant, and reported on images that nothing was chosen
on. Every row is stored in benchmarks/results-edge.json as it comes, and not measured again; `python -m
benchmarks.tables` makes the tables of docs/howto/edge.md of it. What is trained is kept in FOLDER.

Seconds are of processor, one thread: of a whole training with the reading of its images, or of measuring networks.
"""

import argparse
import datetime
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.chains import CIFAR, OMNIGLOT, SEEDS, Data, dev_part, reference_to, training_job, vectors_of
from benchmarks.harness import processor
from benchmarks.ways import Part, parts
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.settings.config import ClusterConfig
from graceful.flows.settings.variants import VariantConfig
from graceful.training.architecture import Architecture, Candidate, SearchConfig, best
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, read_manifest, write_manifest
from graceful.training.search import cost_of, search
from graceful.training.supernet import supernet_recipe

RESULTS = Path(__file__).with_name("results-edge.json")
FEWER = 20
"""Times fewer multiply-adds than the large network."""
CLOUD_WIDTHS = (64, 128, 256, 512)


def _with_a_large_network(data: Data, counts: tuple[int, int]) -> Data:
    """Two generations of it; `counts`: what is known to the older, and to the newer."""
    large = {"name": "small_cnn", "kwargs": {"block_widths": list(CLOUD_WIDTHS)}}
    return replace(
        data, name=f"{data.name}-edge", counts=counts, recipe={**data.recipe, "epochs": 8, "backbone": large}
    )


DATA = {
    "omniglot": _with_a_large_network(OMNIGLOT, (18, 30)),
    "cifar100": _with_a_large_network(CIFAR, (60, 100)),
}
IMAGE_SIZES = {"omniglot": (16, 20), "cifar100": (24, 32)}
EPOCHS, MAX_LR = {"omniglot": 24, "cifar100": 48}, 5e-3  # of every edge network that is reported
SWEPT = (0.14, 0.18, 0.21)  # times the large network's widths
SWEEP_EPOCHS = 24
EVALUATIONS, DRAWN = 36, 10
WAYS = ("evolution", "random search", "width sweep")


def space(image_sizes: tuple[int, ...], limit: int, drawn: int) -> SearchConfig:
    """The space of both searches; `drawn`: networks before any is changed."""
    return SearchConfig(
        block_widths=((4, 8, 12, 16), (12, 16, 24, 32), (24, 32, 48, 64), (48, 64, 96, 128)),
        image_sizes=image_sizes,
        max_multiply_adds=limit,
        epochs=24,
        evaluations=EVALUATIONS,
        population=drawn,
    )


@dataclass(frozen=True)
class Found:
    """What a way chose, the reward it chose it by, and what choosing took."""

    architecture: Architecture
    reward: float
    seconds: float
    tried: int


class Bench:
    """The generations and edge networks of one data set and seed."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        self.name, self.seed, self.data = name, seed, DATA[name]
        self.folder, self.place = folder, folder / self.data.name
        self.place.mkdir(parents=True, exist_ok=True)
        self.queries, self.gallery = self.data.evaluation()
        self._parts = parts(self.data, self.queries, self.gallery)
        self._known: list[PredecessorRef] = []
        self.recipe = TrainingConfig.model_validate({**self.data.recipe, "seed": seed, "interpolation": 0.0})
        self.limit = cost_of(self.recipe, self._plain(1.0), timed=False).multiply_adds // FEWER

    def clouds(self) -> dict[str, Any]:
        """Train both generations; their self-tests on test, and what the newer one's training took."""
        for number, count in enumerate(self.data.counts, start=1):
            manifest, images = self._manifest(count)
            references = [self._laid(known, count, images) for known in self._known]
            parent = self._known[-1].generation_uri if self._known else None
            recipe = self.recipe.model_dump(mode="json")
            job = training_job(self.place, manifest, recipe, number, parent, references, self._no_dev)
            generation, seconds = self._trained(job)
            self._known.append(generation)
        older, newer = self._known
        cost = cost_of(self.recipe, self._plain(1.0), timed=False)
        return {
            "self_test": self._right(newer, newer),
            "self_test_before": self._right(older, older),
            "on_older": self._right(newer, older),
            "multiply_adds": cost.multiply_adds,
            "parameters": cost.num_parameters,
            "seconds": seconds,
        }

    def choose(self, way: str) -> Found:
        """Choose an edge network on dev."""
        return self._swept() if way == "width sweep" else self._searched(way)

    def reported(self, found: Found) -> dict[str, Any]:
        """Train what was chosen and measure it on test."""
        newer, older = self._known[-1], self._known[0]
        edge, seconds = self._trained(self._edge_job(found.architecture, EPOCHS[self.name]))
        cost = cost_of(self.recipe, found.architecture, timed=False)
        own, theirs = self._right(edge, edge), self._right(edge, newer)
        return {
            "architecture": found.architecture.model_dump(mode="json"),
            "tried": found.tried,
            "dev_reward": found.reward,
            "choosing_seconds": found.seconds,
            "self_test": own,
            "cross_test": theirs,
            "reward": own * theirs,
            "on_older": self._right(edge, older),
            "multiply_adds": cost.multiply_adds,
            "parameters": cost.num_parameters,
            "seconds": seconds,
        }

    def _searched(self, way: str) -> Found:
        config = space(IMAGE_SIZES[self.name], self.limit, drawn=DRAWN if way == "evolution" else EVALUATIONS)
        job = self._job(supernet_recipe(self._variant(self._plain(1.0), EPOCHS[self.name]), config))
        supernet, seconds = self._trained(job)
        dev = dev_part(self.folder, self.data, self.queries, self.gallery, [self._known[-1]])
        with RaySession(ClusterConfig()) as session:
            session.ensure()
            asked = job.model_copy(update={"dev": dev})
            measured = search(asked, supernet.generation_uri, config, (), lambda _: None)
        chosen = best(measured)
        return Found(chosen.architecture, chosen.reward, seconds + _seconds(measured), len(measured))

    def _swept(self) -> Found:
        tried, seconds = [], 0.0
        for share in SWEPT:
            architecture = self._plain(share)
            if cost_of(self.recipe, architecture, timed=False).multiply_adds <= self.limit:
                edge, took = self._trained(self._edge_job(architecture, SWEEP_EPOCHS))
                seconds += took
                reward = self._right(edge, edge, "dev") * self._right(edge, self._known[-1], "dev")
                tried.append((reward, architecture))
        reward, architecture = max(tried, key=lambda pair: pair[0])
        return Found(architecture, reward, seconds, len(tried))

    def _plain(self, share: float) -> Architecture:
        """The large network with a share of its widths."""
        widths = tuple(round(share * width) for width in CLOUD_WIDTHS)
        return Architecture(
            block_widths=widths, depths=(1,) * 4, kernels=(3,) * 4, image_size=self.recipe.preprocessing.image_size
        )

    def _variant(self, architecture: Architecture, epochs: int) -> TrainingConfig:
        described = VariantConfig(
            backbone=architecture.backbone, image_size=architecture.image_size, epochs=epochs, max_lr=MAX_LR
        )
        return described.recipe(self.recipe)

    def _edge_job(self, architecture: Architecture, epochs: int) -> TrainingJob:
        return self._job(self._variant(architecture, epochs))

    def _job(self, recipe: TrainingConfig) -> TrainingJob:
        count = self.data.counts[-1]
        manifest, images = self._manifest(count)
        references = [self._laid(known, count, images) for known in self._known]
        values, newer = recipe.model_dump(mode="json"), self._known[-1].generation_uri
        return training_job(self.place, manifest, values, 3, newer, references, self._no_dev)

    def _trained(self, job: TrainingJob) -> tuple[PredecessorRef, float]:
        """Train, or find it trained; the seconds lie beside the run."""
        place = Path(job.storage_uri) / f"{job.name}.seconds"
        started = time.process_time()
        card = run_training(job)
        if not place.exists():
            place.write_text(f"{time.process_time() - started:.2f}")
        uri = f"{job.output_uri}/{card.generation_id}"
        known = PredecessorRef(generation_id=card.generation_id, generation_uri=uri, embeddings_uri="")
        return known, float(place.read_text())

    def _manifest(self, count: int) -> tuple[Path, LabelledImages]:
        path = self.place / f"manifest-{count}.parquet"
        if not path.exists():
            write_manifest(str(path), self.data.training(count, full=False))
        return path, read_manifest(str(path))

    def _laid(self, known: PredecessorRef, count: int, images: LabelledImages) -> PredecessorRef:
        return reference_to(self.folder, self.data, f"{count}", known, images)

    def _no_dev(self) -> Any:
        raise AssertionError("nothing in these recipes is chosen on dev")

    def _right(self, asked: PredecessorRef, stored: PredecessorRef, name: str = "test") -> float:
        part = self._parts[name]
        queries, rows = (self._vectors(known, part)[place] for place, known in enumerate((asked, stored)))
        return float(part.right(queries @ rows.T).mean())

    def _vectors(self, known: PredecessorRef, part: Part) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        place = self.place / "vectors" / f"{known.generation_id}.npz"
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            encode = open_encoder(known.generation_uri)
            shown = {"queries": self.queries, "gallery": self.queries if self.gallery is None else self.gallery}
            np.savez(place, **{name: vectors_of(encode, images.sources) for name, images in shown.items()})
        stored = np.load(place)
        return stored["queries"][part.queries], stored["gallery"][part.gallery]


def _seconds(measured: list[Candidate]) -> float:
    return sum(candidate.seconds for candidate in measured)


def rows_of(bench: Bench, known: list[dict[str, Any]], ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one seed that are not known yet: the generations, then every way of these."""
    key = {"data": bench.name, "seed": bench.seed}
    there = {row["way"] for row in known if all(row[name] == value for name, value in key.items())}
    cloud = bench.clouds()
    if "generation" not in there:
        yield {**key, "way": "generation", **cloud}
    for way in ways:
        if way not in there:
            yield {**key, "way": way, **bench.reported(bench.choose(way))}


def main() -> None:
    """Measure every row that is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=DATA, action="append", help="Only these; others stay.")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="Only these; others stay.")
    parser.add_argument("--way", choices=WAYS, action="append", help="Only these; others stay.")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    for name, seed in itertools.product(wanted.data or DATA, wanted.seed or SEEDS):
        for row in rows_of(Bench(wanted.folder.resolve(), name, seed), stored["rows"], wanted.way or WAYS):
            print(json.dumps(row), flush=True)
            today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
            about = {"measured": today, "hardware": f"{os.cpu_count()} x {processor()}"}
            stored = {"rows": [*stored["rows"], {**row, **about}]}
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
