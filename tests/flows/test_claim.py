"""One update at a time: across processes, after a kill, and across machines."""

import multiprocessing
import os
import signal
import time

import pytest

from graceful.flows.store import claim as claiming
from graceful.flows.store.claim import UpdateInProgressError, claim


def hold_for_ever(root: str, ready) -> None:
    with claim(root, "an update"):
        ready.set()
        time.sleep(600)


def claim_and_count(root: str, counter, order) -> None:
    with claim(root, "an update", wait_s=60):
        held = counter.value
        time.sleep(0.05)
        counter.value = held + 1  # a second holder at the same time would lose one of the two counts
        order.put(os.getpid())


@pytest.fixture
def holder(tmp_path, spawn):
    """A real process that holds the claim."""
    ready = multiprocessing.get_context("forkserver").Event()
    process = spawn(hold_for_ever, str(tmp_path), ready)
    assert ready.wait(60)
    yield process
    process.kill()
    process.join(10)


@pytest.mark.timeout(100)
def test_second_update_is_refused_and_told_who_holds_the_claim(tmp_path, holder):
    with (
        pytest.raises(UpdateInProgressError, match=rf"another update.*an update, process {holder.pid} on.*wait"),
        claim(str(tmp_path), "a second update"),
    ):
        pass


@pytest.mark.timeout(100)
def test_claim_of_a_killed_process_is_free_at_once(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    with claim(str(tmp_path), "the next update"):
        pass


@pytest.mark.timeout(100)
def test_waiting_update_starts_when_the_other_one_ends(tmp_path, spawn):
    context = multiprocessing.get_context("forkserver")
    counter, order = context.Value("i", 0), context.Queue()
    processes = [spawn(claim_and_count, str(tmp_path), counter, order) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 3
    assert len({order.get(timeout=5) for _ in processes}) == 3


def test_claim_ends_with_its_block_and_with_an_error_in_it(tmp_path):
    root = str(tmp_path)
    with claim(root, "an update"), pytest.raises(UpdateInProgressError), claim(root, "another"):
        pass
    with pytest.raises(RuntimeError, match="went wrong"), claim(root, "an update"):
        raise RuntimeError("went wrong")
    with claim(root, "an update"):
        pass


def test_holder_on_another_machine_is_believed_until_its_claim_runs_out(tmp_path, monkeypatch):
    root = str(tmp_path)
    elsewhere = {"host": "elsewhere", "pid": 1, "started": "1", "purpose": "an update", "nonce": 7}
    with claim(root, "first"):
        pass
    from graceful.files import join
    from graceful.indexing.tables import VersionedTable

    table = VersionedTable(join(root, "registry", "claims"), claiming.CLAIM_SCHEMA)

    def write(expires_at: float) -> None:
        version, sequence, _ = claiming._newest(table)
        assert claiming._write(table, version, sequence + 1, {**elsewhere, "expires_at": expires_at})

    write(time.time() + 60)
    with pytest.raises(UpdateInProgressError, match="elsewhere"), claim(root, "second"):
        pass
    write(time.time() - 1)
    with claim(root, "second"):
        pass


def test_claim_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claiming, "_RENEW_S", 0.05)
    monkeypatch.setattr(claiming, "LIFETIME_S", 2.0)
    root = str(tmp_path)
    with claim(root, "a long update"):
        time.sleep(3.0)
        with pytest.raises(UpdateInProgressError), claim(root, "another"):
            pass


def test_renewal_survives_a_store_that_does_not_answer_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claiming, "_RENEW_S", 0.05)
    monkeypatch.setattr(claiming, "LIFETIME_S", 2.0)
    write, failures = claiming._write_if_mine, [OSError("no answer")]

    def write_at_the_second_attempt(*arguments, **options):
        if failures:
            raise failures.pop()
        write(*arguments, **options)

    monkeypatch.setattr(claiming, "_write_if_mine", write_at_the_second_attempt)
    root = str(tmp_path)
    with claim(root, "a long update"):
        time.sleep(3.0)
        with pytest.raises(UpdateInProgressError), claim(root, "another"):
            pass


def test_claim_that_was_lost_is_not_given_back_by_its_former_holder(tmp_path, monkeypatch):
    """A process that was suspended past the end of its claim must not end the claim of whoever came after it."""
    monkeypatch.setattr(claiming, "LIFETIME_S", 0.1)
    root = str(tmp_path)
    with claim(root, "suspended"):
        time.sleep(0.2)
        monkeypatch.setattr(claiming, "LIFETIME_S", 60.0)
        with claim(root, "next"):
            pass
        second = claim(root, "third")
        second.__enter__()
    try:
        with pytest.raises(UpdateInProgressError, match="third"), claim(root, "fourth"):
            pass
    finally:
        second.__exit__(None, None, None)
