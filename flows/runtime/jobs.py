"""Work on a cluster that this process is no part of: Ray jobs with specifications and results on shared storage.

A job's id comes from what it does. A flow that died and runs again finds its job by that id and waits for it instead
of submitting it twice; cancelling the flow stops the job.

    python -m graceful.flows.runtime.jobs train <specification>     trains one generation
    python -m graceful.flows.runtime.jobs embed <specification>     embeds units with one generation
"""

import contextlib
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import exists, join, read_json, remove, write_json
from graceful.flows.settings.config import ClusterConfig
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.embedding_pool import EmbeddingPool
from graceful.training.generation import GenerationCard, read_card
from graceful.training.job import TrainingJob

_POLL_S = 1.0
_AGENT_START_S = 120.0
_SILENCE_S = 120.0


class JobFailedError(GracefulError):
    """A Ray job ended without its result."""


def submit_training(
    config: ClusterConfig, jobs_location: str, job: TrainingJob, follow: Callable[[], None]
) -> GenerationCard:
    """Train on the cluster behind a job server; returns the card of the new generation.

    `follow` is called again and again meanwhile, and once at the end: it reads the training's trail.
    """
    specification = {"job": job.model_dump(mode="json"), "deadline_s": config.deadline_hours * 3600}
    result = _run(config, jobs_location, "train", specification, lambda found: exists(found["generation_uri"]), follow)
    follow()
    return read_card(result["generation_uri"])


def submit_embedding(
    config: ClusterConfig, jobs_location: str, generation_uri: str, units: Sequence[EmbedUnit]
) -> list[EmbeddedUnit]:
    """Embed units on the cluster behind a job server."""
    specification = {
        "generation_uri": generation_uri,
        "num_workers": config.embed_workers,
        "gpus_per_worker": config.embed_gpus_per_worker,
        "deadline_s": config.deadline_hours * 3600,
        "units": [
            {
                "unit_id": unit.unit_id,
                "sources": list(unit.sources),
                "keys": _plain(unit.keys),
                "path": unit.path,
            }
            for unit in units
        ],
    }
    # A unit's file moves away when it is committed: the same units asked for again are embedded again.
    result = _run(
        config, jobs_location, "embed", specification, lambda found: all(exists(u["path"]) for u in found["units"])
    )
    return [EmbeddedUnit(**{**unit, "failures": tuple(map(tuple, unit["failures"]))}) for unit in result["units"]]


def _plain(keys: Mapping[str, Sequence[object]] | pa.Table) -> dict[str, list[object]]:
    if isinstance(keys, pa.Table):
        return dict(keys.to_pydict())
    return {name: list(values) for name, values in keys.items()}


def _run(
    config: ClusterConfig,
    jobs_location: str,
    kind: str,
    specification: dict[str, Any],
    still_there: Callable[[dict[str, Any]], bool],
    follow: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    from ray.job_submission import JobStatus, JobSubmissionClient

    from graceful.flows.runtime.cluster import runtime_environment

    digest = hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()[:20]
    location = join(jobs_location, f"{kind}-{digest}")
    result = join(location, "result.json")
    if exists(result):
        found = dict(read_json(result))
        if still_there(found):
            return found
        remove(result)
    write_json(join(location, "specification.json"), specification)
    client = JobSubmissionClient(config.address)
    entrypoint = f"python -m graceful.flows.runtime.jobs {kind} {location}"
    job_id = _submitted(client, f"graceful-{kind}-{digest}", entrypoint, runtime_environment())
    status = _wait(client, job_id, config.deadline_hours, follow)
    if status != JobStatus.SUCCEEDED or not exists(result):
        # The log is empty where the job could not even start; the message then has the reason.
        told = client.get_job_logs(job_id) or str(client.get_job_info(job_id).message)
        raise JobFailedError(f"Ray job {job_id} ended as {status.value}: {' '.join(told[-600:].split())}")
    return dict(read_json(result))


def _wait(client: Any, job_id: str, deadline_hours: float, follow: Callable[[], None]) -> Any:
    """Final status of a job. A head that does not answer for a while is asked again; leaving the wait stops the job."""
    deadline = time.monotonic() + deadline_hours * 3600
    heard = time.monotonic()
    try:
        while True:
            try:
                status = client.get_job_status(job_id)
            except (ConnectionError, OSError, RuntimeError) as error:
                if time.monotonic() - heard > _SILENCE_S:
                    raise JobFailedError(
                        f"waiting for Ray job {job_id}: its head has not answered for {_SILENCE_S:g} s ({error}); the "
                        "same command finds the job again"
                    ) from error
            else:
                heard = time.monotonic()
                if status.is_terminal():
                    return status
            follow()
            if time.monotonic() > deadline:
                raise JobFailedError(f"waiting for Ray job {job_id}: not done after {deadline_hours:g} hours")
            time.sleep(_POLL_S)
    except BaseException:
        with contextlib.suppress(Exception):  # a head that does not answer cannot be told
            client.stop_job(job_id)
        raise


def _submitted(client: Any, name: str, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Id of the attempt that runs; where all have ended, a new one is submitted.

    Every attempt has an id of its own: one that is deleted and used again at once fails now and then.
    """
    for attempt in itertools.count(1):
        job_id = f"{name}-{attempt}"
        try:
            if not client.get_job_status(job_id).is_terminal():
                return job_id
        except RuntimeError:  # unknown id
            break
    deadline = time.monotonic() + _AGENT_START_S
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env)
            return job_id
        except RuntimeError as error:
            # A head that has just started answers before it can take jobs.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _train(specification: dict[str, Any]) -> dict[str, Any]:
    from graceful.training.launch import run_training

    job = TrainingJob.model_validate(specification["job"])
    card = run_training(job, deadline_s=specification["deadline_s"])
    return {"generation_uri": join(job.output_uri, card.generation_id)}


def _embed(specification: dict[str, Any]) -> dict[str, Any]:
    from graceful.training.encoder import open_encoder

    units = [EmbedUnit(**{**unit, "sources": tuple(unit["sources"])}) for unit in specification["units"]]
    encoder = functools.partial(open_encoder, specification["generation_uri"])
    with EmbeddingPool(specification["num_workers"], gpus_per_worker=specification["gpus_per_worker"]) as pool:
        done = pool.embed(units, encoder, deadline_s=specification["deadline_s"])
    return {"units": [vars(unit) for unit in done]}


_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"train": _train, "embed": _embed}


def main(arguments: Sequence[str]) -> None:
    """Carry out one job on the cluster that this process runs in."""
    from graceful.flows.runtime.cluster import RaySession

    kind, location = arguments
    with RaySession(ClusterConfig(address="auto")) as session:
        session.ensure()
        write_json(join(location, "result.json"), _KINDS[kind](read_json(join(location, "specification.json"))))


if __name__ == "__main__":
    main(sys.argv[1:])
