"""Leases: no gap when one is taken, renewed while the reader lives, given back at the end, and never many files."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from graceful.files import read_json, write_json
from graceful.indexing import leases as module
from graceful.indexing.leases import GalleryVersion, LeaseLostError, Leases, ReaderArrivingError

pytestmark = pytest.mark.timeout(60)

V1, V2, V3 = (GalleryVersion(number, 10 * number) for number in (1, 2, 3))


@pytest.fixture
def leases(tmp_path):
    return Leases(str(tmp_path / "leases"))


@pytest.fixture
def elsewhere(monkeypatch):
    """Leases taken in this test are those of another machine: only the clock tells whether they are over."""
    names = iter(["elsewhere", "elsewhere", *["here"] * 1000])
    monkeypatch.setattr(module, "process_space", lambda: next(names))


def files(leases):
    folder = Path(leases._folder)
    return sorted(folder.iterdir()) if folder.exists() else []


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.01)


def test_version_is_pinned_until_the_block_ends_and_nothing_stays_behind(leases):
    with leases.hold(lambda: V1) as version:
        assert version == V1
        assert leases.open_versions() == [V1]
        with leases.hold(lambda: V2):
            assert sorted(leases.open_versions(), key=lambda v: v.items) == [V1, V2]
    assert leases.open_versions() == []
    with pytest.raises(RuntimeError), leases.hold(lambda: V1):
        raise RuntimeError
    for _ in range(20):
        with leases.hold(lambda: V1):
            pass
    assert files(leases) == []


def test_long_lived_lease_moves_and_is_released_once(leases):
    newest = [V1]
    lease = leases.take(lambda: newest[0])
    newest[0] = V2
    assert lease.version == V1
    assert lease.move_to(V2) == lease.version == V2
    assert leases.open_versions() == [V2]
    newest[0] = V3
    assert lease.move_to(V1) == V3, "an older version may have lost files: the newest is pinned"
    assert len(files(leases)) == 1
    lease.release()
    lease.release()
    assert leases.open_versions() == []
    with pytest.raises(LeaseLostError, match="one that was released"):
        lease.version  # noqa: B018


def test_remover_between_the_look_at_the_newest_version_and_the_lease_waits_for_the_reader(leases):
    """The gap: a version is looked up, its files are removed, and only then the lease is written."""
    kept, removers = [], []

    def newest():
        remover = threading.Thread(target=lambda: kept.append(leases.open_versions()))
        remover.start()
        removers.append(remover)
        time.sleep(0.2)
        assert kept == [], "the remover went on although a reader was arriving"
        return V1

    with leases.hold(newest):
        removers[0].join(20)
        assert kept == [[V1]]


def test_moving_keeps_the_old_version_until_the_new_one_is_pinned(leases):
    seen = []
    lease = leases.take(lambda: V1)

    def newest():
        seen.append(read_json(str(files(leases)[0])))
        return V2

    lease._newest = newest
    lease.move_to()
    assert seen[0]["arriving"]
    assert seen[0]["versions"] == [[1, 10]]
    lease.release()


def test_reader_that_never_says_what_it_reads_stops_a_remover_with_an_error(leases, monkeypatch):
    monkeypatch.setattr(module, "_ARRIVAL_S", 0.1)
    with leases.hold(lambda: V1):
        file = str(files(leases)[0])
        write_json(file, {**read_json(file), "arriving": True})
        with pytest.raises(ReaderArrivingError, match="try again later"):
            leases.open_versions()


def test_reader_that_fails_while_it_arrives_leaves_nothing(leases):
    def newest():
        raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        leases.take(newest)
    assert files(leases) == []
    lease = leases.take(lambda: V1)
    lease._newest = newest
    with pytest.raises(OSError, match="no answer"):
        lease.move_to()
    assert leases.open_versions() == [V1] == [lease.version]
    lease.release()


def test_lease_outlives_its_lifetime_while_its_reader_lives(leases, monkeypatch):
    monkeypatch.setattr(module, "SLACK_S", 0.0)
    lease = leases.take(lambda: V1, lifetime_s=1.0)
    taken = read_json(str(files(leases)[0]))["expires_at"]
    until(lambda: read_json(str(files(leases)[0]))["expires_at"] > taken + 0.9)
    time.sleep(0.5)
    assert not lease.lost
    assert leases.open_versions() == [V1]
    lease.release()


def test_lease_that_could_not_be_renewed_in_time_is_an_error_when_it_is_used(leases, monkeypatch):
    monkeypatch.setattr(module.Lease, "renew", lambda self: None)
    lease = leases.take(lambda: V1, lifetime_s=0.1)
    until(lambda: lease.lost)
    for use in (lambda: lease.version, lease.check, lease.move_to):
        with pytest.raises(LeaseLostError, match="could not be renewed in time"):
            use()
    assert lease.follow() == V1
    lease.release()
    with pytest.raises(LeaseLostError), leases.hold(lambda: V1, lifetime_s=0.05):
        time.sleep(0.1)


def test_lease_whose_file_was_removed_is_not_brought_back(leases):
    lease = leases.take(lambda: V1)
    files(leases)[0].unlink()
    lease.renew()
    assert lease.lost
    assert files(leases) == []
    lease.release()


def test_lease_that_nobody_refers_to_any_more_is_given_back(leases):
    lease = leases.take(lambda: V1)
    del lease
    gc.collect()
    assert leases.open_versions() == []
    assert files(leases) == []


def test_lease_of_another_machine_is_believed_until_long_after_its_end(leases, elsewhere, monkeypatch):
    lease = leases.take(lambda: V1, lifetime_s=100.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100 + module.SLACK_S - 10)
    assert leases.open_versions() == [V1]
    monkeypatch.setattr(time, "time", lambda: now + 100 + module.SLACK_S + 10)
    assert leases.open_versions() == []
    assert files(leases) == []
    lease.release()


def test_clock_that_steps_does_not_end_a_lease_of_this_machine(leases, monkeypatch):
    lease = leases.take(lambda: V1, lifetime_s=100.0)
    now = time.time()
    for step in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda step=step: now + step)
        assert not lease.lost
        assert leases.open_versions() == [V1]
    lease.release()


def hold_until_killed(folder, ready):
    lease = Leases(folder).take(lambda: V1)
    ready.set()
    time.sleep(600)
    lease.release()


def test_lease_of_a_killed_process_is_over_at_once(leases):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_until_killed, args=(leases._folder, ready))
    process.start()
    assert ready.wait(50)
    assert leases.open_versions() == [V1]
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert leases.open_versions() == []
    assert files(leases) == []
