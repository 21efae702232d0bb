"""Which variants may query, and which of them answers: read from lineage and certificates, stored nowhere else.

A variant is approved while its newest judgement says so, it holds its certificate for itself, and nobody has retired
it. For a name the champion's approved one answers, else the newest whose generation's rows the champion reads: a
promotion and a rollback move variants without a word, since they move the champion. One that is approved and whose
generation is kept may be asked for by its id, as an older client may.
"""

import re
from collections.abc import Iterable

from graceful.errors import GracefulError
from graceful.files import crash_point
from graceful.flows.store.events import VariantJudged
from graceful.flows.store.registry import Registry, read_by
from graceful.training.generation import ordinal_of, variant_in


class QueryOnlyError(GracefulError):
    """A variant was named where a generation is needed whose vectors are stored."""


class NoVariantError(GracefulError):
    """No approved variant of this name may read what is served."""


def settle(registry: Registry, variant: str, made: VariantJudged, *, update_key: str, occurrence: int = 1) -> None:
    """Issue or revoke a variant's certificates, then record the judgement that lets it answer, or not.

    `occurrence`: which judgement of these inputs it is; see `standing`.
    """
    wanted = [(variant, variant), *((variant, name) for name in made.readable)] if made.approved else []
    held = {pair for pair in registry.certificates() if pair[0] == variant}
    registry.revoke(sorted(held.difference(wanted)), reason=made.reason)
    registry.certify(wanted, reason=made.reason)
    crash_point("variant-certified")
    registry.record(made, update_key=update_key, generation=variant, occurrence=occurrence)
    crash_point("variant-judged")


def standing(registry: Registry, variant: str, update_key: str) -> tuple[VariantJudged | None, int]:
    """The newest judgement of a variant, if it was made of these inputs; and how many were.

    One that other inputs came after does not stand any more: it is judged, and recorded, again.
    """
    events = [event for event in registry.events(VariantJudged) if event.generation == variant]
    is_newest = bool(events) and events[-1].update_key == update_key
    return events[-1].payload if is_newest else None, sum(event.update_key == update_key for event in events)


def judged(registry: Registry) -> dict[str, VariantJudged]:
    """The newest judgement of every variant, in the order in which they were made."""
    found: dict[str, VariantJudged] = {}
    for event in registry.events(VariantJudged):
        found.pop(event.generation, None)
        found[event.generation] = event.payload
    return found


def approved(registry: Registry, without: str | None = None) -> dict[str, VariantJudged]:
    """Variants that may query; of several of one name and generation, the one judged last. `without`: as if one were
    not there.
    """
    pairs, retired = registry.certificates(), registry.retired()
    found: dict[tuple[str, str], str] = {}
    verdicts = judged(registry)
    for variant, verdict in verdicts.items():
        if variant != without and verdict.approved and (variant, variant) in pairs and variant not in retired:
            found[verdict.name, verdict.of] = variant
    return {variant: verdicts[variant] for variant in found.values()}


def answering(registry: Registry, without: str | None = None) -> dict[str, str]:
    """The variant that answers for each name now, or would `without` one; names without one are left out."""
    champion = registry.serving().champion
    if champion is None:
        return {}
    read = {champion, *read_by(champion, registry.certificates())}
    may = {variant: verdict for variant, verdict in approved(registry, without).items() if verdict.of in read}
    ascending = sorted(may, key=lambda variant: (may[variant].of == champion, ordinal_of(may[variant].of)))
    return {may[variant].name: variant for variant in ascending}


def variant_for(registry: Registry, name: str) -> str:
    """The id of the variant that answers for a name.

    Raises:
        NoVariantError: none may, with the reason of the newest judgement.
    """
    found = answering(registry)
    if name in found:
        return found[name]
    champion = registry.serving().champion
    newest = [verdict for verdict in judged(registry).values() if verdict.name == name]
    said = f"; the newest, of {newest[-1].of}, was {newest[-1].reason}" if newest else ""
    raise NoVariantError(
        f"querying as {name}: expected an approved variant that may read what {champion} serves, found "
        f"{', '.join(found) or 'none'}{said}; make one with [variants.{name}] in the configuration and "
        f"'graceful variant {name}'"
    )


def names_variant(name: str) -> bool:
    """Whether what a query asks as is the name of a variant; else it is an id, or the beginning of one (g002).

    >>> names_variant("edge"), names_variant("g002"), names_variant("g002.edge-77a0b2")
    (True, False, False)
    """
    return re.match(r"g\d", name) is None


def resolve_query(registry: Registry, name: str) -> str:
    """The id behind what a query asks as: a variant's name, or what `Registry.resolve` knows.

    Raises: NoVariantError, UnknownGenerationError.
    """
    return variant_for(registry, name) if names_variant(name) else registry.resolve(name)


def live_variants(registry: Registry, kept: Iterable[str], supported: Iterable[str] = ()) -> list[str]:
    """Approved variants whose rows are kept: they answer, their generation is kept, or their clients are supported."""
    answer, names, clients = set(answering(registry).values()), set(kept), set(supported)
    return [
        variant for variant, verdict in approved(registry).items() if variant in answer | clients or verdict.of in names
    ]


def generation_behind(registry: Registry, name: str) -> str:
    """The generation whose vectors a client's queries need: of a variant, the one that it is a variant of."""
    return name if variant_in(name) is None else registry.variants().get(name, name)


def refuse_variant(registry: Registry, act: str, generation: str) -> None:
    """Raise QueryOnlyError for a variant: it owns no rows of the gallery, and never serves in another's place."""
    variant = variant_in(generation)
    if variant is not None:
        raise QueryOnlyError(
            f"{act}: expected a generation whose vectors are stored, found {generation}, a variant, which only "
            f"queries; name its generation, {generation_behind(registry, generation)}, or 'graceful search --as "
            f"{variant}'"
        )
