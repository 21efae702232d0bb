"""Adopting an encoder that was trained elsewhere: tried on images first, stored only when it can be used.

The factory `package.module:function` is called with what it asks for of `channels`, `image_size` and the given keyword
arguments, and returns a torch module (n, channels, size, size) float32, normalised, -> (n, d). "timm/NAME" and
"torchvision/NAME" are networks of a library, with their own weights and their own preprocessing.

A generation is known by the digest of its weights, of what builds it (name and arguments) and of its preprocessing:
change one of them and it is another generation; the same again is the same one.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from graceful.errors import GracefulError
from graceful.files import exists, join, list_files, read_bytes, write_bytes
from graceful.flows.settings.config import PipelineConfig
from graceful.flows.store.claim import claim
from graceful.flows.store.evaluation_set import load_evaluation_set
from graceful.flows.store.events import Adopted
from graceful.flows.store.workspace import Workspace
from graceful.training.backbones import stated_preprocessing
from graceful.training.encoder import adopt, open_encoder
from graceful.training.generation import GenerationCard, Preprocessing, ordinal_of, read_card
from graceful.training.libraries import is_of_a_library, own_preprocessing

NUM_TRIED = 32
_SAME = 1.0 - 1e-6
_OPTIONS = ("image_size", "channels", "mean", "std")  # those with an option of their own on the command line


class AdoptionError(GracefulError):
    """An encoder from elsewhere cannot be used; nothing of it was stored."""


def adopt_generation(
    workspace: Workspace,
    config: PipelineConfig,
    name: str,
    factory: str,
    *,
    weights: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> str:
    """Store an encoder as a generation, and return its id; one with the same weights is found and not stored twice.

    Args:
        workspace: Where it is stored.
        config: Gives the images that it is tried on, and the preprocessing that `preprocessing` does not state.
        name: What people call it; it stands in the lineage.
        factory: `package.module:function`, where the current folder is searched too, `timm/NAME` or `torchvision/NAME`.
        weights: A file to load into the module; for a library's network also a name, by default its pretrained ones.
        kwargs: Arguments of the factory, JSON values.
        preprocessing: Values that differ from the library's own, or from those that the factory states in its attribute
            `preprocessing` and the configuration's (image_size, channels, mean, std, resize, ...).

    Raises:
        AdoptionError, UsageError: it cannot be built, raises, or gives vectors that nothing can be found by.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    wanted = _preprocessing(config, name, factory, preprocessing or {})
    # Under the claim: an update that runs now may be making the generation of the same ordinal.
    with claim(workspace.root, f"adopting {name}"):
        return _store(workspace, config, name, factory, weights, dict(kwargs or {}), wanted)


def _store(
    workspace: Workspace,
    config: PipelineConfig,
    name: str,
    factory: str,
    weights: str | None,
    kwargs: dict[str, Any],
    wanted: Preprocessing,
) -> str:
    registry = workspace.registry
    ordinal = max([ordinal_of(known) for known in registry.generations()], default=0) + 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = adopt(
                factory,
                preprocessing=wanted,
                out_uri=folder,
                ordinal=ordinal,
                kwargs=kwargs,
                weights=weights,
            )
            sources = load_evaluation_set(config.evaluation).images[1]
            # Spread over the set: its first images are often all of one identity.
            _try(join(folder, card.generation_id), name, sources[:: -(-len(sources) // NUM_TRIED)])
        except GracefulError:
            raise
        except FileNotFoundError as error:
            raise AdoptionError(f"adopting {name}: {error}; correct --weights, or what {factory} reads") from None
        except Exception as error:  # whatever the factory or its module raises
            raise AdoptionError(
                f"adopting {name}: {factory} raised {type(error).__name__} on images of {wanted.channels} x "
                f"{wanted.image_size} x {wanted.image_size} pixels: {' '.join(str(error).split())}; correct the "
                "factory, or give --image-size and --channels"
            ) from error
        known = _stored(workspace, card)
        if known is not None:
            return known
        source, target = join(folder, card.generation_id), workspace.generation_uri(card.generation_id)
        # The card last: a generation without one is not there.
        for file in sorted(list_files(source), key=lambda file: file.endswith("card.json")):
            write_bytes(join(target, file.removeprefix(source)), read_bytes(file))
    registry.record(Adopted(name=name, factory=factory), generation=card.generation_id)
    return card.generation_id


def _preprocessing(config: PipelineConfig, name: str, factory: str, given: Mapping[str, Any]) -> Preprocessing:
    """The encoder's own preprocessing, with what was given instead. Raises AdoptionError, naming the option."""
    if is_of_a_library(factory):
        own = own_preprocessing(factory, given.get("image_size")).model_dump()
    else:
        try:
            own = {**config.training.preprocessing.model_dump(), **stated_preprocessing(factory)}
        except GracefulError:
            raise
        except Exception as error:  # whatever importing a module of somebody else raises
            raise AdoptionError(
                f"adopting {name}: importing {factory} raised {type(error).__name__}: {' '.join(str(error).split())}; "
                "correct the module"
            ) from error
    own = {key: value for key, value in own.items() if key != "resize_size" or "crop_share" not in given}
    try:
        return Preprocessing.model_validate({**own, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        key = str(problem["loc"][0]) if problem["loc"] else "mean and --std"
        option = key.replace("_", "-") if key in _OPTIONS or not problem["loc"] else "preprocessing"
        named = f", {key}" if option == "preprocessing" else ""
        found = f", found {problem['input']!r}" if problem["loc"] else ""
        raise AdoptionError(f"adopting {name}: {message}{found}; correct --{option}{named}") from None


def _try(uri: str, name: str, sources: list[str]) -> None:
    """Embed a few images. Raises AdoptionError where nothing could be found by such vectors."""
    vectors, failures = open_encoder(uri, precision="float32")(sources)
    if failures:
        raise AdoptionError(
            f"adopting {name}: expected finite vectors that are not zero for {len(sources)} images, found "
            f"{len(failures)} failures (first {sources[min(failures)]}: {failures[min(failures)]}); correct the "
            "encoder or its weights"
        )
    if len(vectors) > 1 and float(np.min(vectors @ vectors[0])) > _SAME:
        raise AdoptionError(
            f"adopting {name}: expected different vectors for different images, found the same one for "
            f"{len(vectors)}; correct the encoder, its weights or its preprocessing"
        )


def _stored(workspace: Workspace, card: GenerationCard) -> str | None:
    """The adopted generation with this digest: the file holds weights, builder, arguments and preprocessing."""
    for event in workspace.registry.events(Adopted):
        uri = workspace.generation_uri(event.generation)
        if exists(join(uri, "card.json")) and read_card(uri).digest == card.digest:
            return event.generation
    return None
