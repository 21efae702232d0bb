"""Ctrl-C and SIGTERM end a training within seconds: one line, an exit code, no process left; the work goes on later."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from benchmarks.mortal_world import MARK, living
from tests.flows import running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ENDLESS = {**tiny.grown(5), "training.epochs": 50_000, "cluster.object_store_mib": 80}


def until_it_trains(root: Path, log: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(root.glob("runs/g002-*/metrics.jsonl")):
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


def no_process_is_left(mark: str) -> None:
    deadline = time.monotonic() + 30
    while (left := living(f"{MARK}={mark}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left] == []


def is_one_line(text: str) -> None:
    assert text.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in text
    assert "***" not in text, "a library's own stack trace"


def test_ctrl_c_ends_an_update_and_its_flow_server(
    workspace_root: Path, digits_file: Path, command_environment: dict[str, str], tmp_path: Path
) -> None:
    tiny.write_config(workspace_root, digits_file, ENDLESS)
    environment = {**command_environment, MARK: str(tmp_path)}
    del environment["PREFECT_HOME"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "graceful.flows.cli", "update", "--root", str(workspace_root)],
            cwd=tiny.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        until_it_trains(workspace_root, log)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the whole group
        assert process.wait(60) == 130, log.read_text()[-2000:]
        assert time.monotonic() - started < 10
        is_one_line(log.read_text())
        no_process_is_left(str(tmp_path))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    with sqlite3.connect(workspace_root / ".prefect" / "prefect.db") as database:
        ((marked,),) = database.execute("select state_type from flow_run")
    assert marked in ("CRASHED", "CANCELLED")
    assert running.document("status", "--root", workspace_root)["champion"] is not None


def test_sigterm_ends_an_update_and_its_ray_cluster(
    workspace_root: Path,
    digits_file: Path,
    flow_server: dict[str, str],
    tmp_path: Path,
    spawn: Callable[..., BaseProcess],
) -> None:
    tiny.write_config(workspace_root, digits_file, {**ENDLESS, "cluster.num_workers": 1})
    log = tmp_path / "log"
    environment = {**flow_server, "RAY_USAGE_STATS_ENABLED": "0", MARK: str(tmp_path)}
    process = spawn(running.command_in_child, ["update", "--root", str(workspace_root)], "", str(log), environment)
    until_it_trains(workspace_root, log)
    assert living(f"{MARK}={tmp_path}")
    started = time.monotonic()
    process.terminate()
    process.join(60)
    assert process.exitcode == 143, log.read_text()[-2000:]
    assert time.monotonic() - started < 10
    is_one_line(log.read_text())
    no_process_is_left(str(tmp_path))
    runs = running.ask_server(flow_server["PREFECT_API_URL"], "POST", "/flow_runs/filter", {"limit": 200})
    (run,) = [run for run in runs if run["parameters"].get("workspace") == str(workspace_root)]
    assert run["state_type"] in ("CRASHED", "CANCELLED")
    assert running.document("status", "--root", workspace_root)["champion"] is not None
