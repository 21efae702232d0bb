"""Which recipes cannot work with which predecessors: refused before anything is read but cards. No torch here."""

from collections.abc import Sequence

from graceful.errors import GracefulError
from graceful.training.choices import OF_LOGITS
from graceful.training.generation import GenerationCard, ordinal_of
from graceful.training.job import ConstraintConfig, TrainingConfig

CORNERS = "corners"  # in a card's training: the classes of a fixed simplex in the order of its corners


class IncompatibleParentError(GracefulError):
    """The parent or a predecessor cannot give what the recipe takes from it."""


def check_combination(
    name: str, config: TrainingConfig, parent: GenerationCard | None, predecessors: Sequence[GenerationCard]
) -> None:
    """Refuse a recipe that its parent or its predecessors do not allow; `name` is what is being trained.

    Raises: IncompatibleParentError, with the reason and what can be done instead.
    """
    constrained = tuple(predecessors) if config.constraints else ()
    _check_widths(name, config, parent, constrained)
    _check_classifiers(name, config, constrained)
    if parent is not None and config.start == "parent":
        _check_weights(name, config, parent)
        if config.lqf is not None:
            _check_expansion(name, config, parent)
    if parent is not None and config.mixture != 0:
        _check_mixture(name, config, parent, predecessors)
    if config.head.name == "simplex":
        _check_simplex(name, config, [*([parent] if parent is not None else []), *constrained])


def _check_widths(
    name: str, config: TrainingConfig, parent: GenerationCard | None, constrained: Sequence[GenerationCard]
) -> None:
    given = parent is not None and (config.start == "parent" or config.rows_from_parent)
    widest = max([*constrained, *([parent] if parent is not None and given else [])], key=_width, default=None)
    if widest is not None and widest.width > config.width:
        raise IncompatibleParentError(
            f"training {name}: expected a width of at least {widest.width}, that of {widest.generation_id}, found "
            f"{config.width}; widths may grow but not shrink: raise width, or train an unconstrained generation with "
            "constraints = [], mixture = 0, start = 'scratch' and rows_from_parent = false, and re-embed the "
            "gallery"
        )
    for entry in config.constraints:
        seen = _against(entry, constrained)
        other = next((card for card in seen if card.width != config.width), None)
        if entry.name == "mixbct" and other is not None:
            raise IncompatibleParentError(
                f"training {name}: expected predecessors of width {config.width} for mixbct, which puts their vectors "
                f"in the place of new ones, found {other.width} in {other.generation_id}; keep the width, or use bct "
                "or oca, which compare the shared prefix"
            )


def _check_expansion(name: str, config: TrainingConfig, parent: GenerationCard) -> None:
    if parent.width != config.width:
        raise IncompatibleParentError(
            f"training {name}: expected the width {parent.width} of {parent.generation_id} with [training.lqf], "
            f"which expands the network of that generation, found {config.width}; keep the width, or train without "
            "[training.lqf]"
        )


def _check_classifiers(name: str, config: TrainingConfig, constrained: Sequence[GenerationCard]) -> None:
    for entry in config.constraints:
        without = [card for card in _against(entry, constrained) if not card.has_classifier]
        if entry.name in OF_LOGITS and without:
            raise IncompatibleParentError(
                f"training {name}: expected a classifier in every predecessor for {entry.name}, which compares logits, "
                f"found none in {without[0].generation_id} ({without[0].origin}); use l2 with focus = 5, which "
                "compares embeddings, or against = 'latest' where the latest has one"
            )


def _against(entry: ConstraintConfig, constrained: Sequence[GenerationCard]) -> Sequence[GenerationCard]:
    if entry.against != "latest" or not constrained:
        return constrained
    return [max(constrained, key=lambda card: ordinal_of(card.generation_id))]


def _check_weights(name: str, config: TrainingConfig, parent: GenerationCard) -> None:
    if parent.backbone == config.backbone and config.preprocessing.takes_weights_of(parent.preprocessing):
        return
    if config.lqf is not None:
        raise IncompatibleParentError(
            f"training {name}: expected a parent with the same backbone and preprocessing with [training.lqf], which "
            f"expands the parent's network, found {parent.backbone.name} {parent.backbone.kwargs} for "
            f"{config.backbone.name} {config.backbone.kwargs} ({parent.generation_id}); keep the backbone, or train "
            "without [training.lqf] and with start = 'scratch'"
        )
    what = "starts from and is interpolated with" if config.interpolation != 0 else "starts from"
    raise IncompatibleParentError(
        f"training {name}: expected a parent with the same backbone and preprocessing, because the network {what} its "
        f"weights, found {parent.backbone.name} for {config.backbone.name} ({parent.generation_id}); set "
        "start = 'scratch' and interpolation = 0: the constraints hold across architectures"
    )


def _check_mixture(
    name: str, config: TrainingConfig, parent: GenerationCard, predecessors: Sequence[GenerationCard]
) -> None:
    if parent.generation_id not in {card.generation_id for card in predecessors}:
        raise IncompatibleParentError(
            f"training {name}: expected the parent {parent.generation_id} among the predecessors, because the mixture "
            "takes its stored vectors, found it missing; add it, or set mixture = 0"
        )
    if config.start == "scratch" and not config.constraints:
        raise IncompatibleParentError(
            f"training {name}: expected a network in the space of {parent.generation_id} for a mixture with its "
            "vectors, found one from scratch without constraints; set mixture = 0, or take constraints"
        )


def _check_simplex(name: str, config: TrainingConfig, earlier: Sequence[GenerationCard]) -> None:
    for card in earlier:
        if CORNERS not in card.training:
            raise IncompatibleParentError(
                f"training {name}: expected the fixed simplex from the first generation on, because only classes that "
                f"were always in the same places are compatible by it, found {card.generation_id} without it; use "
                "another head with bct, ract or cross_contrast, or start a chain of its own with the simplex"
            )
        if card.width != config.width:
            raise IncompatibleParentError(
                f"training {name}: expected the width {card.width} of {card.generation_id}, because a simplex of "
                f"another width has its corners elsewhere, found {config.width}; keep the width, or use another head"
            )


def _width(card: GenerationCard) -> int:
    return card.width
