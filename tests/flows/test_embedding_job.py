"""The one embedding job of an update: orders and results as files. The job runs in a thread here, without Ray."""

import contextlib
import functools
import threading
import time
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from ray.job_submission import JobStatus

from graceful.files import list_files
from graceful.flows.runtime import embedding_job
from graceful.flows.runtime.embedding_job import EmbeddingJob, carry_out_orders
from graceful.flows.runtime.jobs import JobFailedError
from graceful.flows.settings.config import ClusterConfig
from graceful.indexing.embed import EmbeddingFailedError, EmbedUnit, embed_units
from graceful.indexing.embedding_files import read_embeddings

pytestmark = pytest.mark.timeout(60)


class DeathError(Exception):
    """The job's process is gone."""


class Pool:
    """Embeds in the job's own thread; dies after so many units, as often as it is told."""

    deaths: ClassVar[list[int]] = []
    embedded: ClassVar[list[str]] = []

    def __init__(self, num_workers, **_wanted):
        self.num_workers = num_workers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def embed(self, units, opener, *, deadline_s, on_unit):
        def count(unit):
            on_unit(unit)
            Pool.embedded.append(unit.unit_id)
            if Pool.deaths:
                Pool.deaths[0] -= 1
                if Pool.deaths[0] == 0:
                    Pool.deaths.pop(0)
                    raise DeathError

        return embed_units(units, opener, deadline_s=deadline_s, on_unit=count)


class Threads:
    """A job server whose jobs are threads."""

    def __init__(self, _address, say):
        self.say, self.jobs = say, []

    def submit(self, name, kind, location):
        assert kind == "embed"

        def run():
            with contextlib.suppress(DeathError):
                carry_out_orders(location)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.jobs.append(thread)
        self.say(name)
        return thread

    def status(self, job):
        return JobStatus.RUNNING if job.is_alive() else JobStatus.FAILED

    def follow(self, job, location):
        pass

    def stop(self, job):
        job.join(20)

    def epitaph(self, _job):
        return "Ray job x ended as FAILED"


def open_encoder(uri):
    if "broken" in uri:
        raise EmbeddingFailedError("embedding: opening the encoder raised")
    return lambda sources: (np.eye(8, dtype=np.float32)[: len(sources)], {})


@pytest.fixture
def job(tmp_path, monkeypatch):
    Pool.deaths, Pool.embedded = [], []
    monkeypatch.setattr(embedding_job, "Jobs", Threads)
    monkeypatch.setattr(embedding_job, "EmbeddingPool", Pool)
    monkeypatch.setattr(embedding_job, "_POLL_S", 0.02)
    monkeypatch.setattr("graceful.training.encoder.open_encoder", open_encoder)
    said = []
    config = ClusterConfig(address="http://127.0.0.1:9", embed_workers=2, max_failures=2)
    made = EmbeddingJob(config, str(tmp_path / "jobs"), said.append)
    made.said = said
    yield made
    made.close()


def units_of(folder, count, first=0):
    return [
        EmbedUnit(f"u{n}", (f"s{n}a", f"s{n}b"), pa.table({"row": [2 * n, 2 * n + 1]}), str(folder / f"{n}.parquet"))
        for n in range(first, first + count)
    ]


def test_orders_of_several_generations_go_to_one_job_and_each_unit_is_handed_on_as_it_comes(job, tmp_path):
    handed = []
    for number, uri in enumerate(["g1", "g2"]):
        units = units_of(tmp_path, 3, 3 * number)
        found = job.embed(units, uri, handed.append)
        assert [unit.unit_id for unit in found] == [unit.unit_id for unit in units]
        assert sorted(unit.unit_id for unit in handed[-3:]) == [unit.unit_id for unit in units]
        keys, vectors = read_embeddings([unit.path for unit in found])
        assert keys["row"].to_pylist() == list(range(6 * number, 6 * number + 6))
        assert vectors.shape == (6, 8)
    assert len(job.said) == 1
    assert job.embed([], "g2", handed.append) == []


def test_a_job_that_dies_is_started_again_for_what_is_left(job, tmp_path):
    Pool.deaths = [2, 1]
    handed = []
    job.embed(units_of(tmp_path, 6), "g1", lambda unit: handed.append(unit.unit_id))
    assert sorted(handed) == [f"u{n}" for n in range(6)], "once each"
    assert sorted(Pool.embedded) == sorted(handed), "nothing was embedded twice"
    assert len(job.said) == 3


def test_a_job_that_dies_too_often_is_given_up_and_what_it_did_was_handed_on(job, tmp_path):
    Pool.deaths = [1, 1, 1, 1]
    handed = []
    with pytest.raises(JobFailedError, match=r"ended as FAILED; 3 units are left"):
        job.embed(units_of(tmp_path, 6), "g1", lambda unit: handed.append(unit.unit_id))
    assert len(handed) == 3


def test_an_encoder_that_cannot_be_opened_is_told_as_it_is_and_ends_the_job(job, tmp_path):
    with pytest.raises(EmbeddingFailedError, match="opening the encoder raised"):
        job.embed(units_of(tmp_path, 1), "broken", lambda _unit: None)
    assert not job._job_id.is_alive()


def test_a_job_whose_giver_has_gone_ends_by_itself(job, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_job, "ABANDONED_AFTER_S", 0.3)
    job.embed(units_of(tmp_path, 1), "g1", lambda _unit: None)
    job._closed.set()  # as a killed process: no sign, and no word that it is enough
    deadline = time.monotonic() + 10
    while job._job_id.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not job._job_id.is_alive()
    assert not [place for place in list_files(str(tmp_path / "jobs")) if place.endswith("end.json")]


def test_an_error_of_whoever_commits_a_unit_ends_the_job(job, tmp_path):
    def refuse(_unit):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        job.embed(units_of(tmp_path, 2), "g1", refuse)
    assert not job._job_id.is_alive()


def test_the_job_keeps_one_opener_for_a_generation(monkeypatch, job, tmp_path):
    """By which the workers know that they need not open it again."""
    openers = []
    embed = Pool.embed
    monkeypatch.setattr(
        Pool,
        "embed",
        lambda self, units, opener, **rest: (openers.append(opener), embed(self, units, opener, **rest))[1],
    )
    for first in (0, 1):
        job.embed(units_of(tmp_path, 1, first), "g1", lambda _unit: None)
    assert openers[0] is openers[1]
    assert isinstance(openers[0], functools.partial)
