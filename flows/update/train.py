"""Makes the candidate: extends the predecessors' caches over new training images, trains on Ray, embeds what judges it.

Each step finds its own earlier output and goes on: caches by content hash, a training by the name of its run, a
generation by its event in the lineage.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import exists, join, write_json
from graceful.flows.runtime.jobs import submit_training
from graceful.flows.runtime.session import Session
from graceful.flows.store.events import Decided, Trained, UpdateStarted
from graceful.flows.store.withdrawn import among, trained_on
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.freeze import Inputs, trained_before
from graceful.flows.update.learning import LearningCurve, epoch_text
from graceful.indexing.embedding_files import write_embedding_file
from graceful.training.forgetting import leave_out
from graceful.training.generation import CARD_FILE, GenerationCard, PredecessorRef, VariantOf
from graceful.training.job import DevPart, TrainingConfig, TrainingJob
from graceful.training.launch import Tail, run_training
from graceful.training.manifest import LabelledImages, count_images
from graceful.training.progress import TrailReporter
from graceful.training.trackers import open_trackers

_LAID_ROWS = 65536
_UNSEEN = 1000  # images that forgotten ones are compared with


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
            f"(first {source}: {reason}); remove those images, or take the generation out with "
            f"'graceful retire {generation} --reason ...' if it is the encoder that is broken"
        )
    return embedded


def extend_cache(inputs: Inputs, predecessor: str) -> PredecessorRef:
    """Embed the training and dev images that a predecessor has not seen, and lay its vectors beside the manifests."""
    key = inputs.frozen.update_key
    laid = lay_vectors(inputs.session, key, predecessor, inputs.images)
    if inputs.dev is not None:
        lay_vectors(inputs.session, key, predecessor, inputs.dev, "-dev")
    weights = dict(zip(inputs.frozen.predecessors, inputs.frozen.weights, strict=False))  # none: all weigh 1
    return laid.model_copy(update={"weight": weights.get(predecessor, 1.0)})


def lay_vectors(
    session: Session, update_key: str, generation: str, images: LabelledImages, suffix: str = ""
) -> PredecessorRef:
    """Embed the images that a generation has not seen, and lay its vectors of all of them below an update's folder."""
    workspace, hashes = session.workspace, images.content_sha256
    places = _vectors_uris(workspace, update_key, generation, len(images), suffix)
    embed_images(session, generation, hashes, images.sources)
    if not all(map(exists, places)):
        blocks = workspace.cache(generation).read_blocks(hashes, _LAID_ROWS)
        for number, (place, vectors) in enumerate(zip(places, blocks, strict=True)):
            start = number * _LAID_ROWS
            write_embedding_file(place, pa.table({"content_sha256": hashes[start : start + len(vectors)]}), vectors)
    return PredecessorRef(
        generation_id=generation, generation_uri=workspace.generation_uri(generation), embeddings_uri=places
    )


def train_candidate(inputs: Inputs, predecessors: Sequence[PredecessorRef]) -> str:
    """Train the candidate under one constraint per predecessor, from the champion's weights; returns its id.

    One that was trained from the same inputs before, for an update under another policy, is taken as it is. Where
    withdrawn images are all that has changed, it is the champion without them, computed and not trained.
    """
    registry, frozen = inputs.registry, inputs.frozen
    for event in registry.events(Trained, frozen.update_key):
        return event.generation
    known = frozen.adopted or trained_before(registry, frozen.training_key)
    if known is not None:
        registry.record(Trained(training_key=frozen.training_key), update_key=frozen.update_key, generation=known)
        return known
    if frozen.num_forgotten:
        card = _leave_out(inputs)
    else:
        recipe = inputs.session.config.training
        job = training_job(inputs.session, frozen, recipe, "candidate", _parent(inputs), predecessors)
        card = train(inputs.session, job)
    made = Trained(training_key=frozen.training_key, summary=card.training)
    registry.record(made, update_key=frozen.update_key, generation=card.generation_id)
    inputs.session.compute_s += _training_seconds(card)
    return card.generation_id


def _leave_out(inputs: Inputs) -> GenerationCard:
    """The champion without the images that it was trained on and this update is not."""
    workspace, champion = inputs.workspace, inputs.frozen.champion
    before = trained_on(workspace, champion)
    if champion is None or before is None:
        raise AssertionError("an update forgets images of a champion that was trained here")
    gallery = inputs.evaluation_set.gallery
    return leave_out(
        workspace.generation_uri(champion),
        before,
        ~among(before, frozenset(inputs.images.content_sha256)),
        gallery.sources[:: -(-len(gallery) // _UNSEEN)],
        out_uri=join(workspace.root, "generations"),
        ordinal=inputs.frozen.ordinal,
    )


def train_paragon(inputs: Inputs) -> str:
    """Train the same recipe tied to no predecessor's space, for as many epochs: the reference for gain and tax.

    It starts from the champion's paragon, so that a tax is what has accumulated over the chain; from the champion where
    that has none.
    """
    recipe = inputs.session.config.training.without_constraints()
    parent = _paragon_before(inputs) or _parent(inputs)
    card = train(inputs.session, training_job(inputs.session, inputs.frozen, recipe, "paragon", parent, ()))
    inputs.session.compute_s += _training_seconds(card)
    return card.generation_id


def train(session: Session, job: TrainingJob) -> GenerationCard:
    """Run one training, on Ray or in this process; a finished run of the same name is found and not repeated."""
    config, role = session.config.cluster, _role(job)
    label = f"training g{job.ordinal:03d} ({role})"
    with (
        open_trackers(session.config.trackers, job.name, job.config.model_dump(mode="json")) as write,
        session.progress.track(label, job.planned_epochs) as advance,
    ):
        learning = LearningCurve(session.progress, f"{session.config.name}-learning-curve", role)

        def on_epoch(line: dict[str, Any]) -> None:
            advance(1, epoch_text(line))
            learning.add(line)
            write(line)

        def on_glance(line: dict[str, Any]) -> None:
            advance(0, epoch_text(line))

        try:
            session.encoders.release()  # the trainers may need every processor that the embedding workers hold
            if session.cluster.submits_jobs and config.num_workers:
                tail = Tail(TrailReporter(job.storage_uri, job.name), on_epoch, on_glance)
                return submit_training(
                    config, join(session.workspace.root, "jobs"), job, tail.advance, session.progress.say
                )
            if config.num_workers:
                session.cluster.ensure()
            return run_training(job, on_epoch, deadline_s=config.deadline_hours * 3600, on_glance=on_glance)
        finally:
            learning.show()


def training_job(
    session: Session,
    frozen: UpdateStarted,
    recipe: TrainingConfig,
    role: str,
    parent_uri: str | None,
    predecessors: Sequence[PredecessorRef],
    variant: VariantOf | None = None,
) -> TrainingJob:
    """The order of a training, named by what goes into it; `role`: what for, such as 'candidate'.

    `variant`: one is trained, on what its generation was trained on; it has no dev part, and nothing is chosen there.
    """
    config = session.config.cluster
    run = [frozen.training_key, role, recipe.model_dump(mode="json"), parent_uri]
    name = f"g{frozen.ordinal:03d}-{role}-{hashlib.sha256(json.dumps(run).encode()).hexdigest()[:12]}"
    return TrainingJob(
        config=recipe,
        name=name,
        manifest_uri=session.workspace.manifest_uri(frozen.update_key),
        output_uri=join(session.workspace.root, "generations"),
        ordinal=frozen.ordinal,
        parent_uri=parent_uri,
        predecessors=tuple(predecessors),
        dev=_dev_part(session, frozen, predecessors) if variant is None else None,
        variant=variant,
        storage_uri=join(session.workspace.root, "runs"),
        num_workers=config.num_workers,
        use_gpu=config.gpus_per_worker > 0,
        cpus_per_worker=config.cpus_per_worker,
        decoding_processes=config.decoding_processes,
        min_workers=config.min_workers,
        resources=config.worker_resources,
        labels=config.worker_labels,
        max_failures=config.max_failures,
        checkpoint_minutes=config.checkpoint_minutes,
    )


def _role(job: TrainingJob) -> str:
    """What a training is for, as `training_job` names it."""
    return job.name.partition("-")[2].rpartition("-")[0]


def embed_evaluation(inputs: Inputs, generation: str) -> int:
    """Embed the evaluation set once with a generation; returns how many images were new.

    A query log is answered by the champion and the candidate alone.
    """
    chosen = inputs.evaluation_set
    answers = generation == inputs.frozen.champion or generation not in inputs.frozen.generations
    num_new = embed_images(inputs.session, generation, *(chosen.images_with_log if answers else chosen.images))
    rows_per_s = inputs.session.encoders.rows_per_s
    if num_new and rows_per_s is not None:
        # Stored, so that an update that was killed here and goes on, or judges again, decides by the same prices.
        write_json(inputs.workspace.throughput_uri(generation), {"rows_per_s": round(rows_per_s, 3)})
    return num_new


def _dev_part(session: Session, frozen: UpdateStarted, predecessors: Sequence[PredecessorRef]) -> DevPart | None:
    """What a training looks at and chooses by; None where the update set no dev part aside."""
    workspace, key = session.workspace, frozen.update_key
    manifest_uri = workspace.dev_uri(key)
    if not exists(manifest_uri):
        return None
    num_images = count_images(manifest_uri)
    beside = [
        reference.model_copy(
            update={"embeddings_uri": _vectors_uris(workspace, key, reference.generation_id, num_images, "-dev")}
        )
        for reference in predecessors
    ]
    limit = session.config.policy.nfr_limit
    return DevPart(manifest_uri=manifest_uri, predecessors=tuple(beside), max_flips=limit)


def _vectors_uris(
    workspace: Workspace, update_key: str, predecessor: str, num_images: int, suffix: str = ""
) -> tuple[str, ...]:
    """Files of a predecessor's vectors in the order of a manifest, so many rows each."""
    folder = join(workspace.update_uri(update_key), "predecessors", f"{predecessor}{suffix}")
    return tuple(join(folder, f"{start // _LAID_ROWS:05d}.parquet") for start in range(0, num_images, _LAID_ROWS))


def _parent(inputs: Inputs) -> str | None:
    champion = inputs.frozen.champion
    return None if champion is None else inputs.workspace.generation_uri(champion)


def _paragon_before(inputs: Inputs) -> str | None:
    """The paragon that was trained beside the champion, if there is one."""
    decided = [event for event in inputs.registry.events(Decided) if event.generation == inputs.frozen.champion]
    names = [event.payload.paragon for event in decided if event.payload.paragon]
    uris = [inputs.workspace.generation_uri(name) for name in names[-1:]]
    return uris[0] if uris and exists(join(uris[0], CARD_FILE)) else None


def _training_seconds(card: GenerationCard) -> float:
    """Seconds that the epochs and the calibration took, as the card says."""
    return float(card.training.get("seconds", 0.0))
