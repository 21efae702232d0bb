"""The search endpoint under load and under abuse, behind its real server: a socket at the other end, no mocks."""

import asyncio
import gc
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi.testclient import TestClient

from graceful.flows.search.answering import ImageQuestion, VectorQuestion, answer_images, answer_vectors
from graceful.flows.search.batches import Batches, QueueFullError
from graceful.flows.search.connections import limited_by
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, ServedSnapshot, UnreadableQueryError
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.training.images import MAX_PIXELS
from tests.flows import running, tiny

pytestmark = pytest.mark.timeout(120)

HEADERS = "POST /search HTTP/1.1\r\nhost: x\r\ncontent-type: {}\r\ncontent-length: {}\r\n\r\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("load") / "ws")
    running.update(root)
    return root


@pytest.fixture(scope="module")
def served(workspace: Path) -> ServedSnapshot:
    return GallerySearcher(open_workspace(str(workspace))).served


@pytest.fixture(scope="module")
def payloads(workspace: Path) -> list[bytes]:
    return [row["bytes"] for row in pq.read_table(workspace / "digits.parquet")["image"].to_pylist()[:30]]


class SlowSearcher:
    """The searcher of a workspace, whose encoder waits before each batch until it may go on."""

    def __init__(self, served: ServedSnapshot) -> None:
        self.go_on = threading.Event()
        self.batches: list[int] = []
        encoder = _Waiting(served.encoder, self)
        self.served = replace(served, encoder=encoder)  # type: ignore[arg-type]

    def refresh(self) -> bool:
        return False


class _Waiting:
    def __init__(self, encoder: Any, searcher: SlowSearcher) -> None:
        self.card, self._encoder, self._searcher = encoder.card, encoder, searcher

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        self._searcher.batches.append(len(pixels))
        assert self._searcher.go_on.wait(60)
        return self._encoder.encode_pixels(pixels)


@contextmanager
def serving(root: Path, open_searcher: Any = GallerySearcher, **limits: Any) -> Iterator[str]:
    """The real server on a port of its own; its address."""
    config = EndpointConfig(**limits)
    app = make_app(str(root), open_searcher=open_searcher, config=config, refresh_s=0.1)
    settings = uvicorn.Config(
        app, port=0, http=limited_by(config), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def connect(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(4_096) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def figure(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).rpartition(" ")[2])


def num_errors(address: str, kind: str) -> float:
    return figure(address, f'graceful_search_errors_total{{kind="{kind}"}}')


# Batches


def test_vectors_that_are_answered_together_get_the_answers_that_they_get_alone_bit_for_bit(
    served: ServedSnapshot,
) -> None:
    rng = np.random.default_rng(0)
    questions = [
        VectorQuestion(rng.standard_normal(served.width).astype(np.float32), served.generation, k, bool(k % 2))
        for k in (3, 7, 3, 100, 250, 7, 3, 1, 3)
    ]
    alone = [answer_vectors(served, [question])[0] for question in questions]
    assert answer_vectors(served, questions) == alone
    assert len({bytes(answer) for answer in alone}) == len(alone)  # type: ignore[arg-type]


def test_images_that_are_encoded_together_get_the_answers_that_they_get_alone(
    served: ServedSnapshot, payloads: list[bytes]
) -> None:
    """The same items in the same order; scores within 1e-5, the rounding of float32 sums in another order."""
    questions = [ImageQuestion(payload, 5, with_sources=False) for payload in payloads]
    with ThreadPoolExecutor(3) as pool:
        together = answer_images(served, questions, max_pixels=MAX_PIXELS, mapper=pool.map)
    for question, answer in zip(questions, together, strict=True):
        alone = json.loads(answer_images(served, [question], max_pixels=MAX_PIXELS, mapper=map)[0])  # type: ignore[arg-type]
        batched = json.loads(answer)  # type: ignore[arg-type]
        assert [hit["item_id"] for hit in batched["hits"]] == [hit["item_id"] for hit in alone["hits"]]
        scores = [[hit["score"] for hit in found["hits"]] for found in (batched, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def assert_same_but_for_rounding(found: Any, expected: Any) -> None:
    """An encoder answers a picture among others with another last digit than alone."""
    for ours, theirs in zip(found["hits"], expected["hits"], strict=True):
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-5)
    assert found == expected


def test_a_question_that_cannot_be_answered_does_not_touch_those_beside_it(
    served: ServedSnapshot, payloads: list[bytes]
) -> None:
    good = ImageQuestion(payloads[0], 5, with_sources=False)
    answers = answer_images(
        served, [good, ImageQuestion(b"none", 5, with_sources=False), good], max_pixels=MAX_PIXELS, mapper=map
    )
    assert isinstance(answers[1], UnreadableQueryError)
    (alone,) = answer_images(served, [good], max_pixels=MAX_PIXELS, mapper=map)
    assert answers[0] == answers[2]
    assert isinstance(answers[0], bytes)
    assert isinstance(alone, bytes)
    assert_same_but_for_rounding(json.loads(answers[0]), json.loads(alone))
    vector = np.ones(served.width, np.float32)
    right = VectorQuestion(vector, None, 5, with_sources=False)
    wrong = [
        replace(right, vector=vector[:-1]),
        replace(right, vector=vector * np.nan),
        replace(right, made_by="g000-000000"),
    ]
    answers = answer_vectors(served, [wrong[0], right, wrong[1], right, wrong[2]])
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["WidthMismatchError", "bytes", "NonFiniteEmbeddingError", "bytes", "OtherGenerationError"]
    assert answers[1] == answers[3] == answer_vectors(served, [right])[0]


def test_what_waits_is_answered_together_in_order_and_no_more_may_wait_than_the_limit() -> None:
    batches: list[list[int]] = []
    go_on = threading.Event()

    def answer(questions: Any) -> list[int | Exception]:
        batches.append(list(questions))
        assert go_on.wait(20)
        return [ValueError("four") if question == 4 else 10 * question for question in questions]

    async def ask() -> None:
        lane = Batches[int, int]("numbers", answer, max_waiting=5, max_batch=3)
        lane.start()
        first = lane.ask(0)
        while not batches:
            await asyncio.sleep(0.01)
        others = [lane.ask(number) for number in range(1, 6)]
        with pytest.raises(QueueFullError, match="at most 5 numbers to wait"):
            lane.ask(6)
        others[1].cancel()  # its client has gone
        go_on.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        await asyncio.to_thread(lane.close)
        assert [str(one) for one in found] == ["0", "10", "", "30", "four", "50"]
        assert batches == [[0], [1, 3], [4, 5]]

    asyncio.run(ask())


def test_an_answer_that_fails_as_a_whole_is_the_error_of_each_and_the_next_is_answered() -> None:
    def answer(questions: Any) -> list[int]:
        if 0 in questions:
            raise OSError("disk")
        return list(questions)

    async def ask() -> None:
        lane = Batches[int, int]("numbers", answer, max_waiting=5, max_batch=3)
        lane.start()
        with pytest.raises(OSError, match="disk"):
            await lane.ask(0)
        assert await lane.ask(1) == 1
        await asyncio.to_thread(lane.close)

    asyncio.run(ask())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_threads_that_work_stand_back_behind_the_event_loop() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def ask() -> tuple[int, int]:
        lane = Batches[int, int]("numbers", lambda _: [priority()], max_waiting=1, max_batch=1)
        lane.start()
        found = await lane.ask(0)
        await asyncio.to_thread(lane.close)
        return priority(), found

    here, there = asyncio.run(ask())
    assert there == max(here, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_an_endpoint_keeps_its_event_loop_from_waiting_and_leaves_the_process_as_it_was(workspace: Path) -> None:
    before = sys.getswitchinterval()

    def stand_back() -> bool:
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("search-")]
        names = {thread.name.removeprefix("search-") for thread in threads}
        assert names >= {"looking", "beside", "images", "vectors", "comparisons"}
        return all(os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) >= 5 for thread in threads)

    with TestClient(make_app(str(workspace))):
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert gc.get_freeze_count() > 10_000
        deadline = time.monotonic() + 10
        while not stand_back():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, 0)


# Load


def test_health_answers_while_every_image_waits_and_a_search_too_many_is_told_when_to_come_again(
    workspace: Path, served: ServedSnapshot, payloads: list[bytes]
) -> None:
    slow = SlowSearcher(served)
    with serving(workspace, lambda *_: slow, max_waiting=60, batch_searches=16) as address:
        with ThreadPoolExecutor(101) as clients, httpx.Client(base_url=address, limits=httpx.Limits()) as client:

            def ask(number: int) -> httpx.Response:
                return httpx.post(f"{address}/search?k=1", content=payloads[number % 30], timeout=60)

            answers = [clients.submit(ask, number) for number in range(100)]
            try:
                until(lambda: sum(answer.done() for answer in answers) >= 100 - 60 - 16)
                for path in ("/health", "/status", "/metrics"):  # behind the images they would not answer at all
                    assert client.get(path, timeout=10).status_code == 200
                vector = client.post("/search", json={"vector": [1.0] * served.width}, timeout=10)
            finally:
                slow.go_on.set()
            found = [answer.result() for answer in answers]
        refused = [answer for answer in found if answer.status_code == 429]
        assert vector.status_code == 200, "vectors do not wait for images"
        assert {answer.status_code for answer in found} == {200, 429}
        assert len(refused) == num_errors(address, "busy") >= 24
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert max(slow.batches) == 16, "those that waited were encoded together"
        assert figure(address, 'graceful_search_batch_size_count{kind="image"}') == len(slow.batches)


def test_health_answers_while_a_look_at_the_workspace_hangs(workspace: Path, served: ServedSnapshot) -> None:
    class Hanging:
        def __init__(self) -> None:
            self.served, self.looks, self.go_on = served, 0, threading.Event()

        def refresh(self) -> bool:
            self.looks += 1
            assert self.go_on.wait(60)
            return False

    hanging = Hanging()
    with serving(workspace, lambda *_: hanging) as address:
        until(lambda: hanging.looks == 1)
        for path in ("/health", "/status", "/metrics"):
            assert httpx.get(address + path, timeout=2).status_code == 200
        assert httpx.post(f"{address}/search", json={"vector": [1.0] * served.width}, timeout=2).status_code == 200
        hanging.go_on.set()


# Abuse


def test_a_large_vector_is_refused_by_its_declared_length_before_it_is_sent(
    workspace: Path, served: ServedSnapshot
) -> None:
    """The limit is that of a vector, or of the longest text where that is more."""
    with serving(workspace) as address, connect(address) as connection:
        connection.sendall(HEADERS.format("application/json", 15_000_000).encode())
        answer = b""
        while b"}" not in answer:  # not one byte of the body is sent
            answer += connection.recv(4_096)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"kind":"too_large"' in answer
        assert str(max(48 * served.width, 12 * 1_000) + 4_096).encode() in answer.replace(b",", b"")


def test_a_large_vector_is_refused_by_its_streamed_length_before_it_is_parsed(
    workspace: Path, served: ServedSnapshot
) -> None:
    sent = []

    def stream() -> Iterator[bytes]:
        yield b'{"vector": ['
        for _ in range(3_000):
            sent.append(1)
            yield b"1.0," * 1_000

    with serving(workspace) as address, connect(address) as connection:
        connection.sendall(
            HEADERS.format("application/json", 0).replace("content-length: 0", "transfer-encoding: chunked").encode()
        )
        for part in stream():
            connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            if not is_silent(connection):
                break
        assert connection.recv(4_096).startswith(b"HTTP/1.1 413")
        assert len(sent) < 1_000
        exact = json.dumps({"vector": [-1.2345678901234567e-03] * served.width}, indent=4)
        assert httpx.post(f"{address}/search", content=exact, headers={"content-type": "application/json"}).is_success


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(0.002)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(20)


def test_an_image_above_the_endpoints_pixels_is_refused_undecoded(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from PIL import Image

    from graceful.flows.search import searcher

    decoded = []
    decode = searcher.decode
    monkeypatch.setattr(searcher, "decode", lambda *given: decoded.append(1) or decode(*given))
    with serving(workspace, max_megapixels=0.01) as address:
        found = []
        for side in (100, 101):
            buffer = io.BytesIO()
            Image.new("RGB", (side, side)).save(buffer, "PNG")
            found.append(httpx.post(f"{address}/search", content=buffer.getvalue()))
        assert [answer.status_code for answer in found] == [200, 422]
        assert "at most 10,000 pixels, found 101x101" in found[1].json()["detail"]
    assert decoded == [1]


def test_a_half_sent_body_is_dropped_after_its_time(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(workspace, body_timeout_s=0.5) as address:
        half, trickling, silent = (connect(address) for _ in range(3))
        started = time.monotonic()
        half.sendall(HEADERS.format("image/png", 1_000).encode() + b"x" * 10)
        trickling.sendall(b"POST /search HTTP/1.1\r\n")
        with half, trickling, silent:
            answer = b"".join(iter(lambda: half.recv(4_096), b""))  # until the connection is closed
            assert answer.startswith(b"HTTP/1.1 408")
            assert time.monotonic() - started < 15

            def goes_on_trickling() -> bool:
                try:
                    trickling.sendall(b"x: y\r\n")
                except OSError:
                    return False
                return not is_closed(trickling)

            until(lambda: not goes_on_trickling(), 15)  # headers that never end
            until(lambda: is_closed(silent), 15)  # a connection that says nothing
        assert num_errors(address, "timeout") == 1
    assert caplog.records == []


def test_clients_that_go_leave_no_traceback_and_their_questions_are_not_answered(
    workspace: Path, served: ServedSnapshot, payloads: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    slow = SlowSearcher(served)
    with serving(workspace, lambda *_: slow) as address:
        first = connect(address)
        request = HEADERS.format("image/png", len(payloads[0])).encode() + payloads[0]
        first.sendall(request)
        until(lambda: slow.batches == [1])
        waiting = [connect(address) for _ in range(5)]
        for connection in waiting:
            connection.sendall(request)
        until(lambda: figure(address, 'graceful_search_waiting{kind="image"}') == 5)
        halves = [connect(address) for _ in range(5)]
        for connection in halves:
            connection.sendall(HEADERS.format("image/png", 1_000).encode() + b"x" * 10)
        until(lambda: figure(address, "graceful_search_body_bytes") == 6 * len(payloads[0]) + 50)
        for connection in [*waiting[:4], *halves]:
            connection.close()
        until(lambda: num_errors(address, "gone") == 9)
        assert figure(address, "graceful_search_body_bytes") == 2 * len(payloads[0])
        slow.go_on.set()
        assert first.recv(4_096).startswith(b"HTTP/1.1 200")
        assert waiting[4].recv(4_096).startswith(b"HTTP/1.1 200")
        assert slow.batches == [1, 1], "only who is there is answered"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_at_the_limit_of_connections_the_one_goes_that_has_been_sending_longest(
    workspace: Path, payloads: list[bytes]
) -> None:
    with serving(workspace, max_connections=20) as address:
        held = []
        for _ in range(60):
            held.append(connect(address))
            held[-1].sendall(HEADERS.format("image/png", 1_000).encode() + b"x")
        until(lambda: sum(is_closed(connection) for connection in held[:40]) == 40)
        assert not any(is_closed(connection) for connection in held[45:])
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.post(f"{address}/search?k=1", content=payloads[0]).status_code == 200
        for connection in held:
            connection.close()


def test_all_bodies_together_are_limited(workspace: Path, served: ServedSnapshot) -> None:
    slow = SlowSearcher(served)
    with serving(workspace, lambda *_: slow, max_waiting_mib=1) as address:
        with connect(address) as held:
            held.sendall(HEADERS.format("image/png", 900_000).encode() + b"x" * 800_000)
            until(lambda: figure(address, "graceful_search_body_bytes") == 800_000)
            refused = httpx.post(f"{address}/search", content=b"x" * 300_000)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        until(lambda: figure(address, "graceful_search_body_bytes") == 0)
        assert httpx.post(f"{address}/search", content=b"x" * 300_000).status_code == 422


def test_a_server_that_ends_answers_what_waits_and_leaves_no_traceback(
    workspace: Path, served: ServedSnapshot, payloads: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    slow = SlowSearcher(served)
    with serving(workspace, lambda *_: slow) as address:
        half = connect(address)
        half.sendall(HEADERS.format("image/png", 1_000).encode() + b"x")
        until(lambda: figure(address, "graceful_search_body_bytes") == 1)
        slow.go_on.set()
    with half:
        assert half.recv(4_096).startswith(b"HTTP/1.1 503")
    assert not [record for record in caplog.records if record.exc_info], caplog.text


def test_the_searcher_is_opened_while_the_probe_is_answered_already(workspace: Path) -> None:
    opening = threading.Event()

    def open_slowly(opened: Workspace, *_: object) -> GallerySearcher:
        assert opening.wait(60)
        return GallerySearcher(opened)

    app = make_app(str(workspace), open_searcher=open_slowly, refresh_s=0.1, first_look_s=0.2)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        assert httpx.get(f"{address}/health").status_code == 503
        assert httpx.post(f"{address}/search", content=b"x").status_code == 503
        opening.set()
        until(lambda: httpx.get(f"{address}/health").status_code == 200)
    finally:
        opening.set()
        server.should_exit = True
        thread.join(20)
