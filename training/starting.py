"""Where a training starts: the parent's weights and class means, and the network and head that are trained."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.augmentation import Transforms
from graceful.training.backbones import build_backbone, load_initial_weights
from graceful.training.combinations import CORNERS, IncompatibleParentError, check_combination
from graceful.training.constraints import build_constraint, takes
from graceful.training.encoder import autocast, open_network, read_classifier
from graceful.training.finishing import sum_by_class
from graceful.training.generation import GenerationCard, read_card
from graceful.training.heads import Head, build_head, initialise_rows
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.linear import Linearised, SquaredHead, check_linearisable
from graceful.training.material import Material
from graceful.training.objective import Draw
from graceful.training.predecessors import synthesise_rows
from graceful.training.simplex import corner_order, simplex_vertices


class Trainee(nn.Module):
    """Network and head in one module, so that gradients of both are averaged over the workers."""

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, images: Tensor, labels: Tensor, dtype: torch.dtype | None, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, d) float32, not normalised, and the task loss of what the draw makes of them."""
        with autocast(images.device, dtype):
            embeddings = self.network(images)
        embeddings = embeddings.float()
        return embeddings, self.head(draw.mix(embeddings), labels, draw.sample)

    @property
    def is_linear(self) -> bool:
        """Whether the expansion of a network is trained, instead of a network."""
        return isinstance(self.network, Linearised)

    def plain(self) -> nn.Module:
        """Return the network that is measured and stored: the one in training, or a copy of it at w0 + d."""
        return self.network.moved() if isinstance(self.network, Linearised) else self.network


@dataclass(frozen=True)
class Parent:
    """What a training takes from the generation that it starts from, at the width of the one to make."""

    card: GenerationCard
    state: dict[str, Tensor]
    class_means: Tensor  # (C, d) over the current training set; 0 beyond the parent's width
    rows: Tensor  # (C, d) its own, the class mean where it has none; 0 beyond the parent's width
    is_new: Tensor  # (C,) classes that it does not know
    corners: tuple[str, ...]  # every class that ever had a corner of the fixed simplex, in their order; empty without
    corners_of_classes: Tensor  # (C,) each class's corner; empty without


def check_start(job: TrainingJob) -> None:
    """Refuse what cannot be trained, before any data are read: constraints and transforms with their
    parameters, and combinations.

    Raises: UsageError, IncompatibleParentError.
    """
    for entry in job.config.constraints:
        constraint = build_constraint(entry.name, entry.parameters)
        if entry.uncertainty and not takes(constraint, "weights"):
            raise UsageError(
                f"constraint {entry.name}: expected a parameter weights for uncertainty = true, found none; give its "
                "call one, (K, B), or set uncertainty = false"
            )
    if job.config.augmentation.kind == "transforms":
        Transforms(job.config.augmentation, job.config.preprocessing)
    parent = None if job.parent_uri is None else read_card(job.parent_uri)
    predecessors = [read_card(reference.generation_uri) for reference in job.predecessors]
    check_combination(job.name, job.config, parent, predecessors)
    if job.config.lqf is not None and parent is not None:
        check_linearisable(_build_network(job.config))


def load_parent(job: TrainingJob, material: Material, device: torch.device, dtype: torch.dtype | None) -> Parent | None:
    """Read what the recipe takes from the parent; class means from its cache, or in one pass over the clean images.

    `check_start` has been called. Raises: IncompatibleParentError, UsageError.
    """
    config, head = job.config, job.config.head
    takes_classes = config.rows_from_parent or head.name == "simplex" or head.new_class_margin > 0
    if job.parent_uri is None or not (config.start == "parent" or takes_classes):
        return None
    card, network = open_network(job.parent_uri, device)
    means = material.predecessors.class_means_of(card.generation_id)
    if means is None:
        if not config.preprocessing.takes_weights_of(card.preprocessing):
            raise IncompatibleParentError(
                f"training {job.name}: expected the parent {card.generation_id} among the predecessors, because its "
                "preprocessing differs from this training's, found it missing; add it or set rows_from_parent = false"
            )
        means = sum_by_class(network, material.clean(0, 1), len(material.classes), card.preprocessing, device, dtype)
    means = functional.normalize(means.float(), dim=1).cpu()
    stored = read_classifier(job.parent_uri)
    rows = means if stored is None else synthesise_rows(stored[0].classes, stored[1], material.classes, means)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if card.width < config.width and config.start == "parent":
        state = widened(job, state, card.width)
    known = set(card.classes)
    corners: list[str] = []
    if head.name == "simplex":
        corners = corner_order(material.classes, card.training.get(CORNERS, ()), config.width)
    places = {name: corner for corner, name in enumerate(corners)}
    padding = (0, config.width - card.width)
    return Parent(
        card,
        state,
        class_means=functional.pad(means, padding),
        rows=functional.pad(rows, padding),
        is_new=torch.tensor([name not in known for name in material.classes]),
        corners=tuple(corners),
        corners_of_classes=torch.tensor([places[name] for name in material.classes if corners], dtype=torch.long),
    )


def widened(job: TrainingJob, state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return the state of the job's network from that of one with narrower embeddings, which keep their coordinates.

    What differs must differ in its first axis alone, `width` there: the projection. Its new rows are a tenth of a
    random start, so that they begin as a small part of the vector. Raises: IncompatibleParentError.
    """
    config = job.config
    wanted = _build_network(config).state_dict()
    for name, values in wanted.items():
        narrow = state.get(name)
        if narrow is None or narrow.shape != values.shape:
            expected = (width, *values.shape[1:])
            if narrow is None or values.shape[:1] != (config.width,) or tuple(narrow.shape) != expected:
                raise IncompatibleParentError(
                    f"training {job.name}: expected a network whose last layer alone grows with the width, found "
                    f"{name} of {tuple(values.shape)} where the parent has "
                    f"{None if narrow is None else tuple(narrow.shape)}; set start = 'scratch', interpolation = 0 and "
                    "rows_from_parent = false"
                )
            wanted[name] = torch.cat([narrow.to(values), 0.1 * values[width:]])
        else:
            wanted[name] = narrow
    return wanted


def build_trainee(config: TrainingConfig, num_classes: int, parent: Parent | None) -> Trainee:
    """Build network and head and give them their first weights."""
    network = _build_network(config)
    if parent is not None and config.start == "parent":
        network.load_state_dict(parent.state, strict=True)
    elif config.initial_weights is not None:
        look = config.preprocessing
        load_initial_weights(network, config.backbone, config.initial_weights, look.channels, look.image_size)
    head = build_head(config.head, num_classes, config.width)
    if parent is not None and config.lqf is not None:
        network = Linearised(network)
        if config.lqf.loss == "squared":
            head = SquaredHead(config.head, config.lqf.target, num_classes, config.width)
    if parent is not None:
        head.expand(parent.is_new)
        if head.is_fixed:
            head.set_rows(simplex_vertices(config.width)[parent.corners_of_classes])
        elif config.rows_from_parent:
            head.set_rows(initialise_rows(parent.class_means))
    return Trainee(network, head)


def _build_network(config: TrainingConfig) -> nn.Module:
    preprocessing = config.preprocessing
    return build_backbone(config.backbone, config.width, preprocessing.channels, preprocessing.image_size)
