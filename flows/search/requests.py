"""What a request to the search endpoint asks: read from its address, headers and body, or refused with a reason."""

import json
from typing import NamedTuple, TypeVar

import numpy as np
from fastapi import Request
from pydantic import ValidationError

from graceful.flows.search.answering import ImageQuestion, TextQuery, TextQuestion, VectorQuery, VectorQuestion
from graceful.flows.search.refusals import Refused
from graceful.training.generation import variant_in

Sent = TypeVar("Sent", TextQuery, VectorQuery)


class Wanted(NamedTuple):
    """What a request asks for beside its picture or vector."""

    k: int
    with_sources: bool
    generation: str | None
    asked_as: str | None

    @property
    def variant(self) -> str | None:
        """The variant that is to answer, by its name or id."""
        return self.asked_as or (self.generation if variant_in(self.generation or "") else None)


def media_type(request: Request) -> str:
    """Type of the body, in lower case and without parameters; empty where none is named."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def image_question(body: bytes, wanted: Wanted) -> ImageQuestion:
    """A picture. Raises Refused where there is no body."""
    if not body:
        line = "searching: expected an image or a vector in the body, found nothing"
        raise Refused(400, "wrong_request", line)
    return ImageQuestion(body, wanted.k, wanted.with_sources)


def refuse_both(wanted: Wanted, named: str | None) -> None:
    """Refuse who names a variant that asks, in the address or the body, and a generation that answers."""
    if wanted.generation is not None and {wanted.asked_as, named} - {None, wanted.generation}:
        line = "searching: expected a variant that asks or a generation that answers, found both; leave one out"
        raise Refused(422, "wrong_request", line)


def json_question(body: bytes, wanted: Wanted) -> VectorQuestion | TextQuestion:
    """A vector, or a text; `generation` is the variant that its body names, if it does."""
    return _text_question(body, wanted) if _has_text(body) else _vector_question(body, wanted)


def _has_text(body: bytes) -> bool:
    """Whether a JSON body has the key text: few have, and only those are parsed to see."""
    if b'"text"' not in body:
        return False
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and "text" in found


def _read(kind: type[Sent], body: bytes, example: str) -> Sent:
    """A body as the query that it should be; what it is not is said with an example. Raises Refused."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "body"
        line = f"searching: {place}: {problem['msg']}; send {example}"
        raise Refused(422, "wrong_request", line) from None


def _text_question(body: bytes, wanted: Wanted) -> TextQuestion:
    query = _read(TextQuery, body, '{"text": "...", "as": "words"}')
    return TextQuestion(query.text, query.k or wanted.k, wanted.with_sources, query.asked_as)


def _vector_question(body: bytes, wanted: Wanted) -> VectorQuestion:
    """A vector; `generation` is the variant that its body names, if it does."""
    query = _read(VectorQuery, body, '{"vector": [...]}')
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as that
        vector = np.asarray(query.vector, np.float32)
    return VectorQuestion(vector, query.generation, query.k or wanted.k, wanted.with_sources, query.asker)
