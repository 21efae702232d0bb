"""A reporter that dies: stands for a kill at a chosen write."""

from collections.abc import Callable
from typing import Any

from graceful.training.generation import GenerationCard
from graceful.training.job import TrainingJob
from graceful.training.loop import train_worker
from graceful.training.progress import TrailReporter


class Killed(BaseException):
    """Stands for a kill."""


class MortalReporter(TrailReporter):
    """Dies after the first `lives` checkpoints (or lines) that it wrote, or instead of writing the next one."""

    def __init__(self, job: TrainingJob, lives: int = 1, before: bool = False, lines: bool = False) -> None:
        super().__init__(job.storage_uri, job.name)
        self.lives, self.before, self.lines = lives, before, lines

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        self._pass(lambda: super(MortalReporter, self).report(metrics, state))

    def glance(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        if state is None and not self.lines:
            super().glance(metrics, state)
        else:
            self._pass(lambda: super(MortalReporter, self).glance(metrics, state))

    def _pass(self, write: Callable[[], None]) -> None:
        if self.before and not self.lives:
            raise Killed
        write()
        self.lives -= 1
        if not self.before and not self.lives:
            raise Killed


def trained_with_kills(job: TrainingJob, most: int, **how: Any) -> tuple[GenerationCard, list[dict[str, Any]]]:
    """Start a training again after every kill until it ends, at most so often; its card, and what each kill left."""
    left = []
    for _ in range(most):
        try:
            card = train_worker(job, MortalReporter(job, **how))
        except Killed:
            state = TrailReporter(job.storage_uri, job.name).latest()
            assert state is not None
            left.append(state)
        else:
            assert card is not None
            return card, left
    raise AssertionError(f"not trained after {most} kills")
