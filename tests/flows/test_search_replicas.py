"""The search endpoint on Ray Serve: two replicas, the same answers, and a move that both follow."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.search.http import make_app
from graceful.flows.store.workspace import open_workspace
from tests.flows import running, tiny

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-some-length-3141592653"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_replicas_answer_like_one_endpoint_and_follow_a_move_and_end_within_seconds(
    tmp_path: Path, command_environment: dict[str, str]
) -> None:
    pytest.importorskip("grpc_reflection", reason="needs graceful[serve]")
    root = tiny.new_workspace(tmp_path / "ws")
    running.update(root)
    first = open_workspace(str(root)).registry.serving().champion
    payload = bytes(pq.read_table(root / "digits.parquet")["image"][0].as_py()["bytes"])
    with TestClient(make_app(str(root))) as alone:
        expected = alone.post("/search?k=5", content=payload).json()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "graceful.flows.cli", "serve", "--http", "--root", str(root)]
    command += ["--replicas", "2", "--port", str(port)]
    environment = {**command_environment, "GRACEFUL_SEARCH_TOKEN": TOKEN}
    headers = {"authorization": f"Bearer {TOKEN}"}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while "by 2 replicas" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        address = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert httpx.post(f"{address}/search", content=payload).status_code == 401

        def answers() -> list[httpx.Response]:
            return [httpx.post(f"{address}/search?k=5", content=payload, headers=headers) for _ in range(12)]

        for answer in answers():
            assert answer.status_code == 200, answer.text
            found = answer.json()
            assert [hit["item_id"] for hit in found["hits"]] == [hit["item_id"] for hit in expected["hits"]]
            assert found["snapshot_id"] == expected["snapshot_id"]
        starts = {
            re.search(r"^process_start_time_seconds (\S+)$", page, re.MULTILINE)[1]  # type: ignore[index]
            for page in (httpx.get(f"{address}/metrics", headers=headers).text for _ in range(30))
        }
        assert len(starts) == 2, "each replica is a process of its own"

        tiny.write_config(root, root / "digits.parquet", {"training.seed": 1})
        running.update(root)
        second = open_workspace(str(root)).registry.serving().champion
        assert second != first
        deadline = time.monotonic() + 20
        while True:
            found = [answer.json() for answer in answers()]
            assert all(one["snapshot_id"].startswith(one["query_generation"]) for one in found)
            if {one["query_generation"] for one in found} == {second}:
                break
            assert time.monotonic() < deadline
        os.kill(process.pid, signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(30) == 143, log.read_text()
        assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait(10)
    text = log.read_text()
    assert TOKEN not in text
    assert "Traceback" not in text
    assert "*** SIGTERM" not in text


def test_replicas_are_refused_by_name_where_ray_serve_is_not_installed_and_beside_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    both = CliRunner().invoke(app, ["serve", "--http", "--root", str(root), "--replicas", "2", "--shards", "2"])
    assert "expected --shards or --replicas, found both" in both.stderr
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    refused = CliRunner().invoke(app, ["serve", "--http", "--root", str(root), "--replicas", "2"])
    assert refused.exit_code == 1
    assert "pip install 'graceful[serve]'" in refused.stderr
