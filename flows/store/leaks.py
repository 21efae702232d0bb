"""Which generations were trained on images that are to judge the next one.

A generation is judged fairly only on images that none of the compared generations was trained on. The training's own
check looks at the candidate; this one at everything trained before, by the manifests that every update leaves.
"""

from collections.abc import Iterator, Sequence

from graceful.errors import GracefulError
from graceful.files import exists
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.events import Adopted, Retired, Trained
from graceful.flows.store.workspace import Workspace
from graceful.training.manifest import LabelledImages, read_manifest

_SHOWN = 3


class TrainedOnQueriesError(GracefulError):
    """Evaluation queries were in an earlier generation's training."""


def training_manifests(workspace: Workspace) -> Iterator[tuple[str, LabelledImages]]:
    """Each generation that was trained here and takes part, with the images that it was trained on.

    An adopted encoder left no manifest (that of its update is what was trained on beside it); one that the operator
    retired is compared with nothing any more.
    """
    registry = workspace.registry
    left_out = {event.generation for event in registry.events(Adopted)}
    left_out |= {event.generation for event in registry.events(Retired) if event.payload.reason}
    seen: set[str] = set()
    for event in registry.events(Trained):
        uri = workspace.manifest_uri(event.update_key)
        if event.generation not in left_out | seen and exists(uri):
            seen.add(event.generation)
            yield event.generation, read_manifest(uri)


def refuse_trained_on(workspace: Workspace, evaluation_set: EvaluationSet) -> None:
    """Raise TrainedOnQueriesError, with count, names and remedy, where a generation was trained on a query."""
    judging = [images for images in (evaluation_set.queries, evaluation_set.log) if images is not None]
    leaks = _leaks(workspace, judging)
    if not leaks:
        return
    generation, names = max(leaks.items(), key=lambda item: len(item[1]))
    each = ", ".join(f"{len(found)} in {name}" for name, found in leaks.items())
    raise TrainedOnQueriesError(
        f"checking that nobody was trained on the evaluation queries: expected none of {len(evaluation_set.queries)}, "
        f"found {each} (such as {'; '.join(names[:_SHOWN])} in {generation}); leave these images out, or draw the "
        'evaluation with split = { share = 0.2, by = "content", ... }: no image changes sides then'
    )


def refuse_trained_on_dev(workspace: Workspace, dev: LabelledImages) -> None:
    """Raise TrainedOnQueriesError where a generation was trained on images of the dev part: it looks too good there."""
    leaks = _leaks(workspace, [dev])
    if not leaks:
        return
    generation, names = max(leaks.items(), key=lambda item: len(item[1]))
    raise TrainedOnQueriesError(
        f"checking that nobody was trained on the dev part: expected none of {len(dev)} images, found {len(names)} in "
        f"{generation} (such as {'; '.join(names[:_SHOWN])}); give evaluation.dev.images that no generation was "
        "trained on, or leave evaluation.dev out"
    )


def _leaks(workspace: Workspace, judging: Sequence[LabelledImages]) -> dict[str, list[str]]:
    """Sources of the given images that each generation was trained on."""
    source_of = {
        digest: source
        for images in judging
        for digest, source in zip(images.content_sha256, images.sources, strict=True)
    }
    found: dict[str, list[str]] = {}
    for generation, manifest in training_manifests(workspace):
        trained = set(manifest.content_sha256)
        names = [source for digest, source in source_of.items() if digest in trained]
        if names:
            found[generation] = names
    return found
