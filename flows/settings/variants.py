"""Variants of a generation that only query: networks trained here, by what differs from [training], and text towers.

A text tower comes from elsewhere (`training.text_tower`): `factory` says so, and then the keys of a training are
refused. Both are judged by the policy, with the margin of their own where they have one.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from graceful.errors import UsageError
from graceful.evaluation.policy import RolloutPolicy
from graceful.training.architecture import SearchConfig
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.job import AugmentationConfig, ConstraintConfig, TrainingConfig
from graceful.training.texts import TextQueriesConfig

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LIKE_A_GENERATION = re.compile(r"g\d.*")
_OF_TEXT_ALONE = ("parameters", "queries", "min_quality_points")
_OF_ALL = ("quality_margin_points",)
_AS_TRAINED = ("initial_weights", "augmentation", "epochs", "batch_size", "weight_decay", "seed")


def distillation() -> tuple[ConstraintConfig, ...]:
    """Return a variant's constraints: the vectors of its generation, and two terms against every readable one."""
    return (
        ConstraintConfig(name="l2", weight=10.0, against="latest"),
        ConstraintConfig(name="cross_contrast", reduction="sum"),
        ConstraintConfig(name="ract", reduction="mean"),
    )


class VariantConfig(BaseModel):
    """A variant of every generation that serves, such as a small network for phones: it only queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneSpec | None = Field(default=None, description="Network to train; or else a factory.")
    factory: str | None = Field(
        default=None,
        pattern=r"^[^:\s]+:[^:\s]+$",
        description='A text tower instead, which is not trained: "package.module:function" that returns a callable, '
        "texts -> vectors (n, width). Called with parameters, and with generation_id, generation_uri and width where "
        "it takes them.",
    )
    parameters: dict[str, Any] = Field(default_factory=dict, description="factory: its arguments (JSON values only).")
    queries: TextQueriesConfig | None = Field(
        default=None, description="factory: labelled texts by which it is judged, against the evaluation gallery."
    )
    min_quality_points: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="factory: what the lower bound of its metric must reach, in points, beside what chance would.",
    )
    initial_weights: str | None = Field(default=None, description="As training.initial_weights; by default none.")
    width: int | None = Field(
        default=None, ge=2, description="Embedding width; by default training.width, without which it cannot search."
    )
    prefix_widths: tuple[int, ...] = Field(
        default=(), description="Shorter prefixes declared valid; training.width must be one where width is larger."
    )
    image_size: int | None = Field(
        default=None, ge=4, description="Pixels of its input; all else as in training.preprocessing."
    )
    preprocessing: Preprocessing | None = Field(
        default=None, description="Instead of image_size: the whole table; by default training.preprocessing."
    )
    augmentation: AugmentationConfig | None = Field(default=None, description="By default training.augmentation.")
    constraints: tuple[ConstraintConfig, ...] = Field(
        default_factory=distillation,
        min_length=1,
        description="Against the generation it is a variant of, which is the latest, and those whose rows that reads.",
    )
    task_weight: float = Field(
        default=0.1,
        gt=0,
        description="Factor of its own classifier in the loss, in the place of training.head.weight: small, since the "
        "space is its generation's.",
    )
    quality_margin_points: float | None = Field(
        default=None, ge=0, description="What its gate lets it lose; by default policy.quality_margin_points."
    )
    epochs: int | None = Field(default=None, ge=1, description="By default training.epochs.")
    batch_size: int | None = Field(default=None, ge=2, description="By default training.batch_size.")
    max_lr: float | None = Field(default=None, gt=0, description="Peak learning rate; by default first_max_lr.")
    weight_decay: float | None = Field(default=None, ge=0, description="By default training.weight_decay.")
    seed: int | None = Field(default=None, ge=0, description="By default training.seed.")
    search: SearchConfig | None = Field(
        default=None, description="Networks of which 'graceful variant NAME --search' looks for the best."
    )

    @property
    def tower(self) -> BackboneSpec | None:
        """What builds it, of a text tower; None of a network that is trained here."""
        return None if self.factory is None else BackboneSpec(name=self.factory, kwargs=self.parameters)

    def policy(self, policy: RolloutPolicy) -> RolloutPolicy:
        """Return what its gate judges by: the policy of the decisions, with its own margin where it has one."""
        margin = self.quality_margin_points
        return policy if margin is None else policy.model_copy(update={"quality_margin_points": margin})

    def recipe(self, training: TrainingConfig) -> TrainingConfig:
        """Return the training of this variant: from scratch, its classifier rows started at its generation's means.

        Raises: UsageError, ValueError (pydantic's) for what cannot be trained.
        """
        assert self.backbone is not None, "a text tower is not trained"
        given: dict[str, Any] = {name: getattr(self, name) for name in _AS_TRAINED if getattr(self, name) is not None}
        return TrainingConfig.model_validate(
            training.model_dump()
            | {
                "initial_weights": None,
                "backbone": self.backbone.model_dump(),
                "width": self.width or training.width,
                "prefix_widths": self.prefix_widths,
                "preprocessing": self._preprocessing(training.preprocessing).model_dump(),
                "constraints": [entry.model_dump() for entry in self.constraints],
                "predecessor_weights": "equal",
                "head": training.head.model_dump() | {"weight": self.task_weight, "new_class_margin": 0.0},
                "start": "scratch",
                "rows_from_parent": True,
                "interpolation": 0.0,
                "mixture": 0.0,
                "lqf": None,
                "patience": None,
                "first_max_lr": self.max_lr or training.first_max_lr,
            }
            | {name: _plain(value) for name, value in given.items()}
        )

    def _preprocessing(self, trained: Preprocessing) -> Preprocessing:
        if self.preprocessing is not None or self.image_size is None:
            return self.preprocessing or trained
        return trained.at_size(self.image_size)


def check_variants(variants: Mapping[str, VariantConfig], training: TrainingConfig) -> None:
    """Refuse variants that could not search their generation's rows, before anything is trained. Raises UsageError."""
    for name, variant in variants.items():
        if not _NAME.fullmatch(name) or _LIKE_A_GENERATION.fullmatch(name):
            raise UsageError(
                f"variant {name!r}: expected a name of small letters, digits and _ that is not like a generation's "
                "(g002), by which queries ask; call it edge, or phone"
            )
        _check_kind(name, variant)
        if variant.factory is not None:
            continue
        if variant.preprocessing is not None and variant.image_size is not None:
            raise UsageError(f"variant {name}: expected image_size or preprocessing, found both; give one")
        recipe = variant.recipe(training)
        if training.width not in (recipe.width, *recipe.prefix_widths):
            raise UsageError(
                f"variant {name}: expected the width {training.width} of its generation, or it among prefix_widths of "
                f"a larger one, found width {recipe.width} with prefix_widths {list(recipe.prefix_widths)}: its "
                "queries could not be scored against the stored rows; leave width out"
            )


def _check_kind(name: str, variant: VariantConfig) -> None:
    """Refuse what is neither a network to train nor a text tower, or both. Raises UsageError."""
    if (variant.backbone is None) == (variant.factory is None):
        found = "neither" if variant.backbone is None else "both"
        raise UsageError(
            f"variant {name}: expected a backbone, which is trained here on images, or a factory of a text tower from "
            f"elsewhere, found {found}; {'add' if found == 'neither' else 'keep'} one of the two"
        )
    given = variant.model_fields_set - {"backbone", "factory"}
    foreign = sorted(
        given.difference(_OF_TEXT_ALONE, _OF_ALL) if variant.factory is not None else given.intersection(_OF_TEXT_ALONE)
    )
    if foreign:
        kind = "a text tower, which is not trained," if variant.factory is not None else "a network, which is trained,"
        raise UsageError(
            f"variant {name}: expected only keys of {kind} found {', '.join(foreign)}; leave "
            f"{'it' if len(foreign) == 1 else 'them'} out"
        )
    if variant.factory is not None and variant.queries is None:
        raise UsageError(
            f"variant {name}: expected labelled texts by which its gate can judge it, found none; add a table "
            f"[variants.{name}.queries] with source and path"
        )


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value
