"""What one training is: the recipe (TrainingConfig) and the order to carry it out (TrainingJob). Plain JSON values.

The defaults are the recipe that docs/comparison.md compares with others: fine-tune from the parent with classifier rows
started at the parent's class means, one RACT term against every predecessor, put the mixture with the parent into the
network, then calibrate batch norm.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from graceful.errors import UsageError
from graceful.training.choices import CONSTRAINT_PARAMETERS, HEAD_NAMES, OF_LOGITS, PER_IMAGE, check_parameters
from graceful.training.generation import BackboneSpec, PredecessorRef, Preprocessing, VariantOf

TRAINING_VERSION = 3
"""Version of what a recipe means. Raise it with every change after which the same job gives other weights: a loss, the
loop, an augmentation, the calibration. Trainings of another version are not taken up again."""


class HeadConfig(BaseModel):
    """The classifier loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        default="additive_margin",
        description="additive_margin, arcface, cosine_softmax, or simplex: fixed rows, from the first generation on.",
    )
    scale: float = Field(default=20.0, gt=0, description="Logit scale s.")
    margin: float = Field(
        default=0.2,
        ge=0,
        description="Margin m: of the cosine, or of the angle for arcface; cosine_softmax and simplex have none.",
    )
    weight: float = Field(default=1.0, gt=0, description="Factor of the task in the loss.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    rotation: bool = Field(
        default=False,
        description="Whether the classifier sees the embedding through a learned orthogonal matrix (OCA).",
    )
    new_class_margin: float = Field(
        default=0.0,
        ge=0,
        description="Added to the logits of classes that the parent does not know, against flips to them (MPT).",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in HEAD_NAMES:
            raise UsageError(f"head: expected one of {list(HEAD_NAMES)}, found {value!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "HeadConfig":
        if self.name == "simplex" and self.rotation:
            raise UsageError(
                "head: expected the fixed simplex without rotation, found both: a learned rotation would move the "
                "corners from generation to generation; set rotation = false or take another head"
            )
        return self


class ConstraintConfig(BaseModel):
    """One compatibility constraint, applied against every predecessor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="bct, cross_contrast, focal_kl, focal_logits, hoc, l2, ldi, mixbct, oca, ract, repulsion, or "
        "package.module:Class of your own."
    )
    weight: float = Field(default=1.0, ge=0, description="Factor of this constraint in the loss.")
    reduction: Literal["sum", "mean"] = Field(
        default="sum",
        description="Over the predecessors. sum: each counts as much however many there are, which holds tens of old "
        "galleries and costs self-test; mean: all together count as much as one.",
    )
    against: Literal["all", "latest", "ensemble"] = Field(
        default="all",
        description="Which predecessors it is applied against; ensemble: their mean, for focal_kl, focal_logits, ldi.",
    )
    uncertainty: bool = Field(
        default=False,
        description="Weigh each image by the class margin of its stored vector: what was bad need not be repeated.",
    )
    focus: float = Field(
        default=0.0,
        ge=0,
        description="Weigh an image 1 + focus where the predecessor is right on it, by the nearest class mean: focal "
        "distillation of embeddings with l2 (5 in the paper).",
    )
    parameters: dict[str, float] = Field(default_factory=dict, description="Arguments of the constraint.")

    @model_validator(mode="after")
    def _known(self) -> "ConstraintConfig":
        if ":" in self.name:  # looked up when the training starts
            if not all(self.name.partition(":")[::2]):
                raise UsageError(f"constraint: expected package.module:Class, found {self.name!r}")
            return self
        if self.name not in CONSTRAINT_PARAMETERS:
            raise UsageError(
                f"constraint: expected package.module:Class or one of {sorted(CONSTRAINT_PARAMETERS)}, found "
                f"{self.name!r}"
            )
        check_parameters(self.name, self.parameters)
        if self.name not in PER_IMAGE and (self.uncertainty or self.focus or self.weight != 1.0):
            raise UsageError(
                f"constraint {self.name}: expected neither weight, uncertainty nor focus, because it has no loss of "
                f"its own, found weight = {self.weight:g}, uncertainty = {str(self.uncertainty).lower()}, focus = "
                f"{self.focus:g}; leave them out"
            )
        if self.name in OF_LOGITS and self.focus:
            raise UsageError(
                f"constraint {self.name}: expected no focus beside its own weights, found {self.focus:g}; set beta of "
                "focal_kl or focal_logits, or take l2 for embeddings"
            )
        if self.against == "ensemble" and (self.name not in OF_LOGITS or self.uncertainty):
            raise UsageError(
                f"constraint {self.name}: expected against = 'ensemble' for one of {list(OF_LOGITS)} without "
                f"uncertainty, because only logits of several spaces have a mean, found it for {self.name} with "
                f"uncertainty = {str(self.uncertainty).lower()}; set against = 'all'"
            )
        return self


class TransformConfig(BaseModel):
    """One transform of a training image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="Class of torchvision.transforms.v2, such as RandomResizedCrop, or package.module:factory of your "
        "own, which returns a function of an image (channels, height, width) of bytes."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments (JSON values); size is the network's where it is not given."
    )


class AugmentationConfig(BaseModel):
    """Random changes to training images. What is at the default of a later key is not written: digests stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "affine", "crop_flip", "transforms"] = Field(
        default="none",
        description="Family of changes; affine and crop_flip are made on a batch at once, transforms image by image.",
    )
    rotation_degrees: float = Field(default=15.0, ge=0, description="affine: largest rotation, either way.")
    shift: float = Field(default=0.1, ge=0, lt=1, description="affine: largest shift as a share of the image's side.")
    scale: float = Field(default=0.15, ge=0, lt=1, description="affine: largest relative change of size.")
    padding: int = Field(default=4, ge=0, description="crop_flip: pixels of reflected border before the crop.")
    flip: bool = Field(default=True, description="crop_flip: whether to mirror half of the images.")
    transforms: tuple[TransformConfig, ...] = Field(
        default=(), description="transforms: what is done to each image, in this order; {name, parameters} each."
    )
    source_size: int | None = Field(
        default=None,
        ge=4,
        description="transforms: height and width at which images are decoded for them, so that a crop has something "
        "to cut from; by default the network's.",
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> "AugmentationConfig":
        if self.kind == "transforms" and not self.transforms:
            raise UsageError(
                'augmentation: expected transforms for kind = "transforms", found none; name some, or set another kind'
            )
        if self.kind != "transforms" and (self.transforms or self.source_size is not None):
            raise UsageError(
                f'augmentation: expected transforms and source_size with kind = "transforms" alone, found kind = '
                f'"{self.kind}"; set kind = "transforms" or leave them out'
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_as_it_was(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = write(self)
        return {key: value for key, value in values.items() if key not in ("transforms", "source_size") or value}


class LqfConfig(BaseModel):
    """Linear quadratic fine-tuning: where a parent exists, its first-order expansion is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["head", "squared"] = Field(
        default="head", description="head: training.head's; squared: the paper's, against fixed rows, the parent's "
        "class means, which gains less here.",
    )  # fmt: skip
    target: float = Field(default=15.0, gt=0, description="squared: logit alpha of an image's own class; 0 for others.")
    optimizer: Literal["kfac", "adam"] = Field(
        default="kfac",
        description="kfac: momentum on gradients preconditioned by the curvature at the parent, computed once; adam: "
        "as every other training, with training.max_lr.",
    )
    max_lr: float | None = Field(
        default=None,
        gt=0,
        description="kfac: peak learning rate; by default 0.1 with the head's loss, 0.005 with the squared one, for "
        "which 1 is a Newton step of one batch.",
    )
    damping: float = Field(
        default=0.1, gt=0, description="kfac: added to the curvature, relative to its mean eigenvalue."
    )
    decay: float = Field(default=0.0, ge=0, description="kfac: factor of half the squared distance to the parent.")
    curvature_images: int = Field(default=1024, ge=1, description="kfac: clean images that the curvature is taken on.")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate of K-FAC."""
        return self.max_lr if self.max_lr is not None else {"head": 0.1, "squared": 5e-3}[self.loss]


def recipe_constraints() -> tuple[ConstraintConfig, ...]:
    """Return the default recipe's constraints."""
    return (ConstraintConfig(name="ract", reduction="mean"),)


class TrainingConfig(BaseModel):
    """The recipe of one generation's training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneSpec = Field(default=BackboneSpec(name="small_cnn"), description="Network to train.")
    initial_weights: str | None = Field(
        default=None,
        description='For a start without parent: a weights file, a name of torchvision weights, "pretrained" for timm.',
    )
    width: int = Field(default=128, ge=2, description="Embedding width.")
    prefix_widths: tuple[int, ...] = Field(default=(), description="Shorter prefixes declared valid.")
    preprocessing: Preprocessing = Field(description="How an image becomes the network's input.")
    augmentation: AugmentationConfig = Field(default=AugmentationConfig(), description="Changes to training images.")
    head: HeadConfig = Field(default=HeadConfig(), description="Classifier loss.")
    constraints: tuple[ConstraintConfig, ...] = Field(
        default_factory=recipe_constraints,
        description="Compatibility constraints; [] for a control, with mixture = 0.",
    )
    predecessor_weights: Literal["equal", "share", "dual"] = Field(
        default="equal",
        description="Of the predecessors in the constraints: equal; share: by the gallery rows that the champion reads "
        "of each; dual: after every epoch more for those that are read badly on evaluation.dev, less for the others.",
    )
    start: Literal["parent", "scratch"] = Field(default="parent", description="Initial weights where a parent exists.")
    rows_from_parent: bool = Field(
        default=True, description="Start classifier rows at 1.1 x the parent's class means instead of at random."
    )
    interpolation: Annotated[float, Field(ge=0, lt=1)] | Literal["dev"] = Field(
        default=0.0,
        description="Share a of the parent's weights in the final ones; 0 for none; dev: chosen on evaluation.dev. "
        "Fewer flips than a mixture, and a lower self-test.",
    )
    mixture: Annotated[float, Field(ge=0, lt=1)] | Literal["dev"] = Field(
        default=0.5,
        description="Share b of the parent's vectors in the mixture that the last epochs put into the network, against "
        "flips; 0 for none; dev: chosen on evaluation.dev.",
    )
    mixture_epochs: int = Field(default=2, ge=1, description="With a mixture: further epochs, for it.")
    mixture_weight: float = Field(
        default=10.0,
        gt=0,
        description="With a mixture: factor of the squared distance to it, beside task and constraints.",
    )
    lqf: LqfConfig | None = Field(
        default=None,
        description="Train the parent's linear expansion (LQF) instead of the network; the table may be empty. A first "
        "generation is trained as ever.",
    )
    epochs: int = Field(default=6, ge=1, description="Passes over the training images.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many epochs without a better self-test on evaluation.dev, and keep the best epoch's "
        "weights; by default all epochs are made and the last one's kept.",
    )
    min_epochs: int = Field(default=1, ge=1, description="With patience: epochs that are made in any case.")
    batch_size: int = Field(default=256, ge=2, description="Images per step, all workers together.")
    accumulation: int = Field(
        default=1,
        ge=1,
        description="Micro-batches per step, for batches that do not fit in memory. ract and batch norm see one "
        "micro-batch of all workers at a time.",
    )
    max_gradient_norm: float | None = Field(
        default=None, gt=0, description="Longer gradients of a step are shortened to this norm; by default none are."
    )
    sampled_classes: int | None = Field(
        default=None,
        ge=0,
        description="Classes in a step's softmax, of the task and of constraints: the batch's own and random others. "
        "0: all. By default all up to 1,024, above that 1,024 or twice the batch.",
    )
    max_lr: float = Field(
        default=1e-3,
        gt=0,
        description="Peak learning rate with a parent. A higher one learns more in an update, and holds fewer of the "
        "older galleries.",
    )
    first_max_lr: float = Field(default=2e-3, gt=0, description="Peak learning rate when started from scratch.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's decay; not applied to norms and biases.")
    calibration_images: int = Field(default=4096, ge=0, description="Clean images for batch norm statistics; 0: none.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: 16 bit where the processor has it."
    )
    compile: Literal["auto", "off", "on"] = Field(
        default="auto", description="torch.compile: auto on a GPU for at least 1,000 steps."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    pixel_memory_mib: int = Field(
        default=2048,
        ge=0,
        description="Decoded images up to this are held in memory by every worker, larger sets are decoded while the "
        "network runs; the same holds for the vectors of predecessors, which are then read from a file. 0: never in "
        "memory. The result is the same.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if not self.constraints and self.mixture != 0 and "mixture" not in self.model_fields_set:
            raise UsageError(
                "training config: expected mixture to be said with constraints = [], because its default "
                f"{self.mixture} ties a generation to its parent too; set mixture = 0 for a control without any tie, "
                "or the share that you want"
            )
        if self.start == "scratch" and self.interpolation != 0:
            raise UsageError(
                "training config: interpolation needs weights that started at the parent's; set interpolation = 0 with "
                'start = "scratch"'
            )
        if self.lqf is not None and (self.start != "parent" or not self.rows_from_parent):
            raise UsageError(
                "training config: expected start = 'parent' and rows_from_parent = true with [training.lqf], which "
                "expands the parent's network, found another start; leave them out, or train without [training.lqf]"
            )
        if self.lqf is not None and (self.head.name == "simplex" or self.head.rotation):
            raise UsageError(
                "training config: expected a head whose rows are the parent's class means with [training.lqf], found "
                "simplex or rotation; take additive_margin, arcface or cosine_softmax without rotation"
            )
        if self.lqf is not None and self.precision not in ("auto", "float32"):
            raise UsageError(
                f"training config: expected float32 with [training.lqf], because changes are small beside the weights "
                f"that they are added to, found {self.precision}; set precision = 'auto'"
            )
        if sum(entry.name == "mixbct" for entry in self.constraints) > 1:
            raise UsageError("training config: expected mixbct once, found it twice; raise its share instead")
        if self.batch_size < self.accumulation:
            raise UsageError(
                f"training config: expected an image for each of {self.accumulation} micro-batches, found batch_size = "
                f"{self.batch_size}; lower accumulation"
            )
        if any(not 0 < prefix < self.width for prefix in self.prefix_widths):
            raise UsageError(f"training config: expected prefix widths below {self.width}, found {self.prefix_widths}")
        return self

    @property
    def arithmetic(self) -> str:
        """The name of the network's precision while it is trained."""
        return self.precision if self.lqf is None else "float32"

    @property
    def needs_dev(self) -> bool:
        """Whether something of the recipe is chosen on a dev part."""
        chosen = "dev" in (self.interpolation, self.mixture) or self.predecessor_weights == "dual"
        return chosen or self.patience is not None

    def without_constraints(self) -> "TrainingConfig":
        """Return the paragon's recipe: the same training for as many epochs, tied to no predecessor."""
        name = "cosine_softmax" if self.head.name == "simplex" else self.head.name
        head = self.head.model_copy(update={"name": name, "new_class_margin": 0.0})
        epochs = self.epochs + (self.mixture_epochs if self.mixture != 0 else 0)
        free = {"constraints": (), "interpolation": 0.0, "mixture": 0.0, "lqf": None}
        return self.model_copy(update={**free, "epochs": epochs, "head": head})


def check_shares(config: TrainingConfig, num_workers: int) -> None:
    """Refuse a recipe whose batches have no image for some worker. Raises UsageError."""
    parts = max(num_workers, 1) * config.accumulation
    if config.batch_size < parts:
        raise UsageError(
            f"training on {num_workers} workers: expected an image of every micro-batch for each of them, found "
            f"batch_size = {config.batch_size} for {parts} parts ({num_workers} workers, {config.accumulation} "
            "micro-batches); raise batch_size, or use fewer workers or micro-batches"
        )


class DevPart(BaseModel):
    """Images that choices are made on: neither trained on nor reported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest_uri: str = Field(description="Dev manifest (source, label, content_sha256), no content twice.")
    predecessors: tuple[PredecessorRef, ...] = Field(
        default=(), description="Generations and their embeddings of the dev images, in the manifest's order."
    )
    max_flips: float | None = Field(
        default=None, description="Largest share of dev queries that may be right by the parent and wrong afterwards."
    )


class TrainingJob(BaseModel):
    """The order to train one generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: TrainingConfig = Field(description="Recipe.")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, from a digest of everything that goes into it: the same name resumes.",
    )
    manifest_uri: str = Field(description="Training manifest (source, label, content_sha256).")
    output_uri: str = Field(description="Root of the generations; the new one gets its own folder there.")
    ordinal: int = Field(ge=0, description="Ordinal of the generation to make.")
    parent_uri: str | None = Field(default=None, description="Folder of the generation to start from.")
    predecessors: tuple[PredecessorRef, ...] = Field(default=(), description="Generations to stay compatible with.")
    dev: DevPart | None = Field(default=None, description="What is looked at and chosen by.")
    variant: VariantOf | None = Field(default=None, description="Make a variant of a generation, which only queries.")
    storage_uri: str = Field(description="Where checkpoints, progress and the result are kept.")
    num_workers: int = Field(default=0, ge=0, description="Ray Train workers; 0 trains in this process without Ray.")
    min_workers: int | None = Field(
        default=None, ge=1, description="Fewest workers to go on with when some are lost; by default all are needed."
    )
    use_gpu: bool = Field(default=False, description="One GPU per worker.")
    cpus_per_worker: int = Field(default=1, ge=1, description="CPU cores per worker, also its threads.")
    decoding_processes: int | None = Field(
        default=None, ge=1, description="Processes of a worker that decode images; by default its cores but one."
    )
    resources: dict[str, float] = Field(default_factory=dict, description="Further Ray resources per worker.")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray labels of the nodes that workers run on.")
    max_failures: int = Field(default=2, ge=1, description="Worker failures that are recovered from.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints kept while training.")
    checkpoint_minutes: float = Field(
        default=10.0, ge=0, description="Minutes between checkpoints within an epoch; there is one after every epoch."
    )

    @property
    def planned_epochs(self) -> int:
        """Epochs that are made, unless the training stops early."""
        mixing = self.parent_uri is not None and self.config.mixture != 0
        return self.config.epochs + (self.config.mixture_epochs if mixing else 0)

    @property
    def taking_part(self) -> tuple[PredecessorRef, ...]:
        """Predecessors that the training looks at: all under constraints, the parent for a mixture without."""
        if self.config.constraints:
            return self.predecessors
        return tuple(p for p in self.predecessors if self.config.mixture != 0 and p.generation_uri == self.parent_uri)

    @field_validator("manifest_uri", "output_uri", "storage_uri", "parent_uri")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return (
            value if value is None or "://" in value else os.path.abspath(value)
        )  # workers have other working directories

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingJob":
        ids = [reference.generation_id for reference in self.predecessors]
        if len(set(ids)) != len(ids):
            raise UsageError(f"training job: expected distinct predecessors, found {ids}")
        if self.config.needs_dev and self.dev is None:
            raise UsageError(
                f"training job {self.name}: expected a dev part to choose on (interpolation = "
                f"{self.config.interpolation!r}, mixture = {self.config.mixture!r}, predecessor_weights = "
                f"{self.config.predecessor_weights!r}, patience = {self.config.patience}), found none; give "
                "evaluation.dev, or numbers, equal weights and no patience"
            )
        if (
            "dev" in (self.config.interpolation, self.config.mixture)
            and self.parent_uri is not None
            and self.dev is not None
        ):
            known = [reference.generation_id for reference in self.dev.predecessors]
            parent = self.parent_uri.rstrip("/").rpartition("/")[2]
            if parent not in known:
                raise UsageError(
                    f"training job {self.name}: expected the parent {parent} among the dev part's predecessors "
                    f"(a share of it is chosen by its flips), found {known}; embed the dev images with it"
                )
        check_shares(self.config, self.num_workers)
        if self.min_workers is not None and self.min_workers > max(self.num_workers, 1):
            raise UsageError(
                f"training job: expected min_workers of at most {self.num_workers} workers, found {self.min_workers}"
            )
        return self
