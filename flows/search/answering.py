"""From questions to the bodies of answers: one encoder pass and one product for many, one snapshot for all of them.

A question that cannot be answered gets its own error and does not touch the others. What comes of a vector does not
depend on what it was asked together with: exact search scores every row in one way, and only questions for the same K
share a search. Images that are encoded together differ from those encoded alone by the rounding of the network's sums.

Shapes: Q questions, D width, K results.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from graceful.errors import GracefulError
from graceful.flows.search.searcher import Hit, Mapper, ServedSnapshot
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.training.generation import variant_in
from graceful.training.texts import MAX_TEXT_CHARS

MAX_K = 1_000


class OtherGenerationError(GracefulError):
    """A query vector was made by another generation than the one that serves."""


class VectorQuery(BaseModel):
    """A query that the client has encoded itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vector: list[float] = Field(description="One embedding, made by the serving generation.")
    generation: str | None = Field(
        default=None, description="Who made it; a query of another generation than the one that answers is refused."
    )
    k: int | None = Field(default=None, ge=1, le=MAX_K, description="How many items to return.")
    asked_as: str | None = Field(
        default=None, alias="as", description="A variant that made it, such as edge, instead of the serving generation."
    )

    @property
    def asker(self) -> str | None:
        """The variant that asks: named, or known by its id in `generation`; None for the serving generation."""
        return self.asked_as or (self.generation if variant_in(self.generation or "") else None)


class TextQuery(BaseModel):
    """A text, for a variant that takes texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1, max_length=MAX_TEXT_CHARS, description="What to search for.")
    k: int | None = Field(default=None, ge=1, le=MAX_K, description="How many items to return.")
    asked_as: str | None = Field(
        default=None, alias="as", description="The text tower that encodes it, such as words; or else ?as= names it."
    )


class FoundItem(BaseModel):
    """One item found; `generation` is the one whose vector it was found by."""

    item_id: str
    score: float = Field(description="Cosine similarity; higher is better.")
    generation: str
    source: str | None = Field(default=None, description="Where the server has the image; only where it was asked for.")
    label: str
    above: dict[str, bool] = Field(description="Whether the score is at least each consumer's threshold for this hit.")


class Answer(BaseModel):
    """Hits, best first, and what they come from."""

    query_generation: str = Field(description="Who asked: the champion, or the variant that answers for ?as=.")
    snapshot_id: str
    thresholds: dict[str, dict[str, float]] = Field(
        description="Consumer of scores, generation of the hit's vector: threshold for queries of this generation."
    )
    hits: list[FoundItem]


@dataclass(frozen=True)
class ImageQuestion:
    """An image, as its bytes. `generation`: who is to answer, where it is not the one that serves.

    `replaceable`: the one that serves answers in its place, where it cannot.
    """

    payload: bytes
    k: int
    with_sources: bool
    generation: str | None = None
    replaceable: bool = False


@dataclass(frozen=True)
class VectorQuestion:
    """A vector (D,); `made_by`: who encoded it, where that is named; `generation` as of an image."""

    vector: NDArray[np.float32]
    made_by: str | None
    k: int
    with_sources: bool
    generation: str | None = None


@dataclass(frozen=True)
class TextQuestion:
    """A text; `generation` as of an image."""

    text: str
    k: int
    with_sources: bool
    generation: str | None = None


def answer_images(
    served: ServedSnapshot, questions: Sequence[ImageQuestion], *, max_pixels: int, mapper: Mapper
) -> list[bytes | Exception]:
    """Bodies of the answers to images; images are decoded by `mapper` and encoded in one pass."""
    vectors = served.encode_payloads([question.payload for question in questions], max_pixels, mapper)
    return _answered(served, questions, vectors)


def answer_vectors(served: ServedSnapshot, questions: Sequence[VectorQuestion]) -> list[bytes | Exception]:
    """Bodies of the answers to vectors."""
    return _answered(served, questions, [_checked(served, question) for question in questions])


def answer_texts(served: ServedSnapshot, questions: Sequence[TextQuestion]) -> list[bytes | Exception]:
    """Bodies of the answers to texts, which are encoded in one pass."""
    return _answered(served, questions, served.encode_texts([question.text for question in questions]))


def _checked(served: ServedSnapshot, question: VectorQuestion) -> NDArray[np.float32] | Exception:
    if question.made_by not in (None, served.generation):
        return OtherGenerationError(
            f"the query was encoded by {question.made_by}, but {served.generation} answers; encode it again"
        )
    try:
        served.check_queries(question.vector[None])
    except (WidthMismatchError, NonFiniteEmbeddingError) as error:
        return error
    return question.vector


def _answered(
    served: ServedSnapshot,
    questions: Sequence[ImageQuestion | VectorQuestion | TextQuestion],
    vectors: Sequence[NDArray[np.float32] | Exception],
) -> list[bytes | Exception]:
    answers: list[bytes | Exception] = [vector if isinstance(vector, Exception) else b"" for vector in vectors]
    asked: dict[int, list[tuple[int, NDArray[np.float32]]]] = defaultdict(list)
    for row, (question, vector) in enumerate(zip(questions, vectors, strict=True)):
        if not isinstance(vector, Exception):
            asked[question.k].append((row, vector))
    for k, rows in asked.items():
        found = served.search_vectors(np.stack([vector for _, vector in rows]), k)
        for (row, _), hits in zip(rows, found, strict=True):
            answers[row] = _body(served, hits, questions[row].with_sources)
    return answers


def _body(served: ServedSnapshot, hits: Sequence[Hit], with_sources: bool) -> bytes:
    answer = Answer(
        query_generation=served.generation,
        snapshot_id=served.snapshot_id,
        thresholds={name: dict(values) for name, values in served.thresholds.items()},
        hits=[
            FoundItem(
                item_id=hit.item_id,
                score=hit.score,
                generation=hit.generation,
                source=hit.source if with_sources else None,
                label=hit.label,
                above=dict(hit.above),
            )
            for hit in hits
        ],
    )
    return answer.model_dump_json(exclude_none=True).encode()
