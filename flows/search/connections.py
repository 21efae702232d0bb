"""Connections of the search server: how many may be open, and how long a request may take to come in.

uvicorn by itself waits for ever for the rest of a request, and for a client to read its answer. Here a request has so
many seconds from its first byte (a new connection: from its opening) until all of it is here; and where more
connections are open than may be, the one goes that has been sending its request longest. One whose request is complete
is never taken for that, so a probe of its health gets through while others hold half-sent requests open.
"""

import asyncio
import contextlib
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from graceful.flows.settings.endpoint import EndpointConfig

# Files that a server has open beside its connections.
_FILES_BESIDE = 256


class LimitedConnection(H11Protocol):
    """One connection. `limited_by` makes the class with the limits of a configuration."""

    max_connections: int
    receive_s: float

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._overdue: asyncio.TimerHandle | None = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_more()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.is_incomplete:
            self._expect_more()
        else:
            self._expect_nothing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_more()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.is_incomplete:
            self._expect_nothing()

    @property
    def is_incomplete(self) -> bool:
        """Whether a request is being received, or waited for."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _expect_more(self) -> None:
        if self._overdue is None:
            self._since = time.monotonic()
            self._overdue = self.loop.call_later(self.receive_s, self._give_up)

    def _expect_nothing(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _give_up(self) -> None:
        self._overdue = None
        self.transport.abort()

    def _make_room(self) -> None:
        others = [other for other in self.connections if other is not self and isinstance(other, LimitedConnection)]
        incomplete = [other for other in others if other.is_incomplete and not other.transport.is_closing()]
        if incomplete:
            min(incomplete, key=lambda other: other._since).transport.abort()
        else:
            self.transport.abort()


def limited_by(config: EndpointConfig) -> type[LimitedConnection]:
    """The connection class of a server with these limits."""

    class Connection(LimitedConnection):
        max_connections = config.max_connections
        # The application gives up a body first, and says so.
        receive_s = config.body_timeout_s + 1

    return Connection


def allow_open_files(config: EndpointConfig) -> None:
    """Raise the limit on open files of this process, as far as it may, to what so many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + _FILES_BESIDE
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
