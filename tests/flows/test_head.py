"""A Ray head that has gone, or was never there: one line in bounded time. A socket stands for it here."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ray._private import worker

from graceful.flows.runtime import head
from graceful.flows.runtime.cluster import RaySession, log_with_processes
from graceful.flows.runtime.head import ClusterLostError, HeadWatch
from graceful.flows.settings.config import ClusterConfig
from tests.flows.test_service import free_port

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def impatient(monkeypatch):
    """A silence is over in a third of a second; what was not heard is said again after half a second."""
    monkeypatch.setattr(head, "SECONDS_OF_SILENCE", 0.3)
    monkeypatch.setattr(head, "_SECONDS_BETWEEN_LOOKS", 0.5)


@contextlib.contextmanager
def watching_for(address):
    """A watch for this process, which no test leaves behind: it would raise in those that come after."""
    watch = HeadWatch(address)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def test_a_head_that_goes_is_told_in_the_main_thread_wherever_it_is(impatient):
    listener = socket.create_server(("127.0.0.1", 0))
    before = signal.getsignal(signal.SIGUSR1)
    with watching_for(f"127.0.0.1:{listener.getsockname()[1]}"):
        time.sleep(1.2)  # longer than a silence may be: it answers
        listener.close()
        started = time.monotonic()
        with pytest.raises(ClusterLostError, match="run the same command again"):
            time.sleep(20)
        took = time.monotonic() - started
    assert took < 5
    assert signal.getsignal(signal.SIGUSR1) == before
    time.sleep(1.2)  # nothing is raised any more


def test_an_error_that_was_swallowed_is_raised_again(impatient):
    swallowed = 0
    with watching_for(f"127.0.0.1:{free_port()}"):
        while swallowed < 3:
            try:
                time.sleep(20)
            except ClusterLostError:
                swallowed += 1


def test_a_head_that_is_back_in_time_is_not_missed(impatient, monkeypatch):
    monkeypatch.setattr(head, "SECONDS_OF_SILENCE", 3.0)
    port = free_port()
    with watching_for(f"127.0.0.1:{port}"):
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)):
            time.sleep(3.5)


DEAF = """
import itertools, signal, sys
from graceful.flows.runtime import head
head.SECONDS_OF_SILENCE, head._SECONDS_BETWEEN_LOOKS, head._SECONDS_TO_HEAR, head._SECONDS_TO_END = 0.2, 0.1, 0.5, 0.5
head.FLOW_RUN.set(sys.argv[2])
head.HeadWatch(sys.argv[1]).start()
print("started", flush=True)
for ignored in sys.argv[3:]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [int(ignored)])
sum(itertools.repeat(0))  # in C, with the interpreter held, for ever
"""


class Told(BaseHTTPRequestHandler):
    """A flow server that writes down what it is told."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.told.append((self.path, body, self.headers["authorization"]))
        self.send_response(201)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def flow_server_that_listens():
    with HTTPServer(("127.0.0.1", 0), Told) as server:
        server.told = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("blocked", "ended_by"), [([], signal.SIGTERM), ([signal.SIGTERM], signal.SIGKILL)])
def test_a_process_that_does_not_come_to_hear_it_is_ended_with_the_line(flow_server_that_listens, blocked, ended_by):
    server = flow_server_that_listens
    run = f"http://127.0.0.1:{server.server_port}/api/flow_runs/7"
    command = [sys.executable, "-c", DEAF, f"127.0.0.1:{free_port()}", run, *(str(int(sign)) for sign in blocked)]
    environment = {**os.environ, "PREFECT_API_AUTH_STRING": "ann:secret"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == -ended_by
    (line,) = ended.stderr.splitlines()
    assert line.startswith("graceful: working on the Ray cluster at 127.0.0.1:")
    ((path, body, word),) = server.told
    assert (path, body["force"], body["state"]["type"]) == ("/api/flow_runs/7/set_state", True, "CRASHED")
    assert word == "Basic YW5uOnNlY3JldA=="


def test_nothing_watches_once_it_is_stopped_or_its_process_is_killed(impatient):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with watching_for(address):
            come_to_watch(address, 1)
        assert watching(address) == []
        command = [sys.executable, "-c", DEAF, address, ""]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            come_to_watch(address, 1)
            process.kill()
        come_to_watch(address, 0)


def come_to_watch(address, number):
    """Wait until so many processes watch a head: one that has just been started has no command line yet."""
    deadline = time.monotonic() + 10
    while len(watching(address)) != number and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(watching(address)) == number


def watching(address):
    """The processes that watch a head."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"graceful.flows.runtime.head_watch" in words and address.encode() in words[3]:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("address", ["auto", "host:port"])
def test_a_cluster_that_is_not_there_is_refused_in_one_line_and_in_time(monkeypatch, tmp_path, address):
    monkeypatch.setattr(head, "_SECONDS_TO_JOIN", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if address == "auto":
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    else:
        address = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    with RaySession(ClusterConfig(address=address)) as session, pytest.raises(ClusterLostError, match="ray start"):
        session.ensure()
    assert time.monotonic() - started < 20


def test_what_ray_says_of_a_lost_node_is_not_among_what_a_command_prints(capfd, monkeypatch):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    log_with_processes()
    said = {"lines": ["a node was lost"], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(said, ignore_prefix=False)  # as Ray's listener does
    assert capfd.readouterr() == ("", "a node was lost\n")
