"""An update killed anywhere and run again ends where one ends that was never killed: real processes, real kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graceful.files import CRASH_EXIT_CODE
from graceful.flows.store.workspace import Workspace
from tests.flows import tiny
from tests.flows.run_steps import FINISHED, REPEATED, in_child

pytestmark = pytest.mark.timeout(400)

CRASH_POINTS = [
    "evaluation-written", "decided", "certified", "plan-saved", "before-serving-moves", "after-serving-moved",
    "vectors-before-commit", "vectors-after-commit", "wave-done",
]  # fmt: skip


def run(spawn, root: Path, crash_at: str = "", environment: dict[str, str] | None = None) -> int:
    log = root.parent / f"{root.name}.log"
    process = spawn(in_child, str(root), crash_at, str(log), environment)
    process.join(200)
    assert process.exitcode is not None, "the update hangs"
    if process.exitcode not in (FINISHED, REPEATED, CRASH_EXIT_CODE, -signal.SIGKILL):
        pytest.fail(log.read_text()[-3000:])
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(spawn, bootstrapped, tmp_path_factory):
    """End state of the second update when nobody kills it."""
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("uninterrupted") / "workspace")
    assert run(spawn, root) == FINISHED
    return tiny.end_state(root)


def test_the_update_that_is_killed_in_these_tests_does_all_there_is_to_do(uninterrupted):
    assert uninterrupted["decision"]["outcome"] == "COMPATIBLE_ROLLOUT"
    first, second = uninterrupted["generations"]
    assert (uninterrupted["champion"], uninterrupted["previous"]) == (second, first)
    assert (second, first) in uninterrupted["certificates"]
    assert uninterrupted["active_plan"] is None
    assert len(uninterrupted["view"]) == 100


@pytest.mark.slow
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_killed_update_ends_as_if_it_had_not_been_killed(spawn, uninterrupted, bootstrapped, tmp_path, point):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    before = tiny.end_state(root)
    assert run(spawn, root, point) == CRASH_EXIT_CODE
    if CRASH_POINTS.index(point) < CRASH_POINTS.index("after-serving-moved"):
        half_way = Workspace(str(root), None).registry.serving()
        assert half_way.champion == before["champion"], "the serving state moved too early"
    assert run(spawn, root) == FINISHED
    assert tiny.end_state(root) == uninterrupted


@pytest.mark.slow
def test_update_killed_at_every_point_in_turn_still_ends(spawn, uninterrupted, workspace_root):
    """Each attempt dies at the next point, again and again, as on a machine that keeps failing."""
    for point in CRASH_POINTS:
        assert run(spawn, workspace_root, point) in (CRASH_EXIT_CODE, FINISHED, REPEATED)
    assert run(spawn, workspace_root) in (FINISHED, REPEATED)
    assert tiny.end_state(workspace_root) == uninterrupted


@pytest.mark.slow
def test_update_killed_while_it_trains_goes_on_from_its_checkpoint(spawn, digits_file, bootstrapped, tmp_path):
    """A real SIGKILL between the second and the last epoch."""
    longer = {**tiny.grown(5), "training.epochs": 12}
    quiet = tiny.copy_workspace(bootstrapped, tmp_path / "quiet")
    killed = tiny.copy_workspace(bootstrapped, tmp_path / "killed")
    for root in (quiet, killed):
        tiny.write_config(root, digits_file, longer)
    assert run(spawn, quiet) == FINISHED
    process = spawn(in_child, str(killed), "", str(tmp_path / "log"))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.is_alive():
        trails = [file for file in killed.glob("runs/g002-*/metrics.jsonl") if file.read_text().count("\n") >= 2]
        if trails:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    trail = killed / "runs" / trails[0].parent.name
    assert not (trail / "result.json").exists(), "it was killed too late to prove anything"
    done = trails[0].read_text().splitlines()
    assert run(spawn, killed) == FINISHED
    assert trails[0].read_text().splitlines()[: len(done)] == done, "epochs were trained again"
    assert tiny.end_state(killed) == tiny.end_state(quiet)


def test_finished_update_run_again_does_nothing(spawn, bootstrapped, tmp_path, digits_file):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    tiny.write_config(root, digits_file)
    before = tiny.end_state(root)
    written = {file: file.stat().st_mtime_ns for file in (root / "gallery").rglob("*") if file.is_file()}
    assert run(spawn, root) == REPEATED
    assert tiny.end_state(root) == before
    assert {file: file.stat().st_mtime_ns for file in (root / "gallery").rglob("*") if file.is_file()} == written


@pytest.mark.slow
def test_command_killed_after_the_decision_carries_the_same_decision_out(
    uninterrupted, workspace_root, command_environment
):
    """The real command line with its flow server: dies between decision and action, then acts on the recorded one."""
    arguments = ("update", "--root", str(workspace_root), "--json")
    killed = tiny.graceful(*arguments, env={**command_environment, "GRACEFUL_CRASH_POINT": "decided"})
    assert killed.returncode == CRASH_EXIT_CODE, killed.stderr
    resumed = tiny.graceful(*arguments, env=command_environment)
    assert resumed.returncode == 0, resumed.stderr
    document = json.loads(resumed.stdout)
    assert (document["outcome"], document["repeated"]) == ("COMPATIBLE_ROLLOUT", False)
    assert tiny.end_state(workspace_root) == uninterrupted
    again = tiny.graceful(*arguments, env=command_environment)
    assert json.loads(again.stdout) == {**document, "repeated": True, "rows_reindexed": 0}
    assert tiny.end_state(workspace_root) == uninterrupted


@pytest.mark.slow
def test_reindex_on_ray_killed_in_a_wave_goes_on_where_it_stopped(
    uninterrupted, bootstrapped, tmp_path, digits_file, command_environment
):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    on_ray = {
        **tiny.grown(5),
        "cluster.embed_workers": 1,
        "cluster.in_process_below": 0,
        "cluster.object_store_mib": 80,
    }
    tiny.write_config(root, digits_file, on_ray)
    program = f"from tests.flows.run_steps import in_child; in_child({str(root)!r})"

    def start(crash_at: str) -> subprocess.CompletedProcess[str]:
        environment = {**command_environment, "GRACEFUL_CRASH_POINT": crash_at}
        with (tmp_path / "output").open("w+") as output:
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=tiny.ROOT, env=environment, stdout=output, stderr=output,
                timeout=250, check=False,
            )  # fmt: skip
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read())

    killed = start("vectors-after-commit")
    assert killed.returncode == CRASH_EXIT_CODE, killed.stdout[-2000:]
    finished = start("")
    assert finished.returncode == FINISHED, finished.stdout[-2000:]
    assert tiny.end_state(root) == uninterrupted
