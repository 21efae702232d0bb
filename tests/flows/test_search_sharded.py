"""Search over three shards on one machine: answers of the whole, one version at a time, and a shard that is killed."""

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from fastapi.testclient import TestClient

from graceful.flows.search import sharded
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, IncompleteAnswerError, OpenSearcher, ServingSearcher
from graceful.flows.search.sharded import ShardedSearcher, open_sharded_searcher, shard_buckets
from graceful.flows.store.workspace import Workspace, open_workspace
from tests.flows import running, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("sharded") / "ws")
    running.update(root)
    return root


@pytest.fixture(scope="module")
def opener() -> Iterator[OpenSearcher]:
    """What opens searchers over three shards of one cluster."""
    with open_sharded_searcher(3) as open_searcher:
        yield open_searcher


@pytest.fixture(scope="module")
def searcher(workspace: Path, opener: OpenSearcher) -> ShardedSearcher:
    return opener(open_workspace(str(workspace)), None, ())  # type: ignore[return-value]


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
    with TestClient(make_app(str(workspace), open_searcher=lambda *_: searcher, refresh_s=60)) as client:
        answers = []

        def answered() -> bool:
            answers.append(client.post("/search", json={"vector": queries()[0].tolist(), "k": 12}))
            return answers[-1].status_code == 200

        until(answered)
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert [hit["item_id"] for hit in answers[-1].json()["hits"]] == [hit.item_id for hit in expected[0]]
        assert all("of all 3 shards" in answer.text for answer in answers[:-1])
    assert searcher.served.snapshot_id == served.snapshot_id


def test_a_shadow_over_shards_is_compared_like_one_over_a_whole_index_and_its_shards_end_with_it(
    workspace: Path, opener: OpenSearcher, tmp_path: Path
) -> None:
    root = tiny.copy_workspace(workspace, tmp_path / "ws")
    tiny.write_config(root, root / "digits.parquet", {"training.seed": 1, "rollout.approval": "always"})
    assert running.update(root).approval == "waiting"
    running.command("canary", "start", "g002", "--shadow", "--share", "100%", "--max-changed", "100%", "-r", root)
    pictures = [bytes(row["bytes"]) for row in pq.read_table(root / "digits.parquet")["image"].slice(0, 30).to_pylist()]
    names = open_workspace(str(root)).registry.generations()

    def answered(client: TestClient, payload: bytes, name: str) -> str:
        answer = client.post("/search", params={"generation": name}, content=payload)
        assert (answer.status_code, answer.json()["query_generation"]) == (200, name)
        return str(answer.json()["hits"][0]["label"])

    opened: list[Any] = []

    def open_searcher(opened_in: Workspace, name: str | None, granted: Sequence[str]) -> ServingSearcher:
        """The candidate over shards; for the champion that is tested above."""
        searcher = opener(opened_in, name, granted) if name else GallerySearcher(opened_in)
        opened.extend([weakref.ref(searcher)] if name else [])
        return searcher

    with TestClient(make_app(str(root), refresh_s=0.05, open_searcher=open_searcher)) as client:
        until(lambda: (client.get("/status").json()["canary"] or {}).get("watched_here"), 180)
        changed = 0
        for payload in pictures:
            assert client.post("/search", content=payload).json()["query_generation"] == names[0]
            before, after = (answered(client, payload, name) for name in names)
            changed += before != after
            judged = client.post("/labels", params={"label": before}, content=payload).json()
            assert (judged["reference_is_right"], judged["candidate_is_right"]) == (True, before == after)
        until(lambda: running.document("canary", "status", "-r", root)["compared"] == len(pictures))
        found = running.document("canary", "status", "-r", root)
        assert (found["changed"], found["negative_flips"]) == (changed, changed)
        (candidate,) = opened
        beside = candidate()
        processes = [ray.get(shard.process_id.remote()) for shard in beside.shards]
        del beside
        running.command("canary", "stop", "--reason", "seen enough", "-r", root)
        until(lambda: not any(Path("/proc", str(process)).exists() for process in processes))
        assert client.post("/search", content=pictures[0]).json()["query_generation"] == names[0]


def test_all_buckets_are_in_one_shard() -> None:
    for num_shards in (1, 3, 7, 256):
        ranges = shard_buckets(num_shards)
        assert [bucket for low, high in ranges for bucket in range(low, high)] == list(range(256))
    with pytest.raises(ValueError, match="1 to 256 shards, found 300"):
        shard_buckets(300)
