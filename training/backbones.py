"""Networks that turn a batch of images into embeddings: small CNN, torchvision models, or any factory.

Every builder returns a module (n, channels, size, size) -> (n, width). Unit length is the encoder's business, not the
network's. Arguments are JSON values, so that a generation's card can rebuild the network.
"""

import importlib
import inspect
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graceful.errors import UsageError
from graceful.training.generation import BackboneSpec


class SmallCnn(nn.Module):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pooling, then the mean over what is left.

    Suits images of 8x8 to 64x64. A block pools only while there are at least 2 pixels to pool.
    """

    def __init__(self, width: int, channels: int, image_size: int, block_widths: tuple[int, ...]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        size, previous = image_size, channels
        for block_width in block_widths:
            blocks += [
                nn.Conv2d(previous, block_width, 3, padding=1, bias=False),
                nn.BatchNorm2d(block_width),
                nn.ReLU(inplace=True),
            ]
            if size >= 2:
                blocks.append(nn.MaxPool2d(2))
                size //= 2
            previous = block_width
        self.blocks = nn.Sequential(*blocks)
        self.projection = nn.Linear(previous, width)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(images)
        return self.projection(features.mean(dim=(2, 3)))


class ProjectedBackbone(nn.Module):
    """A feature extractor followed by a linear projection to the embedding width."""

    def __init__(self, features: nn.Module, feature_width: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.projection = nn.Linear(feature_width, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.features(images).flatten(1))


def build_backbone(
    spec: BackboneSpec, width: int, channels: int, image_size: int, offer_width: bool = True
) -> nn.Module:
    """Build the network named by `spec` with random initial weights.

    "small_cnn" takes `block_widths` (default [32, 64, 128, 256]). A torchvision name takes `small_stem` (3x3 stride-1
    first convolution and no pooling, ResNets only) and torchvision's own arguments. "package.module:factory" is called
    with the spec's kwargs, and with `width`, `channels` and `image_size` where it has parameters of these names; it
    must return a module of the given width (no projection is added); `offer_width=False` leaves its width to it.
    """
    kwargs = dict(spec.kwargs)
    if ":" in spec.name:
        offered = {"channels": channels, "image_size": image_size} | ({"width": width} if offer_width else {})
        return _call_factory(spec.name, kwargs, offered)
    if spec.name == "small_cnn":
        block_widths = tuple(int(value) for value in kwargs.pop("block_widths", (32, 64, 128, 256)))
        _refuse_unknown(spec.name, kwargs, ["block_widths"])
        return SmallCnn(width, channels, image_size, block_widths)
    models = _torchvision_models()
    if spec.name in models.list_models():
        return _build_torchvision(spec.name, kwargs, width, channels)
    raise UsageError(
        f"building a backbone: expected small_cnn, package.module:factory or a torchvision model, found {spec.name!r}; "
        f"torchvision has {', '.join(models.list_models(module=models))}"
    )


def load_initial_weights(module: nn.Module, spec: BackboneSpec, weights: str) -> None:
    """Load first weights from a file (.safetensors, or a torch file with tensors only) or a torchvision enum's name.

    An enum name such as "IMAGENET1K_V2" goes to the feature extractor of a torchvision model; the projection and a
    replaced stem keep their random start. A file must fit exactly.
    """
    if weights.endswith((".safetensors", ".pt", ".pth", ".bin")):
        state = (
            load_file(weights)
            if weights.endswith(".safetensors")
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
        module.load_state_dict(state, strict=True)
        return
    if not isinstance(module, ProjectedBackbone):
        raise UsageError(
            f"loading initial weights: expected a file for {spec.name}, found {weights!r}; only torchvision models "
            "have named weights"
        )
    enum = _torchvision_models().get_model_weights(spec.name)
    names = [entry.name for entry in enum]
    if weights not in names:
        raise UsageError(f"loading initial weights: expected one of {names} or a file, found {weights!r}")
    own = module.features.state_dict()
    stored = enum[weights].get_state_dict(progress=False, check_hash=True)
    fitting = {key: value for key, value in stored.items() if key in own and own[key].shape == value.shape}
    missing = sorted(set(own) - set(fitting))
    stem = {key for key in missing if key.startswith("conv1.")}
    if set(missing) - stem:
        raise UsageError(
            f"loading initial weights: expected {weights} of {spec.name} to fit, found {len(missing)} tensors that do "
            f"not (first {missing[0]}); use weights of the same model"
        )
    module.features.load_state_dict({**own, **fitting}, strict=True)


def _torchvision_models() -> Any:
    """Load torchvision's models when they are asked for: that takes seconds, and the small network does without."""
    import torchvision

    return torchvision.models


def _build_torchvision(name: str, kwargs: dict[str, Any], width: int, channels: int) -> nn.Module:
    small_stem = bool(kwargs.pop("small_stem", False))
    network = _torchvision_models().get_model(name, weights=None, **kwargs)
    if small_stem or channels != 3:
        if not isinstance(network, _torchvision_models().ResNet):
            raise UsageError(
                f"building a backbone: small_stem and grey images need a ResNet, found {name!r}; use 3 channels and no "
                "small_stem, or a package.module:factory"
            )
        stem = network.conv1
        network.conv1 = (
            nn.Conv2d(channels, stem.out_channels, 3, padding=1, bias=False)
            if small_stem
            else nn.Conv2d(channels, stem.out_channels, 7, stride=2, padding=3, bias=False)
        )
        if small_stem:
            network.maxpool = nn.Identity()
    return ProjectedBackbone(network, _cut_classifier(network, name), width)


def _cut_classifier(network: nn.Module, name: str) -> int:
    """Replace the last linear layer by the identity; return the width of the features before it."""
    for attribute in ("fc", "classifier", "heads", "head"):
        layer = getattr(network, attribute, None)
        if isinstance(layer, nn.Linear):
            setattr(network, attribute, nn.Identity())
            return layer.in_features
        if isinstance(layer, nn.Sequential):
            for key, inner in reversed(list(layer.named_children())):
                if isinstance(inner, nn.Linear):
                    setattr(layer, key, nn.Identity())
                    return inner.in_features
    raise UsageError(
        f"building a backbone: expected a classification model, found no final linear layer in {name!r}; use a "
        "package.module:factory"
    )


def _call_factory(name: str, kwargs: dict[str, Any], offered: dict[str, int]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"building a backbone: expected an importable {name}, found {error}; check the name and PYTHONPATH"
        ) from error
    parameters = inspect.signature(factory).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters and key not in kwargs}
    network = factory(**kwargs, **arguments)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"building a backbone: expected {name} to return a torch module, found {type(network).__name__}"
        )
    return network


def _refuse_unknown(name: str, left_over: dict[str, Any], known: list[str]) -> None:
    if left_over:
        raise UsageError(f"building {name}: expected only {known}, found {sorted(left_over)}")
