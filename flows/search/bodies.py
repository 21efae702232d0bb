"""Reading the body of a request within limits: of its length, of its time, and of what all bodies take together.

Nothing is parsed before its length is known to be allowed: first the length that the client declares, then every
chunk that comes. A body that is not complete in time is given up.
"""

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from graceful.flows.search.refusals import Refused, busy
from graceful.training.texts import MAX_TEXT_CHARS

# A float32 written as a decimal number with its comma takes up to 16 characters, one that came from a float64 26; the
# rest is for white space. The other keys are short.
_JSON_BYTES_PER_VALUE = 48
_JSON_BYTES_BESIDE = 4_096
_JSON_BYTES_PER_CHARACTER = 12  # a character outside the first plane is two escapes of six
_MAX_FILES = 8


def json_limit(width: int) -> int:
    """Bytes of the largest JSON query: for vectors of a width, or the longest text.

    >>> json_limit(512), json_limit(128)
    (28672, 16096)
    """
    return max(_JSON_BYTES_PER_VALUE * width, _JSON_BYTES_PER_CHARACTER * MAX_TEXT_CHARS) + _JSON_BYTES_BESIDE


class BodyBudget:
    """Bytes of all bodies that are in memory, of one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0

    @contextmanager
    def hold(self) -> Iterator["HeldBody"]:
        """Room for one body, given back at the end of the block."""
        held = HeldBody(self)
        try:
            yield held
        finally:
            self.held_bytes -= held.num_bytes


class HeldBody:
    """What one body takes of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self.budget = budget
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Take more; 429 where all bodies together take too much."""
        self.num_bytes += num_bytes
        self.budget.held_bytes += num_bytes
        if self.budget.held_bytes > self.budget.max_bytes:
            raise busy("searching: too many large searches at a time; ask again")


async def read_body(request: Request, held: HeldBody, *, limit: int, timeout_s: float, is_form: bool) -> bytes:
    """The body of a request, or the one file of a multipart form.

    Raises:
        Refused: 413 above `limit` bytes, 408 after `timeout_s`, 400 for a form with another number of files.
        ClientDisconnect: the client has gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    limited = _limited(request, held, limit)
    try:
        async with asyncio.timeout(timeout_s):
            return await _form_file(limited) if is_form else await limited.body()
    except TimeoutError:
        line = f"searching: expected the whole body within {timeout_s:g} s, found a part; send it again"
        raise Refused(408, "timeout", line, {"connection": "close"}) from None
    except Refused:
        raise
    except HTTPException as error:  # of the form's parser
        raise Refused(error.status_code, "wrong_request", str(error.detail)) from None


def _too_large(limit: int) -> Refused:
    size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit:,} bytes"
    return Refused(413, "too_large", f"searching: expected at most {size}, found more; send a smaller body")


def _limited(request: Request, held: HeldBody, limit: int) -> Request:
    """The same request, whose body is refused once it is too large, before all of it is in memory."""

    async def receive() -> MutableMapping[str, Any]:
        message = await request.receive()
        held.take(len(message.get("body", b"")))
        if held.num_bytes > limit:
            raise _too_large(limit)
        return message

    return Request(request.scope, receive)


async def _form_file(request: Request) -> bytes:
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FILES) as form:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if len(files) != 1:
            line = f"searching: expected a form with one file, found {len(files)}"
            raise Refused(400, "wrong_request", line)
        return await files[0].read()
