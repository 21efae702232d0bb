"""Which threshold a consumer uses for a hit: by the generation of the query and that of the hit's vector."""

from collections.abc import Mapping, Sequence

from graceful.evaluation.policy import Consumer
from graceful.flows.store.registry import Registry

Thresholds = dict[str, dict[str, float]]
"""Consumer -> generation of the hit's vector -> threshold. A generation that is not there has none that is known."""


def served_thresholds(
    registry: Registry, consumers: Mapping[str, Consumer], query_generation: str, readable: Sequence[str]
) -> Thresholds:
    """Thresholds for queries of one generation.

    What a decision recorded counts. The configured one counts as long as no decision has recorded any of its consumer:
    it was registered for the generation that serves. Afterwards a pair without a record has no threshold rather than
    that of another generation.
    """
    if not consumers:
        return {}
    recorded = registry.thresholds()
    known = {consumer for consumer, _, _ in recorded}
    found: Thresholds = {}
    for name, consumer in consumers.items():
        configured = {} if name in known else dict.fromkeys(readable, consumer.threshold)
        pairs = {owner: recorded.get((name, query_generation, owner)) for owner in readable}
        found[name] = configured | {owner: value for owner, value in pairs.items() if value is not None}
    return found
