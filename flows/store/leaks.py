"""Which generations were trained on images that are to judge the next one.

A generation is judged fairly only on images that none of the compared generations was trained on. The training's own
check looks at the candidate; this one at everything trained before, by the manifests that every update leaves.
"""

from graceful.errors import GracefulError
from graceful.files import exists
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.workspace import Workspace
from graceful.training.manifest import read_manifest

_SHOWN = 3


class TrainedOnQueriesError(GracefulError):
    """Evaluation queries were in an earlier generation's training."""


def images_trained_on(workspace: Workspace, evaluation_set: EvaluationSet) -> dict[str, int]:
    """Queries that each generation was trained on, by content; generations with none are left out.

    An adopted encoder left no manifest: what it was trained on is not known, and not counted.
    """
    return {generation: len(names) for generation, names in _leaks(workspace, evaluation_set).items()}


def refuse_trained_on(workspace: Workspace, evaluation_set: EvaluationSet) -> None:
    """Raise TrainedOnQueriesError, with count, names and remedy, where a generation was trained on a query."""
    leaks = _leaks(workspace, evaluation_set)
    if not leaks:
        return
    generation, names = max(leaks.items(), key=lambda item: len(item[1]))
    each = ", ".join(f"{len(found)} in {name}" for name, found in leaks.items())
    raise TrainedOnQueriesError(
        f"checking that nobody was trained on the evaluation queries: expected none of {len(evaluation_set.queries)}, "
        f"found {each} (such as {'; '.join(names[:_SHOWN])} in {generation}); leave these images out, or draw the "
        'evaluation with split = { share = 0.2, by = "content", ... }: no image changes sides then'
    )


def _leaks(workspace: Workspace, evaluation_set: EvaluationSet) -> dict[str, list[str]]:
    """Sources of the queries that each generation was trained on."""
    queries = evaluation_set.queries
    source_of = dict(zip(queries.content_sha256, queries.sources, strict=True))
    found: dict[str, list[str]] = {}
    for event in workspace.registry.events("trained"):
        uri = workspace.manifest_uri(event.update_key)
        if not exists(uri):
            continue
        trained = set(read_manifest(uri).content_sha256)
        names = [source for digest, source in source_of.items() if digest in trained]
        if names:
            found[event.generation] = names
    return found
