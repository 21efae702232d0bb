"""Encoders of torchvision and timm: which network a name means, and how its own library prepares a picture for it.

A name is "torchvision/resnet50", "torchvision/resnet50.IMAGENET1K_V2" or "timm/vit_small_patch14_dinov2.lvd142m": the
part after the dot says which weights, and with them which preprocessing; without it they are the library's default.
Nothing is fetched here: what is read are the descriptions that the installed library carries.

    python -m graceful.training.libraries timm/resnet18      prints it as a line of a configuration
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graceful.errors import UsageError
from graceful.training.backbones import TIMM, load_timm
from graceful.training.generation import BackboneSpec, Preprocessing

TORCHVISION = "torchvision/"
_RESIZE = {"center": "shorter_side", None: "shorter_side", "squash": "squash", "border": "fit"}  # timm's crop_mode


@dataclass(frozen=True)
class LibraryEncoder:
    """A network of a library, whose output is the library's own features, and the name of its pretrained weights."""

    spec: BackboneSpec
    weights: str


def is_of_a_library(name: str) -> bool:
    """Whether a name is that of a network of torchvision or timm."""
    return name.startswith((TIMM, TORCHVISION))


def library_encoder(name: str, kwargs: Mapping[str, Any]) -> LibraryEncoder:
    """Return the network of "timm/NAME" or "torchvision/NAME", without a projection, and its weights' name."""
    arguments = {"projection": False, **kwargs}
    if name.startswith(TIMM):
        return LibraryEncoder(BackboneSpec(name=name, kwargs=arguments), "pretrained")
    bare, _, weights = name.removeprefix(TORCHVISION).partition(".")
    return LibraryEncoder(BackboneSpec(name=bare, kwargs=arguments), weights or "DEFAULT")


def own_preprocessing(name: str, image_size: int | None = None) -> Preprocessing:
    """Return how the library itself prepares a picture for this network, at another size if `image_size` says so.

    Of torchvision `Weights.X.transforms()`, of timm `create_transform(**resolve_model_data_config(model))`, both for a
    PIL picture. Decoding stays ours ("photo"): a picture that its EXIF tags turn, or that is transparent, is shown
    upright and on white, which the libraries leave to their caller.

    Raises: UsageError where timm, the network or its weights are not there, or it takes no RGB squares.
    """
    return _of_timm(name, image_size) if name.startswith(TIMM) else _of_torchvision(name, image_size)


def _of_timm(name: str, image_size: int | None) -> Preprocessing:
    timm = load_timm(name)
    bare = name.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(bare, allow_unregistered=False)
    except RuntimeError as error:
        raise UsageError(f"preprocessing of {name}: expected a network of timm, found that {error}") from None
    look = timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    channels, height, width = look["input_size"]
    if channels != 3 or height != width or look["crop_mode"] not in _RESIZE:
        raise UsageError(
            f"preprocessing of {name}: expected square RGB pictures, found {look['input_size']} by "
            f"{look['crop_mode']}; adopt it by a package.module:factory"
        )
    resize, mean, side = _RESIZE[look["crop_mode"]], tuple(look["mean"]), image_size or height
    resized = math.floor(side / look["crop_pct"])
    return _checked(
        name,
        image_size=side,
        mean=mean,
        std=tuple(look["std"]),
        resize=resize,
        resize_size=resized,
        interpolation=look["interpolation"],
        padding_color=tuple(round(255 * level) for level in mean) if resize == "fit" else (0, 0, 0),
    )


def _of_torchvision(name: str, image_size: int | None) -> Preprocessing:
    import torchvision  # takes seconds to load

    bare, _, weights = name.removeprefix(TORCHVISION).partition(".")
    try:
        enum = torchvision.models.get_model_weights(bare)
    except ValueError as error:
        raise UsageError(f"preprocessing of {name}: expected a network of torchvision, found {error}") from None
    names = [entry.name for entry in enum]
    if weights not in (*names, "", "DEFAULT"):
        raise UsageError(f"preprocessing of {name}: expected weights among {names}, found {weights!r}")
    look = enum[weights or "DEFAULT"].transforms()
    if not hasattr(look, "crop_size"):
        raise UsageError(
            f"preprocessing of {name}: expected a network for single pictures, found {type(look).__name__}"
        )
    (crop,), (resized,) = look.crop_size, look.resize_size
    return _checked(
        name,
        image_size=image_size or crop,
        mean=tuple(look.mean),
        std=tuple(look.std),
        resize="shorter_side",
        resize_size=resized if image_size is None else resized * image_size // crop,
        interpolation=look.interpolation.value,
        padding_color=(0, 0, 0),
    )


def _checked(name: str, **values: Any) -> Preprocessing:
    try:
        return Preprocessing(channels=3, jpeg="full", **values)
    except ValueError as error:  # a filter that Pillow has not
        raise UsageError(f"preprocessing of {name}: {' '.join(str(error).split())}") from None


def as_toml(preprocessing: Preprocessing) -> str:
    """Return a preprocessing as a line of a configuration."""

    def value(found: Any) -> str:
        return f'"{found}"' if isinstance(found, str) else str(list(found) if isinstance(found, tuple) else found)

    values = preprocessing.model_dump(exclude_defaults=True)
    return "preprocessing = { " + ", ".join(f"{key} = {value(found)}" for key, found in values.items()) + " }"


if __name__ == "__main__":
    print(as_toml(own_preprocessing(sys.argv[1])))
