"""An update by the real command on Ray clusters of several raylets, joined with `auto`: it loses nodes, and the head.

What is left equals what an update leaves that ran undisturbed and without Ray.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mortal_world import MARK, Raylets, kill, living
from graceful.flows.runtime import head
from graceful.processes import descendants, process_start
from tests.flows import running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

EPOCHS = 40
HEAD_SILENT_S = 6.0
EMBEDDING, WAVE = "s  embed evaluation set with g002", "s  re-index"
ON_RAY = {"cluster": {"num_workers": 1, "embed_workers": 1, "in_process_below": 0, "address": "auto"}}
LONGER = {**tiny.grown(5), "training.epochs": EPOCHS}
Spawn = Callable[..., BaseProcess]


@pytest.fixture(autouse=True)
def quiet_and_quick_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes of a cluster need from the environment of who starts them.

    A lost node is noticed after 2 s instead of 15, and Ray Train looks more often.
    """
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def undisturbed(bootstrapped: Path, digits_file: Path, spawn: Spawn, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an update leaves that nothing happened to."""
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("undisturbed") / "ws")
    tiny.write_config(root, digits_file, LONGER)
    process = spawn(running.update_in_child, str(root), "")
    process.join(200)
    assert process.exitcode == 0
    return tiny.end_state(root)


class Update:
    """The command in a process of its own, joining a cluster."""

    def __init__(self, root: Path, spawn: Spawn, environment: dict[str, str]) -> None:
        self.root, self.log = root, root.parent / "log"
        self.process = spawn(impatient_update, str(root), str(self.log), environment)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def epochs(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.root.glob("runs/g002-*/metrics.jsonl"))

    def until(self, condition: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.is_alive(), self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)
        return found

    def ends(self, seconds: float) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


def impatient_update(root: str, log: str, environment: Mapping[str, str]) -> None:
    """Entry point of a child process: `graceful update`, which waits for a silent head not quite so long."""
    head.SECONDS_OF_SILENCE = HEAD_SILENT_S
    running.command_in_child(["update", "--root", root], "", log, environment)


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[Raylets]:
    """A head and nodes."""
    started = Raylets(num_nodes)
    try:
        yield started
    finally:
        started.end()


def test_an_update_that_loses_three_nodes_and_the_head_ends_as_one_that_nothing_happened_to(
    bootstrapped: Path, digits_file: Path, tmp_path: Path, spawn: Spawn, flow_server: dict[str, str], undisturbed: Any
) -> None:
    root = tiny.copy_workspace(bootstrapped, tmp_path / "ws")
    tiny.write_config(root, digits_file, {**LONGER, **ON_RAY})
    environment = {**flow_server, MARK: str(tmp_path)}
    with cluster_of(2) as cluster:
        update = Update(root, spawn, {**environment, **cluster.environment})
        update.until(lambda: update.epochs() > 2)
        lose(cluster, "RayTrainWorker", update)
        assert update.epochs() < EPOCHS
        update.until(lambda: EMBEDDING in update.said())
        kill(cluster.head())  # the next worker cannot start without it
        ends_in_time_with_one_line(update)
    runs = running.ask_server(flow_server["PREFECT_API_URL"], "POST", "/flow_runs/filter", {"limit": 200})
    (run,) = [run for run in runs if run["parameters"].get("workspace") == str(root)]
    assert run["state_type"] in ("CRASHED", "FAILED")
    deadline = time.monotonic() + 30
    while (left := living(f"{MARK}={tmp_path}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    with cluster_of(3) as another:
        update = Update(root, spawn, {**environment, **another.environment})
        update.until(lambda: update.said().count(EMBEDDING) == 2)
        lose(another, "_Worker", update)
        update.until(lambda: WAVE in update.said())
        lose(another, "_Worker", update)
        assert update.ends(240) == 0, update.said()[-3000:]
    assert "Raylet is terminated" not in update.said(), "what Ray prints is in a log of its own"
    assert tiny.end_state(root) == undisturbed


def lose(cluster: Raylets, worker: str, update: Update) -> None:
    """Lose the node of a worker; its worker ends with it."""
    raylet = update.until(lambda: cluster.raylet_of(worker))
    workers = descendants(raylet.pid)
    cluster.lose(raylet)
    update.until(lambda: not any(map(process_start, workers)), 20)


def ends_in_time_with_one_line(update: Update) -> None:
    """It says that the head has gone, and not Ray, which takes a minute."""
    bound = HEAD_SILENT_S + head._SECONDS_TO_HEAR + head._SECONDS_TO_END + 15
    killed = time.monotonic()
    assert update.ends(bound) not in (None, 0), update.said()[-3000:]
    assert time.monotonic() - killed < bound
    (line,) = [line for line in update.said().splitlines() if line.startswith("graceful: ")]
    assert "run the same command again to go on" in line
    assert "Failed to connect to GCS within 60 seconds" not in update.said(), "Ray did not end it"
