"""Ray Train for real: two workers, refusals, a killed worker, a killed driver."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graceful.files import join
from graceful.training.encoder import open_encoder
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import ClusterNotStartedError, run_training
from graceful.training.manifest import LabelledImages
from graceful.training.progress import TrailReporter
from graceful.training.records import ChangedImagesError

MakeJob = Callable[..., TrainingJob]
ROOT = Path(__file__).parents[2]


def recall_at_1(job: TrainingJob, generation_id: str, images: LabelledImages) -> float:
    vectors, _ = open_encoder(join(job.output_uri, generation_id))(images.sources)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    return float((images.labels[scores.argmax(axis=1)] == images.labels).mean())


def processes_with(text: str) -> list[int]:
    """Return the living processes whose command line holds `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if text in command and state != "Z":
                found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = parent_of(pid)
        except OSError:
            return False
    return False


def test_workers_without_a_cluster_are_refused(make_job: MakeJob) -> None:
    with pytest.raises(ClusterNotStartedError, match="set num_workers = 0"):
        run_training(make_job(num_workers=2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_together_and_report_progress(make_job: MakeJob, digits: LabelledImages) -> None:
    job = make_job(num_workers=2)
    epochs: list[int] = []
    card = run_training(job, on_progress=lambda line: epochs.append(line["epoch"]))
    assert epochs == [0, 1, 2, 3]
    assert card.training["workers"] == 2
    assert recall_at_1(job, card.generation_id, digits) > 0.7
    assert sorted(path.name for path in (Path(job.storage_uri) / job.name).iterdir()) == [
        "checkpoints.json",
        "metrics.jsonl",
        "result.json",
    ]
    assert run_training(job) == card


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_comes_back_by_name_without_retries(make_job: MakeJob, digits: LabelledImages) -> None:
    broken = LabelledImages(digits.sources, digits.labels, ["0" * 64] * len(digits))
    with pytest.raises(ChangedImagesError, match="write the manifest again"):
        run_training(make_job(images=broken, num_workers=2))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced_and_training_goes_on(make_job: MakeJob, config: TrainingConfig) -> None:
    longer = config.model_copy(update={"epochs": 60})
    job = make_job(num_workers=2, config=longer)
    killed: list[int] = []

    def kill_one(line: dict[str, object]) -> None:
        if not killed and int(str(line["epoch"])) >= 2:
            mine = [pid for pid in processes_with("ray::RayTrainWorker") if descends_from_this_cluster(pid)]
            os.kill(mine[0], signal.SIGKILL)
            killed.append(mine[0])

    card = run_training(job, on_progress=kill_one)
    assert killed
    assert card.training["epochs"] == 60
    lines = TrailReporter(job.storage_uri, job.name).metrics()
    assert [line["epoch"] for line in lines] == list(range(60))


def descends_from_this_cluster(pid: int) -> bool:
    """Say whether a Ray worker belongs to the cluster that this process started, not to a neighbour's."""
    return descends_from(pid, os.getpid())


DRIVER = """
import json, sys
import ray
from graceful.training.job import TrainingJob
from graceful.training.launch import run_training

if __name__ == "__main__":
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False)
    job = TrainingJob.model_validate_json(open(sys.argv[1]).read())
    card = run_training(job, on_progress=lambda line: print("epoch", line["epoch"], flush=True))
    print(card.generation_id, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_leaves_a_training_that_the_next_run_goes_on_with(
    make_job: MakeJob, config: TrainingConfig, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    job = make_job(num_workers=2, config=config.model_copy(update={"epochs": 200}))
    (tmp_path / "job.json").write_text(job.model_dump_json())
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    environment = {**os.environ, **ray_environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "job.json")]
    trail = TrailReporter(job.storage_uri, job.name)

    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        give_up = time.monotonic() + 400
        try:
            while first.poll() is None and len(trail.metrics()) < 3 and time.monotonic() < give_up:
                time.sleep(0.05)
        finally:
            first.kill()
            first.wait()
    assert trail.result() is None, (tmp_path / "first.log").read_text()
    reached = len(trail.metrics())
    assert reached >= 3, (tmp_path / "first.log").read_text()

    shorter = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=450)
    assert shorter.returncode == 0, shorter.stderr
    epochs = [int(line.split()[1]) for line in shorter.stdout.splitlines() if line.startswith("epoch ")]
    assert epochs == list(range(200))  # those of the first run are handed on too
    finished = trail.result()
    assert finished is not None
    assert finished[1].generation_id == shorter.stdout.splitlines()[-1]
