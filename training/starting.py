"""Where a training starts: the parent's weights and class means, and the network and head that are trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import GracefulError
from graceful.training.backbones import build_backbone, load_initial_weights
from graceful.training.encoder import autocast, open_network, read_classifier
from graceful.training.finishing import sum_by_class
from graceful.training.generation import GenerationCard
from graceful.training.heads import Head, build_head, initialise_rows
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.material import Material
from graceful.training.predecessors import synthesise_rows


class IncompatibleParentError(GracefulError):
    """The parent cannot give what the recipe takes from it."""


class Trainee(nn.Module):
    """Network and head in one module, so that gradients of both are averaged over the workers."""

    def __init__(self, network: nn.Module, head: Head) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, d) float32, not normalised, and the task loss."""
        with autocast(images.device, dtype):
            embeddings = self.network(images)
        embeddings = embeddings.float()
        return embeddings, self.head(embeddings, labels)


@dataclass(frozen=True)
class Parent:
    """What a training takes from the generation that it starts from."""

    card: GenerationCard
    state: dict[str, Tensor]
    class_means: Tensor  # (C, d) over the current training set
    rows: Tensor  # (C, d) its own, the class mean where it has none


def load_parent(job: TrainingJob, material: Material, device: torch.device, dtype: torch.dtype | None) -> Parent | None:
    """Read what the recipe takes from the parent; class means from its cache, or in one pass over the clean images.

    Raises: IncompatibleParentError.
    """
    config = job.config
    widest = max((group.width for group in material.predecessors.groups), default=0)
    if widest > config.width:
        raise IncompatibleParentError(
            f"training {job.name}: expected a width of at least {widest}, that of its widest predecessor, found "
            f"{config.width}; widths may grow but not shrink"
        )
    takes_weights = config.start == "parent"
    if job.parent_uri is None or not (takes_weights or config.rows_from_parent):
        return None
    card, network = open_network(job.parent_uri, device)
    same_network = card.backbone == config.backbone and config.preprocessing.takes_weights_of(card.preprocessing)
    if card.width != config.width or (takes_weights and not same_network):
        raise IncompatibleParentError(
            f"training {job.name}: expected a parent with the same backbone, preprocessing and width, found "
            f"{card.backbone.name}, {card.width} wide (in {job.parent_uri}); set start = 'scratch', interpolation = 0 "
            "and, for another width, rows_from_parent = false"
        )
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
    return Parent(card, {name: tensor.clone() for name, tensor in network.state_dict().items()}, means, rows)


def build_trainee(config: TrainingConfig, num_classes: int, parent: Parent | None) -> Trainee:
    """Build network and head and give them their first weights."""
    network = build_backbone(
        config.backbone, config.width, config.preprocessing.channels, config.preprocessing.image_size
    )
    if parent is not None and config.start == "parent":
        network.load_state_dict(parent.state, strict=True)
    elif config.initial_weights is not None:
        load_initial_weights(network, config.backbone, config.initial_weights)
    head = build_head(config.head.name, num_classes, config.width, config.head.scale, config.head.margin)
    if parent is not None and config.rows_from_parent:
        head.set_rows(initialise_rows(parent.class_means))
    return Trainee(network, head)
