"""Work submitted to a real Ray head as jobs, and a running cluster that is joined and left running.

The head runs on ports and in a folder of its own, so that it meets no other cluster on this machine. Nothing of this
project is installed where it runs: the code travels in the runtime environment.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray.job_submission import JobStatus
from ray.util import get_node_ip_address

from graceful.flows.runtime import jobs
from graceful.flows.runtime.cluster import runtime_environment
from graceful.flows.runtime.embedding_job import EmbeddingJob
from graceful.flows.runtime.jobs import JobFailedError, Jobs, submit_training
from graceful.flows.settings.config import ClusterConfig
from graceful.indexing.embed import EmbeddedUnit, EmbeddingFailedError, EmbedUnit
from graceful.indexing.embedding_files import read_embeddings
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import Tail, run_training
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.progress import TrailReporter

CODE = Path(__file__).parents[2]
START_S = 180

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]


@dataclass(frozen=True)
class Head:
    """A Ray head that answers."""

    job_server: str
    gcs: str
    folder: str


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def living(text: str) -> list[int]:
    """Living processes whose command line or environment holds a text; ended but not reaped ones do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and text.encode() in told:
                found.append(int(entry.name))
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with its job server; ended with everything that it started."""
    # Ray's sockets lie below this folder, and a socket's path must be short.
    folder = tempfile.mkdtemp(prefix="gr", dir="/tmp")
    try:
        # Ray gives its own processes 30 s to start, which a busy machine can need more than.
        found = start_head(folder) or start_head(folder) or start_head(folder)
        assert found is not None, Path(folder, "head.log").read_text()[-3000:]
        yield found
    finally:
        end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_head(folder: str) -> Head | None:
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {
        # "python" in a job's command is the one that Ray itself runs on.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    options = {
        "port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc, "ray-client-server-port": client, "metrics-export-port": metrics,
        "dashboard-host": "127.0.0.1", "include-dashboard": "true", "num-cpus": 3, "temp-dir": folder,
        "object-store-memory": 100 * 2**20,
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = Path(folder, "head.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if "Ray runtime started" in log.read_text() and answers(f"http://127.0.0.1:{dashboard}/api/version"):
            return Head(f"http://127.0.0.1:{dashboard}", f"{get_node_ip_address()}:{gcs}", folder)
        time.sleep(0.5)
    end_processes(folder)
    process.wait()
    return None


def end_processes(folder: str) -> None:
    """End what runs in a folder: kindly at first; by process id, for other clusters may run here."""
    for sign, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        for pid in living(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + seconds
        while living(folder) and time.monotonic() < deadline:
            time.sleep(0.5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    path = tmp_path_factory.mktemp("data") / "digits.parquet"
    return load_images(DatasetConfig(source="digits", path=str(path), where={"instance": {"max": 19}}))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the storage that all nodes see."""
    return tmp_path_factory.mktemp("shared")


def training_job(shared: Path) -> TrainingJob:
    config = TrainingConfig(
        backbone=BackboneSpec(name="small_cnn", kwargs={"block_widths": [8, 16]}),
        width=16,
        preprocessing=Preprocessing(image_size=8, channels=1, mean=(0.3,), std=(0.37,)),
        epochs=1,
        batch_size=64,
    )
    return TrainingJob(
        config=config,
        name="tiny",
        manifest_uri=str(shared / "manifest.parquet"),
        output_uri=str(shared / "generations"),
        ordinal=1,
        storage_uri=str(shared / "runs"),
        num_workers=1,
    )


def test_a_failed_job_tells_its_reason_and_the_same_order_trains_once_repaired(
    head: Head, shared: Path, digits: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACEFUL_SOMETHING", "travels with the job")
    config = ClusterConfig(address=head.job_server, num_workers=1, embed_workers=1, deadline_hours=0.1)
    job, folder = training_job(shared), str(shared / "jobs")
    said: list[str] = []
    with pytest.raises(JobFailedError, match=r"manifest\.parquet"):
        submit_training(config, folder, job, lambda: None, said.append)

    write_manifest(job.manifest_uri, digits)
    epochs: list[int] = []
    tail = Tail(TrailReporter(job.storage_uri, job.name), lambda line: epochs.append(line["epoch"]), None)
    card = submit_training(config, folder, job, tail.advance, said.append)  # the next attempt at the same order
    assert epochs == [0]
    assert card.ordinal == 1
    assert (card.training["workers"], card.training["batch_per_worker"]) == (1, 64)
    assert (shared / "generations" / card.generation_id / "card.json").exists()
    nowhere = ClusterConfig(address="http://127.0.0.1:9", num_workers=1, deadline_hours=0.1)
    # The result is found; no cluster is asked.
    assert submit_training(nowhere, folder, job, tail.advance, said.append) == card

    (log,) = (shared / "jobs").glob("train-*/job.log")
    assert said[-1].endswith(f"its log: {log}")


def test_an_update_embeds_with_one_job_and_what_it_had_done_stays_when_it_dies(
    head: Head, digits: LabelledImages, tmp_path: Path
) -> None:
    config = ClusterConfig(address=head.job_server, num_workers=1, embed_workers=1, deadline_hours=0.2)
    shared, folder = tmp_path, str(tmp_path / "jobs")
    order = training_job(shared).model_copy(update={"num_workers": 0})
    write_manifest(order.manifest_uri, digits)
    uri = str(shared / "generations" / run_training(order).generation_id)
    sources, keys = tuple(digits.sources), {"item_id": list(digits.sources)}
    units = [
        EmbedUnit("mapping", sources[:50], {"item_id": keys["item_id"][:50]}, str(shared / "a.parquet")),
        EmbedUnit("table", (*sources[50:99], "/nowhere.png"), pa.table({"row": range(50)}), str(shared / "b.parquet")),
    ]
    told: list[str] = []
    handed: list[str] = []
    killed: list[int] = []
    job = EmbeddingJob(config, folder, told.append)
    try:
        first, second = job.embed(units, uri, lambda unit: handed.append(unit.unit_id))
        assert (first.num_rows, second.num_rows, second.width) == (50, 49, 16)
        assert [place for place, _ in second.failures] == [49]
        assert sorted(handed) == ["mapping", "table"]
        _, vectors = read_embeddings([first.path])
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert len(told) == 1

        # The next order goes to the same job; it dies at the first unit, and what it had done stays.
        def kill_once(unit: EmbeddedUnit) -> None:
            handed.append(unit.unit_id)
            if len(handed) == 1:
                killed.append(embedding_driver(shared))
                os.kill(killed[-1], signal.SIGKILL)

        handed.clear()
        many = [  # so many that it is in the midst of them when the first one is handed on
            EmbedUnit(f"unit-{n}", (sources[n % len(sources)],), {"row": [n]}, str(shared / f"many-{n}.parquet"))
            for n in range(1500)
        ]
        assert [unit.num_rows for unit in job.embed(many, uri, kill_once)] == [1] * 1500
        assert sorted(handed) == sorted(unit.unit_id for unit in many), "each unit is handed on once"
        assert len(told) == 1 + len(killed) == 2, "one further attempt"
        with pytest.raises(EmbeddingFailedError, match="opening the encoder"):
            job.embed(units[:1], str(shared / "nothing"), lambda _unit: None)
    finally:
        job.close()
    deadline = time.monotonic() + 60
    while embedding_driver(shared) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not embedding_driver(shared)


def embedding_driver(shared: Path) -> int:
    """Process id of the driver of the embedding job, not of the shell around it; 0 where there is none."""
    return next(iter(living(f"job_main\0embed\0{shared}")), 0)


def test_the_runtime_environment_carries_the_four_packages_and_the_stores_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_REGION", "nowhere")
    monkeypatch.setenv("SECRET_OF_SOMETHING_ELSE", "x")
    found = runtime_environment()
    (package,) = map(Path, found["py_modules"])
    assert package.name == "graceful"
    shipped = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    wanted = {"__init__.py", "files.py", "training/launch.py", "indexing/embed.py", "flows/runtime/jobs.py"}
    assert {*wanted, "evaluation/templates/report.html.j2"} <= shipped
    assert found["env_vars"]["AWS_REGION"] == "nowhere"
    assert not [name for name in found["env_vars"] if not name.startswith(("AWS_", "GRACEFUL_"))]


class Client:
    """A job server that answers with what was planted."""

    def __init__(self, *answers: JobStatus | Exception) -> None:
        self.answers, self.stopped = list(answers), []

    def get_job_status(self, job_id: str) -> JobStatus:
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    def stop_job(self, job_id: str) -> None:
        self.stopped.append(job_id)


def jobs_of(client: Client) -> Jobs:
    found = Jobs("http://127.0.0.1:9", lambda _line: None)
    found._asked = client
    return found


def test_a_head_that_is_silent_for_a_while_is_asked_again_and_its_job_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.0)
    client = Client(JobStatus.RUNNING, ConnectionError("refused"), RuntimeError("502"), JobStatus.SUCCEEDED)
    jobs._wait(jobs_of(client), "job", 0.1, lambda: None)
    assert client.stopped == []


def test_a_cancelled_wait_stops_the_job_and_a_silent_head_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.0)
    monkeypatch.setattr(jobs, "_SILENCE_S", 0.05)
    silent = Client(ConnectionError("refused"))
    with pytest.raises(JobFailedError, match="has not answered for"):
        jobs._wait(jobs_of(silent), "job", 0.1, lambda: None)
    assert silent.stopped == [], "the same command finds it again"
    late = Client(JobStatus.RUNNING)
    with pytest.raises(JobFailedError, match="not done after"):
        jobs._wait(jobs_of(late), "job", 0.0, lambda: None)
    assert late.stopped == ["job"]
    cancelled = Client(JobStatus.RUNNING)
    monkeypatch.setattr(cancelled, "get_job_status", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        jobs._wait(jobs_of(cancelled), "job", 0.1, lambda: None)
    assert cancelled.stopped == ["job"]


def raise_interrupt(job_id: str) -> JobStatus:
    raise KeyboardInterrupt


JOIN = """
import os, signal, sys, time
import ray
from graceful.flows.runtime import head
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.preflight import code_digest, prove_nodes
from graceful.flows.settings.config import ClusterConfig

@ray.remote(num_cpus=1)
def where():
    import graceful.flows.runtime.cluster
    return graceful.flows.runtime.cluster.__file__

with RaySession(ClusterConfig(address="auto")) as session:
    session.ensure()
    session.ensure()
    print("worker has", ray.get(where.remote(), timeout=120))
    print("proven", prove_nodes(sys.argv[1], code_digest()))
    print("refused", prove_nodes(sys.argv[1], "another"))
print("left", not ray.is_initialized(), flush=True)
"""


def joined(head: Head, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "RAY_ADDRESS": head.gcs, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(CODE)}
    environment["RAY_TMPDIR"] = head.folder
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment, cwd=head.folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_running_cluster_is_joined_proven_and_left_running(head: Head, tmp_path: Path) -> None:
    ended = joined(head, JOIN, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "left True" in ended.stdout
    # The worker's copy of the code came through the runtime environment, not from this checkout.
    assert "py_modules_files" in ended.stdout, ended.stdout
    lines = dict(line.split(" ", 1) for line in ended.stdout.splitlines())
    assert "'problem': ''" in lines["proven"]
    assert "expected this version of the code (another)" in lines["refused"]
    assert answers(f"{head.job_server}/api/version")
