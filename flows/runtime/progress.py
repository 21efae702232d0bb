"""What a person sees while a pipeline works: one line per step, and a bar for what takes long.

A `Progress` is handed down to the steps, which know neither terminal nor flow UI.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]


class Progress(Protocol):
    """Where steps report to."""

    def say(self, text: str) -> None:
        """Report one line that stays."""

    def track(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Follow `total` pieces of work; gives the function that counts them."""


class SilentProgress:
    """Reports nothing (tests, `--json`)."""

    def say(self, text: str) -> None:
        """Report nothing."""

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:  # noqa: ARG002
        """Follow nothing."""
        yield _ignore


class TerminalProgress:
    """Lines and bars on a terminal; lines alone where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def track(self, label: str, total: int) -> Iterator[Advance]:
        """Show a bar that goes away when the work is done."""
        if total <= 0 or not self.console.is_terminal:
            yield _ignore
            return
        columns = (
            TextColumn("  {task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=total)
            yield lambda count: bars.advance(task, count)


def _ignore(count: int) -> None:
    """Count nothing."""
