"""TrainingJob -> Generation."""

from collections.abc import Callable
from typing import Any

from training.generation import GenerationCard
from training.job import TrainingJob
from training.loop import train_worker
from training.progress import TrailReporter


def run_training(
    job: TrainingJob, on_progress: Callable[[dict[str, Any]], None] | None = None, deadline_s: float | None = None
) -> GenerationCard:
    trail = TrailReporter(job.storage_uri, job.name, job.keep_checkpoints)
    done = trail.result()
    if done is not None:
        return done[1]
    card = train_worker(job, trail)
    assert card is not None
    return card
