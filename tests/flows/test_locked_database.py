"""The flow server's database is SQLite and may be locked by others for a while: an update waits, and is recorded."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.flows import running, tiny

LOCKED_S = 8.0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_update_ends_and_is_recorded_as_any_other_where_the_database_was_locked(
    bootstrapped: Path,
    digits_file: Path,
    tmp_path: Path,
    spawn: Callable[..., BaseProcess],
    flow_server: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    (database,) = tmp_path_factory.getbasetemp().glob("server[0-9]*/.prefect/prefect.db")
    states, locked = {}, False
    for name in ("quiet", "locked"):
        root, log = tiny.copy_workspace(bootstrapped, tmp_path / name), tmp_path / f"{name}.log"
        tiny.write_config(root, digits_file, tiny.grown(5))
        process = spawn(running.command_in_child, ["update", "--root", str(root)], "", str(log), flow_server)
        deadline = time.monotonic() + 150
        while name == "locked" and process.is_alive() and not locked:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            locked = log.exists() and "s  train candidate" in log.read_text()
            time.sleep(0.02)
        if locked:
            with closing(sqlite3.connect(database, isolation_level=None, timeout=60)) as other:
                other.execute("BEGIN IMMEDIATE")  # nobody else writes meanwhile
                time.sleep(LOCKED_S)
                assert process.is_alive(), "it was over before"
                other.execute("ROLLBACK")
        process.join(150)
        assert process.exitcode == 0, log.read_text()[-3000:]
        assert "does not answer" not in log.read_text()
        states[name] = tiny.end_state(root)
        runs = running.ask_server(flow_server["PREFECT_API_URL"], "POST", "/flow_runs/filter", {"limit": 200})
        (run,) = [run for run in runs if run["parameters"].get("workspace") == str(root)]
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "COMPATIBLE_ROLLOUT 100 %"), run["state_name"]
    assert locked
    assert states["locked"] == states["quiet"]
