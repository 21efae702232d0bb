"""What the search endpoint promises its clients and operators: answers, its page, its token, its figures."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fastapi.testclient import TestClient
from openapi_spec_validator import validate
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.runtime.cluster import runtime_environment
from graceful.flows.search.answering import Answer
from graceful.flows.search.guarding import TOKEN_VARIABLE, Token, read_token
from graceful.flows.search.http import make_app
from graceful.flows.search.refusals import KINDS
from graceful.flows.settings.config import ConfigError
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.flows.store.registry import Plan
from graceful.flows.store.workspace import open_workspace
from tests.flows import running, tiny

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "examples" / "monitoring"
TOKEN = "a-token-of-some-length-3141592653"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("contract") / "ws")
    running.update(root)
    return root


@pytest.fixture(scope="module")
def client(workspace: Path) -> Iterator[TestClient]:
    with TestClient(make_app(str(workspace), refresh_s=0.1)) as found:
        yield found


@pytest.fixture(scope="module")
def payload(workspace: Path) -> bytes:
    return bytes(pq.read_table(workspace / "digits.parquet")["image"][0].as_py()["bytes"])


def figures(client: TestClient) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


# Answers


def test_an_answer_names_no_file_of_the_server_unless_it_is_asked_for(
    workspace: Path, client: TestClient, payload: bytes
) -> None:
    plain = client.post("/search?k=3", content=payload)
    assert str(workspace) not in plain.text
    assert [set(hit) for hit in plain.json()["hits"]] == [{"item_id", "score", "generation", "label", "above"}] * 3
    named = client.post("/search?k=3&sources=true", content=payload).json()["hits"]
    assert all(hit["source"].startswith(f"{workspace}/digits.parquet#") for hit in named)
    assert [hit["item_id"] for hit in named] == [hit["item_id"] for hit in plain.json()["hits"]]
    with TestClient(make_app(str(workspace), config=EndpointConfig(sources=True))) as configured:
        assert configured.post("/search?k=3", content=payload).json()["hits"] == named
        hits = configured.post("/search?k=3&sources=false", content=payload).json()["hits"]
        assert all("source" not in hit for hit in hits)


def test_the_workspaces_own_table_is_what_the_endpoint_accepts(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws", {"endpoint.max_image_mib": 1})
    running.update(root)
    with TestClient(make_app(str(root))) as client:
        assert client.post("/search", content=b"x" * (2**20 + 1)).status_code == 413
        assert client.post("/search", content=b"x" * 2**20).status_code == 422


def test_every_refusal_has_a_kind_that_is_counted(client: TestClient) -> None:
    before = figures(client)
    asked = [
        ({"content": b"no image"}, "unreadable_image"),
        ({"json": {"vector": [1.0]}}, "wrong_vector"),
        ({"json": {"vector": [1.0] * 16, "generation": "g000-000000"}}, "other_generation"),
        ({"json": {"vector": [1.0] * 16, "as": "edge"}}, "unknown_variant"),
        ({"json": {"vektor": []}}, "wrong_request"),
        ({"content": b""}, "wrong_request"),
        ({"params": {"k": 0}, "content": b"x"}, "wrong_request"),
        ({"json": {"vector": [1.0] * 16_000}}, "too_large"),
    ]
    for values, kind in asked:
        answer = client.post("/search", **values)  # type: ignore[arg-type]
        assert answer.json()["kind"] == kind, answer.text
        assert kind in KINDS
    after = figures(client)
    for kind in KINDS:
        name = f'graceful_search_errors_total{{kind="{kind}"}}'
        assert after[name] - before[name] == sum(expected == kind for _, expected in asked)


# The page


def test_the_openapi_document_is_valid_and_describes_every_body_with_an_example_that_is_one(
    client: TestClient, payload: bytes
) -> None:
    document = client.get("/openapi.json").json()
    validate(document)
    search = document["paths"]["/search"]["post"]
    assert set(search["responses"]) == {"200", "400", "401", "404", "408", "409", "413", "422", "429", "503"}
    answer = search["responses"]["200"]["content"]["application/json"]
    assert answer["schema"] == {"$ref": "#/components/schemas/Answer"}
    Answer.model_validate(answer["example"])
    assert set(client.post("/search?k=1", content=payload).json()) == set(answer["example"])
    for status in ("400", "401", "404", "408", "409", "413", "422", "429", "503"):
        refusal = search["responses"][status]["content"]["application/json"]
        assert refusal["example"]["kind"] in KINDS
        assert set(refusal["schema"]["required"]) == set(refusal["example"])
    named = {"k", "sources", "as", "generation", "x-graceful-generation"}
    assert {parameter["name"] for parameter in search["parameters"]} == named


def test_the_page_shows_the_document_and_loads_nothing(client: TestClient) -> None:
    page = client.get("/docs").text
    for shown in ("POST /search", "GET /health", "GET /metrics", "multipart/form-data", "photos/2024/cat.jpg", "429"):
        assert shown in page
    assert not re.search(r"<script|<link|<img|https?://", page)


# The token


def test_every_path_but_health_needs_the_token(
    workspace: Path, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with TestClient(make_app(str(workspace), token=Token(TOKEN))) as client:
        assert client.get("/health").status_code == 200
        wrong = [
            {},
            {"authorization": f"Bearer {TOKEN[:-1]}"},
            {"authorization": f"Bearer {TOKEN}x"},
            {"authorization": TOKEN},
            {"authorization": f"Basic {TOKEN}"},
            {"authorization": "Bearer "},
            {"authorization": b"Bearer \xff\xfe"},
        ]
        for path in ("/status", "/metrics", "/openapi.json", "/docs", "/elsewhere"):
            for headers in wrong:
                answer = client.get(path, headers=headers)  # type: ignore[arg-type]
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert client.post("/search", content=payload).status_code == 401
        right = {"authorization": f"bearer {TOKEN}"}
        assert client.post("/search", content=payload, headers=right).status_code == 200
        counted = client.get("/metrics", headers=right).text
        assert f'graceful_search_errors_total{{kind="unauthorized"}} {5 * len(wrong) + 1}.0' in counted
        assert TOKEN not in counted + caplog.text + repr(vars(Token(TOKEN)))


def test_a_token_is_read_from_a_file_or_the_environment_and_needed_where_others_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None, "127.0.0.1", refused=False) is None
    assert read_token(None, "0.0.0.0", refused=True) is None
    for host in ("0.0.0.0", "", "::", "192.168.1.7", "search.example.org"):
        with pytest.raises(ConfigError, match=r"expected a token .* --no-token"):
            read_token(None, host, refused=False)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv(TOKEN_VARIABLE, "another-token-of-some-length")
    from_file, from_environment = (
        read_token(str(file), "0.0.0.0", refused=False),
        read_token(None, "::1", refused=False),
    )
    assert from_file is not None
    assert from_environment is not None
    assert from_file.admits(f"Bearer {TOKEN}".encode())
    assert not from_environment.admits(f"Bearer {TOKEN}".encode())
    assert TOKEN_VARIABLE not in runtime_environment()["env_vars"], "Ray shows it in its dashboard"
    for text in ("", "short"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"16 characters or more, found {len(text)}"):
            read_token(str(file), "127.0.0.1", refused=False)
    with pytest.raises(ConfigError, match="expected a text file, found FileNotFoundError"):
        read_token(str(tmp_path / "none"), "127.0.0.1", refused=False)


def test_the_command_is_refused_without_a_token_for_other_hosts_and_where_the_port_is_taken(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    serve = ["serve", "--http", "--root", str(workspace)]
    refused = CliRunner().invoke(app, [*serve, "--host", "0.0.0.0"])
    assert refused.exit_code == 2
    assert "expected a token" in refused.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = CliRunner().invoke(app, [*serve, "--port", str(port)])
    assert refused.exit_code == 1
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_real_command_needs_its_token_and_ends_within_seconds_of_a_signal_with_one_line(
    workspace: Path, command_environment: dict[str, str], tmp_path: Path, payload: bytes, sign: int, code: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "graceful.flows.cli", "serve", "--http", "--root", str(workspace)]
    command += ["--host", "0.0.0.0", "--port", str(port)]
    log = tmp_path / "log"
    environment = {**command_environment, TOKEN_VARIABLE: TOKEN}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        address, headers = f"http://127.0.0.1:{port}/search?k=1", {"authorization": f"Bearer {TOKEN}"}
        assert httpx.post(address, content=payload).status_code == 401
        assert httpx.post(address, content=payload, headers=headers).status_code == 200
        with socket.create_connection(("127.0.0.1", port)) as half:
            head = f"POST /search HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 9\r\n\r\n"
            half.sendall(head.encode() + b"x")
            time.sleep(0.3)
            os.kill(process.pid, sign)
            started = time.monotonic()
            assert process.wait(30) == code, log.read_text()
            assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait(10)
    text = log.read_text()
    assert "Traceback" not in text
    assert TOKEN not in text
    assert text.splitlines()[-1] == "interrupted; run the same command again to go on"


# Figures


def test_the_figures_say_who_serves_and_what_cannot_be_found(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    with TestClient(make_app(str(root), refresh_s=0.05)) as client:
        assert figures(client)["graceful_serving"] == 0
        assert figures(client)["graceful_last_look_ok"] == 0
        running.update(root)
        opened = open_workspace(str(root))
        champion = str(opened.registry.serving().champion)
        deadline = time.monotonic() + 20
        while (found := figures(client)).get(f'graceful_rows{{generation="{champion}"}}') != 100:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert found["graceful_serving"] == found["graceful_last_look_ok"] == 1
        assert found[f'graceful_serving_generation{{generation="{champion}"}}'] == 1
        assert found["graceful_items"] == 100
        assert found["graceful_unreadable_share"] == 0
        age = time.time() - opened.registry.serving_periods()[-1][1]
        assert found["graceful_champion_age_seconds"] == pytest.approx(age, abs=5)
        assert found["graceful_last_look_age_seconds"] < 5
        assert not any(name.startswith("graceful_plan_items") for name in found)
        client.post("/search", json={"vector": [1.0] * 16})
        assert figures(client)['graceful_search_seconds_count{kind="vector"}'] == 1
        assert figures(client)['graceful_search_seconds_count{kind="image"}'] == 0


def test_the_figures_say_how_far_a_re_index_is(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    running.update(root)
    registry = open_workspace(str(root)).registry
    champion = str(registry.serving().champion)
    with TestClient(make_app(str(root), refresh_s=0.05)) as client:
        assert not any(name.startswith("graceful_plan_items") for name in figures(client))
        plan = Plan(
            plan_id="p1", generation=champion, order="random", seed=0, fraction=0.4, num_items=40, num_wave_zero=0,
            num_waves=1, before_move="wave_zero", decision="none",
        )  # fmt: skip
        revisions = open_workspace(str(root)).gallery.view([champion]).revisions[:40]
        registry.save_plan(plan, pa.table({"wave": np.ones(40), "position": np.arange(40), "revision": revisions}))
        registry.move_serving(registry.serving(), active_plan="p1")
        until(lambda: figures(client).get(f'graceful_plan_items{{generation="{champion}"}}') == 40)
        registry.move_serving(registry.serving(), active_plan=None)
        until(lambda: not any(name.startswith("graceful_plan_items{") for name in figures(client)))


def test_alerts_and_dashboard_name_only_figures_that_the_endpoint_has(client: TestClient) -> None:
    known = set(re.findall(r"^# TYPE (\w+) ", client.get("/metrics").text, re.MULTILINE))
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    scrape = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["metrics_path"] == "/metrics"
    assert all({"alert", "expr", "annotations"} <= set(rule) for rule in rules)
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions = [rule["expr"] for rule in rules] + shown
    named: set[str] = set()
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        named |= set(re.findall(r"\b((?:graceful|process)_\w+)", expression))
        for kinds in re.findall(r'kind=~?"([^"]+)"', expression):
            assert set(kinds.split("|")) <= set(KINDS)
    assert named
    endings = ("", "_bucket", "_sum", "_count")
    assert [name for name in named if not any(name.removesuffix(end) in known for end in endings)] == []
    unshown = {name for name in known if name.startswith("graceful_") and not name.endswith("_created")}
    unshown -= {re.sub("_(bucket|sum|count)$", "", name) for name in named} | {"graceful_serving"}
    assert unshown == set(), "a figure that neither alert nor dashboard uses"


def test_the_dashboard_lays_its_panels_beside_one_another() -> None:
    panels: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
