"""TrainingJob -> Generation, on Ray Train (several workers) or in this process (num_workers = 0).

A job's name stands for everything that went into it. A training that has ended is found and returned; one that was
killed goes on from its last complete checkpoint. The trail (progress.py) is what is resumed from, never Ray's own run
folder: every attempt gets a fresh one, because Ray rewrites its snapshot in place and a kill can leave it unreadable.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.torch
import torch

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import join, resolve
from graceful.training.combinations import IncompatibleParentError
from graceful.training.datasets import EmptyDatasetError, SingleImageClassError
from graceful.training.encoder import CorruptedWeightsError
from graceful.training.generation import GenerationCard, GenerationNotFoundError
from graceful.training.images import UnreadableImageError
from graceful.training.job import TrainingJob
from graceful.training.loop import TrainingDeadlineError, TrainingDivergedError, train_worker
from graceful.training.manifest import DatasetNotFoundError
from graceful.training.pixels import OF_ONE_RANK
from graceful.training.predecessors import MisalignedCacheError
from graceful.training.progress import TrailReporter
from graceful.training.records import ChangedImagesError, ScratchFullError
from graceful.training.resuming import ChangedTrainingError

CONTROLLER_FAILURES = 3  # Ray's default is to retry for ever
POLL_INTERVAL_S = 0.25
DEADLINE_GRACE_S = 30.0
Progress = Callable[[dict[str, Any]], None]
# The same on every rank and after every restart: handed back instead of raised, so that Ray does not try again.
REFUSALS = (
    ChangedImagesError,
    ChangedTrainingError,
    CorruptedWeightsError,
    DatasetNotFoundError,
    EmptyDatasetError,
    GenerationNotFoundError,
    IncompatibleParentError,
    MisalignedCacheError,
    ScratchFullError,
    SingleImageClassError,
    TrainingDeadlineError,
    TrainingDivergedError,
    UnknownFormatError,
    UnreadableImageError,
    ValueError,
)


class ClusterNotStartedError(GracefulError):
    """Workers were asked for, but this process is not connected to a Ray cluster."""


class TrainingFailedError(GracefulError):
    """The workers failed more often than allowed, or could not be started."""


def run_training(
    job: TrainingJob,
    on_progress: Progress | None = None,
    deadline_s: float | None = None,
    on_glance: Progress | None = None,
) -> GenerationCard:
    """Train the generation that `job` describes, or find it finished; return its card.

    on_progress is called in this thread with one dict per finished epoch (on resuming, first with the earlier ones);
    on_glance with the same of an epoch that is under way, every few seconds. With workers, Ray must have been started
    or joined by the caller.

    Raises: the errors named in REFUSALS, TrainingFailedError, ClusterNotStartedError.
    """
    trail = TrailReporter(job.storage_uri, job.name, job.keep_checkpoints)
    tail = Tail(trail, on_progress, on_glance)
    finished = trail.result()
    if finished is None:
        deadline = None if deadline_s is None else time.time() + deadline_s
        if job.num_workers == 0:
            train_worker(job, _LocalReporter(trail, tail), deadline=deadline)
        else:
            _fit(job, trail, tail, deadline)
        finished = trail.result()
    tail.advance()
    if finished is None:
        raise TrainingFailedError(f"training {job.name}: expected a result at {trail.uri}, found none; run it again")
    return finished[1]


class Tail:
    """Hands every progress line of a trail on exactly once, in the thread that calls `advance`."""

    def __init__(self, trail: TrailReporter, on_progress: Progress | None, on_glance: Progress | None) -> None:
        self._trail = trail
        self._on_progress = on_progress
        self._on_glance = on_glance
        self._next_epoch = 0
        self._seen = (0, 0)

    def advance(self) -> None:
        """Hand on what is new."""
        if self._on_progress is None:
            return
        for line in self._trail.metrics():
            if line["epoch"] >= self._next_epoch:
                self._next_epoch = line["epoch"] + 1
                self._on_progress(line)
        glance = self._trail.last_glance() if self._on_glance is not None else None
        if self._on_glance is None or glance is None:
            return
        place = (glance["epoch"], glance["step"])
        if place > self._seen and glance["epoch"] >= self._next_epoch:
            self._seen = place
            self._on_glance(glance)


class _LocalReporter:
    """The trail for a training in this process."""

    def __init__(self, trail: TrailReporter, tail: Tail) -> None:
        self._trail, self._tail = trail, tail
        self.latest = trail.latest
        self.finish = trail.finish

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        self._trail.report(metrics, state)
        self._tail.advance()

    def glance(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        self._trail.glance(metrics, state)
        self._tail.advance()


class _RayReporter:
    """The trail inside a Ray Train worker: rank 0 writes, then all ranks meet in Ray's report."""

    def __init__(self, trail: TrailReporter) -> None:
        self._trail = trail
        self.latest = trail.latest
        self.glance = trail.glance
        self.finish = trail.finish

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        self._trail.report(metrics, state)
        ray.train.report(metrics)


def _fit(job: TrainingJob, trail: TrailReporter, tail: Tail, deadline: float | None) -> None:
    """Run one TorchTrainer in a thread, pass progress on meanwhile, keep the deadline."""
    if not ray.is_initialized():
        raise ClusterNotStartedError(
            f"training {job.name}: expected a running Ray cluster for {job.num_workers} workers, found none; call "
            "ray.init() first or set num_workers = 0"
        )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    run_folder = join(trail.uri, "ray")
    _remove_folder(run_folder)
    trainer = ray.train.torch.TorchTrainer(
        _train_on_ray,
        train_loop_config={"job": job.model_dump(mode="json"), "deadline": deadline},
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=job.num_workers if job.min_workers is None else (job.min_workers, job.num_workers),  # type: ignore[arg-type]
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, **({"GPU": 1} if job.use_gpu else {}), **job.resources},
            label_selector=job.labels or None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=run_folder,
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=job.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(job.cpus_per_worker)}},
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name=f"fit-{job.name}", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_INTERVAL_S)
        tail.advance()
        # The workers keep the deadline too; the grace is for one that hangs and cannot.
        if deadline is not None and time.time() > deadline + DEADLINE_GRACE_S:
            raise TrainingDeadlineError(
                f"training {job.name}: expected to end before its deadline, found workers that hang; shut the cluster "
                "down, then run the same job again to go on from the last checkpoint"
            )
    if isinstance(outcome.get("value"), BaseException):
        raise outcome["value"]
    if "error" in outcome:
        if trail.result() is not None:  # the generation is complete: what failed afterwards does not matter
            return
        raise TrainingFailedError(
            f"training {job.name}: expected {job.num_workers} workers to finish, found "
            f"{_first_line(outcome['error'])}; run the same job again to go on from the last checkpoint"
        ) from outcome["error"]
    _remove_folder(run_folder)


def _train_on_ray(config: dict[str, Any]) -> Any:
    """Run one Ray Train worker; return a refusal instead of raising it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    job = TrainingJob.model_validate(config["job"])
    context = ray.train.get_context()
    reporter = _RayReporter(TrailReporter(job.storage_uri, job.name, job.keep_checkpoints))
    try:
        train_worker(
            job,
            reporter,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=ray.train.torch.get_device(),
            deadline=config["deadline"],
        )
    except REFUSALS as error:
        if getattr(error, OF_ONE_RANK, False) and context.get_world_size() > 1:
            raise  # the other ranks wait for this one in the midst of a step: a failure alone ends them
        return error
    return None


def _first_line(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return f"{type(first).__name__}: {lines[-1] if lines else ''}"


def _remove_folder(uri: str) -> None:
    file_system, path = resolve(uri)
    if file_system.get_file_info(path).type == pafs.FileType.Directory:
        file_system.delete_dir(path)
