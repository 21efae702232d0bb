"""`graceful update --dry-run`: a few real steps on a sample of the real images, and what a training would take.

Nothing in the workspace is changed: predecessors embed the sample anew, into a folder that goes away.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from graceful.flows.runtime.session import Session, open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.evaluation_set import load_evaluation_set, separate, with_dev
from graceful.flows.store.workspace import require_workspace
from graceful.flows.update.predecessors import predecessors_of
from graceful.indexing.embedding_files import write_embedding_file
from graceful.training.datasets import check_trainable, load_images
from graceful.training.encoder import open_encoder
from graceful.training.generation import PredecessorRef
from graceful.training.job import TrainingJob
from graceful.training.known import KnownImages
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.material import decoding_processes, is_streamed
from graceful.training.pixels import Look
from graceful.training.rehearsal import rehearse

_BATCHES, _PER_CLASS = 2, 8


class DryRun(BaseModel):
    """What one generation's training would take, from a few steps on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(description="Training images.")
    classes: int = Field(description="Their classes.")
    sampled_images: int = Field(description="Images that the steps were measured on.")
    sampled_classes: int = Field(description="Their classes; head and constraints cost more with more of them.")
    device: str = Field(description="What the steps ran on.")
    precision: str = Field(description="Arithmetic of the network.")
    compiled: bool = Field(description="Whether the network ran compiled.")
    workers: int = Field(description="Workers that a training has; the steps were measured with one's share.")
    batch_images: int = Field(description="Images of one worker in a step.")
    step_s: float = Field(description="Seconds of a step.")
    images_per_s: float = Field(description="Images per second, all workers; what they say to one another not counted.")
    memory_mib: int = Field(
        description="Peak memory of one worker: of the GPU where there is one, else of the process."
    )
    pixels_mib: int = Field(description="All images, decoded.")
    streamed: bool = Field(
        description="Whether they are decoded while the network runs, being more than training.pixel_memory_mib."
    )
    steps: int = Field(description="Steps of a training.")
    load_s: float = Field(
        description="Seconds of reading and decoding all images before the first step; 0 where they are streamed."
    )
    training_s: float = Field(description="Seconds of all steps, or of decoding where that takes longer.")
    predecessors: int = Field(description="Generations that constrain it.")
    predecessors_step_share: float | None = Field(description="What they add to a step, as a share of one without.")
    images_to_embed: int = Field(description="Vectors that predecessors have to compute first, all together.")
    embed_s: float | None = Field(description="Seconds of that, one worker; None: there is nothing to embed.")
    total_s: float = Field(description="All of it.")
    note: str = Field(description="What the measurement does not say; empty if nothing.")


def dry_run(root: str, say: Callable[[str], None] = lambda text: None) -> DryRun:  # noqa: ARG005
    """Measure a training of the workspace's next generation; nothing is changed, whether or not one is due.

    Raises: what reading the data raises, and what a training raises before its first step.
    """
    require_workspace(root)
    config = load_workspace_config(root)
    with open_session(root, config) as session, tempfile.TemporaryDirectory(prefix="graceful-dry-run-") as folder:
        say("reading the training images")
        known = KnownImages(session.workspace.known_images_uri, grows=False)
        judging = load_evaluation_set(config.evaluation, known)
        images, _ = separate(config.evaluation, load_images(config.training_data, known), judging)
        images, _ = with_dev(config.evaluation, images, judging, known)
        check_trainable(images)
        workers = max(config.cluster.num_workers, 1)
        share = math.ceil(config.training.batch_size / workers)
        plain = {"interpolation": 0.0, "mixture": 0.0, "patience": None}
        recipe = config.training.model_copy(update={"batch_size": share, **plain})
        sample = _sample(images, _BATCHES * recipe.batch_size, recipe.seed)
        names = predecessors_of(session.workspace, config)
        if names:
            say(f"embedding {len(sample):,} of {len(images):,} images with {len(names)} predecessors")
        references, rate = _embed(session, sample, names, Path(folder))
        manifest = str(Path(folder) / "manifest.parquet")
        write_manifest(manifest, sample)
        champion = session.workspace.registry.serving().champion
        job = TrainingJob(
            config=recipe,
            name="rehearsal",
            manifest_uri=manifest,
            output_uri=folder,
            ordinal=0,
            parent_uri=None if champion is None else session.workspace.generation_uri(champion),
            predecessors=references,
            storage_uri=folder,
            use_gpu=config.cluster.gpus_per_worker > 0,
            cpus_per_worker=config.cluster.cpus_per_worker,
            decoding_processes=config.cluster.decoding_processes,
        )
        say("taking a few steps")
        full = rehearse(job)
        bare = None
        if full.num_predecessors:
            bare = rehearse(job.model_copy(update={"config": recipe.without_constraints()}))
        to_embed = sum(len(session.workspace.cache(name).missing(images.content_sha256)) for name in names)
        steps = math.ceil(len(images) / config.training.batch_size) * recipe.epochs
        load_s, embed_s = full.load_s_per_image * len(images), to_embed / rate if to_embed and rate else None
        look = Look.of(recipe.preprocessing, recipe.augmentation)
        streamed = is_streamed(recipe, look, len(images))
        training_s = steps * full.step_s
        if streamed:
            processes = decoding_processes(job.model_copy(update={"num_workers": config.cluster.num_workers}))
            decode_s = recipe.epochs * load_s / workers / processes
            load_s, training_s = 0.0, max(training_s, decode_s)
        missing_gpu = config.cluster.gpus_per_worker > 0 and full.device != "cuda"
        return DryRun(
            images=len(images),
            classes=len(set(images.labels.tolist())),
            sampled_images=len(sample),
            sampled_classes=len(set(sample.labels.tolist())),
            device=full.device,
            precision=full.precision,
            compiled=full.compiled,
            workers=workers,
            batch_images=full.batch_images,
            step_s=round(full.step_s, 5),
            images_per_s=round(workers * full.batch_images / full.step_s, 1),
            memory_mib=full.memory_mib,
            pixels_mib=math.ceil(look.size_bytes(len(images)) / 2**20),
            streamed=streamed,
            steps=steps,
            load_s=round(load_s, 1),
            training_s=round(training_s, 1),
            predecessors=full.num_predecessors,
            predecessors_step_share=None if bare is None else round(full.step_s / bare.step_s - 1, 3),
            images_to_embed=to_embed,
            embed_s=None if embed_s is None else round(embed_s, 1),
            total_s=round(load_s + training_s + (embed_s or 0.0), 1),
            note="this machine has no GPU and the workers have: times are this processor's" if missing_gpu else "",
        )


def _sample(images: LabelledImages, wanted: int, seed: int) -> LabelledImages:
    """At least two images of every class that is drawn, and about `wanted` in all."""
    order = np.random.default_rng(seed).permutation(len(images))
    by_class = order[np.argsort(images.labels[order], kind="stable")]
    labels = images.labels[by_class]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    groups = np.split(by_class, starts[1:])
    drawn: list[np.ndarray] = []
    count = 0
    per_class = max(_PER_CLASS, math.ceil(wanted / len(groups)))
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if count >= wanted:
            break
        drawn.append(groups[group][:per_class])
        count += len(drawn[-1])
    return images.take(np.sort(np.concatenate(drawn)))


def _embed(
    session: Session, sample: LabelledImages, names: Sequence[str], folder: Path
) -> tuple[tuple[PredecessorRef, ...], float | None]:
    """Vectors of the sample from every predecessor, and how many a second one process made."""
    references, seconds = [], 0.0
    for name in names:
        uri = session.workspace.generation_uri(name)
        started = time.perf_counter()
        vectors, _ = open_encoder(uri)(sample.sources)
        seconds += time.perf_counter() - started
        path = str(folder / f"{name}.parquet")
        write_embedding_file(path, pa.table({"content_sha256": sample.content_sha256}), vectors)
        references.append(PredecessorRef(generation_id=name, generation_uri=uri, embeddings_uri=path))
    return tuple(references), len(names) * len(sample) / seconds if names else None
