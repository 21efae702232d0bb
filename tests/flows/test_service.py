"""`graceful serve` as a process of its own: cron runs, triggered runs, one update at a time, and a clean end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from graceful.flows.runtime.environment import prepare_environment, process_start, running_server
from tests.flows import tiny

CODE = Path(__file__).parents[2]
SCHEDULE = {"cron": "5 * * * *", "timezone": "Asia/Kathmandu"}
SLOW_EPOCHS = 3_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's variables without those that lead Prefect elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "1"}


def graceful(*arguments: str, timeout_s: float = 200) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "graceful.flows.cli", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)


def living(text: str) -> list[str]:
    """Command lines of the living processes that hold a text; ended ones that were not reaped do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            variables = (entry / "environ").read_bytes().decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and (text in command or text in variables):
            found.append(command)
    return found


def until(condition: Callable[[], Any], seconds: float, why: Callable[[], str]) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s; {why()}"
        time.sleep(0.2)
    return found


@dataclass
class Service:
    """A running `graceful serve`."""

    root: Path
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers.

        SQLite refuses about one write in twenty while others write; the server then says 503, and Prefect's own
        clients ask again.
        """

        def answer() -> httpx.Response | None:
            found = httpx.request(method, f"http://127.0.0.1:{self.port}/api{path}", json=body, timeout=30)
            return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

        found: httpx.Response = until(answer, 60, self.text)
        assert found.is_success, f"{found.status_code}: {found.text}"
        return found.json()

    def deployment(self) -> dict[str, Any]:
        return dict(self.ask("GET", "/deployments/name/graceful-update/tiny"))

    def trigger(self, **parameters: Any) -> str:
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask("POST", f"/deployments/{self.deployment()['id']}/create_flow_run", body)["id"])

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"/flow_runs/{run}")["state_name"])

    def reaches(self, run: str, state: str, seconds: float = 200) -> None:
        until(lambda: self.state(run) == state, seconds, lambda: f"{self.state(run)}: {self.text()[-3000:]}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serves a workspace whose schedule is five minutes past every hour in Kathmandu."""
    folder = tmp_path_factory.mktemp("serve")
    root = tiny.new_workspace(folder / "ws", {"schedule": SCHEDULE})
    port, log = free_port(), folder / "serve.log"
    command = [sys.executable, "-m", "graceful.flows.cli", "serve", "--root", str(root), "--ui-port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    found = Service(root, port, process, log)
    try:
        until(
            lambda: "Next update of" in found.text() or process.poll() is not None,
            300,
            lambda: found.text()[-2000:],
        )
        assert process.poll() is None, found.text()
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_cron_schedule_really_yields_runs_and_the_flow_ui_shows_a_form(service: Service) -> None:
    # A wrong SQLAlchemy lets the server start and schedule nothing.
    def scheduled() -> list[dict[str, Any]]:
        body = {"sort": "EXPECTED_START_TIME_ASC", "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        return list(service.ask("POST", "/flow_runs/filter", body))

    runs = until(lambda: len(scheduled()) >= 2 and scheduled(), 100, service.text)
    # Five past the hour in Kathmandu (+05:45) is twenty past in UTC.
    assert {run["expected_start_time"][14:16] for run in runs} == {"20"}
    deployment = service.deployment()
    assert deployment["name"] == "tiny"
    assert deployment["parameters"] == {"workspace": str(service.root)}
    properties = deployment["parameter_openapi_schema"]["properties"]
    assert {name: value.get("type") or value.get("anyOf") for name, value in properties.items()} == {
        "workspace": "string",
        "again": "boolean",
        "train_paragon": [{"type": "boolean"}, {"type": "null"}],
        "adopted": [{"type": "string"}, {"type": "null"}],
        "wait_hours": [{"type": "number"}, {"type": "null"}],
    }
    assert all(value["description"] for value in properties.values())
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert f"Flow UI: http://127.0.0.1:{service.port}/" in service.text()
    assert "+0545 (cron '5 * * * *')" in service.text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_triggered_run_completes_and_leaves_artifacts_under_stable_keys(service: Service) -> None:
    run = service.trigger(train_paragon=True)
    service.reaches(run, "BOOTSTRAP")
    artifacts = service.ask("POST", "/artifacts/latest/filter", {})
    assert {"tiny-compatibility-matrix", "tiny-decision", "tiny-report"} <= {found["key"] for found in artifacts}
    (decision,) = [found for found in artifacts if found["key"] == "tiny-decision"]
    assert "BOOTSTRAP" in decision["data"]
    tasks = service.ask("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    names = {found["name"].split("-")[0] for found in tasks}
    assert {"freeze inputs", "train candidate", "judge", "move serving state", "publish"} <= names
    assert service.ask("GET", f"/flow_runs/{run}")["parameters"]["train_paragon"] is True
    assert json.loads(graceful("status", "--root", str(service.root), "--json").stdout)["champion"] is not None


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_one_update_at_a_time_and_stopping_cancels_it_and_leaves_no_process(service: Service) -> None:
    slow = {"schedule": SCHEDULE, "training.epochs": SLOW_EPOCHS}
    tiny.write_config(service.root, service.root / "digits.parquet", slow)
    running, waiting = service.trigger(), service.trigger()
    # Which of the two comes first is for the runner to say; the other one waits for it.
    until(
        lambda: {service.state(running), service.state(waiting)} == {"Running", "AwaitingConcurrencySlot"},
        200,
        service.text,
    )
    if service.state(running) != "Running":
        running = waiting

    by_hand = graceful("update", "--root", str(service.root))
    assert by_hand.returncode == 1
    assert "another update of this workspace is in progress" in by_hand.stderr
    assert by_hand.stderr.splitlines()[-1].startswith("graceful: starting an update: ")
    # The flow server that serves the workspace was found, and shows what was started by hand as well.
    runs = service.ask("POST", "/flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Failed"]}}}})
    assert [run["deployment_id"] for run in runs] == [None]

    assert service.state(running) == "Running"
    started = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 143
    took = time.monotonic() - started
    assert took < 11
    assert "Stopping: runs under way are cancelled" in service.text()
    until(lambda: living(str(service.root)) == [], 20, lambda: "\n".join(living(str(service.root))))
    assert not (service.root / ".prefect" / "server.json").exists()
    assert running_server(str(service.root)) is None
    # On a machine too busy to cancel it in time, the next service marks the run (test_service_overlap.py).
    assert "Cancelled flow run" in service.text() or took > 8.5


@pytest.mark.timeout(60)
def test_the_flow_server_ends_when_the_process_that_wanted_it_was_killed(tmp_path: Path) -> None:
    port = str(free_port())
    start = (
        "import os, subprocess, sys\n"
        "environment = {**os.environ, 'GRACEFUL_PARENT': str(os.getpid())}\n"
        f"command = [sys.executable, '-m', 'graceful.flows.runtime.server', '127.0.0.1', '{port}']\n"
        "child = subprocess.Popen(command, env=environment,"
        " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    marked = {**environment(), "PREFECT_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", start], env=marked, timeout=50)
    until(lambda: living(str(tmp_path)) == [], 50, lambda: "\n".join(living(str(tmp_path))))


def test_a_cron_expression_that_cannot_be_used_and_a_missing_workspace_are_refused_in_one_line(tmp_path: Path) -> None:
    refused = graceful("serve", "--root", str(tmp_path / "nothing"))
    assert refused.returncode == 1
    assert "graceful init" in refused.stderr
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        root = tiny.new_workspace(tmp_path / "ws")
        refused = graceful("serve", "--root", str(root), "--ui-port", str(busy.getsockname()[1]))
    assert refused.returncode == 1
    assert "--ui-port" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_server_file_of_a_dead_or_foreign_process_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ".prefect"
    home.mkdir()
    state = {"api_url": "http://127.0.0.1:9/api", "host": socket.gethostname(), "pid": os.getpid()}
    state["process_start"] = process_start(os.getpid())
    (home / "server.json").write_text(json.dumps(state))
    assert running_server(str(tmp_path)) is None  # this process lives, but answers no API
    (home / "server.json").write_text(json.dumps({**state, "process_start": "0"}))
    assert running_server(str(tmp_path)) is None
    (home / "server.json").write_text("{")
    assert running_server(str(tmp_path)) is None
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    prepare_environment(str(tmp_path))
    assert "PREFECT_API_URL" not in os.environ
