"""The flow UI is no dependency: a flow server that dies, hangs or was never there stops no training and no decision."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.settings import get_current_settings

from graceful.flows.runtime import flow_ui
from graceful.flows.runtime.flow_ui import Aside
from graceful.flows.store.events import Decided
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import flow
from tests.flows import tiny

EPOCHS = 200


def server_of(root: Path) -> int | None:
    """Process id of the flow server that a command started for a workspace."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            home = f"PREFECT_HOME={root}/.prefect".encode()
            if b"graceful.flows.runtime.server" in command and home in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def decided(root: Path) -> float:
    """When the second generation was decided about, in seconds since the epoch."""
    event = Workspace(str(root), tiny.no_encoder).registry.events(Decided)[-1]
    assert event.generation.startswith("g002-")
    return event.at


def update(root: Path, environment: dict[str, str], **further: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "graceful.flows.cli", "update", "--root", str(root), "--json"],
        cwd=tiny.ROOT, env={**environment, **further}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_an_update_whose_flow_server_dies_or_hangs_ends_as_any_other(
    workspace_root: Path, digits_file: Path, command_environment: dict[str, str], sign: int
) -> None:
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "training.epochs": EPOCHS})
    environment = {name: value for name, value in command_environment.items() if name != "PREFECT_HOME"}
    process = update(workspace_root, environment)
    server = None
    try:
        deadline = time.monotonic() + 200
        while not (found := list(workspace_root.glob("runs/g002-*/metrics.jsonl"))):
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server = server_of(workspace_root)
        assert server is not None
        os.kill(server, sign)
        assert len(found[0].read_text().splitlines()) < EPOCHS, "the server is to go while the training is under way"
        stdout, stderr = process.communicate(timeout=200)
        took = time.time() - decided(workspace_root)
    finally:
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
    assert process.returncode in (0, 3, 4), stderr[-3000:]
    assert json.loads(stdout)["candidate"].startswith("g002-")
    assert "Traceback" not in stderr
    assert "The flow server does not answer" in stderr
    assert took < 75, "Prefect's client with its own retries takes more than two minutes"


@pytest.mark.timeout(200)
def test_an_update_without_any_flow_server_does_its_work_and_says_so(
    workspace_root: Path, digits_file: Path, command_environment: dict[str, str]
) -> None:
    tiny.write_config(workspace_root, digits_file, tiny.grown(5))
    nobody = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    process = update(workspace_root, command_environment, **nobody)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode in (0, 3, 4), stderr[-3000:]
    assert json.loads(stdout)["candidate"].startswith("g002-")
    assert "The flow server does not answer" in stderr
    assert "the work is done without it" in stderr


@pytest.mark.timeout(200)
def test_an_error_of_the_work_is_reported_as_it_is_without_a_flow_server(
    workspace_root: Path, digits_file: Path, command_environment: dict[str, str]
) -> None:
    tiny.write_config(workspace_root, digits_file, tiny.grown(5))
    next(workspace_root.glob("generations/g001-*/weights.safetensors")).write_bytes(b"torn")
    nobody = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    process = update(workspace_root, command_environment, **nobody)
    stderr = process.communicate(timeout=180)[1]
    assert process.returncode == 1, stderr[-3000:]
    assert "restore the file from a copy" in stderr
    assert "Traceback" not in stderr


def test_a_run_keeps_the_settings_of_its_process_and_leaves_them_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of them would read the environment anew: runs, tasks and clients would be at two servers."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # Prefect was imported before
    settings, before = get_current_settings(), get_current_settings().client.max_retries
    seen = []

    def in_flow() -> None:
        flow_ui.ask_no_more()
        seen.append((get_current_settings(), get_current_settings().client.max_retries))
        box = flow._BOX.get()
        assert box is not None
        box.results.append("done")

    assert flow.run_flow(in_flow, lambda: "without") == "done"
    assert seen[0][0] is settings
    assert seen[0][1] == 0 < before == settings.client.max_retries


class TestAside:
    def test_things_are_done_in_order_and_waited_for_at_the_end(self) -> None:
        done: list[int] = []
        aside = Aside(lambda _: None)
        for number in range(20):
            aside.do(lambda number=number: done.append(number))  # type: ignore[misc]
        aside.close()
        assert done == list(range(20))

    def test_what_hangs_for_ever_costs_the_caller_nothing(self) -> None:
        for_ever, said = threading.Event(), list[str]()
        aside = Aside(said.append)
        started = time.monotonic()
        for _ in range(1_000):
            aside.do(for_ever.wait)
        assert time.monotonic() - started < 2
        assert len(said) == 1
        aside.close(seconds=0.1)
        assert time.monotonic() - started < 3
        for_ever.set()

    def test_what_takes_long_is_said_once_and_nothing_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flow_ui, "SECONDS_OF_SILENCE", 0.2)
        answers, said, done = threading.Event(), list[str](), list[int]()
        aside = Aside(said.append)
        aside.do(lambda: answers.wait(30))
        aside.do(lambda: done.append(0))
        assert said == []
        time.sleep(0.4)
        for number in range(1, 5):
            aside.do(lambda number=number: done.append(number))  # type: ignore[misc]
        assert said == ["nothing for 0.2 s"]
        answers.set()
        aside.close()
        assert done == [0, 1, 2, 3, 4]

    def test_a_pause_of_the_update_is_no_silence_of_the_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flow_ui, "SECONDS_OF_SILENCE", 0.2)
        said, done = list[str](), threading.Event()
        aside = Aside(said.append)
        aside.do(lambda: 1 / 0)
        aside.do(done.set)
        assert done.wait(5)
        time.sleep(0.4)
        aside.do(lambda: None)
        aside.close()
        assert said == []

    def test_failures_in_a_row_are_said_once_and_the_server_is_left_alone(self) -> None:
        tried, said = list[int](), list[str]()

        def fail() -> None:
            tried.append(1)
            raise ConnectionError("gone")

        aside = Aside(said.append)
        for _ in range(50):
            aside.do(fail)
        aside.close()
        assert len(tried) == 3
        assert said == ["ConnectionError: gone"]

    def test_single_failures_are_forgotten(self) -> None:
        said, acts = list[str](), list[Callable[[], object]]()
        aside = Aside(said.append)
        for number in range(10):
            acts += [lambda: 1 / 0, lambda: None] if number else []
        for act in acts:
            aside.do(act)
        aside.close()
        assert said == []
