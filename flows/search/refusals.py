"""Why a search is refused: an HTTP status, a kind that is counted, and one line that says what to do."""

from fastapi import HTTPException

from graceful.errors import GracefulError
from graceful.flows.search.answering import OtherGenerationError
from graceful.flows.search.batches import QueueFullError
from graceful.flows.search.beside import NotOpenYetError
from graceful.flows.search.searcher import (
    IncompleteAnswerError,
    NothingServedError,
    UnreadableQueryError,
    UnreadableTextError,
    WrongQueryError,
)
from graceful.flows.search.watching import NothingWatchedError
from graceful.flows.store.variants import NoVariantError
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError
from graceful.training.text_tower import TextTowerError

RETRY_AFTER_S = 1
_AGAIN = {"retry-after": str(RETRY_AFTER_S)}


class Refused(HTTPException):
    """A search that is not answered. `kind` is one word, counted in /metrics and told to the client."""

    def __init__(self, status_code: int, kind: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status_code, detail, headers)
        self.kind = kind


def busy(detail: str) -> Refused:
    """Too much at a time: 429, to be asked again."""
    return Refused(429, "busy", detail, _AGAIN)


_BY_ERROR: dict[type[GracefulError], tuple[int, str]] = {
    UnreadableQueryError: (422, "unreadable_image"),
    UnreadableTextError: (422, "unreadable_text"),
    TextTowerError: (503, "broken_tower"),
    WrongQueryError: (422, "wrong_request"),
    WidthMismatchError: (422, "wrong_vector"),
    NonFiniteEmbeddingError: (422, "wrong_vector"),
    OtherGenerationError: (409, "other_generation"),
    QueueFullError: (429, "busy"),
    IncompleteAnswerError: (503, "incomplete_index"),
    NothingServedError: (503, "nothing_served"),
    NoVariantError: (404, "unknown_variant"),
    NotOpenYetError: (503, "opening"),
    NothingWatchedError: (409, "nothing_watched"),
}
ANSWERABLE = tuple(_BY_ERROR)
"""Errors that have a status and a kind."""

KINDS = (
    "broken_tower", "busy", "gone", "incomplete_index", "internal", "no_report", "nothing_served", "nothing_watched",
    "opening",
    "other_generation",
    "timeout", "too_large", "unauthorized", "unknown_variant", "unreadable_image", "unreadable_text",
    "wrong_request", "wrong_vector",
)  # fmt: skip
"""All kinds that are counted."""


def refusal_of(error: GracefulError) -> Refused:
    """What a client is told about an error of `ANSWERABLE`."""
    status, kind = _BY_ERROR[type(error)]
    return Refused(status, kind, str(error), _AGAIN if status in (429, 503) else None)
