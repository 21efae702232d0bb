"""What a training leaves at a checkpoint, and how it is taken up again."""

import logging
from typing import Any

from graceful.errors import GracefulError
from graceful.training.mixing import Mixture
from graceful.training.pace import Course
from graceful.training.step import Run, Stepper
from graceful.training.validation import Validation

logger = logging.getLogger(__name__)


class ChangedTrainingError(GracefulError):
    """A checkpoint of the same name is that of another training."""


def checkpoint(
    run: Run, stepper: Stepper, validation: Validation, course: Course, steps: int, mixture: Mixture | None
) -> dict[str, Any]:
    """Return everything that the next step depends on, and whose training it is."""
    recipe = run.job.config.model_dump(mode="json")
    parts = {**stepper.state_dict(), **validation.state_dict(), **course.state_dict()}
    mixed = {} if mixture is None else {"mixture": mixture.state_dict()}
    return {**parts, **mixed, "recipe": recipe, "steps": steps}


def latest_checkpoint(run: Run, steps: int) -> dict[str, Any] | None:
    """Return the latest checkpoint of this training, if there is one.

    Raises: ChangedTrainingError for that of another.
    """
    saved = run.report.latest()
    if saved is None:
        return None
    now, before = run.job.config.model_dump(mode="json"), saved["recipe"]
    changed = [f"{name} = {before.get(name)!r}" for name in now if now[name] != before.get(name)]
    if saved["steps"] != steps:
        changed.append(f"{saved['steps']} steps per epoch instead of {steps}")
    if changed:
        raise ChangedTrainingError(
            f"resuming training {run.job.name}: expected the checkpoint of this recipe and these images, found one "
            f"with {', '.join(changed)}; give the changed training a name of its own, or undo the change to go on"
        )
    return saved


def resume(run: Run, stepper: Stepper, validation: Validation, course: Course, saved: dict[str, Any] | None) -> None:
    """Load a checkpoint into the stepper, and say so where it goes on with other workers."""
    if saved is None:
        return
    stepper.load_state_dict(saved)
    validation.load_state_dict(saved)
    if course.step == saved["steps"]:
        course.begin_epoch()
    if course.workers != run.world_size:
        logger.warning(
            "training %s goes on with %d workers instead of %d, from epoch %d, step %d",
            run.job.name, run.world_size, course.workers, course.epoch, course.step,
        )  # fmt: skip
        course.worker_changes.append([course.epoch, course.step, course.workers, run.world_size])
        course.workers = run.world_size
