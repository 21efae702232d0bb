"""`graceful blame --training`: which training images a lost search hangs on. Runs networks; nothing is stored."""

from typing import Any

import numpy as np

from graceful.errors import GracefulError
from graceful.flows.store.withdrawn import trained_on
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.training.influence import Explained
from graceful.training.manifest import LabelledImages

MOST_IMAGES = 20_000
MOST_SEARCHES = 5


class NotTrainedHereError(GracefulError):
    """Of this generation no training images are known."""


def add_training_images(root: str, found: dict[str, Any], count: int) -> dict[str, Any]:
    """Return what `blame` found with the `count` training images that each of the first lost searches hangs on most.

    `effect` is by how much the right answer's lead over the wrong one (difference of cosines) would grow if the last
    layer were fitted without the image (training/influence.py). Of more than 20,000 training images a random sample
    takes part, drawn the same every time.

    Raises:
        NotTrainedHereError: the generation was adopted, or its manifest is gone.
    """
    parts = ("wrong_answer_to", "right_answer_lost", "own_search_lost")
    lost = {flip["query"]: flip for part in parts for flip in found[part] if flip["wrong_item"] and flip["right_item"]}
    if not lost:
        return found
    workspace = open_workspace(root)
    images, num_images = _training_images(workspace, found["generation"])
    explained = Explained(workspace.generation_uri(found["generation"]), images)
    searches = {}
    for query, flip in list(lost.items())[:MOST_SEARCHES]:
        right, wrong = (
            (flip[f"{side}_item"], workspace.generation_uri(flip[f"{side}_owner"])) for side in ("right", "wrong")
        )
        hangs = explained.search(query, right, wrong, count)
        searches[query] = {
            "margin": hangs.margin,
            "margin_without": hangs.margin_without,
            "against": _entries(images, hangs.against),
            "for": _entries(images, hangs.held_by),
        }
    return {**found, "training": {"num_images": num_images, "num_taken": len(images), "searches": searches}}


def _entries(images: LabelledImages, effects: list[tuple[int, float]]) -> list[dict[str, Any]]:
    return [
        {"source": images.sources[place], "label": str(images.labels[place]), "effect": effect}
        for place, effect in effects
    ]


def _training_images(workspace: Workspace, generation: str) -> tuple[LabelledImages, int]:
    """The images that a generation was trained on, or a sample of them, and how many there are."""
    images = trained_on(workspace, generation)
    if images is None:
        raise NotTrainedHereError(
            f"naming the training images behind {generation}: expected a generation that was trained here, found an "
            "adopted one, or one without its manifest; leave out --training"
        )
    if len(images) <= MOST_IMAGES:
        return images, len(images)
    chosen = np.random.default_rng(0).choice(len(images), MOST_IMAGES, replace=False)
    return images.take(np.sort(chosen)), len(images)
