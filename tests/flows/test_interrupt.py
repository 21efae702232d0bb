"""Ctrl-C and SIGTERM end a command within seconds: one line, an exit code, no process left; the work goes on later."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows import tiny


def processes_of(session: int) -> list[str]:
    """Command lines of the live processes of a session, and of those that carry its mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if stat[0] != "Z" and (int(stat[3]) == session or f"GRACEFUL_TEST_MARK={session}".encode() in environment):
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("sign", "code", "workers"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1)])
def test_interrupted_training_ends_within_seconds_and_leaves_no_process(
    workspace_root, digits_file, command_environment, tmp_path, sign, code, workers
):
    long = {**tiny.grown(5), "training.epochs": 50_000, "cluster.num_workers": workers, "cluster.object_store_mib": 80}
    tiny.write_config(workspace_root, digits_file, long)
    mark = str(os.getpid() * 1_000 + code)
    environment = {**command_environment, "GRACEFUL_TEST_MARK": mark}
    del environment["PREFECT_HOME"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "graceful.flows.cli", "update", "--root", str(workspace_root)],
            cwd=tiny.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not list(workspace_root.glob("runs/g002-*/metrics.jsonl")):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        started = time.monotonic()
        os.killpg(process.pid, sign)  # what a terminal sends: to the whole group
        assert process.wait(60) == code, log.read_text()[-2000:]
        took = time.monotonic() - started
        text = log.read_text()
        assert took < 10, f"{took:.1f} s"
        assert text.splitlines()[-1] == "interrupted; run the same command again to go on"
        assert "Traceback" not in text
        assert "***" not in text, "a library's own stack trace"
        end = time.monotonic() + 30
        while (left := processes_of(int(mark))) and time.monotonic() < end:
            time.sleep(0.5)
        assert left == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    with sqlite3.connect(workspace_root / ".prefect" / "prefect.db") as database:
        ((marked,),) = database.execute("select state_type from flow_run")
    assert marked in ("CRASHED", "CANCELLED")
    state = json.loads(tiny.graceful("status", "--root", str(workspace_root), "--json", env=environment).stdout)
    assert state["champion"] is not None
