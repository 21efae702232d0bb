"""Which generations the next one stays compatible with."""

from collections.abc import Sequence

from graceful.flows.settings.config import PipelineConfig
from graceful.flows.store.workspace import Workspace

LEAST_WEIGHT = 0.1
"""Of a predecessor without rows: it takes part because it may be searched again, by a client or after a rollback."""


def predecessors_of(workspace: Workspace, config: PipelineConfig) -> list[str]:
    """Generations to constrain against: all that ever served, or those of them that still serve somebody.

    Those that the champion reads rows of, and those whose clients are supported. What the operator retired is left out.
    """
    retired = workspace.registry.retired()
    champion = workspace.registry.serving().champion
    served = [name for name in workspace.registry.served_generations() if name == champion or name not in retired]
    if config.predecessors == "all" or champion is None:
        return served
    owners = workspace.view(champion).rows_by_generation()
    clients = config.gallery.supported_query_generations
    return [name for name in served if name == champion or owners.get(name) or name in clients]


def weights_by_share(workspace: Workspace, predecessors: Sequence[str]) -> tuple[float, ...]:
    """Weights of mean 1 in proportion to the gallery rows that the champion reads of each; at least LEAST_WEIGHT."""
    champion = workspace.registry.serving().champion
    rows = {} if champion is None else workspace.view(champion).rows_by_generation()
    counts = [int(rows.get(name, 0)) for name in predecessors]
    total = sum(counts)
    if not total:
        return (1.0,) * len(predecessors)
    return tuple(max(LEAST_WEIGHT, len(counts) * count / total) for count in counts)
