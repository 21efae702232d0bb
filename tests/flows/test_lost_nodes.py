"""Updates by the real command on a Ray cluster of several raylets, joined with `auto`: nodes are killed, and the head.

What is left equals what an update leaves that ran undisturbed and without Ray.
"""

import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mortal_world import MARK, Raylets, kill, living
from graceful.flows.runtime import head
from tests.flows import running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

EPOCHS = 40
ON_RAY = {"cluster": {"num_workers": 1, "embed_workers": 1, "in_process_below": 0, "address": "auto"}}
LONGER = {**tiny.grown(5), "training.epochs": EPOCHS}
Spawn = Callable[..., BaseProcess]


@pytest.fixture(autouse=True)
def quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes of a cluster need from the environment of who starts them."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}.items():
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
        self.process = spawn(running.command_in_child, ["update", "--root", str(root)], "", str(self.log), environment)

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


@pytest.fixture
def cluster() -> Iterator[Raylets]:
    """A head and four nodes."""
    started = Raylets(4)
    try:
        yield started
    finally:
        started.end()


def test_nodes_lost_in_training_embedding_and_a_wave_change_nothing(
    bootstrapped: Path,
    digits_file: Path,
    tmp_path: Path,
    spawn: Spawn,
    flow_server: dict[str, str],
    undisturbed: Any,
    cluster: Raylets,
) -> None:
    root = tiny.copy_workspace(bootstrapped, tmp_path / "ws")
    tiny.write_config(root, digits_file, {**LONGER, **ON_RAY})
    update = Update(root, spawn, {**flow_server, **cluster.environment})
    lost = []
    for begun, worker in (
        (lambda: update.epochs() > 2, "RayTrainWorker"),
        (lambda: "s  embed evaluation set with g002" in update.said(), "_Worker"),
        (lambda: "s  re-index" in update.said(), "_Worker"),
    ):
        update.until(begun)
        raylet = update.until(lambda worker=worker: cluster.raylet_of(worker))  # type: ignore[misc]
        kill(raylet)
        lost.append(raylet)
    assert update.ends(240) == 0, update.said()[-3000:]
    assert len(set(lost)) == 3
    assert tiny.end_state(root) == undisturbed


def test_an_update_whose_head_is_killed_ends_in_time_and_goes_on_with_another(
    bootstrapped: Path, digits_file: Path, tmp_path: Path, spawn: Spawn, flow_server: dict[str, str], undisturbed: Any
) -> None:
    root = tiny.copy_workspace(bootstrapped, tmp_path / "ws")
    tiny.write_config(root, digits_file, {**LONGER, **ON_RAY})
    mark = {MARK: str(tmp_path)}
    cluster = Raylets(2)
    try:
        update = Update(root, spawn, {**flow_server, **cluster.environment, **mark})
        update.until(lambda: update.epochs() > 2)
        kill(cluster.head())
        killed = time.monotonic()
        bound = head.SECONDS_OF_SILENCE + head._SECONDS_TO_HEAR + head._SECONDS_TO_END
        assert update.ends(bound + 15) not in (None, 0), update.said()[-3000:]
        assert time.monotonic() - killed < bound + 15
        (line,) = [line for line in update.said().splitlines() if line.startswith("graceful: ")]
        assert "run the same command again to go on" in line
        assert "Failed to connect to GCS within 60 seconds" not in update.said(), "Ray did not end it"
        runs = running.ask_server(flow_server["PREFECT_API_URL"], "POST", "/flow_runs/filter", {"limit": 200})
        (run,) = [run for run in runs if run["parameters"].get("workspace") == str(root)]
        assert run["state_type"] in ("CRASHED", "FAILED")
        deadline = time.monotonic() + 30
        while (left := living(f"{MARK}={tmp_path}", "head_watch")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        cluster.end()
    another = Raylets(2)
    try:
        update = Update(root, spawn, {**flow_server, **another.environment, **mark})
        assert update.ends(240) == 0, update.said()[-3000:]
    finally:
        another.end()
    assert tiny.end_state(root) == undisturbed
