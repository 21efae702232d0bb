"""Images that may not be trained on any more: what the lineage says of them, and which training they were in."""

import numpy as np
from numpy.typing import NDArray

from graceful.files import exists
from graceful.flows.store.events import Trained, Withdrawn
from graceful.flows.store.registry import Registry
from graceful.flows.store.workspace import Workspace
from graceful.training.manifest import LabelledImages, read_manifest


def withdrawn_images(registry: Registry) -> frozenset[str]:
    """Content hashes of all images that were ever withdrawn from training."""
    return frozenset(digest for event in registry.events(Withdrawn) for digest in event.payload.content_sha256)


def among(images: LabelledImages, hashes: frozenset[str]) -> NDArray[np.bool_]:
    """Which images (N,) have one of these content hashes."""
    return np.array([digest in hashes for digest in images.content_sha256], bool)


def trained_on(workspace: Workspace, generation: str | None) -> LabelledImages | None:
    """The images of the update that made a generation; None where there is no such update, or no manifest of it."""
    made = [event for event in workspace.registry.events(Trained) if event.generation == generation]
    uri = workspace.manifest_uri(made[0].update_key) if made else ""
    return read_manifest(uri) if made and exists(uri) else None
