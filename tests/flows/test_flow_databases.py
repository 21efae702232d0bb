"""The flow server's database: SQLite that others lock for a while, where an update waits; and PostgreSQL."""

import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from graceful.flows.runtime import server
from tests.flows import running, tiny
from tests.flows.test_service import free_port

LOCKED_S = 8.0
PROGRAMS = Path(shutil.which("pg_ctl") or "nowhere").resolve().parent


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


@pytest.fixture
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL server of its own; it does not run as root."""
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("no PostgreSQL here; apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    folder = tempfile.mkdtemp(prefix="graceful-pg-")
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(PROGRAMS / program), "-D", f"{folder}/data", *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, timeout=120, stdout=subprocess.DEVNULL)

    port = free_port()
    try:
        call("initdb", "-U", "graceful", "-A", "trust")
        call("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
        yield f"postgresql+asyncpg://graceful@127.0.0.1:{port}/postgres"
    finally:
        if Path(folder, "data", "postmaster.pid").exists():
            call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_update_is_recorded_in_postgresql(
    bootstrapped: Path,
    digits_file: Path,
    tmp_path: Path,
    spawn: Callable[..., BaseProcess],
    postgres: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, log = tiny.copy_workspace(bootstrapped, tmp_path / "ws"), tmp_path / "log"
    tiny.write_config(root, digits_file, tiny.grown(5))
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", postgres)
    with server.flow_server(str(root)) as api:
        process = spawn(
            running.command_in_child, ["update", "--root", str(root)], "", str(log), {"PREFECT_API_URL": api}
        )
        process.join(200)
        assert process.exitcode == 0, log.read_text()[-3000:]
        (run,) = running.ask_server(api, "POST", "/flow_runs/filter", {})
        assert (run["state_type"], run["parameters"]["workspace"]) == ("COMPLETED", str(root))
    assert not list(root.rglob("prefect.db"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_server_of_a_workspace_in_an_object_store_has_its_database_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with server.flow_server("s3://graceful/workspace"):
        assert (tmp_path / "home" / ".prefect" / "prefect.db").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
