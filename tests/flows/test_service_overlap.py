"""Scheduled runs that are due while another works, a second service, and what a killed service leaves behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graceful.flows.runtime.service import ServiceRunsError, end_orphan, only_service
from graceful.flows.store.claim import SERVICE_VARIABLE, claim, holder
from graceful.processes import process_start
from tests.flows import tiny
from tests.flows.test_service import Service, environment, free_port, graceful, until

EVERY_MINUTE = {"schedule": {"cron": "* * * * *"}, "training.epochs": 20_000}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[list[Service]]:
    """Services that are killed at the end."""
    started: list[Service] = []
    yield started
    for service in started:
        if service.process.poll() is None:
            service.process.terminate()
            try:
                service.process.wait(60)
            except subprocess.TimeoutExpired:
                service.process.kill()


def serve(root: Path, services: list[Service], wait_for: str = "Next update of") -> Service:
    port, log = free_port(), root.parent / f"serve-{len(services)}.log"
    command = [sys.executable, "-m", "graceful.flows.cli", "serve", "--root", str(root), "--ui-port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    found = Service(root, port, process, log)
    services.append(found)
    until(lambda: wait_for in found.text() or process.poll() is not None, 200, found.text)
    assert process.poll() is None, found.text()
    return found


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_scheduled_run_is_skipped_while_another_works_and_a_killed_services_run_is_ended_and_goes_on(
    tmp_path: Path, services: list[Service]
) -> None:
    root = tiny.new_workspace(tmp_path / "ws", EVERY_MINUTE)
    service = serve(root, services)
    by_person = service.trigger()
    service.reaches(by_person, "Running")

    def named(name: str) -> list[dict[str, str]]:
        body = {"flow_runs": {"state": {"name": {"any_": [name]}}}}
        return list(service.ask("POST", "/flow_runs/filter", body))

    skipped = until(lambda: named("Skipped"), 120, service.text)
    assert all(run["auto_scheduled"] for run in skipped)
    assert "another update was under way" in service.ask("GET", f"/flow_runs/{skipped[0]['id']}")["state"]["message"]
    waiting = [run for run in named("Late") + named("AwaitingConcurrencySlot") if run["auto_scheduled"]]
    assert len(waiting) <= 1

    refused = graceful("serve", "--root", str(root), "--ui-port", str(free_port()))
    assert refused.returncode == 1
    assert f"found process {service.process.pid} on" in refused.stderr

    status = graceful("status", "--root", str(root))
    assert re.search(r"under way\s+purpose: an update", status.stdout), status.stdout

    service.process.send_signal(signal.SIGKILL)
    service.process.wait(30)
    orphan, held = holder(str(root))
    assert held, "the run lives on without its service"
    assert str(orphan["service"]).startswith(f"{service.process.pid}@"), orphan
    again = serve(root, services)
    assert f"Ended an update (process {orphan['pid']}), which a killed service had left behind" in again.text()
    assert process_start(int(str(orphan["pid"]))) != orphan["started"]

    def works() -> bool:
        found, is_held = holder(str(root))
        return is_held and found["pid"] != orphan["pid"]

    until(works, 100, again.text)


def test_a_second_service_is_refused_by_name_and_the_first_ones_end_frees_the_place(tmp_path: Path) -> None:
    with only_service(str(tmp_path)):
        code = (
            "import sys; from graceful.flows.runtime.service import only_service\n"
            "try:\n    with only_service(sys.argv[1]): pass\n"
            "except Exception as error: print(error); sys.exit(7)"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert run.returncode == 7
        assert f"found process {os.getpid()} on" in run.stdout
    with only_service(str(tmp_path)):
        pass
    assert issubclass(ServiceRunsError, Exception)


@pytest.mark.parametrize("service", ["alive", "dead", "none"])
def test_only_an_update_whose_service_has_gone_is_ended(tmp_path: Path, service: str) -> None:
    value = {"alive": f"{os.getpid()}@{process_start(os.getpid())}", "dead": "1@0", "none": ""}[service]
    code = (
        "import sys, time; from graceful.flows.store.claim import claim\n"
        "with claim(sys.argv[1], 'an update'):\n    print('held', flush=True); time.sleep(100)"
    )
    variables = {**os.environ, **({SERVICE_VARIABLE: value} if value else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=variables, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        started = time.monotonic()
        found = end_orphan(str(tmp_path))
        if service == "dead":
            assert found == f"an update (process {process.pid})"
            assert process.wait(10) == -signal.SIGTERM
            with claim(str(tmp_path), "another update"):
                pass
        else:
            assert found is None
            assert process.poll() is None
        assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait()
