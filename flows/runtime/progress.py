"""What a person sees while a pipeline works: one line per step, and a bar for what takes long.

A `Progress` is handed down to the steps, which know neither terminal nor flow UI.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Counts pieces of work that are done."""

    def __call__(self, count: int, note: str = "") -> None:
        """Count; `note` says something about the newest piece, such as its loss, and how long is left."""


@dataclass(frozen=True)
class Artifact:
    """Something to look at that a step leaves in the flow UI: a text, or a link. The key is the same every time."""

    key: str
    description: str
    markdown: str = ""
    link: str = ""


class Progress(Protocol):
    """Where steps report to."""

    def say(self, text: str) -> None:
        """Report one line that stays."""

    def say_step(self, name: str) -> None:
        """Report that a step of an update begins."""

    def entitle(self, title: str) -> None:
        """Say in a few words what this run is, for lists of many."""

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        """Show results where results can be shown; `make` is called there alone, because pictures take time."""

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Follow `total` pieces of work; gives the function that counts them."""


class SilentProgress:
    """Reports nothing (tests, `--json`)."""

    def say(self, text: str) -> None:
        """Report nothing."""

    def say_step(self, name: str) -> None:
        """Report nothing."""

    def entitle(self, title: str) -> None:
        """Report nothing."""

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        """Show nothing."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:  # noqa: ARG002
        """Follow nothing."""
        yield _ignore


class TerminalProgress:
    """Lines and bars on a terminal. Where the output is no terminal, a line for each step and every few seconds.

    Every line begins with the seconds since the start.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def say_step(self, name: str) -> None:
        """Print a line with the time that has passed."""
        self.console.print(self._stamped(name), style="dim", highlight=False, soft_wrap=True)

    def entitle(self, title: str) -> None:
        """Show nothing: a terminal shows one run."""

    def show(self, make: Callable[[], Sequence[Artifact]]) -> None:
        """Show nothing: a terminal prints the result at the end."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Show a bar that goes away when the work is done; lines where there is no terminal."""
        if total <= 0:
            yield _ignore
            return
        if not self.console.is_terminal:
            yield _Lines(label, total, lambda text: self.console.print(self._stamped(text), soft_wrap=True)).advance
            return
        columns = (
            TextColumn("  {task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=total)
            yield lambda count, note="": bars.update(task, advance=count, description=f"{label} {note}".strip())

    def _stamped(self, text: str) -> str:
        return f"{time.monotonic() - self._started:6.0f} s  {text}"


class _Lines:
    """Counts work, and says how far it is: at most every few seconds, and at its end."""

    def __init__(self, label: str, total: int, say: Callable[[str], None]) -> None:
        self._label, self._total, self._say = label, total, say
        self._started = self._said = time.monotonic()
        self._done = 0

    def advance(self, count: int, note: str = "") -> None:
        """Count; `note` says something about the newest piece, such as its loss."""
        self._done += count
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._said = now
        left = 0.0 if note else (now - self._started) / max(self._done, 1) * max(self._total - self._done, 0)
        parts = [f"{self._label}: {self._done:,} of {self._total:,}", note, f"about {left:.0f} s left" if left else ""]
        self._say("  " + ", ".join(part for part in parts if part))


def _ignore(count: int, note: str = "") -> None:
    """Count nothing."""
