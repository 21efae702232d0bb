"""Reports over HTTP: what is listed and read, what is not, and a token in a browser that cannot send a header."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from graceful.flows.settings.config import ReportConfig
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import Decided
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update.publish import publish
from tests.flows import tiny
from tests.flows.browsing import NEEDS_BROWSER, open_browser, visit
from tests.flows.test_learning import Recorder
from tests.flows.test_service import free_port

TOKEN = "a-token-of-some-length"

pytestmark = pytest.mark.timeout(200)


@dataclass
class Endpoint:
    """`graceful serve --http` with a token."""

    root: Path
    address: str
    evaluation: str
    log: Path


@pytest.fixture(scope="module")
def endpoint(bootstrapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("reports")
    root = tiny.copy_workspace(bootstrapped, folder / "ws")
    (event,) = open_workspace(str(root)).registry.events(Decided)
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "graceful.flows.cli", "serve", "--http", "--root", str(root), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "GRACEFUL_SEARCH_TOKEN": TOKEN}, stdout=output, stderr=output
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health", timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield Endpoint(root, address, event.payload.evaluation, log)
    finally:
        process.terminate()
        process.wait(30)


def test_a_report_is_listed_and_read_with_the_header_and_nothing_else_is(endpoint: Endpoint) -> None:
    evaluation, folder = endpoint.evaluation, endpoint.root / "evaluations" / endpoint.evaluation
    (folder / "private.txt").write_text("not for others")
    (endpoint.root / "evaluations" / "report.html").write_text("not for others")
    with httpx.Client(base_url=endpoint.address, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        listed = client.get("/reports/")
        assert f'href="{evaluation}/report.html"' in listed.text
        page = client.get(f"/reports/{evaluation}/report.html")
        assert page.content == (folder / "report.html").read_bytes()
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (page.headers["referrer-policy"], page.headers["cache-control"]) == ("no-referrer", "no-store")
        for file in ("report.json", "decision.json", "outcomes.parquet"):
            assert client.get(f"/reports/{evaluation}/{file}").content == (folder / file).read_bytes()
        for beyond in (
            f"{evaluation}/private.txt",
            f"{evaluation}/question.json",
            "../graceful.toml",
            "%2e%2e/graceful.toml",
            "..%2f..%2fgraceful.toml/report.html",
            "./report.html",
            "%2e/report.html",
            f"{evaluation}/..%2f{evaluation}%2freport.html",
            f"{evaluation}/%2e%2e%2f..%2fgraceful.toml",
            f"{evaluation}%00/report.html",
            f"%2f{endpoint.root}/evaluations/{evaluation}/report.html",
            "0000000000000000/report.html",
        ):
            refused = client.get(f"/reports/{beyond}")
            assert refused.status_code == 404, beyond
            assert "not for others" not in refused.text
        assert client.post(f"/reports/{evaluation}/report.html").status_code == 405


def test_a_token_in_the_query_becomes_a_cookie_that_opens_reports_alone(endpoint: Endpoint) -> None:
    place = f"/reports/{endpoint.evaluation}/report.html"
    with httpx.Client(base_url=endpoint.address) as client:
        assert client.get(place).status_code == client.get("/reports/").status_code == 401
        assert client.get(f"{place}?token=another-token-of-length").status_code == 401
        assert client.get(f"{place}?token={TOKEN}&token={TOKEN}").status_code == 401
        assert client.get(f"/status?token={TOKEN}").status_code == 401
        assert client.post(f"/search?token={TOKEN}").status_code == 401
        entered = client.get(f"{place}?token={TOKEN}")
        cookie = entered.headers["set-cookie"]
        assert entered.status_code == 200
        assert TOKEN not in entered.text + cookie
        assert "; HttpOnly; SameSite=Strict" in cookie
        assert client.get(place).text.startswith("<!")
        assert client.get("/reports/").status_code == 200
        assert client.get("/status").status_code == client.post("/search").status_code == 401
        assert client.get(place, headers={"authorization": "Bearer another-token-of-length"}).status_code == 401
    for wrong in ("graceful_reports=", "graceful_reports=00", f"graceful_reports={TOKEN}", "graceful_reports=\u00fc"):
        answered = httpx.get(f"{endpoint.address}{place}", headers={b"cookie": wrong.encode("latin-1")})
        assert answered.status_code == 401
    assert TOKEN not in endpoint.log.read_text()


def test_the_flow_ui_links_to_the_endpoint_where_one_is_named(endpoint: Endpoint) -> None:
    workspace, shown = open_workspace(str(endpoint.root)), Recorder()
    (event,) = workspace.registry.events(Decided)
    evaluation = read_evaluation(workspace.evaluation_uri(endpoint.evaluation))
    shows = ReportConfig(url="https://search.example.org/")
    publish(workspace, event.payload, evaluation, shows=shows, name="tiny", progress=shown)
    (artifact,) = [found for found in shown.artifacts if found.key == "tiny-report"]
    assert artifact.link == f"https://search.example.org/reports/{endpoint.evaluation}/report.html"


@pytest.mark.browser
@NEEDS_BROWSER[1]
def test_a_browser_that_follows_a_link_from_another_page_sees_the_report_and_keeps_no_token(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    link = f"{endpoint.address}/reports/{endpoint.evaluation}/report.html?token={TOKEN}"
    elsewhere = tmp_path / "page.html"
    elsewhere.write_text(f'<a href="{link}">report</a>')
    with open_browser() as browser:
        seen = visit(browser, endpoint.address, 1280, 800)
        seen.page.goto(elsewhere.as_uri())
        seen.page.click("a")
        seen.page.wait_for_url(lambda url: "token" not in url, timeout=20_000)
        seen.page.wait_for_selector("h1", timeout=20_000)
        assert "BOOTSTRAP" in seen.page.inner_text("body")
        assert seen.page.evaluate("document.cookie") == ""
        seen.page.goto(f"{endpoint.address}/reports/")
        seen.page.click("a")
        seen.page.wait_for_selector("h1", timeout=20_000)
        assert [error for error in seen.errors if "401" not in error] == [], "it may only miss an icon"
        seen.page.context.clear_cookies()
        assert seen.page.goto(f"{endpoint.address}/reports/").status == 401
