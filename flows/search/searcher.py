"""GallerySearcher: an encoder and an index that follows the gallery, for applications. No Prefect, no Ray.

The searcher reads the serving state and searches what the champion sees. Invariant: an answer comes whole from one
`ServedSnapshot`: the query is encoded by the generation whose view is searched, never by another, also while `refresh`
moves on. What a refresh costs depends on what has changed, not on the gallery.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.flows.search.views import open_follower, target_of, thresholds_of
from graceful.flows.settings.config import load_supported_clients
from graceful.flows.store.variants import names_variant, variant_for
from graceful.flows.store.workspace import Workspace
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.indexing.following import Followed, Target
from graceful.indexing.search import SearchResult
from graceful.indexing.sidecar import ItemEntry
from graceful.training.encoder import SourceEncoder, open_encoder
from graceful.training.generation import ordinal_of, read_card, variant_in
from graceful.training.images import MAX_PIXELS, UnreadableImageError, check_size, decode
from graceful.training.text_tower import TextEncoder, TextTowerError, open_text_encoder
from graceful.training.texts import UnreadableTextError, checked_text

__all__ = [
    "GallerySearcher",
    "Hit",
    "IncompleteAnswerError",
    "Mapper",
    "NothingServedError",
    "SearchedIndex",
    "ServedSnapshot",
    "ServingSearcher",
    "UnreadableQueryError",
    "UnreadableTextError",
    "WrongQueryError",
]


class NothingServedError(GracefulError):
    """No generation serves yet."""


class UnreadableQueryError(GracefulError):
    """A query image could not be embedded."""


class WrongQueryError(GracefulError):
    """A text was given to an encoder of images, or an image to one of texts."""


class IncompleteAnswerError(GracefulError):
    """A part of the index does not answer now; what the others found is not an answer."""


Mapper = Callable[[Callable[[bytes], Any], Iterable[bytes]], Iterable[Any]]
"""`map`, or that of a pool of threads."""


@dataclass(frozen=True)
class Hit:
    """One item found, best first; `generation` is the one whose vector it was found by.

    `above` says for each consumer of scores whether the score is at least its threshold for this pair of generations;
    a consumer without a known threshold for the pair is left out.
    """

    item_id: str
    score: float
    generation: str
    source: str
    label: str
    above: Mapping[str, bool] = field(default_factory=dict)


class SearchedIndex(Protocol):
    """One moment of an index, in this process or in several: every answer comes from it alone."""

    @property
    def snapshot_id(self) -> str:
        """Name of the view that is searched."""

    @property
    def num_unreadable(self) -> int:
        """Live items that cannot be found."""

    def rows_by_generation(self) -> dict[str, int]:
        """Number of rows of each generation."""

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[SearchResult, dict[int, ItemEntry]]:
        """The best `k` rows of unit queries (Q, D), and what the items found are called."""


@dataclass(frozen=True)
class FollowedIndex:
    """The index of one process."""

    followed: Followed

    @property
    def snapshot_id(self) -> str:
        return self.followed.index.snapshot_id

    @property
    def num_unreadable(self) -> int:
        return self.followed.num_unreadable

    def rows_by_generation(self) -> dict[str, int]:
        counts = self.followed.index.rows_by_generation()
        return {name: counts.get(name, 0) for name in self.followed.target.readable}

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[SearchResult, dict[int, ItemEntry]]:
        found = self.followed.index.search(queries, k)
        return found, self.followed.book.entries(found.revisions[found.revisions >= 0])


@dataclass(frozen=True)
class ServedSnapshot:
    """What one answer comes from: a generation's encoder and an index of what that generation sees."""

    generation: str
    encoder: SourceEncoder | TextEncoder = field(repr=False)
    index: SearchedIndex = field(repr=False)
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Consumer of scores -> generation of the hit's vector -> threshold, for queries of this generation."""

    @property
    def snapshot_id(self) -> str:
        """Name of the view that is searched; the same view has the same name everywhere."""
        return self.index.snapshot_id

    @property
    def num_unreadable(self) -> int:
        """Items that cannot be found: this generation may read no vector of theirs."""
        return self.index.num_unreadable

    @property
    def rows_by_generation(self) -> dict[str, int]:
        """Number of items read from each generation's vectors. Costs a pass over all rows."""
        return self.index.rows_by_generation()

    @property
    def width(self) -> int:
        """Width D of query vectors."""
        return self.encoder.card.width

    @property
    def takes(self) -> str:
        """What it is asked with: "image", or "text" of a text tower."""
        return "text" if isinstance(self.encoder, TextEncoder) else "image"

    def search_images(self, sources: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode images by name and return the best `k` items of each.

        Raises:
            UnreadableQueryError: an image cannot be read, decoded or embedded.
            WrongQueryError: it takes texts.
        """
        vectors, failures = self._of_images()(sources)
        if failures:
            index, reason = next(iter(failures.items()))
            raise UnreadableQueryError(f"searching: image {sources[index]} {reason}; give a readable image")
        return self.search_vectors(vectors, k)

    def encode_payloads(
        self, payloads: Sequence[bytes], max_pixels: int = MAX_PIXELS, mapper: Mapper = map
    ) -> list[NDArray[np.float32] | UnreadableQueryError]:
        """Encode images given as their bytes, in one pass; for each its vector (D,), or why there is none.

        `mapper` decodes: `map`, or that of a pool of threads. An image of more than `max_pixels` is not decoded.

        Raises:
            WrongQueryError: it takes texts.
        """
        encoder = self._of_images()

        def pixels_of(payload: bytes) -> NDArray[np.uint8] | UnreadableQueryError:
            try:
                check_size(payload, max_pixels)
                return decode(payload, encoder.card.preprocessing)
            except UnreadableImageError as error:
                return UnreadableQueryError(f"searching: the image {error}; give a readable image")

        decoded = list(mapper(pixels_of, payloads))
        images = [pixels for pixels in decoded if not isinstance(pixels, UnreadableQueryError)]
        vectors = iter(encoder.encode_pixels(np.stack(images)) if images else ())
        return [pixels if isinstance(pixels, UnreadableQueryError) else _finite(next(vectors)) for pixels in decoded]

    def search_texts(self, texts: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode texts and return the best `k` items of each.

        Raises:
            UnreadableTextError: a text is empty, too long, or has no vector.
            TextTowerError: the tower raises, or gives no vectors.
            WrongQueryError: it takes images.
        """
        vectors = []
        for vector in self.encode_texts(texts):
            if isinstance(vector, Exception):
                raise vector
            vectors.append(vector)
        return self.search_vectors(np.stack(vectors), k) if vectors else []

    def encode_texts(self, texts: Sequence[str]) -> list[NDArray[np.float32] | UnreadableTextError | TextTowerError]:
        """Encode texts together; for each its vector (D,), or why there is none. One that fails does not touch others.

        Raises:
            WrongQueryError: it takes images.
        """
        encoder = self.encoder
        if not isinstance(encoder, TextEncoder):
            raise WrongQueryError(
                f"searching as {self.generation}: expected an image, found a text; ask as a variant that takes texts, "
                "'graceful status' lists them"
            )
        checked = [_checked(text) for text in texts]
        good = [text for text in checked if isinstance(text, str)]
        try:
            found: list[NDArray[np.float32] | TextTowerError] = list(encoder(good)[0])
        except TextTowerError:
            found = [_encoded_alone(encoder, text) for text in good]
        vectors = iter(found)
        return [_with_direction(text, next(vectors)) if isinstance(text, str) else text for text in checked]

    def _of_images(self) -> SourceEncoder:
        if isinstance(self.encoder, TextEncoder):
            raise WrongQueryError(
                f"searching as {self.generation}: expected a text, found an image; send a text, or leave the variant "
                "out"
            )
        return self.encoder

    def check_queries(self, vectors: NDArray[np.float32]) -> None:
        """Refuse what are not query vectors (n, D) of this generation.

        Raises:
            WidthMismatchError, NonFiniteEmbeddingError: not vectors of this generation.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise WidthMismatchError(
                f"searching as {self.generation}: expected query vectors of width {self.width}, found shape "
                f"{vectors.shape}; encode queries with {self.generation}"
            )
        norms = np.linalg.norm(vectors, axis=1)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise NonFiniteEmbeddingError(
                "searching: expected finite query vectors that are not zero, found NaN, infinity or zero; encode again"
            )

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the best `k` items for query vectors (n, D) made by this generation; they are scaled to unit length.

        Raises:
            WidthMismatchError, NonFiniteEmbeddingError: not vectors of this generation.
        """
        self.check_queries(vectors)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        found, entries = self.index.find((vectors / norms).astype(np.float32), k)
        return [
            [
                Hit(entry[0], float(score), str(generation), *entry[1:], self._above(float(score), str(generation)))
                for revision, score, generation in zip(*row, strict=True)
                if revision >= 0 and (entry := entries[int(revision)])
            ]
            for row in zip(found.revisions, found.scores, found.generations, strict=True)
        ]

    def _above(self, score: float, generation: str) -> dict[str, bool]:
        known = {name: values[generation] for name, values in self.thresholds.items() if generation in values}
        return {name: score >= threshold for name, threshold in known.items()}


def _finite(vector: NDArray[np.float32]) -> NDArray[np.float32] | UnreadableQueryError:
    if np.isfinite(vector).all():
        return vector
    return UnreadableQueryError("searching: the image has no finite embedding; give another image")


def _checked(text: str) -> str | UnreadableTextError:
    try:
        return checked_text(text)
    except UnreadableTextError as error:
        return error


def _encoded_alone(encoder: TextEncoder, text: str) -> NDArray[np.float32] | TextTowerError:
    try:
        vector: NDArray[np.float32] = encoder([text])[0][0]
    except TextTowerError as error:
        return error
    return vector


def _with_direction(
    text: str, vector: NDArray[np.float32] | TextTowerError
) -> NDArray[np.float32] | UnreadableTextError | TextTowerError:
    if isinstance(vector, TextTowerError) or np.isfinite(vector).all():
        return vector
    return UnreadableTextError(f"searching: the text {text[:80]!r} has no finite embedding; say it otherwise")


class ServingSearcher(Protocol):
    """What the HTTP endpoint needs of a searcher."""

    @property
    def served(self) -> ServedSnapshot:
        """What is served now; take it once per request."""

    def refresh(self) -> bool:
        """Follow the serving state and the gallery; True when another snapshot serves now."""


OpenSearcher = Callable[[Workspace, str | None, Sequence[str]], ServingSearcher]
"""Opens what a query generation searches: the champion's view for None; and what a canary grants it to read, if any."""


class GallerySearcher:
    """Searches what production serves; safe to use from several threads. `refresh` follows the serving state."""

    def __init__(self, workspace: Workspace, query_generation: str | None = None, granted: Sequence[str] = ()) -> None:
        """Open the champion's view, or another query generation's: an old client's by its id, a variant's by its name.

        A name is looked up at every refresh: which variant answers moves with the champion. `granted`: the generations
        whose vectors it reads, where a canary grants what no certificate does.
        """
        self._workspace = workspace
        self._pinned = query_generation
        self._granted = tuple(granted)
        self._lock = threading.Lock()
        self._follower = open_follower(workspace)
        self._served: ServedSnapshot | None = None
        self.refresh()

    @property
    def served(self) -> ServedSnapshot:
        """What is served now; take it once per request."""
        assert self._served is not None
        return self._served

    @property
    def generation(self) -> str:
        """The generation that encodes queries now."""
        return self.served.generation

    @property
    def snapshot_id(self) -> str:
        """The index snapshot that is searched now."""
        return self.served.snapshot_id

    def refresh(self) -> bool:
        """Follow the serving state and the gallery; True when another snapshot serves now. If it fails, the old stays.

        When nothing has moved this reads two versions and the certificates, no view.
        """
        with self._lock:
            encoder, target = searched_as(self._workspace, self._pinned, self._granted, self._served)
            followed = self._follower.follow(target)
            before = self._served
            if before is None or not isinstance(before.index, FollowedIndex) or before.index.followed is not followed:
                # Of images: a text's scores are on a scale of their own.
                thresholds = {} if isinstance(encoder, TextEncoder) else thresholds_of(self._workspace, target)
                self._served = ServedSnapshot(target.query_generation, encoder, FollowedIndex(followed), thresholds)
            return before is None or before.snapshot_id != followed.index.snapshot_id

    def search_images(self, sources: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode images and return the best `k` items of each; see `ServedSnapshot.search_images`."""
        return self.served.search_images(sources, k)

    def search_texts(self, texts: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Encode texts, as a text tower does, and return the best `k` items; see `ServedSnapshot.search_texts`."""
        return self.served.search_texts(texts, k)

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """Return the best `k` items for query vectors (n, D) of the serving generation."""
        return self.served.search_vectors(vectors, k)


def searched_as(
    workspace: Workspace, query_generation: str | None, granted: Sequence[str], served: ServedSnapshot | None
) -> tuple[SourceEncoder | TextEncoder, Target]:
    """Who is to query now, and what it reads: the champion, or the one that is named; see `GallerySearcher`.

    The encoder is opened unless it is that of `served`.

    Raises:
        NothingServedError: no generation serves yet.
        GracefulError: the one that is named may not query.
        EncoderChangedError: it does not embed here as it did where it was made.
        TextTowerError: a text tower cannot be built here.
    """
    generation = query_generation
    if generation is None:
        generation = workspace.registry.serving().champion
    elif not granted:
        generation = variant_for(workspace.registry, generation) if names_variant(generation) else generation
        workspace.may_query(generation, load_supported_clients(workspace.root))
    if generation is None:
        raise NothingServedError("searching: expected a serving generation, found none; run 'graceful update' first")
    is_served = served is not None and served.generation == generation
    encoder = served.encoder if is_served and served else _open_encoder(workspace.generation_uri(generation))
    widths = encoder.card.prefix_widths
    if granted:
        return encoder, Target(generation, tuple(sorted(granted, key=ordinal_of)), tuple(sorted(widths)))
    return encoder, target_of(workspace, generation, widths)


def _open_encoder(uri: str) -> SourceEncoder | TextEncoder:
    """Open who queries: of a variant its card says what it takes."""
    is_variant = variant_in(uri.rstrip("/").rpartition("/")[2]) is not None
    return open_text_encoder(uri) if is_variant and read_card(uri).takes == "text" else open_encoder(uri)
