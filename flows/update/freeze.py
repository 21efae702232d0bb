"""The inputs of an update, fixed before it starts: data, champion, predecessors, evaluation set, and the key of it all.

`update_key = digest(data, config, code)`, so that the same command resumes the same update and a changed one starts
anew. What is frozen stands in the lineage before anything is trained.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from graceful.files import exists
from graceful.flows.runtime.session import Session
from graceful.flows.store.evaluation_set import EvaluationSet, load_evaluation_set, save_evaluation_set, separate
from graceful.training.datasets import LabelledImages, check_trainable, load_images, write_manifest
from graceful.training.generation import ordinal_of

_PACKAGES = ("training", "indexing", "evaluation", "flows")


class FrozenUpdate(BaseModel):
    """What an update is about. Stored in the lineage; a resumed update reads it from there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    update_key: str
    ordinal: int
    champion: str | None
    predecessors: tuple[str, ...]
    generations: tuple[str, ...]
    num_training_images: int
    num_classes: int
    num_unreadable: int
    num_dropped: int = 0
    evaluation_set: str
    adopted: str | None = None


def freeze(
    session: Session, *, again: bool = False, adopted: str | None = None
) -> tuple[FrozenUpdate, EvaluationSet, LabelledImages]:
    """Read the data, and fix or find again the inputs of the update that it calls for.

    An update of the same key is resumed, unless `again` asks for a new attempt or the champion has changed before it
    was decided. Raises the errors of `load_images`, `check_trainable` and `separate`.
    """
    config, registry = session.config, session.workspace.registry
    evaluation_set = load_evaluation_set(config.evaluation)
    images, num_dropped = separate(config.evaluation, load_images(config.training_data), evaluation_set)
    check_trainable(images)
    data = [images.content_sha256, images.labels.tolist(), evaluation_set.set_id, adopted]
    base = _digest([_digest(data), config.digest(), code_version()])[:16]
    attempts = [
        FrozenUpdate.model_validate(event.payload)
        for event in registry.events("update_started")
        if event.update_key.split("-")[0] == base
    ]
    champion = registry.serving().champion
    if attempts and not again:
        last = attempts[-1]
        if last.champion == champion or registry.events("decided", last.update_key):
            return last, evaluation_set, images
    update_key = base if not attempts else f"{base}-{len(attempts) + 1}"
    generations = registry.generations()
    if adopted is not None:
        generations = [name for name in generations if name != adopted]
    manifest_uri = session.workspace.manifest_uri(update_key)
    if not exists(manifest_uri):
        write_manifest(manifest_uri, images)
    save_evaluation_set(session.workspace.root, evaluation_set)
    frozen = FrozenUpdate(
        update_key=update_key,
        ordinal=max([ordinal_of(name) for name in generations], default=0) + 1,
        champion=champion,
        predecessors=tuple(_predecessors(session)),
        generations=tuple(generations),
        num_training_images=len(images),
        num_classes=len(set(images.labels.tolist())),
        num_unreadable=len(images.unreadable) + len(evaluation_set.queries.unreadable),
        num_dropped=num_dropped,
        evaluation_set=evaluation_set.set_id,
        adopted=adopted,
    )
    registry.record("update_started", update_key=update_key, payload=frozen.model_dump(mode="json"))
    return frozen, evaluation_set, images


@cache
def code_version() -> str:
    """Digest of the code that trains, judges and acts."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _predecessors(session: Session) -> list[str]:
    """Generations to constrain against: all that ever served, or those of them that still own readable rows."""
    workspace = session.workspace
    served = workspace.registry.served_generations()
    champion = workspace.registry.serving().champion
    if session.config.predecessors == "all" or champion is None:
        return served
    owners = workspace.view(champion).rows_by_generation()
    return [name for name in served if name == champion or owners.get(name)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
