"""Makes the candidate: extends the predecessors' caches over new training images, trains on Ray, embeds what judges it.

Each step finds its own earlier output and goes on: caches by content hash, a training by the name of its run, a
generation by its event in the lineage.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import exists, join
from graceful.flows.runtime.jobs import submit_training
from graceful.flows.runtime.session import Session
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.update.freeze import FrozenUpdate
from graceful.indexing.embedding_files import write_embedding_file
from graceful.training.datasets import LabelledImages
from graceful.training.generation import GenerationCard, read_card
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.predecessors import PredecessorRef


class EmbeddingFailuresError(GracefulError):
    """Images that training or evaluation cannot do without could not be embedded."""


def embed_images(session: Session, generation: str, hashes: Sequence[str], sources: Sequence[str]) -> int:
    """Extend a generation's cache over images; returns how many were new.

    Raises: EmbeddingFailuresError.
    """
    cache = session.workspace.cache(generation)
    missing = cache.missing(hashes)
    if not missing:
        return 0
    with session.progress.track(f"embedding with {generation}", len(missing)) as advance:
        embedded, failures = cache.extend(
            hashes,
            sources,
            session.workspace.embed_with(generation),
            unit_rows=session.config.gallery.unit_rows,
            on_rows=advance,
        )
    if failures:
        source, reason = next(iter(failures.items()))
        raise EmbeddingFailuresError(
            f"embedding images with {generation}: expected {len(missing)} vectors, found {len(failures)} failures "
            f"(first {source}: {reason}); remove those images"
        )
    return embedded


def extend_cache(session: Session, frozen: FrozenUpdate, images: LabelledImages, predecessor: str) -> PredecessorRef:
    """Embed the training images that a predecessor has not seen, and lay its vectors beside the manifest."""
    embed_images(session, predecessor, images.content_sha256, images.sources)
    uri = join(session.workspace.update_uri(frozen.update_key), "predecessors", f"{predecessor}.parquet")
    if not exists(uri):
        vectors = session.workspace.cache(predecessor).read(images.content_sha256)
        write_embedding_file(uri, pa.table({"content_sha256": images.content_sha256}), vectors)
    return PredecessorRef(
        generation_id=predecessor,
        generation_uri=session.workspace.generation_uri(predecessor),
        embeddings_uri=uri,
    )


def train_candidate(session: Session, frozen: FrozenUpdate, predecessors: Sequence[PredecessorRef]) -> str:
    """Train the candidate under one constraint per predecessor, from the champion's weights; returns its id."""
    registry = session.workspace.registry
    for event in registry.events("trained", frozen.update_key):
        return event.generation
    if frozen.adopted is not None:
        registry.record("trained", update_key=frozen.update_key, generation=frozen.adopted)
        return frozen.adopted
    parent = None if frozen.champion is None else session.workspace.generation_uri(frozen.champion)
    card = train(session, frozen, session.config.training, "candidate", parent, predecessors)
    registry.record("trained", update_key=frozen.update_key, generation=card.generation_id, payload=card.training)
    return card.generation_id


def train_paragon(session: Session, frozen: FrozenUpdate) -> str:
    """Train the same recipe without constraint and without interpolation: the reference for gain and tax."""
    parent = None if frozen.champion is None else session.workspace.generation_uri(frozen.champion)
    recipe = session.config.training.without_constraints()
    return train(session, frozen, recipe, "paragon", parent, ()).generation_id


def train(
    session: Session,
    frozen: FrozenUpdate,
    recipe: TrainingConfig,
    role: str,
    parent_uri: str | None,
    predecessors: Sequence[PredecessorRef],
) -> GenerationCard:
    """Run one training, on Ray or in this process; a finished run of the same name is found and not repeated."""
    config = session.config.cluster
    run = [frozen.update_key, role, recipe.model_dump(mode="json"), parent_uri]
    name = f"g{frozen.ordinal:03d}-{role}-{hashlib.sha256(json.dumps(run).encode()).hexdigest()[:12]}"
    job = TrainingJob(
        config=recipe,
        name=name,
        manifest_uri=session.workspace.manifest_uri(frozen.update_key),
        output_uri=join(session.workspace.root, "generations"),
        ordinal=frozen.ordinal,
        parent_uri=parent_uri,
        predecessors=tuple(predecessors),
        storage_uri=join(session.workspace.root, "runs"),
        num_workers=config.num_workers,
        use_gpu=config.gpus_per_worker > 0,
        cpus_per_worker=config.cpus_per_worker,
    )
    if session.cluster.submits_jobs and config.num_workers:
        return submit_training(config, join(session.workspace.root, "jobs"), job)
    session.encoders.release()  # the trainers may need every processor that the embedding workers hold
    if config.num_workers:
        session.cluster.ensure()
    with session.progress.track(f"training g{frozen.ordinal:03d} ({role})", recipe.epochs) as advance:
        return run_training(job, lambda _epoch: advance(1), deadline_s=config.deadline_hours * 3600)


def embed_evaluation(session: Session, evaluation_set: EvaluationSet, generation: str) -> int:
    """Embed the evaluation set once with a generation; returns how many images were new."""
    return embed_images(session, generation, *evaluation_set.images)


def training_seconds(session: Session, generation: str) -> float:
    """Seconds that a generation's epochs and its calibration took, as its card says."""
    return float(read_card(session.workspace.generation_uri(generation)).training.get("seconds", 0.0))


def prefix_widths(session: Session, generation: str) -> tuple[int, ...]:
    """Widths to which queries of a generation may be cut."""
    return read_card(session.workspace.generation_uri(generation)).prefix_widths


def cached_vectors(session: Session, generation: str, hashes: Sequence[str]) -> np.ndarray:
    """Embeddings (n, D) of images that were embedded before."""
    return session.workspace.cache(generation).read(hashes)
