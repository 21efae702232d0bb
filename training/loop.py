"""The per-worker training loop in plain PyTorch: one process, or one of several under a process group.

The same function runs in this process, under Ray Train and in tests. Everything random in a step comes from
(seed, epoch, step, rank), so a run that is killed and resumed from a checkpoint ends with the same weights as one that
was not (on the same hardware with the same number of workers). Losses and batch norm are those of the global batch
(distributed.py): how many workers share it changes the result by rounding and by their own draws of the augmentation.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graceful.errors import GracefulError
from graceful.training.combinations import CORNERS
from graceful.training.compiling import compiled
from graceful.training.distributed import synchronised_batch_norm
from graceful.training.encoder import arithmetic, save_generation
from graceful.training.finishing import calibrate, interpolate, interpolate_rows, sum_by_class
from graceful.training.generation import GenerationCard
from graceful.training.job import TrainingJob
from graceful.training.material import load_material
from graceful.training.mixing import Mixture
from graceful.training.objective import term_names
from graceful.training.pace import Course, Meetings
from graceful.training.progress import Reporter
from graceful.training.resuming import checkpoint, latest_checkpoint, resume
from graceful.training.starting import Parent, Trainee, build_trainee, check_start, load_parent
from graceful.training.step import Run, Stepper, steps_per_epoch
from graceful.training.validation import Validation, best_epoch, has_stalled, load_dev


class TrainingDivergedError(GracefulError):
    """The loss is no longer finite."""


class TrainingDeadlineError(GracefulError):
    """The training did not end in time; the same job goes on from its last checkpoint."""


def train_worker(
    job: TrainingJob,
    report: Reporter,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    deadline: float | None = None,
) -> GenerationCard | None:
    """Train one generation; rank 0 stores it and returns its card, the other ranks return None.

    deadline: seconds since the epoch, looked at every few seconds; a late training leaves a checkpoint first.
    With world_size > 1 the caller has set up torch's process group. Resumes from `report.latest()`.

    Raises: SingleImageClassError, ChangedImagesError, UnreadableImageError, MisalignedCacheError,
    IncompatibleParentError, ChangedTrainingError, TrainingDivergedError, TrainingDeadlineError, ScratchFullError,
    DecodingStoppedError, UsageError.
    """
    device = device or torch.device("cpu")
    config = job.config
    dtype = arithmetic(config.arithmetic, device)
    check_start(job)
    with contextlib.ExitStack() as opened:
        scratch = opened.enter_context(tempfile.TemporaryDirectory(prefix="graceful-training-"))
        material = opened.enter_context(contextlib.closing(load_material(job, device, Path(scratch))))
        run = Run(job, report, rank, world_size, device, dtype, material)
        steps = steps_per_epoch(run)
        torch.manual_seed(config.seed)
        parent = load_parent(job, material, device, dtype)
        trainee = build_trainee(config, len(material.classes), parent)
        trainee.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        dev = load_dev(job, device, Path(scratch))
        if dev is not None:
            opened.callback(dev.images.close)
        validation = Validation(run, dev, trainee)
        saved = latest_checkpoint(run, steps)
        course = Course.of(saved, world_size)
        from_parent = parent is not None
        if course.mixing_from is None:
            with prepared(run, trainee, from_parent, steps * config.epochs) as (stepper, is_compiled):
                resume(run, stepper, validation, course, saved)
                _run_epochs(run, stepper, validation, course, steps, deadline)
            validation.take_best()
        mixture = None
        if parent is not None and config.mixture != 0:
            mixture = _mixture(run, trainee, parent.card.generation_id, validation, course, saved)
            with prepared(run, trainee, from_parent, steps * config.mixture_epochs, mixture) as (stepper, is_compiled):
                if course.mixing_from is not None:
                    resume(run, stepper, validation, course, saved)
                course.mixing_from = course.epoch if course.mixing_from is None else course.mixing_from
                _run_epochs(run, stepper, validation, course, steps, deadline, mixture)
        return _finish(run, trainee, parent, validation, course, is_compiled, mixture)


@contextlib.contextmanager
def prepared(
    run: Run, trainee: Trainee, from_parent: bool, total_steps: int, mixture: Mixture | None = None
) -> Iterator[tuple[Stepper, bool]]:
    """Yield what moves the trainee while it trains, on all ranks as on one, and whether its network runs compiled."""
    config = run.job.config
    max_lr = config.max_lr if from_parent and config.start == "parent" else config.first_max_lr
    with synchronised_batch_norm(trainee):
        stepper = Stepper(run, trainee, max_lr, total_steps, mixture)

        def rehearse() -> None:
            stepper.rehearse(next(run.material.batches(config.seed, 0, steps_per_epoch(run), run.rank, run.world_size)))

        with compiled(trainee.network, config.compile, run.device, total_steps, rehearse) as is_compiled:
            stepper.distribute()
            yield stepper, is_compiled


def _mixture(
    run: Run, trainee: Trainee, parent_id: str, validation: Validation, course: Course, saved: dict[str, Any] | None
) -> Mixture:
    """Return what the last epochs draw the network to: as it was when they began."""
    if course.mixing_from is not None and saved is not None:
        return Mixture.of(run, trainee, parent_id, saved["mixture"])
    if run.job.config.mixture == "dev":
        return Mixture(run, trainee, parent_id, *validation.choose_mixture(parent_id))
    return Mixture(run, trainee, parent_id, float(run.job.config.mixture))


def _run_epochs(
    run: Run,
    stepper: Stepper,
    validation: Validation,
    course: Course,
    steps: int,
    deadline: float | None,
    mixture: Mixture | None = None,
) -> None:
    """Take all steps that the course has not seen: of the training, or of the mixture's epochs after it."""
    config = run.job.config
    last = config.epochs if course.mixing_from is None else course.mixing_from + config.mixture_epochs
    meetings = Meetings(run.device, run.world_size)
    saved_at = time.monotonic()
    while course.epoch < last and not (mixture is None and has_stalled(course.dev, config)):
        recent: dict[str, Tensor] = {}
        since = 0
        batches = run.material.batches(
            config.seed, course.epoch, steps, run.rank, run.world_size, first_step=course.step
        )
        for batch in batches:
            for name, value in stepper.take(batch, course.epoch, course.step).items():
                recent[name] = recent[name] + value if name in recent else value
            course.step += 1
            since += 1
            is_end = course.step == steps
            if not (meetings.is_due() or is_end):
                continue
            is_late = deadline is not None and time.time() > deadline
            sums, any_late, seconds = meetings.meet(recent, since, is_late)
            recent, since = {}, 0
            course.add(seconds)
            course.sums = {name: course.sums.get(name, 0.0) + value for name, value in sums.items()}
            line = _progress_line(run, course, steps)
            any_late = any_late and not (is_end and course.epoch + 1 == line["epochs"])
            if is_end:
                line |= validation.look(course)
                state = checkpoint(run, stepper, validation, course, steps, mixture) if run.rank == 0 else None
                run.report.report(line, state)
                saved_at = time.monotonic()
            elif run.rank == 0:
                is_due = any_late or time.monotonic() - saved_at >= 60 * run.job.checkpoint_minutes
                state = checkpoint(run, stepper, validation, course, steps, mixture) if is_due else None
                run.report.glance(line, state)
                saved_at = time.monotonic() if is_due else saved_at
            if any_late:
                raise TrainingDeadlineError(
                    f"training {run.job.name}: expected to end before its deadline, found it at epoch "
                    f"{course.epoch + 1} of {line['epochs']}, step {course.step} of {steps}; run the same job again to "
                    "go on from there"
                )
            meetings.restart_clock()
        course.begin_epoch()


def _progress_line(run: Run, course: Course, steps: int) -> dict[str, Any]:
    """Return the losses (means over this epoch's steps so far) and the speed.

    Raises: TrainingDivergedError.
    """
    config = run.job.config
    means = {name: value / course.step for name, value in course.sums.items()}
    if not all(math.isfinite(value) for value in means.values()):
        raise TrainingDivergedError(
            f"training {run.job.name}: expected a finite loss, found {means} (epoch {course.epoch}); lower max_lr or "
            "use float32"
        )
    done = course.epoch * steps + course.step
    epochs = run.job.planned_epochs
    if course.mixing_from is not None:
        epochs = course.mixing_from + config.mixture_epochs
    line = {"epoch": course.epoch, "epochs": epochs, "step": course.step, "steps": steps, **means}
    line["seconds"] = round(course.epoch_seconds, 3)
    line["images_per_s"] = round(len(run.material) * course.step / steps / max(course.epoch_seconds, 1e-9), 1)
    line["eta_s"] = round(course.seconds / done * (steps * epochs - done), 1)
    line["workers"] = run.world_size
    if course.worker_changes and course.worker_changes[-1][0] == course.epoch:
        line["workers_before"] = course.worker_changes[-1][2]
    return line


def _finish(
    run: Run,
    trainee: Trainee,
    parent: Parent | None,
    validation: Validation,
    course: Course,
    is_compiled: bool,
    mixture: Mixture | None,
) -> GenerationCard | None:
    """Interpolate with the parent, calibrate, compute class means, store: every rank computes, rank 0 writes."""
    started = time.perf_counter()
    job, config, material, network = run.job, run.job.config, run.material, trainee.plain()
    preprocessing, device, dtype = config.preprocessing, run.device, run.dtype
    rows = trainee.head.rows.detach()
    share, chosen = 0.0, None
    if parent is not None and config.interpolation == "dev":
        share, chosen = validation.choose_share(parent)
    elif parent is not None:
        share = float(config.interpolation)
    if parent is not None and share > 0:
        interpolate(network, parent.state, share)
        if not trainee.head.is_fixed:
            rows = interpolate_rows(rows, parent.rows, share)
    sample = material.sample(config.calibration_images, config.seed)
    calibrated = calibrate(network, sample, preprocessing, device, dtype)
    own = material.clean(run.rank, run.world_size)
    means = sum_by_class(network, own, len(material.classes), preprocessing, device, dtype)
    if run.world_size > 1:
        dist.all_reduce(means)
    if run.rank != 0:
        return None
    narrower = {group.width for group in material.predecessors.groups if group.width < config.width}
    uri, card = save_generation(
        job.output_uri,
        network,
        ordinal=job.ordinal,
        backbone=config.backbone,
        preprocessing=preprocessing,
        width=config.width,
        classifier=(material.classes, rows, means),
        variant=job.variant,
        prefix_widths=tuple(sorted({*config.prefix_widths, *narrower})),
        parent=parent.card.generation_id if parent is not None else None,
        predecessors=tuple(reference.generation_id for reference in job.predecessors if config.constraints),
        calibrated_images=calibrated,
        training={
            "name": job.name,
            "images": len(material),
            "classes": len(material.classes),
            "epochs": course.epoch,
            "seed": config.seed,
            "seconds": round(course.seconds + time.perf_counter() - started, 2),
            "workers": run.world_size,
            "batch_per_worker": -(-config.batch_size // run.world_size),
            **({"worker_changes": course.worker_changes} if course.worker_changes else {}),
            "compiled": is_compiled,
            "precision": str(dtype or torch.float32).removeprefix("torch."),
            "interpolation": share,
            **({"interpolation_on_dev": chosen} if chosen is not None else {}),
            **({} if mixture is None else {"mixture": mixture.share, "mixture_epochs": config.mixture_epochs}),
            **({"mixture_on_dev": mixture.chosen} if mixture is not None and mixture.chosen is not None else {}),
            **({"lqf": config.lqf.model_dump(mode="json")} if trainee.is_linear and config.lqf is not None else {}),
            **({"best_epoch": best_epoch(course.dev) + 1} if config.patience is not None else {}),
            "constraints": term_names(config.constraints) if len(material.predecessors) else [],
            **({CORNERS: parent.corners if parent is not None else material.classes} if trainee.head.is_fixed else {}),
        },
    )
    run.report.finish(uri, card)
    return card
