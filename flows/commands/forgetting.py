"""`graceful forget-training`: images are withdrawn from training, and an update leaves them out of what serves."""

import hashlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from graceful.errors import GracefulError
from graceful.files import read_bytes
from graceful.flows.commands.updates import update_workspace
from graceful.flows.store.claim import claim
from graceful.flows.store.events import Withdrawn
from graceful.flows.store.leaks import training_manifests
from graceful.flows.store.withdrawn import trained_on, withdrawn_images
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.flows.update.order import UpdateResult
from graceful.flows.update.serving import operator
from graceful.training.generation import read_card
from graceful.training.influence import FeatureReader
from graceful.training.manifest import LabelledImages

_SHOWN = 3


class NotTrainedOnError(GracefulError):
    """Images to forget that the generation which serves was not trained on."""


def forget_training(
    root: str, images: Sequence[str], console: Console, *, reason: str, by: str = ""
) -> tuple[UpdateResult, dict[str, Any]]:
    """Withdraw images from training, now and for good, and run the update that leaves them out of the champion.

    An image is named by its source as the training data has it, by a file with the same bytes, or by its SHA-256.
    Returns the update's result, and what stands of it in the candidate's card: how many were left out, and how far they
    can still be told from images that were never seen. What was withdrawn before is not withdrawn again.

    Raises:
        NotTrainedOnError: an image that the champion was not trained on, or a champion that was not trained here.
        UsageError: the champion does not end in a linear layer with a classifier.
    """
    workspace = open_workspace(root)
    champion = workspace.registry.serving().champion
    trained = trained_on(workspace, champion)
    if champion is None or trained is None:
        raise NotTrainedOnError(
            f"forgetting training images of {champion or 'no generation'}: expected one that was trained here, found "
            "none that serves, an adopted one, or one without its manifest; take the images out of training_data and "
            "run 'graceful update'"
        )
    before = withdrawn_images(workspace.registry)
    hashes = _hashes_of(workspace, images, trained, champion, before)
    FeatureReader(workspace.generation_uri(champion))  # refuses what cannot be computed, before anything is recorded
    with claim(root, "forgetting training images"):
        new = tuple(digest for digest in hashes if digest not in before)
        if new:
            happened = Withdrawn(content_sha256=new, reason=reason, by=by or operator())
            workspace.registry.record(happened, generation=champion)
        for generation in workspace.registry.generations():
            workspace.cache(generation).forget(hashes)
    result = update_workspace(root, console)
    training = read_card(workspace.generation_uri(result.candidate)).training
    return result, {name: training[name] for name in ("forgotten", "traces") if name in training}


def _hashes_of(
    workspace: Workspace, images: Sequence[str], trained: LabelledImages, champion: str, withdrawn: frozenset[str]
) -> list[str]:
    """Content hashes of the named images, each once."""
    by_source = {
        source: digest
        for _, manifest in training_manifests(workspace)
        for source, digest in zip(manifest.sources, manifest.content_sha256, strict=True)
    }
    known = {*trained.content_sha256, *withdrawn}
    found: list[str] = []
    unknown: list[str] = []
    for image in images:
        digest = by_source.get(image, image)
        if digest not in known:
            digest = _digest_of_file(image)
        (found if digest in known else unknown).append(digest if digest in known else image)
    if unknown:
        raise NotTrainedOnError(
            f"forgetting training images of {champion}: expected images that it was trained on, found {len(unknown)} "
            f"others ({', '.join(unknown[:_SHOWN])}); name them as 'graceful blame --training' does, or by their files"
        )
    return list(dict.fromkeys(found))


def _digest_of_file(place: str) -> str:
    try:
        return hashlib.sha256(read_bytes(place)).hexdigest()
    except OSError:
        return ""
