"""What stands before every request: a bearer token, and what happens when its client goes or the server ends.

Pure ASGI, so that the same application is guarded the same way on whatever serves it.
"""

import asyncio
import contextlib
import hashlib
import hmac
import html
import ipaddress
import os
import urllib.parse
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

from graceful.flows.settings.config import ConfigError

TOKEN_VARIABLE = "GRACEFUL_SEARCH_TOKEN"
"""Environment variable of the bearer token."""

WITHOUT_TOKEN = ("/health",)
"""Paths that answer without a token: a probe has none."""

REPORTS = "/reports/"
"""Pages for browsers, which cannot send a header: here the token may come once in the query; a cookie follows it."""

COOKIE = "graceful_reports"
_MIN_CHARACTERS = 16
_ENTRANCE = """<!doctype html><meta charset="utf-8"><title>graceful</title><link rel="icon" href="data:,">
<meta http-equiv="refresh" content="0; url={0}"><a href="{0}">The report</a>
"""


class Token:
    """A bearer token. Only its digest is kept; comparing takes the same time wherever the difference is."""

    def __init__(self, text: str) -> None:
        self._digest = hashlib.sha256(text.encode()).digest()
        self.cookie = hmac.new(text.encode(), COOKIE.encode(), hashlib.sha256).hexdigest()
        """What a browser keeps in its place: it opens reports, and nothing else."""

    def admits(self, authorization: bytes) -> bool:
        """Tell whether the value of an Authorization header carries this token."""
        scheme, _, given = authorization.partition(b" ")
        return self.is_token(given.strip()) and scheme.lower() == b"bearer"

    def is_token(self, given: bytes) -> bool:
        """Tell whether this is the token itself."""
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._digest)


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
            answer = self._at_the_door(scope, self.token)
            if answer is not None:
                await answer(scope, receive, send)
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

    def _at_the_door(self, scope: Any, token: Token) -> Response | None:
        """What is answered to a request that may not go on; None for one that may."""
        values = _values(scope, b"authorization")
        if len(values) == 1 and token.admits(values[0]):
            return None
        reads_report = scope["path"].startswith(REPORTS) and scope["method"] in ("GET", "HEAD")
        if reads_report and not values:
            if any(hmac.compare_digest(found.encode(), token.cookie.encode()) for found in _cookies(scope)):
                return None
            given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
            if len(given) == 1 and token.is_token(given[0].encode()):
                return _entrance(scope["path"], token)
        self.failed("unauthorized")
        line = "expected 'Authorization: Bearer <token>' with this service's token"
        if reads_report:
            line += ", or ?token=<token> once in a browser"
        return JSONResponse({"detail": line, "kind": "unauthorized"}, 401, {"www-authenticate": "Bearer"})


def _entrance(path: str, token: Token) -> Response:
    """A page that goes on to what was asked for, without the token in its address.

    Not a redirect: where the link stood on another page, a browser would not send a strict cookie along with it.
    """
    place = html.escape(urllib.parse.quote(path.rpartition("/")[2]) or "./")
    headers = {
        "set-cookie": f"{COOKIE}={token.cookie}; Path=/; HttpOnly; SameSite=Strict",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(_ENTRANCE.format(place), headers=headers)


def _cookies(scope: Any) -> list[str]:
    found = []
    for value in _values(scope, b"cookie"):
        with contextlib.suppress(CookieError):
            cookies = SimpleCookie(value.decode("latin-1"))
            found += [cookies[COOKIE].value] if COOKIE in cookies else []
    return found


def _values(scope: Any, wanted: bytes) -> list[bytes]:
    return [value for name, value in scope["headers"] if name.lower() == wanted]
