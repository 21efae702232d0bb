"""What predecessors, Ray and the loop itself cost: ten predecessors against none, each against a bare PyTorch loop."""

import tempfile
import time
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
from graceful.training.backbones import build_backbone
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef, Preprocessing
from graceful.training.heads import build_head
from graceful.training.images import decode, read_payloads
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.manifest import LabelledImages, write_manifest

_NUM_PREDECESSORS = 10


def step_cost_predecessors() -> Ratio:
    """A step with 10 predecessors / a step with none: the default recipe against the same loop without."""
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


def loop_overhead() -> Ratio:
    """Images per second of the training loop / of a bare PyTorch loop over the same pixels, network and optimiser."""
    with tempfile.TemporaryDirectory() as folder:
        job, recipe = _job(folder, epochs=4)
        plain = recipe.model_copy(update={"augmentation": AugmentationConfig(kind="none"), "precision": "float32"})
        runs = iter(range(1000))

        def ours() -> float:
            return _steady_seconds(job.model_copy(update={"config": plain, "name": f"run-{next(runs)}"}))

        return paired(
            "loop_overhead",
            partial(_bare_seconds, plain, load_images(_digits(folder))),
            ours,
            pairs=5,
            at_least=0.95,
            invert=True,
            note="small CNN, 28x28, batch 256, no augmentation, float32, one thread; fastest epoch but the first",
        )


def _bare_seconds(recipe: TrainingConfig, images: LabelledImages) -> float:
    """Seconds of the fastest epoch but the first of a loop that does nothing but train."""
    torch.set_num_threads(1)
    look = recipe.preprocessing
    pixels = torch.from_numpy(np.stack([decode(payload, look) for payload in read_payloads(images.sources)]))
    names, codes = np.unique(images.labels, return_inverse=True)
    labels = torch.from_numpy(codes.astype(np.int64))
    network = build_backbone(recipe.backbone, recipe.width, look.channels, look.image_size)
    head = build_head(recipe.head, len(names), recipe.width)
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.first_max_lr, fused=True)
    steps = -(-len(labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.first_max_lr, total_steps=steps * recipe.epochs)
    epochs = []
    for _ in range(recipe.epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(labels)).tensor_split(steps):
            inputs = pixels[rows].float().div_(255.0).sub_(look.mean[0]).div_(look.std[0])
            loss = head(network(inputs.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        epochs.append(time.perf_counter() - started)
    return min(epochs[1:])


def _job(folder: str, epochs: int) -> tuple[TrainingJob, TrainingConfig]:
    images = load_images(_digits(folder))
    manifest = str(Path(folder) / "manifest.parquet")
    write_manifest(manifest, images)
    recipe = TrainingConfig(
        preprocessing=Preprocessing(image_size=28, channels=1, mean=(0.3,), std=(0.37,)),
        augmentation=AugmentationConfig(kind="affine"),
        mixture=0.0,
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
