"""Other generations than the one that serves, as an endpoint keeps them: asked for by name, or watched by a canary.

One thread opens them, follows the gallery with them and watches (`watching`). It is not the one that follows what
serves: a candidate whose index takes minutes to build, or whose store hangs, delays nobody. Each takes the memory of an
index of its own. Invariant: nobody is answered by a generation that may not query (`Workspace.may_query`).
"""

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field

from graceful.errors import GracefulError
from graceful.flows.search.answering import OtherGenerationError
from graceful.flows.search.pauses import stand_back
from graceful.flows.search.searcher import OpenSearcher, ServedSnapshot, ServingSearcher
from graceful.flows.search.watching import CanaryWatch
from graceful.flows.store.workspace import Workspace, open_workspace

MAX_NAMED = 2
"""Generations asked for by name that are open at a time."""
_IDLE_S = 600.0
_SECONDS_TO_OPEN = 30.0
_SECONDS_TO_END = 2.0

_log = logging.getLogger("graceful.search")


@dataclass
class _Named:
    """One generation that was asked for by name. `asked_at`: monotonic seconds."""

    searcher: ServingSearcher
    asked_at: float = field(default_factory=time.monotonic)


class NotOpenYetError(GracefulError):
    """A generation that was asked for by name is being opened."""


class Beside:
    """The generations that one endpoint answers with beside the one that serves."""

    def __init__(self, root: str, open_searcher: OpenSearcher) -> None:
        self.root = root
        self._open_searcher = open_searcher
        self.watch = CanaryWatch(root, open_searcher)
        self._named: dict[str, _Named] = {}
        self._wanted: dict[str, list[asyncio.Future[str]]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, seconds: float) -> None:
        """Look every so many seconds, and at once where a generation is asked for."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(seconds,), daemon=True, name="search-beside")
        self._thread.start()

    def close(self) -> None:
        """Stop; what was counted is written. A look that takes longer than two seconds is left to end by itself."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)

    async def ready(self, name: str) -> str:
        """Wait until a generation that is asked for by id or ordinal can be asked; returns its id.

        Raises:
            OtherGenerationError: it may not query.
            NotOpenYetError: it takes long to open.
        """
        assert self._loop is not None
        waiting: asyncio.Future[str] = self._loop.create_future()
        with self._lock:
            self._wanted.setdefault(name, []).append(waiting)
        self._wake.set()
        try:
            return await asyncio.wait_for(waiting, _SECONDS_TO_OPEN)
        except TimeoutError:
            raise NotOpenYetError(f"asking {name}: its index is being opened; ask again") from None

    def snapshot(self, generation: str) -> ServedSnapshot:
        """What a generation beside the serving one answers from now.

        Raises:
            OtherGenerationError: it is not open.
        """
        arm, named = self.watch.arm, self._named.get(generation)
        if named is not None:
            return named.searcher.served
        if arm is not None and arm.canary.beside == generation:
            return arm.searcher.served
        raise OtherGenerationError(
            f"asking {generation}: it does not serve, and is not asked beside any more; ask again"
        )

    def _run(self, seconds: float) -> None:
        stand_back()
        workspace: Workspace | None = None
        while not self._stopping:
            with contextlib.suppress(GracefulError, OSError):  # said by the thread that follows what serves
                workspace = workspace or open_workspace(self.root)
            if workspace is not None:
                self._open_wanted(workspace)
                self._follow_named(workspace)
                self.watch.look(workspace)
            self._wake.wait(seconds)
            self._wake.clear()
        if workspace is not None:
            self.watch.close()

    def _open_wanted(self, workspace: Workspace) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, {}
        for name, waiting in wanted.items():
            try:
                generation = workspace.registry.resolve(name)
                if generation != workspace.registry.serving().champion:
                    self._open(workspace, generation)
                result: str | Exception = generation
            except Exception as error:
                line = " ".join(str(error).split())
                result = OtherGenerationError(line if isinstance(error, GracefulError) else f"asking {name}: {line}")
            for future in waiting:
                assert self._loop is not None
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(_deliver, future, result)

    def _open(self, workspace: Workspace, generation: str) -> None:
        arm, known = self.watch.arm, self._named.get(generation)
        if known is not None:
            known.asked_at = time.monotonic()
        elif arm is None or arm.canary.beside != generation:
            if len(self._named) >= MAX_NAMED:
                del self._named[min(self._named, key=lambda name: self._named[name].asked_at)]
            self._named[generation] = _Named(self._open_searcher(workspace, generation, ()))

    def _follow_named(self, workspace: Workspace) -> None:
        """Follow the gallery; one that may not query any more, or that nobody asks for, is closed."""
        champion = workspace.registry.serving().champion if self._named else None
        for generation, named in list(self._named.items()):
            try:
                if generation != champion and time.monotonic() - named.asked_at < _IDLE_S:
                    named.searcher.refresh()
                    continue
            except Exception as error:
                _log.warning("following %s: %s", generation, " ".join(str(error).split()))
            del self._named[generation]


def _deliver(future: "asyncio.Future[str]", result: str | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
