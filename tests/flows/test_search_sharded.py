"""Search over three shards on one machine: answers of the whole, one version at a time, and a shard that is killed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from fastapi.testclient import TestClient

from graceful.flows.search import sharded
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, IncompleteAnswerError
from graceful.flows.search.sharded import ShardedSearcher, open_sharded_searcher, shard_buckets
from graceful.flows.store.workspace import open_workspace
from tests.flows import running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("sharded") / "ws")
    running.update(root)
    return root


@pytest.fixture(scope="module")
def searcher(workspace: Path) -> Iterator[ShardedSearcher]:
    with open_sharded_searcher(3) as open_searcher:
        yield open_searcher(open_workspace(str(workspace)))


def queries(num: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num, 16)).astype(np.float32)


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


def test_shards_answer_like_one_index(workspace: Path, searcher: ShardedSearcher) -> None:
    alone = GallerySearcher(open_workspace(str(workspace))).served
    served = searcher.served
    for k in (1, 7, 300):
        assert served.search_vectors(queries(), k) == alone.search_vectors(queries(), k)
    assert served.snapshot_id == alone.snapshot_id
    assert served.rows_by_generation == alone.rows_by_generation
    assert served.num_unreadable == alone.num_unreadable
    held = [ray.get(shard.prepare.remote(served.index.target, served.index.version)) for shard in searcher.shards]
    assert all(sum(counts.rows_by_generation.values()) > 10 for counts in held)


def test_a_change_is_followed_and_an_answer_is_of_one_version(workspace: Path, searcher: ShardedSearcher) -> None:
    """While items go one by one, every answer is that of the state that it names."""
    opened = open_workspace(str(workspace))
    stop, wrong, seen = threading.Event(), [], set()
    expected: dict[str, list[str]] = {}

    def note() -> None:
        view = opened.view(searcher.served.generation)
        alone = GallerySearcher(open_workspace(str(workspace))).served
        assert alone.snapshot_id not in expected or len(expected) == 1
        expected[alone.snapshot_id] = [hit.item_id for hit in alone.search_vectors(queries(1), 200)[0]]
        assert len(expected[alone.snapshot_id]) == view.num_items

    def ask() -> None:
        while not stop.is_set():
            served = searcher.served
            answer = [hit.item_id for hit in served.search_vectors(queries(1), 200)[0]]
            if answer != expected[served.snapshot_id]:
                wrong.append(served.snapshot_id)
            seen.add(served.snapshot_id)

    note()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for item_id in opened.gallery.view(()).item_ids[:6]:
            opened.gallery.delete([str(item_id)])
            note()
            assert searcher.refresh()
            until(lambda: searcher.served.snapshot_id in seen)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(seen) == 7


def test_a_state_that_one_shard_cannot_prepare_is_not_switched_to(
    workspace: Path, searcher: ShardedSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, before = open_workspace(str(workspace)), searcher.served
    monkeypatch.setattr(sharded, "PREPARE_TIMEOUT_S", 0.0)
    opened.gallery.delete([str(opened.gallery.view(()).item_ids[0])])
    with pytest.raises(IncompleteAnswerError, match="all 3 shards"):
        searcher.refresh()
    assert searcher.served is before
    assert before.search_vectors(queries(), 5)
    monkeypatch.undo()
    assert searcher.refresh()


def test_a_killed_shard_is_rebuilt_at_the_same_version_and_no_part_is_given_as_the_whole(
    workspace: Path, searcher: ShardedSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = searcher.served
    expected = served.search_vectors(queries(), 12)

    def kill() -> None:
        process = ray.get(searcher.shards[1].process_id.remote())
        os.kill(process, signal.SIGKILL)

    kill()
    assert served.search_vectors(queries(), 12) == expected  # it waits until the shard is there again
    kill()
    monkeypatch.setattr(sharded, "ANSWER_TIMEOUT_S", 0.3)
    with pytest.raises(IncompleteAnswerError, match="expected an answer of all 3 shards, found none of shard 1"):
        served.search_vectors(queries(), 12)
    with TestClient(make_app(str(workspace), open_searcher=lambda _: searcher, refresh_s=60)) as client:
        answers = []

        def answered() -> bool:
            answers.append(client.post("/search", json={"vector": queries()[0].tolist(), "k": 12}))
            return answers[-1].status_code == 200

        until(answered)
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert [hit["item_id"] for hit in answers[-1].json()["hits"]] == [hit.item_id for hit in expected[0]]
        assert all("of all 3 shards" in answer.text for answer in answers[:-1])
    assert searcher.served.snapshot_id == served.snapshot_id


def test_all_buckets_are_in_one_shard() -> None:
    for num_shards in (1, 3, 7, 256):
        ranges = shard_buckets(num_shards)
        assert [bucket for low, high in ranges for bucket in range(low, high)] == list(range(256))
    with pytest.raises(ValueError, match="1 to 256 shards, found 300"):
        shard_buckets(300)
