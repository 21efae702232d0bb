"""Networks that turn a batch of images into embeddings: small CNN, torchvision and timm models, or any factory.

Every builder returns a module (n, channels, size, size) -> (n, width). Unit length is the encoder's business, not the
network's. Arguments are JSON values, so that a generation's card can rebuild the network.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graceful.errors import UsageError
from graceful.training.choices import imported
from graceful.training.generation import BackboneSpec

TIMM = "timm/"
_OURS = ("negative_slope", "projection", "small_stem")  # arguments that the libraries do not know
WEIGHTS_FILES = (".safetensors", ".pt", ".pth", ".bin")


class SmallCnn(nn.Module):
    """Blocks of convolution, batch norm and ReLU, each ended by 2x2 max pooling, then the mean over what is left.

    Suits images of 8x8 to 64x64. Block b has `depths[b]` convolutions of `kernels[b]` pixels a side, by default one of
    3, and pools only while there are at least 2 pixels to pool. Raises: UsageError where these do not go together.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        image_size: int,
        block_widths: Sequence[int],
        depths: Sequence[int] = (),
        kernels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.depths = tuple(depths) or (1,) * len(block_widths)
        kernels = tuple(kernels) or (3,) * len(block_widths)
        if not len(block_widths) == len(self.depths) == len(kernels) or any(kernel % 2 == 0 for kernel in kernels):
            raise UsageError(
                f"building small_cnn: expected a depth and an odd kernel for each of {len(block_widths)} blocks, found "
                f"depths {list(self.depths)} and kernels {list(kernels)}"
            )
        blocks: list[nn.Module] = []
        size, previous = image_size, channels
        for block_width, depth, kernel in zip(block_widths, self.depths, kernels, strict=True):
            for _ in range(depth):
                blocks += [
                    nn.Conv2d(previous, block_width, kernel, padding=kernel // 2, bias=False),
                    nn.BatchNorm2d(block_width),
                    nn.ReLU(inplace=True),
                ]
                previous = block_width
            if size >= 2:
                blocks.append(nn.MaxPool2d(2))
                size //= 2
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

    All but factories take `negative_slope`: their ReLUs become leaky ones of this slope (for LQF).

    "small_cnn" takes `block_widths` (default [32, 64, 128, 256]), and for each block `depths` (default 1) and `kernels`
    (default 3). A torchvision name takes `small_stem` (3x3 stride-1 first convolution and no pooling, ResNets only)
    and torchvision's own arguments; "timm/NAME" takes timm's. Both take
    `projection`: false leaves out the linear layer to `width`, which an adopted network does not have, so that the
    output is the library's own features. "package.module:factory" is called
    with the spec's kwargs, and with `width`, `channels` and `image_size` where it has parameters of these names; it
    must return a module of the given width (no projection is added); `offer_width=False` leaves its width to it.
    """
    kwargs = dict(spec.kwargs)
    if ":" in spec.name:
        offered = {"channels": channels, "image_size": image_size} | ({"width": width} if offer_width else {})
        return _call_factory(spec.name, kwargs, offered)
    slope = float(kwargs.pop("negative_slope", 0.0))
    if slope:
        plain = BackboneSpec(name=spec.name, kwargs=kwargs)
        return leaky(build_backbone(plain, width, channels, image_size), slope, spec.name)
    if spec.name == "small_cnn":
        shape = {"block_widths": (32, 64, 128, 256), "depths": (), "kernels": ()}
        given = {name: tuple(int(value) for value in kwargs.pop(name, default)) for name, default in shape.items()}
        _refuse_unknown(spec.name, kwargs, [*shape, "negative_slope"])
        return SmallCnn(width, channels, image_size, **given)
    projection = bool(kwargs.pop("projection", True))
    if spec.name.startswith(TIMM):
        features = build_timm(spec.name, kwargs, channels, image_size)
        feature_width = int(getattr(features, "head_hidden_size", None) or features.num_features)
    else:
        features, feature_width = _build_torchvision(spec.name, kwargs, channels)
    return ProjectedBackbone(features, feature_width, width) if projection else features


def leaky(network: nn.Module, slope: float, name: str) -> nn.Module:
    """Put a leaky ReLU of this slope in the place of every ReLU module; names and weights stay what they are.

    Raises: UsageError where there is none, or the slope is not in (0, 1).
    """
    if not 0 < slope < 1:
        raise UsageError(f"building {name}: expected a negative_slope above 0 and below 1, found {slope:g}")
    places = [(module, key) for module in network.modules() for key, child in module.named_children()
              if type(child) is nn.ReLU]  # fmt: skip
    if not places:
        raise UsageError(
            f"building {name}: expected ReLU modules for negative_slope = {slope:g}, found none; leave it out"
        )
    for module, key in places:
        setattr(module, key, nn.LeakyReLU(slope, inplace=getattr(module, key).inplace))
    return network


def load_initial_weights(
    module: nn.Module, spec: BackboneSpec, weights: str, channels: int = 3, image_size: int = 224
) -> None:
    """Load first weights from a file (.safetensors, or a torch file with tensors only) or by a name.

    Names are those of a torchvision enum, such as "IMAGENET1K_V2" or "DEFAULT", and "pretrained" for timm, whose names
    say which weights; they go to the feature extractor, while the projection and a replaced stem keep their random
    start. A file fits the whole network exactly, or it is the library's own: then its classifier is left out.

    Raises: UsageError where nothing of that name is there, can be fetched, or fits.
    """
    features = module.features if isinstance(module, ProjectedBackbone) else module
    of_a_library = ":" not in spec.name and spec.name != "small_cnn"
    if weights.endswith(WEIGHTS_FILES):
        state = (
            load_file(weights)
            if weights.endswith(".safetensors")
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
        if of_a_library and set(state) != set(module.state_dict()):
            features.load_state_dict(_without_classifier(state, features, spec, channels, image_size), strict=True)
        else:
            module.load_state_dict(state, strict=True)
        return
    if spec.name.startswith(TIMM):
        if weights != "pretrained":
            raise UsageError(
                f"loading initial weights of {spec.name}: expected pretrained or a file, found {weights!r}"
            )
        kwargs = {key: value for key, value in spec.kwargs.items() if key not in _OURS}
        twin = _fetched(spec.name, lambda: build_timm(spec.name, {**kwargs, "pretrained": True}, channels, image_size))
        features.load_state_dict(twin.state_dict(), strict=True)
        return
    if not of_a_library:
        raise UsageError(
            f"loading initial weights: expected a file for {spec.name}, found {weights!r}; only networks of "
            "torchvision and timm have named weights"
        )
    enum = _torchvision_models().get_model_weights(spec.name)
    names = [entry.name for entry in enum]
    if weights not in (*names, "DEFAULT"):
        raise UsageError(f"loading initial weights: expected one of {names} or a file, found {weights!r}")
    own = features.state_dict()
    stored = _fetched(spec.name, lambda: enum[weights].get_state_dict(progress=False, check_hash=True))
    fitting = {key: value for key, value in stored.items() if key in own and own[key].shape == value.shape}
    missing = sorted(set(own) - set(fitting))
    stem = {key for key in missing if key.startswith("conv1.")}
    if set(missing) - stem:
        raise UsageError(
            f"loading initial weights: expected {weights} of {spec.name} to fit, found {len(missing)} tensors that do "
            f"not (first {missing[0]}); use weights of the same model"
        )
    features.load_state_dict({**own, **fitting}, strict=True)


def build_timm(name: str, kwargs: dict[str, Any], channels: int, image_size: int) -> Any:
    """Return timm's model of the name "timm/..." without its classifier.

    A network that is made for one size of image, such as a ViT, is made for `image_size`.

    Raises: UsageError where timm, or the model, is not there.
    """
    timm = load_timm(name)
    bare = name.removeprefix(TIMM)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3)
        raise UsageError(f"building a backbone: expected a model of timm, found {bare!r}; near it are {near}")
    try:
        config = timm.get_pretrained_cfg(bare)
    except RuntimeError as error:
        raise UsageError(f"building a backbone: expected weights that timm knows, found {bare!r} ({error})") from None
    arguments = {"num_classes": 0, "in_chans": channels, **kwargs}
    if config is not None and config.fixed_input_size and config.input_size[-1] != image_size:
        arguments.setdefault("img_size", image_size)
    return timm.create_model(bare, **arguments)


def load_timm(name: str) -> Any:
    """Load timm, which is an extra. Raises UsageError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"building {name}: expected timm to be installed, found that it is not ({error}); pip install "
            "'graceful[timm]'"
        ) from None
    return timm


def _torchvision_models() -> Any:
    """Load torchvision's models when they are asked for: that takes seconds, and the small network does without."""
    import torchvision

    return torchvision.models


def _fetched(name: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # no network, no such file on the other side, a digest that differs
        raise UsageError(
            f"loading initial weights of {name}: expected to fetch them, found {' '.join(str(error).split())}; give a "
            "file of weights, or a network that reaches the library's store"
        ) from error


def _without_classifier(
    state: dict[str, Tensor], features: nn.Module, spec: BackboneSpec, channels: int, image_size: int
) -> dict[str, Tensor]:
    """Return what a library's own file says about the features. Raises UsageError on what is not of that model."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key not in _OURS}
    if spec.name.startswith(TIMM):
        whole = build_timm(spec.name, {**kwargs, "num_classes": 1}, channels, image_size)
    else:
        whole = _torchvision_models().get_model(spec.name, weights=None, **kwargs)
    own = set(features.state_dict())
    foreign = sorted(set(state) - own - set(whole.state_dict()))
    missing = sorted(own - set(state))
    if foreign or missing:
        raise UsageError(
            f"loading initial weights: expected a file of {spec.name}, found {len(missing)} tensors missing "
            f"{missing[:1]} and {len(foreign)} that it has not {foreign[:1]}; use weights of the same model"
        )
    return {key: value for key, value in state.items() if key in own}


def _build_torchvision(name: str, kwargs: dict[str, Any], channels: int) -> tuple[nn.Module, int]:
    models = _torchvision_models()
    if name not in models.list_models():
        raise UsageError(
            f"building a backbone: expected small_cnn, timm/NAME, package.module:factory or a torchvision model, found "
            f"{name!r}; torchvision has {', '.join(models.list_models(module=models))}"
        )
    small_stem = bool(kwargs.pop("small_stem", False))
    network = models.get_model(name, weights=None, **kwargs)
    if small_stem or channels != 3:
        if not isinstance(network, models.ResNet):
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
    return network, _cut_classifier(network, name)


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


def stated_preprocessing(name: str) -> dict[str, Any]:
    """Return the values that "package.module:factory" states in its attribute `preprocessing`; none without one.

    Raises: UsageError where it cannot be imported, or states something else than a mapping.
    """
    stated = getattr(imported("building a backbone", name), "preprocessing", {})
    if not isinstance(stated, dict):
        raise UsageError(f"reading {name}.preprocessing: expected a dict, found {type(stated).__name__}")
    return stated


def _call_factory(name: str, kwargs: dict[str, Any], offered: dict[str, int]) -> nn.Module:
    factory = imported("building a backbone", name)
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
