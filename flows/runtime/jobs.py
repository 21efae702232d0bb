"""Work on a cluster that this process is no part of: Ray jobs with specifications and results on shared storage.

A training's job id comes from what it does: a flow that died and runs again finds its job by that id and waits for it
instead of submitting it twice; cancelling the flow stops the job. A job's log is copied beside its specification while
it runs. What a job runs is `runtime.job_main`.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from graceful.errors import GracefulError
from graceful.files import exists, join, read_json, remove, write_bytes, write_json
from graceful.flows.runtime.cluster import log_with_processes, runtime_environment
from graceful.flows.runtime.head import require_head
from graceful.flows.settings.config import ClusterConfig
from graceful.training.generation import GenerationCard, read_card
from graceful.training.job import TrainingJob

LOG_FILE = "job.log"
_POLL_S = 1.0
_AGENT_START_S = 120.0
_SILENCE_S = 120.0
_SECONDS_BETWEEN_LOGS = 10.0


class JobFailedError(GracefulError):
    """A Ray job ended without its result."""


class HeadSilentError(JobFailedError):
    """The head has not answered for a while; what it does with the job is not known."""


class Jobs:
    """The jobs of one head. `say` is told where each job's log is."""

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        self._address, self._say = address, say
        self._asked: Any = None
        self._heard = time.monotonic()
        self._logged = 0.0

    def submit(self, name: str, kind: str, location: str) -> str:
        """Id of the attempt that runs; where all have ended, a new one is submitted.

        Every attempt has an id of its own: one that is deleted and used again at once fails now and then.
        """
        client = self._client()
        for attempt in itertools.count(1):
            job_id = f"{name}-{attempt}"
            try:
                if not client.get_job_status(job_id).is_terminal():
                    break
            except RuntimeError:  # unknown id
                self._submit(job_id, f"python -m graceful.flows.runtime.job_main {kind} {location}")
                break
        self._heard = time.monotonic()
        self._say(f"Ray job {job_id}; its log: {join(location, LOG_FILE)}")
        return job_id

    def status(self, job_id: str) -> Any:
        """Status of a job; while a head does not answer for less than two minutes, that it runs.

        Raises: HeadSilentError.
        """
        from ray.job_submission import JobStatus

        try:
            found = self._client().get_job_status(job_id)
        except (ConnectionError, OSError, RuntimeError) as error:
            if time.monotonic() - self._heard > _SILENCE_S:
                raise HeadSilentError(
                    f"waiting for Ray job {job_id}: its head has not answered for {_SILENCE_S:g} s ({error}); the "
                    "same command finds the job again"
                ) from error
            return JobStatus.RUNNING
        self._heard = time.monotonic()
        return found

    def follow(self, job_id: str, location: str, *, now: bool = False) -> None:
        """Copy a job's log to its folder, every few seconds; what cannot be copied now is copied later."""
        if now or time.monotonic() - self._logged > _SECONDS_BETWEEN_LOGS:
            self._logged = time.monotonic()
            with contextlib.suppress(Exception):
                write_bytes(join(location, LOG_FILE), self._client().get_job_logs(job_id).encode())

    def stop(self, job_id: str) -> None:
        """Stop a job; a head that does not answer cannot be told."""
        with contextlib.suppress(Exception):
            self._client().stop_job(job_id)

    def epitaph(self, job_id: str) -> str:
        """How a job ended, with the end of its log."""
        client = self._client()
        # The log is empty where the job could not even start; the message then has the reason.
        told = client.get_job_logs(job_id) or str(client.get_job_info(job_id).message)
        return f"Ray job {job_id} ended as {client.get_job_status(job_id).value}: {' '.join(told[-600:].split())}"

    def _client(self) -> Any:
        if self._asked is None:
            from ray.job_submission import JobSubmissionClient

            place = urlsplit(self._address)
            require_head(f"{place.hostname}:{place.port or (443 if place.scheme == 'https' else 80)}")
            log_with_processes()
            self._asked = JobSubmissionClient(self._address)
        return self._asked

    def _submit(self, job_id: str, entrypoint: str) -> None:
        deadline = time.monotonic() + _AGENT_START_S
        while True:
            try:
                self._client().submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_environment()
                )
                return
            except RuntimeError as error:
                # A head that has just started answers before it can take jobs.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


def submit_training(
    config: ClusterConfig, jobs_location: str, job: TrainingJob, follow: Callable[[], None], say: Callable[[str], None]
) -> GenerationCard:
    """Train on the cluster behind a job server; returns the card of the new generation.

    `follow` is called again and again meanwhile, and once at the end: it reads the training's trail.
    """
    specification = {"job": job.model_dump(mode="json"), "deadline_s": config.deadline_hours * 3600}
    result = run_job(
        config,
        jobs_location,
        "train",
        specification,
        lambda found: exists(found["generation_uri"]),
        follow,
        say,
    )
    follow()
    return read_card(result["generation_uri"])


def run_job(
    config: ClusterConfig,
    jobs_location: str,
    kind: str,
    specification: dict[str, Any],
    still_there: Callable[[dict[str, Any]], bool],
    follow: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The result of a job that does what the specification says; one that has ended is found by it."""
    digest = hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()[:20]
    location = join(jobs_location, f"{kind}-{digest}")
    result = join(location, "result.json")
    if exists(result):
        found = dict(read_json(result))
        if still_there(found):
            return found
        remove(result)
    write_json(join(location, "specification.json"), specification)
    jobs = Jobs(config.address, say)
    job_id = jobs.submit(f"graceful-{kind}-{digest}", kind, location)

    def look() -> None:
        jobs.follow(job_id, location)
        follow()

    _wait(jobs, job_id, config.deadline_hours, look)
    jobs.follow(job_id, location, now=True)
    if not exists(result):
        raise JobFailedError(jobs.epitaph(job_id))
    return dict(read_json(result))


def _wait(jobs: Jobs, job_id: str, deadline_hours: float, follow: Callable[[], None]) -> None:
    """Wait for a job's end; leaving the wait stops it, unless its head is silent."""
    deadline = time.monotonic() + deadline_hours * 3600
    try:
        while not jobs.status(job_id).is_terminal():
            follow()
            if time.monotonic() > deadline:
                raise JobFailedError(f"waiting for Ray job {job_id}: not done after {deadline_hours:g} hours")
            time.sleep(_POLL_S)
    except HeadSilentError:
        raise
    except BaseException:
        jobs.stop(job_id)
        raise
