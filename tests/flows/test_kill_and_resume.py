"""An update killed anywhere and run again ends where one ends that was never killed.

The real command is killed at every point in turn. That a single kill anywhere does no harm either is tried on copies of
the workspace, made at each point of one update: what is on disk there is what a kill leaves.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graceful.files import CRASH_EXIT_CODE
from graceful.flows.runtime.session import open_session
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import order
from tests.flows import running, tiny
from tests.flows.running import DONE

pytestmark = pytest.mark.timeout(400)

STEPS = [
    "freeze inputs", "extend cache of {champion}", "train candidate", "embed evaluation set with {champion}",
    "embed evaluation set with {candidate}", "judge", "publish the decision", "embed before the move",
    "move serving state", "re-index", "conclude", "publish", "collect",
]  # fmt: skip
INSIDE = [
    "look-taken", "evaluation-written", "decided", "certified", "protected", "plan-saved", "before-serving-moves",
    "after-serving-moved", "vectors-before-commit", "vectors-after-commit", "wave-done",
]  # fmt: skip
MOVED = (
    "after-serving-moved",
    "after move serving state",
    "after re-index",
    "after conclude",
    "after publish",
    "after collect",
)


@pytest.fixture(scope="module")
def run(spawn, flow_server, tmp_path_factory):
    """Be `graceful update` in a process of its own, to its end or to a crash point; gives the exit code."""
    logs = tmp_path_factory.mktemp("logs")

    def run(root: Path, crash_at: str = "") -> int:
        log = logs / f"{len(list(logs.iterdir()))}.log"
        process = spawn(running.command_in_child, ["update", "--root", str(root)], crash_at, str(log), flow_server)
        process.join(200)
        assert process.exitcode is not None, "the update hangs"
        if process.exitcode not in (DONE, CRASH_EXIT_CODE, -signal.SIGKILL):
            pytest.fail(log.read_text()[-3000:])
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def uninterrupted(run, bootstrapped, tmp_path_factory):
    """End state of the second update when nobody kills it."""
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("uninterrupted") / "workspace")
    assert run(root) == DONE
    return tiny.end_state(root)


def test_the_update_that_is_killed_in_these_tests_does_all_there_is_to_do(uninterrupted):
    assert uninterrupted["decision"]["outcome"] == "COMPATIBLE_ROLLOUT"
    first, second = uninterrupted["generations"]
    assert (uninterrupted["champion"], uninterrupted["previous"]) == (second, first)
    assert (second, first) in uninterrupted["certificates"]
    assert uninterrupted["active_plan"] is None
    assert len(uninterrupted["view"]) == 100


def test_the_steps_of_an_update_are_these_and_in_this_order(workspace_root):
    """So that a step that is added is killed, too."""
    done = []

    def step(name, act):
        done.append(name)
        return act()

    with open_session(str(workspace_root), tiny.open_config(workspace_root)) as session:
        result = order.update(session, step=step)
        champion = session.workspace.registry.serving().previous
    assert done == [name.format(champion=champion, candidate=result.candidate) for name in STEPS]


def crash_points(uninterrupted):
    champion, candidate = uninterrupted["generations"]
    return [f"after {name.format(champion=champion, candidate=candidate)}" for name in STEPS]


@pytest.fixture(scope="module")
def resume(spawn, tmp_path_factory):
    """Run an update in a process of its own, without a flow server."""
    log = tmp_path_factory.mktemp("resumed") / "log"

    def resume(root: Path, copies: str = "") -> None:
        process = spawn(running.update_in_child, str(root), str(log), copies)
        process.join(200)
        assert process.exitcode == DONE, log.read_text()[-3000:]

    return resume


@pytest.fixture(scope="module")
def killed_at(resume, bootstrapped, tmp_path_factory):
    """The folder with what a kill at each crash point of an update would leave."""
    folder = tmp_path_factory.mktemp("killed")
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("whole") / "workspace")
    resume(root, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("point", [f"after {name}" for name in STEPS] + INSIDE)
def test_killed_update_ends_as_if_it_had_not_been_killed(resume, killed_at, uninterrupted, bootstrapped, point):
    champion, candidate = uninterrupted["generations"]
    point = point.format(champion=champion, candidate=candidate)
    root = killed_at / point
    if not root.exists():
        pytest.skip("this update decided to re-embed nothing: there was no wave to be killed in")
    half_way = Workspace(str(root)).registry.serving()
    if point not in MOVED and point != "wave-done" and not point.startswith("vectors"):
        assert half_way.champion == tiny.end_state(bootstrapped)["champion"], "the serving state moved too early"
    if point in ("after publish the decision", "after embed before the move", "wave-done"):
        assert list(root.glob("evaluations/*/report.html")), "the report of a killed re-index is not there"
    resume(root)
    assert tiny.end_state(root) == uninterrupted


@pytest.mark.slow
def test_update_killed_at_every_point_in_turn_still_ends(run, uninterrupted, workspace_root):
    """Each attempt dies at the next point, again and again, as on a machine that keeps failing."""
    for point in (*crash_points(uninterrupted), *INSIDE):
        assert run(workspace_root, point) in (CRASH_EXIT_CODE, DONE)
    assert run(workspace_root) == DONE
    assert tiny.end_state(workspace_root) == uninterrupted


@pytest.mark.slow
def test_update_killed_while_it_trains_goes_on_from_its_checkpoint(
    run, spawn, flow_server, digits_file, bootstrapped, tmp_path
):
    """A real SIGKILL between the second and the last epoch."""
    longer = {**tiny.grown(5), "training.epochs": 12}
    quiet = tiny.copy_workspace(bootstrapped, tmp_path / "quiet")
    killed = tiny.copy_workspace(bootstrapped, tmp_path / "killed")
    for root in (quiet, killed):
        tiny.write_config(root, digits_file, longer)
    assert run(quiet) == DONE
    command = ["update", "--root", str(killed)]
    process = spawn(running.command_in_child, command, "", str(tmp_path / "log"), flow_server)
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
    assert run(killed) == DONE
    *kept, _ = done  # the last epoch may be written down while its checkpoint is not yet there
    assert kept
    assert trails[0].read_text().splitlines()[: len(kept)] == kept, "epochs were trained again"
    assert tiny.end_state(killed) == tiny.end_state(quiet)


def test_finished_update_run_again_does_nothing(run, bootstrapped, tmp_path, digits_file):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    tiny.write_config(root, digits_file)
    before = tiny.end_state(root)
    written = {file: file.stat().st_mtime_ns for file in (root / "gallery").rglob("*") if file.is_file()}
    assert run(root) == DONE
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
    run, uninterrupted, bootstrapped, tmp_path, digits_file, command_environment, flow_server
):
    """It goes on without Ray: what a worker had embedded is committed, whoever embeds the rest."""
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    on_ray = {
        **tiny.grown(5),
        "cluster.embed_workers": 1,
        "cluster.in_process_below": 0,
        "cluster.object_store_mib": 80,
    }
    tiny.write_config(root, digits_file, on_ray)

    command = [sys.executable, "-m", "graceful.flows.cli", "update", "--root", str(root)]
    environment = {**command_environment, **flow_server, "GRACEFUL_CRASH_POINT": "vectors-after-commit"}
    with (tmp_path / "output").open("w") as output:
        killed = subprocess.run(
            command, cwd=tiny.ROOT, env=environment, stdout=output, stderr=output, timeout=250, check=False
        )
    assert killed.returncode == CRASH_EXIT_CODE, (tmp_path / "output").read_text()[-2000:]
    tiny.write_config(root, digits_file, tiny.grown(5))
    assert run(root) == DONE
    assert tiny.end_state(root) == uninterrupted
