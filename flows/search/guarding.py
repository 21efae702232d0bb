"""What stands before every request: a bearer token, and what happens when its client goes or the server ends.

Pure ASGI, so that the same application is guarded the same way on whatever serves it.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from graceful.flows.settings.config import ConfigError

TOKEN_VARIABLE = "GRACEFUL_SEARCH_TOKEN"
"""Environment variable of the bearer token."""

WITHOUT_TOKEN = ("/health",)
"""Paths that answer without a token: a probe has none."""

_MIN_CHARACTERS = 16


class Token:
    """A bearer token. Only its digest is kept; comparing takes the same time wherever the difference is."""

    def __init__(self, text: str) -> None:
        self._digest = hashlib.sha256(text.encode()).digest()

    def admits(self, authorization: bytes) -> bool:
        """Tell whether the value of an Authorization header carries this token."""
        scheme, _, given = authorization.partition(b" ")
        is_same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
        return is_same and scheme.lower() == b"bearer"


def read_token(token_file: str | None, host: str, *, refused: bool) -> Token | None:
    """The token of a file, or of GRACEFUL_SEARCH_TOKEN; None where there is none and none is needed.

    refused: whoever starts it has said that there shall be none.

    Raises:
        ConfigError: none, or one too short, where others than this machine can connect.
    """
    if refused:
        return None
    if token_file is not None:
        try:
            text, place = Path(token_file).read_text().strip(), token_file
        except (OSError, UnicodeDecodeError) as error:
            line = f"reading the token: expected a text file, found {type(error).__name__} ({token_file})"
            raise ConfigError(f"{line}; write one with 'openssl rand -hex 32'") from None
    else:
        text, place = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    if not text and token_file is None and is_loopback(host):
        return None
    if len(text) < _MIN_CHARACTERS:
        raise ConfigError(
            f"answering searches on {host or 'all addresses'}: expected a token of {_MIN_CHARACTERS} characters or "
            f"more, found {len(text)} (in {place}); set {TOKEN_VARIABLE} or --token-file, or refuse one by --no-token"
        )
    return Token(text)


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on is reached from this machine alone.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "10.0.0.7")]
    [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """The application behind a token; a client that goes, and a server that ends, leave no traceback."""

    def __init__(self, app: Any, *, token: Token | None, failed: Callable[[str], None]) -> None:
        """`failed` is called with the kind of a request that is not answered."""
        self.app = app
        self.token = token
        self.failed = failed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.token is not None and scope["path"] not in WITHOUT_TOKEN:
            values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
            if len(values) != 1 or not self.token.admits(values[0]):
                self.failed("unauthorized")
                line = "expected 'Authorization: Bearer <token>' with this service's token"
                refusal = JSONResponse({"detail": line, "kind": "unauthorized"}, 401, {"www-authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            self.failed("gone")
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            self.failed("gone")
            ending = JSONResponse({"detail": "this server ends; ask another", "kind": "gone"}, 503)
            with contextlib.suppress(RuntimeError):  # the answer was on its way
                await ending(scope, receive, send)
        except Exception:
            self.failed("internal")
            raise
