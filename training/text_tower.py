"""Text towers: encoders from elsewhere that turn a text into a vector of a generation's space. No torch of ours here.

The factory "package.module:function" is called with the configured parameters, and with `generation_id`,
`generation_uri` (the folder of the generation: card, weights, classifier rows) and `width` where it has parameters of
these names, so that it can pick, or make, the tower that belongs to that generation. It returns a callable that takes
any list of texts (str) and gives an array (n, width); rows are scaled to unit length here.

Nothing is trained, and the weights stay where they are. What is stored is the name of the factory, its parameters, and
the vectors of a few texts (`probes`): they are part of the digest, so that other weights are another variant; and the
tower is compared with them whenever it is opened. Shapes: n texts, d width.
"""

import base64
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import join
from graceful.training.choices import imported
from graceful.training.generation import (
    BackboneSpec,
    GenerationCard,
    VariantOf,
    make_generation_id,
    read_card,
    write_card,
)
from graceful.training.probes import (
    MIN_COSINE,
    Agreement,
    EncoderChangedError,
    compare,
    read_probes,
    said_of,
    write_probes,
)

PROBE_TEXTS = (
    "a photo of a cat",
    "a red shoe with white laces",
    "two people on a bicycle in the rain",
    "the number seven, written by hand",
    "an empty street at night",
    "Ein Haus am See",
    "una taza de café",
    "猫",
)
"""What every tower is asked when it is made, and whenever it is opened: the same texts everywhere, and nobody's."""
NON_FINITE = "non-finite embedding"

Tower = Callable[[list[str]], Any]
"""n texts -> vectors (n, d), of any length."""

_log = logging.getLogger("graceful.encoder")


class TextTowerError(GracefulError):
    """A text tower cannot be built, raises, or gives what are no vectors of its generation's width."""


class TextEncoder:
    """Encodes texts with a tower. Open that of a stored variant with `open_text_encoder`."""

    def __init__(self, card: GenerationCard, tower: Tower, batch_size: int = 256) -> None:
        self.card = card
        self.batch_size = batch_size
        self._tower = tower

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Return unit vectors (n, d) and {index: reason} of the texts that have none; their rows are NaN.

        Raises: TextTowerError, where the tower raises or gives no array (n, d) of numbers.
        """
        parts = [
            _unit_vectors(self.card.generation_id, self._tower, texts[start : start + self.batch_size], self.card.width)
            for start in range(0, len(texts), self.batch_size)
        ]
        vectors = np.concatenate([np.empty((0, self.card.width), np.float32), *parts])
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        return vectors, {int(row): NON_FINITE for row in bad}


def make_text_tower(
    root_uri: str, spec: BackboneSpec, *, variant: VariantOf, generation_uri: str
) -> tuple[str, GenerationCard]:
    """Build a tower, try it, and store it as a variant below `root_uri`; return its folder and card.

    The same factory and parameters that give the same vectors give the same id; written again, nothing changes.

    Raises: TextTowerError; nothing is stored then.
    """
    generation = read_card(generation_uri)
    tower = _build(variant.name, spec, generation, generation_uri)
    vectors = _unit_vectors(variant.name, tower, PROBE_TEXTS, generation.width)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise TextTowerError(
            f"making {variant.name}: expected finite vectors that are not zero for {len(PROBE_TEXTS)} texts, found "
            f"NaN, infinity or zero for {len(bad)} (first {PROBE_TEXTS[bad[0]]!r}); correct {spec.name}"
        )
    if float(np.min(vectors @ vectors[0])) > 1.0 - 1e-6:
        raise TextTowerError(
            f"making {variant.name}: expected different vectors for different texts, found the same one for all "
            f"{len(vectors)}; correct {spec.name}"
        )
    alone = _unit_vectors(variant.name, tower, PROBE_TEXTS[-1:], generation.width)[0]
    if not float(alone @ vectors[-1]) >= MIN_COSINE:
        raise TextTowerError(
            f"making {variant.name}: expected the same vector for a text alone as among others, found a cosine of "
            f"{float(alone @ vectors[-1]):.4f}; correct {spec.name} (padding that is not masked, a network in training "
            "mode, chance)"
        )
    content = [spec.model_dump(mode="json"), variant.of, base64.b64encode(vectors.astype("<f4").tobytes()).decode()]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    generation_id = make_generation_id(generation.ordinal, digest, variant.name)
    uri = join(root_uri, generation_id)
    write_probes(uri, lambda _: vectors, spec.name, [text.encode() for text in PROBE_TEXTS])
    card = GenerationCard(
        generation_id=generation_id,
        ordinal=generation.ordinal,
        origin="adopted",
        backbone=spec,
        preprocessing=generation.preprocessing,
        preprocessing_fingerprint=generation.preprocessing_fingerprint,
        width=generation.width,
        prefix_widths=generation.prefix_widths,
        digest=digest,
        has_classifier=False,
        role="query_only",
        of=variant.of,
        takes="text",
    )
    write_card(uri, card)
    return uri, card


def open_text_encoder(uri: str) -> TextEncoder:
    """Build the tower of a stored variant again, and compare what it gives with its probes.

    Raises: TextTowerError, EncoderChangedError, DamagedProbesError, GenerationNotFoundError.
    """
    encoder, found = _opened(uri)
    if found is not None and found.is_refused:
        raise EncoderChangedError(
            f"opening {encoder.card.generation_id}: expected the vectors that {encoder.card.backbone.name} gave when "
            f"it was made, found a cosine of {found.worst_cosine:.4f} to them, below {MIN_COSINE} "
            f"({said_of(found.changed) or 'the same libraries: other weights, or another factory'}); restore it, or "
            "make it anew with 'graceful variant', which judges it before it answers"
        )
    if found is not None and found.is_noted:
        _log.warning(
            "%s gives almost the vectors that it gave when it was made: cosine %.5f (%s)",
            encoder.card.generation_id, found.worst_cosine, found.said,
        )  # fmt: skip
    return encoder


def probe_text_tower(uri: str) -> Agreement | None:
    """Build a stored variant's tower and give it its probes again; None where it has none. Refuses no difference."""
    return _opened(uri)[1]


def _opened(uri: str) -> tuple[TextEncoder, Agreement | None]:
    card = read_card(uri)
    assert card.takes == "text", f"{card.generation_id} is no text tower"
    assert card.of is not None
    folder = uri.rstrip("/").rpartition("/")[0]
    generation_uri = join(folder, card.of)
    tower = _build(card.generation_id, card.backbone, read_card(generation_uri), generation_uri)
    encoder, probes = TextEncoder(card, tower), read_probes(uri)
    if probes is None:
        return encoder, None
    texts = [payload.decode() for payload in probes.pictures]
    return encoder, compare(probes, lambda _: encoder(texts)[0], card.backbone.name)


def _build(name: str, spec: BackboneSpec, generation: GenerationCard, generation_uri: str) -> Tower:
    try:
        factory = imported(f"making {name}", spec.name)
        offered = {
            "generation_id": generation.generation_id,
            "generation_uri": generation_uri,
            "width": generation.width,
        }
        wanted = inspect.signature(factory).parameters
        known = {key: value for key, value in offered.items() if key in wanted and key not in spec.kwargs}
        tower = factory(**spec.kwargs, **known)
    except GracefulError:
        raise
    except Exception as error:  # whatever somebody else's module or factory raises
        raise TextTowerError(
            f"making {name}: {spec.name} raised {type(error).__name__}: {' '.join(str(error).split())}; correct the "
            "factory, or its parameters"
        ) from error
    if not callable(tower):
        raise TextTowerError(
            f"making {name}: expected {spec.name} to return a callable that takes a list of texts, found "
            f"{type(tower).__name__}; return one"
        )
    return tower  # type: ignore[no-any-return]


def _unit_vectors(name: str, tower: Tower, texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """Unit vectors (n, d) of texts; NaN rows where there is no direction. Raises TextTowerError."""
    try:
        found = np.asarray(tower(list(texts)))
    except Exception as error:  # whatever somebody else's encoder raises
        raise TextTowerError(
            f"encoding texts with {name}: it raised {type(error).__name__}: {' '.join(str(error).split())}; a tower "
            "takes any text: correct it"
        ) from error
    if found.shape != (len(texts), width) or found.dtype.kind not in "fiu":
        raise TextTowerError(
            f"encoding texts with {name}: expected numbers of shape {(len(texts), width)}, one vector of its "
            f"generation's width for each text, found {found.dtype} of shape {found.shape}; correct the tower"
        )
    vectors = found.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where((norms > 1e-12) & np.isfinite(norms), vectors / norms, np.nan).astype(np.float32)
