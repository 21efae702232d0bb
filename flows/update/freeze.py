"""The inputs of an update, fixed before it starts: data, champion, predecessors, evaluation set, and the key of it all.

Three keys, because three things may change. `material_key = digest(images, recipe, TRAINING_VERSION)`: a champion made
of the same material leaves nothing to train. `training_key = digest(material_key, parent, predecessors)` names a
candidate: it is not trained twice, whatever the policy, the prices or the schedule say.
`update_key = digest(images, evaluation set, configuration, TRAINING_VERSION, JUDGING_VERSION)` names an update: the
same command resumes the same one, and a changed one starts anew. The versions are declared beside the code
that they describe; a comment changes neither. What is frozen stands in the lineage before anything is trained.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from graceful.evaluation.decision import JUDGING_VERSION
from graceful.files import exists
from graceful.flows.runtime.session import Session
from graceful.flows.settings.config import PipelineConfig
from graceful.flows.store.approvals import awaited
from graceful.flows.store.evaluation_set import (
    EvaluationSet,
    load_evaluation_set,
    save_evaluation_set,
    separate,
    with_dev,
)
from graceful.flows.store.events import Adopted, Decided, Trained, UpdateStarted
from graceful.flows.store.leaks import refuse_trained_on, refuse_trained_on_dev
from graceful.flows.store.registry import Registry
from graceful.flows.store.withdrawn import among, trained_on, withdrawn_images
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.predecessors import predecessors_of, weights_by_share
from graceful.flows.update.query_log import check_log
from graceful.flows.update.serving import refuse_retired
from graceful.training.datasets import check_trainable, load_images
from graceful.training.generation import ordinal_of
from graceful.training.job import TRAINING_VERSION
from graceful.training.known import KnownImages
from graceful.training.manifest import LabelledImages, write_manifest


@dataclass(frozen=True)
class Inputs:
    """What an update works on. `busy_before_s`: what the session's encoders had computed before it."""

    session: Session
    frozen: UpdateStarted
    evaluation_set: EvaluationSet
    images: LabelledImages
    dev: LabelledImages | None = None
    busy_before_s: float = 0.0

    @property
    def workspace(self) -> Workspace:
        """The workspace that is updated."""
        return self.session.workspace

    @property
    def registry(self) -> Registry:
        """Its registry."""
        return self.session.workspace.registry


def freeze(session: Session, *, again: bool = False, adopted: str | None = None) -> Inputs:
    """Read the data, and fix or find again the inputs of the update that it calls for.

    An update of the same key is resumed, unless `again` asks for a new attempt or the champion has changed before it
    was decided, or while the decision waited for a person. Raises the errors of `load_images`, `check_trainable` and
    `separate`.
    """
    config, registry = session.config, session.workspace.registry
    known = KnownImages(session.workspace.known_images_uri)
    evaluation_set = load_evaluation_set(config.evaluation, known)
    check_log(evaluation_set, config.policy.metric, config.policy.k)
    images, num_dropped = separate(config.evaluation, load_images(config.training_data, known), evaluation_set)
    withdrawn = withdrawn_images(registry)
    if withdrawn:
        images = images.take(~among(images, withdrawn))
    images, dev = with_dev(config.evaluation, images, evaluation_set, known)
    check_trainable(images)
    data = _digest_of_data(images, dev, config)
    versions = [TRAINING_VERSION, JUDGING_VERSION]
    refuse_trained_on(session.workspace, evaluation_set)
    if dev is not None:
        refuse_trained_on_dev(session.workspace, dev)
    base = digest([data, evaluation_set.set_id, adopted, config.digest(), versions])[:16]
    attempts = [event.payload for event in registry.events(UpdateStarted) if event.update_key.split("-")[0] == base]
    champion = registry.serving().champion
    busy = session.encoders.busy_s
    material_key = _material_key(data, config, adopted)
    served = _made_the_champion(registry, material_key)
    if served is not None and not attempts and not again:
        return Inputs(session, served, evaluation_set, images, dev, busy)
    if attempts and not again:
        last = attempts[-1]
        waits = awaited(registry)
        is_open = waits is not None and waits.update_key == last.update_key
        if last.champion == champion or (registry.events(Decided, last.update_key) and not is_open):
            return Inputs(session, last, evaluation_set, images, dev, busy)
    if adopted is not None:
        refuse_retired(session.workspace, f"judging {adopted}", adopted)
        if adopted == champion:
            raise MoveRefusedError(f"judging {adopted}: expected an encoder that does not serve, found that it does")
    update_key = base if not attempts else f"{base}-{len(attempts) + 1}"
    predecessors = tuple(predecessors_of(session.workspace, config))
    weights: tuple[float, ...] = ()
    if config.training.predecessor_weights == "share":
        weights = weights_by_share(session.workspace, predecessors)
    training_key = adopted or digest([material_key, champion, predecessors, *([weights] if weights else [])])[:16]
    made = adopted or trained_before(registry, training_key)
    left_out = ({*registry.retired(), *_adopted_in_vain(registry)} - {champion}) | {made}
    generations = [name for name in registry.generations() if name not in left_out]
    manifest_uri = session.workspace.manifest_uri(update_key)
    if not exists(manifest_uri):
        write_manifest(manifest_uri, images)
    if dev is not None and not exists(dev_uri := session.workspace.dev_uri(update_key)):
        write_manifest(dev_uri, dev)
    save_evaluation_set(session.workspace.root, evaluation_set)
    newest = max([ordinal_of(name) for name in registry.generations()], default=0)
    frozen = UpdateStarted(
        update_key=update_key,
        material_key=material_key,
        training_key=training_key,
        ordinal=newest + 1 if made is None else ordinal_of(made),
        champion=champion,
        predecessors=predecessors,
        weights=weights,
        generations=tuple(generations),
        num_training_images=len(images),
        num_classes=len(set(images.labels.tolist())),
        num_unreadable=len(images.unreadable) + len(evaluation_set.queries.unreadable),
        num_dropped=num_dropped,
        num_dev_images=0 if dev is None else len(dev),
        num_forgotten=_num_forgotten(session, champion, images, dev, withdrawn) if made is None else 0,
        evaluation_set=evaluation_set.set_id,
        adopted=adopted,
    )
    registry.record(frozen, update_key=update_key)
    return Inputs(session, frozen, evaluation_set, images, dev, busy)


def _made_the_champion(registry: Registry, material_key: str) -> UpdateStarted | None:
    """The update that made the champion, where it was made of these very images and this recipe.

    Then there is nothing new to train, whatever else has changed: another policy judges the next candidate.
    """
    champion = registry.serving().champion
    made = {event.update_key for event in registry.events(Trained) if event.generation == champion}
    found = [event.payload for event in registry.events(UpdateStarted) if event.update_key in made]
    return next((start for start in found if start.material_key == material_key), None)


def trained_before(registry: Registry, training_key: str) -> str | None:
    """The generation that was trained from the same inputs, if there is one."""
    found = [event.generation for event in registry.events(Trained) if event.payload.training_key == training_key]
    return found[0] if found else None


def _num_forgotten(
    session: Session,
    champion: str | None,
    images: LabelledImages,
    dev: LabelledImages | None,
    withdrawn: frozenset[str],
) -> int:
    """How many of the images that the champion was trained on are withdrawn, where nothing else has changed; else 0."""
    registry, config = session.workspace.registry, session.config
    before = trained_on(session.workspace, champion) if withdrawn else None
    if before is None:
        return 0
    gone = among(before, withdrawn)
    kept = before.take(~gone)
    if kept.content_sha256 != images.content_sha256 or not np.array_equal(kept.labels, images.labels):
        return 0
    material_key = _material_key(_digest_of_data(before, dev, config), config, None)
    return int(gone.sum()) if _made_the_champion(registry, material_key) is not None else 0


def _material_key(data: str, config: PipelineConfig, adopted: str | None) -> str:
    return digest([data, config.training.model_dump(mode="json"), adopted, TRAINING_VERSION])[:16]


def _digest_of_data(images: LabelledImages, dev: LabelledImages | None, config: PipelineConfig) -> str:
    """Digest of what a training is made of; with a dev part, of that and of the limit by which is chosen on it."""
    parts: list[object] = [images.content_sha256, images.labels.tolist()]
    if dev is not None:
        is_chosen = "dev" in (config.training.interpolation, config.training.mixture)
        parts += [dev.content_sha256, dev.labels.tolist(), config.policy.nfr_limit if is_chosen else None]
    return digest(parts)


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _adopted_in_vain(registry: Registry) -> set[str]:
    """Adopted encoders that no update could judge to its end: they break no other update."""
    judged = {event.generation for event in registry.events(Decided)}
    return {event.generation for event in registry.events(Adopted)} - judged
