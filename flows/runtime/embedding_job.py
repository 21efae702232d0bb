"""One embedding job for a whole update on a cluster behind a job server: its workers stay from one order to the next.

Orders and what came of them are files on storage that this process and the cluster's nodes share:

    <jobs>/embed-<id>/specification.json       workers and what they take
    <jobs>/embed-<id>/alive.json               written every few seconds by whoever gives the orders
    <jobs>/embed-<id>/orders/0003.json         units to embed with a generation
    <jobs>/embed-<id>/done/0003/0017.json      a unit whose file is complete; the units of an order are numbered
    <jobs>/embed-<id>/done/0003/failed.json    why the rest of an order will not come

A unit is handed on as soon as its file is complete, so that what a job had done stays when it dies: the next attempt
gets the rest, as an order of its own. A job whose giver has gone ends after the order under way.
"""

import functools
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import exists, join, list_files, read_json, write_json
from graceful.flows.runtime.jobs import JobFailedError, Jobs
from graceful.flows.settings.config import ClusterConfig
from graceful.indexing.embed import EmbeddedUnit, EmbeddingFailedError, EmbedUnit, check_units
from graceful.indexing.embedding_pool import EmbeddingPool

ABANDONED_AFTER_S = 120.0
_SECONDS_BETWEEN_SIGNS = 10.0
_POLL_S = 0.5
_POLLS_BETWEEN_QUESTIONS = 4
_FAILED = "failed.json"
_END = "end.json"


class EmbeddingJob:
    """Embeds on a cluster by orders to one job, which is started with the first and started again where it dies."""

    def __init__(self, config: ClusterConfig, jobs_location: str, say: Callable[[str], None]) -> None:
        self._config = config
        self._location = join(jobs_location, f"embed-{uuid.uuid4().hex[:12]}")
        self._jobs = Jobs(config.address, say)
        self._job_id: str | None = None
        self._attempts = 0
        self._orders = 0
        self._closed = threading.Event()

    def embed(
        self, units: Sequence[EmbedUnit], generation_uri: str, on_unit: Callable[[EmbeddedUnit], None]
    ) -> list[EmbeddedUnit]:
        """Embed every unit, and return the results in their order; `on_unit` runs as soon as a unit is complete.

        Raises:
            EmbeddingFailedError: the encoder raised, or returned vectors that cannot be stored.
            JobFailedError: the job died more often than `cluster.max_failures`, or the deadline passed.
        """
        check_units(units)
        results: dict[str, EmbeddedUnit] = {}
        deadline = time.monotonic() + 3600 * self._config.deadline_hours
        try:
            while left := [unit for unit in units if unit.unit_id not in results]:
                self._ensure()
                for result in self._carry_out(left, generation_uri, deadline):
                    results[result.unit_id] = result
                    on_unit(result)
        except BaseException:
            self.close()
            raise
        return [results[unit.unit_id] for unit in units]

    def close(self) -> None:
        """Let the job end, and its workers with it."""
        if self._job_id is not None and not self._closed.is_set():
            self._closed.set()
            with suppress(Exception):
                write_json(join(self._location, _END), {})
            self._jobs.stop(self._job_id)

    def _ensure(self) -> None:
        """Submit the job unless one is there."""
        if self._job_id is None:
            _sign(self._location)
            threading.Thread(target=self._give_signs, daemon=True, name="embedding-job").start()
        if self._job_id is None or self._jobs.status(self._job_id).is_terminal():
            config = self._config
            specification = {
                "num_workers": config.embed_workers, "gpus_per_worker": config.embed_gpus_per_worker,
                "resources": config.embed_resources, "labels": config.embed_labels,
                "deadline_s": 3600 * config.deadline_hours, "first_order": self._orders + 1,
            }  # fmt: skip
            write_json(join(self._location, "specification.json"), specification)
            self._attempts += 1
            name = f"graceful-{self._location.rpartition('/')[2]}-{self._attempts}"
            self._job_id = self._jobs.submit(name, "embed", self._location)

    def _carry_out(self, units: Sequence[EmbedUnit], generation_uri: str, deadline: float) -> Any:
        """Give an order, and yield its units as they are complete, until it ends or the job does."""
        assert self._job_id is not None
        self._orders += 1
        number = f"{self._orders:04d}"
        order = {"generation_uri": generation_uri, "units": [_described(unit) for unit in units]}
        write_json(join(self._location, "orders", f"{number}.json"), order)
        done = join(self._location, "done", number)
        seen: set[str] = set()
        expected = {_file_of(place) for place in range(len(units))}
        for poll in range(1_000_000_000):
            # The job's state first: what it wrote before it ended is read after.
            ended = poll % _POLLS_BETWEEN_QUESTIONS == 0 and self._jobs.status(self._job_id).is_terminal()
            there = {place.rpartition("/")[2] for place in list_files(done)}  # some under names of files being written
            for file in sorted(there & expected - seen):
                seen.add(file)
                yield _result(read_json(join(done, file)))
            if _FAILED in there:
                raise EmbeddingFailedError(str(read_json(join(done, _FAILED))["message"]))
            if len(seen) == len(units):
                return
            if ended:
                if self._attempts > self._config.max_failures:
                    raise JobFailedError(f"{self._jobs.epitaph(self._job_id)}; {len(units) - len(seen)} units are left")
                return
            if time.monotonic() > deadline:
                raise JobFailedError(f"waiting for Ray job {self._job_id}: not done in time; run again to go on")
            self._jobs.follow(self._job_id, self._location)
            time.sleep(_POLL_S)

    def _give_signs(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_SIGNS):
            with suppress(Exception):  # a store that does not answer now may answer in time
                _sign(self._location)


def carry_out_orders(location: str) -> dict[str, Any]:
    """Be the job: embed order after order until the giver says that it is enough, or has gone."""
    from graceful.training.encoder import open_encoder

    wanted = read_json(join(location, "specification.json"))
    opener = functools.cache(lambda uri: functools.partial(open_encoder, uri))
    heard, sign, order = time.monotonic(), None, int(wanted["first_order"])
    with EmbeddingPool(
        wanted["num_workers"],
        gpus_per_worker=wanted["gpus_per_worker"],
        resources=wanted["resources"],
        labels=wanted["labels"],
    ) as pool:
        while not exists(join(location, _END)):
            with suppress(OSError):
                newest = read_json(join(location, "alive.json"))["at"]
                if newest != sign:
                    sign, heard = newest, time.monotonic()
            if time.monotonic() - heard > ABANDONED_AFTER_S:
                break
            place = join(location, "orders", f"{order:04d}.json")
            if not exists(place):
                time.sleep(_POLL_S)
                continue
            _carry_out(read_json(place), join(location, "done", f"{order:04d}"), pool, opener, wanted["deadline_s"])
            order += 1
            heard = time.monotonic()
    return {"orders": order - int(wanted["first_order"])}


def _carry_out(
    order: Mapping[str, Any], done: str, pool: EmbeddingPool, opener: Callable[[str], Any], deadline_s: float
) -> None:
    units = [EmbedUnit(**{**unit, "sources": tuple(unit["sources"])}) for unit in order["units"]]
    numbers = {unit.unit_id: number for number, unit in enumerate(units)}

    def on_unit(result: EmbeddedUnit) -> None:
        write_json(join(done, _file_of(numbers[result.unit_id])), vars(result))

    try:
        pool.embed(units, opener(order["generation_uri"]), deadline_s=deadline_s, on_unit=on_unit)
    except GracefulError as error:
        write_json(join(done, _FAILED), {"message": str(error)})


def _file_of(number: int) -> str:
    return f"{number:06d}.json"


def _sign(location: str) -> None:
    write_json(join(location, "alive.json"), {"at": time.time()})


def _described(unit: EmbedUnit) -> dict[str, Any]:
    keys = unit.keys.to_pydict() if isinstance(unit.keys, pa.Table) else unit.keys
    return {
        "unit_id": unit.unit_id, "sources": list(unit.sources), "path": unit.path,
        "keys": {name: list(values) for name, values in keys.items()},
    }  # fmt: skip


def _result(found: Mapping[str, Any]) -> EmbeddedUnit:
    return EmbeddedUnit(**{**found, "failures": tuple(map(tuple, found["failures"]))})
