"""A Ray head that has gone, or was never there: one line in bounded time. A socket stands for it here."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from graceful.flows.runtime import head
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.head import ClusterLostError, HeadWatch
from graceful.flows.settings.config import ClusterConfig
from tests.flows.test_service import free_port

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def impatient(monkeypatch):
    """Seconds become tenths."""
    monkeypatch.setattr(head, "SECONDS_OF_SILENCE", 0.3)
    monkeypatch.setattr(head, "_SECONDS_BETWEEN_LOOKS", 0.1)


def test_a_head_that_goes_is_told_in_the_main_thread_wherever_it_is(impatient):
    listener = socket.create_server(("127.0.0.1", 0))
    before = signal.getsignal(signal.SIGUSR1)
    watch = HeadWatch(f"127.0.0.1:{listener.getsockname()[1]}")
    watch.start()
    try:
        time.sleep(0.6)  # longer than a silence may be: it answers
        listener.close()
        started = time.monotonic()
        with pytest.raises(ClusterLostError, match="run the same command again"):
            time.sleep(20)
        assert time.monotonic() - started < 5
    finally:
        watch.stop()
    assert signal.getsignal(signal.SIGUSR1) == before
    time.sleep(0.5)  # nothing is raised any more


def test_an_error_that_was_swallowed_is_raised_again(impatient):
    watch = HeadWatch(f"127.0.0.1:{free_port()}")
    watch.start()
    swallowed = 0
    try:
        while swallowed < 3:
            try:
                time.sleep(20)
            except ClusterLostError:
                swallowed += 1
    finally:
        watch.stop()


def test_a_head_that_is_back_in_time_is_not_missed(impatient, monkeypatch):
    monkeypatch.setattr(head, "SECONDS_OF_SILENCE", 2.0)
    port = free_port()
    watch = HeadWatch(f"127.0.0.1:{port}")
    watch.start()
    try:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)):
            time.sleep(2.5)
    finally:
        watch.stop()


DEAF = """
import signal, sys, time
from graceful.flows.runtime import head
head.SECONDS_OF_SILENCE, head._SECONDS_BETWEEN_LOOKS, head._SECONDS_TO_HEAR = 0.2, 0.1, 0.5
head.HeadWatch(sys.argv[1]).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
time.sleep(40)
"""


def test_a_process_that_does_not_come_to_hear_it_is_ended_with_the_line():
    command = [sys.executable, "-c", DEAF, f"127.0.0.1:{free_port()}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("graceful: working on the Ray cluster at 127.0.0.1:")


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
