"""Adopting an encoder that was trained elsewhere: tried on images first, stored only when it can be used.

The factory `package.module:function` is called with what it asks for of `channels`, `image_size` and the given keyword
arguments, and returns a torch module (n, channels, size, size) float32, normalised, -> (n, d). A generation is known by
its weights: the same factory with other weights is another generation, the same weights are the same one.
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
from graceful.training.encoder import adopt, open_encoder
from graceful.training.generation import GenerationCard, Preprocessing, ordinal_of, read_card

NUM_TRIED = 32
_SAME = 1.0 - 1e-6


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
        factory: `package.module:function`; the current folder is searched too.
        weights: A file to load into the module.
        kwargs: Arguments of the factory, JSON values.
        preprocessing: Values that differ from the configuration's (image_size, channels, mean, std).

    Raises:
        AdoptionError, UsageError: it cannot be built, raises, or gives vectors that nothing can be found by.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    wanted = _preprocessing(config, name, preprocessing or {})
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


def _preprocessing(config: PipelineConfig, name: str, given: Mapping[str, Any]) -> Preprocessing:
    """The configuration's preprocessing with what was given instead. Raises AdoptionError, naming the option."""
    try:
        return Preprocessing.model_validate({**config.training.preprocessing.model_dump(), **given})
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        option = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "mean and --std"
        found = f", found {problem['input']!r}" if problem["loc"] else ""
        raise AdoptionError(f"adopting {name}: {message}{found}; correct --{option}") from None


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
    """The adopted generation that has these weights already."""
    for event in workspace.registry.events(Adopted):
        uri = workspace.generation_uri(event.generation)
        if exists(join(uri, "card.json")) and read_card(uri).digest == card.digest:
            return event.generation
    return None
