"""What a search endpoint serves now, and the thread that looks at the serving state and the gallery.

A look that fails (a damaged snapshot, a store that does not answer) leaves the snapshot in place that serves, and is
kept to be shown. Invariant: whoever asks what is served, or how things stand, reads values that are there; only this
thread reads the workspace. So a store that hangs stops the following, and neither the answers nor the health probe.
"""

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.search.pauses import stand_back
from graceful.flows.search.searcher import NothingServedError, OpenSearcher, ServedSnapshot, ServingSearcher
from graceful.flows.settings.config import load_supported_clients
from graceful.flows.store.variants import NoVariantError, answering, live_variants
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.training.probes import EncoderChangedError

# Counting rows passes over all of them: at most one part in so many of the time is spent on it.
_COUNTING_SHARE = 20
_SECONDS_TO_END = 2.0

_log = logging.getLogger("graceful.search")


@dataclass(frozen=True)
class Figures:
    """What is known of the workspace beside the snapshot that serves, as of some recent look."""

    rows_by_generation: dict[str, int] = field(default_factory=dict)
    champion_since: float | None = None
    """When the serving generation became champion, in seconds since the epoch."""
    plan_generation: str | None = None
    """Whose vectors the active plan writes; None where no re-index is ordered."""
    plan_items: int = 0


class FollowedVariants:
    """What every variant that may query searches, by its id; and which of them answers for a name.

    One that cannot be followed keeps what it has, and disturbs nobody else.
    """

    def __init__(self, open_searcher: OpenSearcher) -> None:
        self._open = open_searcher
        self._searchers: dict[str, ServingSearcher] = {}
        self._answering: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    def refresh(self, workspace: Workspace) -> None:
        """Open what has come, follow what is there, drop what may query no longer."""
        if not workspace.registry.variants():
            return
        supported = load_supported_clients(workspace.root)
        names = live_variants(workspace.registry, workspace.kept(supported), supported)
        found, errors = {}, {}
        for variant in names:
            searcher = self._searchers.get(variant)
            try:
                if searcher is None:
                    searcher = self._open(workspace, variant, ())
                else:
                    searcher.refresh()
            except Exception as error:
                errors[variant] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if errors[variant] != self._errors.get(variant):
                    _log.warning("following %s: %s", variant, errors[variant])
            if searcher is not None:
                found[variant] = searcher
        self._searchers, self._answering, self._errors = found, answering(workspace.registry), errors

    def served(self, asked_as: str) -> ServedSnapshot:
        """What a variant searches. Raises NoVariantError."""
        variant = self._answering.get(asked_as, asked_as)
        searcher = self._searchers.get(variant)
        if searcher is None and variant in self._errors:
            raise NoVariantError(f"querying as {asked_as}: {variant} cannot be asked here ({self._errors[variant]})")
        if searcher is None:
            raise NoVariantError(
                f"querying as {asked_as}: expected a variant that answers here, found "
                f"{', '.join(self._answering) or 'none'}; leave it out, or look at 'graceful status'"
            )
        return searcher.served

    def status(self) -> dict[str, Any]:
        """Each variant that may query, for a person; one that could not be opened with its error alone."""
        names = {variant: name for name, variant in self._answering.items()}
        found: dict[str, Any] = {}
        for variant in dict.fromkeys([*self._searchers, *self._errors]):
            searcher = self._searchers.get(variant)
            found[variant] = {
                "answers_for": names.get(variant),
                "takes": None if searcher is None else searcher.served.takes,
                "snapshot_id": None if searcher is None else searcher.served.snapshot_id,
                "unreadable": None if searcher is None else searcher.served.num_unreadable,
                "error": self._errors.get(variant),
            }
        return found


class SearchState:
    """The searcher behind an endpoint, and how the last look at the serving state went."""

    def __init__(self, root: str, open_searcher: OpenSearcher) -> None:
        self.root = root
        self.open_searcher = open_searcher
        self.searcher: ServingSearcher | None = None
        self.error: str | None = None
        self.variants = FollowedVariants(open_searcher)
        self.looked_at = 0.0
        self.moved_at = 0.0
        self.figures = Figures()
        self._workspace: Workspace | None = None
        self._counted: tuple[str, int] | None = None
        self._count_due = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, seconds: float) -> "asyncio.Future[None]":
        """Look every so many seconds, in a thread of its own; the future is done after the first look."""
        loop = asyncio.get_running_loop()
        looked: asyncio.Future[None] = loop.create_future()

        def say() -> None:
            if not looked.done():
                looked.set_result(None)

        def run() -> None:
            stand_back()
            self.refresh()
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(say)
            while not self._stopping.wait(seconds):
                self.refresh()

        self._thread = threading.Thread(target=run, daemon=True, name="search-looking")
        self._thread.start()
        return looked

    def close(self) -> None:
        """Stop looking; a look that takes longer than two seconds is left to end by itself."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)

    def refresh(self) -> None:
        """Look at the serving state; never raises: what went wrong is kept to be shown."""
        try:
            if self.searcher is None:
                self._workspace = open_workspace(self.root)
                self.searcher = self.open_searcher(self._workspace, None, ())
                moved = True
            else:
                moved = self.searcher.refresh()
            self._count(self.searcher.served)
            self.error = None
            assert self._workspace is not None
            self.variants.refresh(self._workspace)
        except Exception as error:
            moved, line = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
            if line != self.error:
                _log.warning("following the serving state: %s", line)
                if isinstance(error, EncoderChangedError):
                    self._tell(Notice("encoder", str(error), line))
            self.error = line
        self.looked_at = time.time()
        if moved and self.searcher is not None:
            self.moved_at = self.looked_at
            served = self.searcher.served
            _log.info("serving %s (snapshot %s)", served.generation, served.snapshot_id)

    def served(self) -> ServedSnapshot:
        """What answers now; take it once for an answer.

        Raises:
            NothingServedError: nothing does.
        """
        if self.searcher is None:
            raise NothingServedError(self.error or "searching: no generation serves yet; the first look is under way")
        return self.searcher.served

    def status(self) -> dict[str, Any]:
        """How things stand, for a person."""
        served = None if self.searcher is None else self.searcher.served
        return {
            "query_generation": served.generation if served else None,
            "snapshot_id": served.snapshot_id if served else None,
            "width": served.width if served else None,
            "rows_by_generation": self.figures.rows_by_generation if served else {},
            "unreadable": served.num_unreadable if served else None,
            "variants": self.variants.status(),
            "serving_since": self.moved_at or None,
            "last_look": {"at": self.looked_at or None, "ok": self.error is None, "error": self.error},
        }

    def _tell(self, notice: Notice) -> None:
        """Tell others, who may be slow to take it: in a thread of its own."""
        threading.Thread(target=tell_of, args=(self.root, notice), daemon=True, name="search-telling").start()

    def _count(self, served: ServedSnapshot) -> None:
        """Bring the figures up to date where something has moved, and where there is time for it."""
        assert self._workspace is not None
        serving = self._workspace.registry.serving()
        name = served.snapshot_id, serving.sequence
        if name == self._counted or time.monotonic() < self._count_due:
            return
        started = time.monotonic()
        periods = self._workspace.registry.serving_periods()
        plan = self._workspace.registry.plan_head(serving.active_plan) if serving.active_plan else None
        self.figures = Figures(
            rows_by_generation=served.rows_by_generation,
            champion_since=periods[-1][1] if periods and periods[-1][0] == served.generation else None,
            plan_generation=plan.generation if plan else None,
            plan_items=plan.num_items if plan else 0,
        )
        self._counted = name
        self._count_due = time.monotonic() + _COUNTING_SHARE * (time.monotonic() - started)
