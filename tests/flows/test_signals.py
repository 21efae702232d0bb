"""Ctrl-C and SIGTERM end every command alike: one line, 130 or 143, in bounded time, whatever it waits for."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graceful.flows.cli import signals
from graceful.processes import descendants, process_start
from tests.flows.running import command_in_child

pytestmark = pytest.mark.timeout(120)

# A command and what is under way in it when the signal comes.
COMMANDS = [
    (["update"], "graceful.flows.commands.check", "require_checked"),
    (["ingest", "pictures"], "graceful.flows.commands.images", "ingest_images"),
    (["search", "query.png"], "graceful.flows.commands.images", "search_gallery"),
    (["report"], "graceful.flows.commands.evaluations", "read_report"),
    (["doctor"], "graceful.flows.commands.doctor", "examine_workspace"),
    (["collect"], "graceful.flows.commands.status", "collect_garbage"),
    (["demo"], "graceful.flows.commands.demo", "run_demo"),
    (["serve"], "graceful.flows.schedule", "serve_updates"),
    (["serve", "--http"], "graceful.flows.search.serving", "serve_searches"),
    (["evalset", "show"], "graceful.flows.commands.evalset", "show_sets"),
]


def wait_as_the_command(arguments, module, name, how, here, seconds):
    """Be the command; where it calls the named function, wait."""

    def wait(*_args, **_named):
        Path(here, "waits").write_text("")
        HOW[how](here)

    signals.SECONDS_TO_END = seconds
    setattr(importlib.import_module(module), name, wait)
    os.chdir(here)
    command_in_child(arguments, log=str(Path(here, "log")))


def sleeping(_here):
    time.sleep(100)


def stuck(here):
    """Waits in a library that does not come back to Python, so that no handler of Python's runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    deaf(here)


def deaf(here):
    """Ends for nothing, and has a child in a session of its own."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    Path(here, "child").write_text(str(child.pid))
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(100)


def confused(_here):
    """A library that makes an error of its own of the signal."""
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        raise RuntimeError("a worker went away") from None


HOW = {"sleeping": sleeping, "deaf": deaf, "stuck": stuck, "confused": confused}


def interrupted(spawn, folder, arguments, module, name, sign, how="sleeping", seconds=60.0, again=False):
    """Send the signal to a command that waits; exit code, what it wrote, seconds."""
    process = spawn(wait_as_the_command, arguments, module, name, how, str(folder), seconds)
    deadline = time.monotonic() + 60
    while not (folder / ("child" if how in ("deaf", "stuck") else "waits")).exists():
        assert process.is_alive(), (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.01)
    started = time.monotonic()
    os.kill(process.pid, sign)
    if again:
        time.sleep(0.1)
        os.kill(process.pid, sign)
    process.join(30)
    return process.exitcode, (folder / "log").read_text().splitlines(), time.monotonic() - started


@pytest.mark.parametrize(("number", "command"), list(enumerate(COMMANDS)), ids=[" ".join(c[0]) for c in COMMANDS])
def test_a_signal_ends_every_command_with_one_line(spawn, tmp_path, number, command):
    sign = (signal.SIGINT, signal.SIGTERM)[number % 2]
    code, lines, seconds = interrupted(spawn, tmp_path, *command, sign)
    assert (code, lines) == (128 + sign, [signals.LINE])
    assert seconds < 10


@pytest.mark.parametrize(("sign", "how"), [(signal.SIGINT, "deaf"), (signal.SIGTERM, "stuck")])
def test_a_command_that_does_not_hear_is_ended_with_all_that_it_started(spawn, tmp_path, sign, how):
    code, lines, seconds = interrupted(spawn, tmp_path, *COMMANDS[1], sign, how=how, seconds=0.5, again=True)
    assert (code, lines) == (128 + sign, [signals.LINE])
    assert 0.4 < seconds < 10
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while process_start(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process_start(child)


def test_an_error_that_a_library_makes_of_the_signal_is_not_reported_as_one(spawn, tmp_path):
    code, lines, _ = interrupted(spawn, tmp_path, *COMMANDS[2], signal.SIGTERM, how="confused")
    assert (code, lines) == (143, [signals.LINE])


CLINGS = """
import time
from graceful.flows.cli import entry

class Clings:
    def __del__(self, sleep=time.sleep):
        sleep(60)

def app():
    print("waits", flush=True)
    time.sleep(60)

clings, entry.app = Clings(), app
entry.main()
"""


def test_what_python_takes_apart_at_its_end_does_not_hold_an_interrupted_command_up():
    process = subprocess.Popen(
        [sys.executable, "-c", CLINGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", signals.LINE + "\n")
        assert process.returncode == 130
    finally:
        process.kill()


def test_the_descendants_of_a_process_are_those_of_its_children_too():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while len(found := descendants(child.pid)) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(found) == 1
        assert child.pid in descendants(os.getpid())
        assert found[0] in descendants(os.getpid())
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(10)
