"""What predecessors and Ray cost a training: ten predecessors against none, Ray Train against the bare loop."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from benchmarks.harness import Ratio, paired
from graceful.files import join
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.settings.config import ClusterConfig
from graceful.indexing.embedding_files import write_embedding_file
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef, Preprocessing
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import write_manifest

_NUM_PREDECESSORS = 10


def step_cost_predecessors() -> Ratio:
    """A step with 10 predecessors / a step with none: recipe R against the same loop without constraints."""
    with tempfile.TemporaryDirectory() as folder:
        job, recipe = _job(folder, epochs=3)
        first = run_training(job.model_copy(update={"name": "first"}))
        uri = join(job.output_uri, first.generation_id)
        vectors, _ = open_encoder(uri)(load_images(_digits(folder)).sources)
        references = []
        for number in range(_NUM_PREDECESSORS):
            path = str(Path(folder) / f"predecessor-{number}.parquet")
            write_embedding_file(path, pa.table({"row": np.arange(len(vectors))}), vectors)
            references.append(
                PredecessorRef(generation_id=f"g{number + 1:03d}-{number:06x}", generation_uri=uri, embeddings_uri=path)
            )
        runs = iter(range(1000))
        bare = recipe.without_constraints()

        def seconds(config: TrainingConfig, predecessors: tuple[PredecessorRef, ...]) -> float:
            changes = {"config": config, "predecessors": predecessors, "ordinal": 20, "parent_uri": uri}
            return _steady_seconds(job.model_copy(update={**changes, "name": f"run-{next(runs)}"}))

        return paired(
            "step_cost_predecessors",
            partial(seconds, bare, ()),
            partial(seconds, recipe, tuple(references)),
            pairs=7,
            at_most=1.10,
            note="small CNN, 28x28, batch 256, 128-d; fastest epoch of each run but its first",
        )


def train_overhead() -> Ratio:
    """Images per second under Ray Train (1 worker, steady state) / in the bare loop."""
    with tempfile.TemporaryDirectory() as folder, RaySession(ClusterConfig()) as session:
        session.ensure()
        assert ray.is_initialized()
        job, _ = _job(folder, epochs=5)
        runs = iter(range(1000))

        def seconds(num_workers: int) -> float:
            return _steady_seconds(job.model_copy(update={"num_workers": num_workers, "name": f"run-{next(runs)}"}))

        return paired(
            "train_overhead",
            partial(seconds, 0),
            partial(seconds, 1),
            pairs=5,
            at_least=0.97,
            invert=True,
            note="small CNN, 28x28, batch 256, one thread each; fastest epoch but the first; start-up not counted",
        )


def _job(folder: str, epochs: int) -> tuple[TrainingJob, TrainingConfig]:
    images = load_images(_digits(folder))
    manifest = str(Path(folder) / "manifest.parquet")
    write_manifest(manifest, images)
    recipe = TrainingConfig(
        preprocessing=Preprocessing(image_size=28, channels=1, mean=(0.3,), std=(0.37,)),
        augmentation=AugmentationConfig(kind="affine"),
        epochs=epochs,
    )
    job = TrainingJob(
        config=recipe,
        name="job",
        manifest_uri=manifest,
        output_uri=str(Path(folder) / "generations"),
        ordinal=1,
        storage_uri=str(Path(folder) / "runs"),
    )
    return job, recipe


def _digits(folder: str) -> DatasetConfig:
    return DatasetConfig(source="digits", path=str(Path(folder) / "digits.parquet"))


def _steady_seconds(job: TrainingJob) -> float:
    """Seconds of the fastest epoch after the first; one thread, whoever runs it (a worker of Ray Train has one)."""
    torch.set_num_threads(1)
    epochs: list[float] = []
    run_training(job, lambda metrics: epochs.append(float(metrics["seconds"])))
    return min(epochs[1:])
