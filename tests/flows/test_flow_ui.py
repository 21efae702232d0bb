"""What a person sees and does: runs, artifacts and the form of a decision in the flow UI, and the report, in a browser.

GRACEFUL_WRITE_SCREENSHOTS=1 writes the pictures of docs/images; otherwise they go to a temporary folder.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from graceful.flows.overlap import SKIPPED
from graceful.flows.runtime.server import flow_server
from graceful.flows.store.events import ApprovalAnswered
from graceful.flows.store.workspace import open_workspace
from tests.flows import running, tiny
from tests.flows.browsing import NEEDS_BROWSER, open_browser, visit
from tests.flows.conftest import Spawn
from tests.flows.test_service import environment, free_port

CODE = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    *NEEDS_BROWSER,
]


@dataclass(frozen=True)
class ShownUpdate:
    """A finished update in a flow server that still runs."""

    base: str
    run: str
    report: Path
    outcome: str
    root: Path


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShownUpdate]:
    """The second update of a workspace, run by the command line under the workspace's own flow server."""
    changes: dict[str, Any] = {"name": "digits", "training.epochs": 6, "training.first_max_lr": 0.1}
    changes |= {"policy": {}, "prices": {}}
    root = tiny.new_workspace(tmp_path_factory.mktemp("ui") / "ws", changes)
    running.update(root)
    tiny.write_config(root, root / "digits.parquet", {**changes, "training.epochs": 2, **tiny.grown(5)})
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        for name, value in {
            "PREFECT_SERVER_UI_V2_ENABLED": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PYTHONPATH": str(CODE),
        }.items():
            patch.setenv(name, value)
        with flow_server(str(root), "127.0.0.1", port) as api:
            command = [sys.executable, "-m", "graceful.flows.cli", "update", "--root", str(root), "--paragon"]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
            assert done.returncode in (0, 3, 4), done.stderr[-3000:]
            (run,) = httpx.post(f"{api}/flow_runs/filter", json={}, timeout=30).json()
            assert (run["state_type"], run["name"]) == ("COMPLETED", "digits g002")
            assert run["state_name"].split()[0].rstrip(":") in run["tags"]
            shown_as = run["state_name"].split()[0]
            report = max(root.glob("evaluations/*/report.html"), key=lambda path: path.stat().st_mtime)
            yield ShownUpdate(api.removesuffix("/api"), run["id"], report, shown_as, root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def keep(page: Any, path: Path, height: int) -> None:
    """Keep a picture of a page, in few colours: pages have few, and the file is small."""
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1280, "height": height})
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)
    few.save(path, optimize=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    if os.environ.get("GRACEFUL_WRITE_SCREENSHOTS") != "1":
        return tmp_path
    folder = CODE / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_flow_run_shows_its_tasks_and_its_artifacts(browser: Any, shown: ShownUpdate, pictures: Path) -> None:
    from playwright.sync_api import expect

    # The interface draws an artifact's card only once it is in view.
    seen = visit(browser, shown.base, 1280, 1600)
    page = seen.page
    page.goto(f"{shown.base}/runs/flow-run/{shown.run}")
    page.wait_for_load_state("networkidle")
    expect(page.get_by_text(shown.outcome).first).to_be_visible(timeout=30_000)
    page.get_by_role("tablist").get_by_text("Task Runs", exact=True).click()
    for name in ("freeze inputs", "train candidate", "train paragon", "judge", "publish"):
        expect(page.get_by_text(name).first).to_be_visible(timeout=20_000)
    keep(page, pictures / "flow-run.png", 1200)
    page.get_by_role("tablist").get_by_text("Artifacts", exact=True).click()
    for key in ("digits-compatibility-matrix", "digits-decision", "digits-report", "digits-learning-curve"):
        expect(page.get_by_text(key).first).to_be_visible(timeout=20_000)

    artifacts = httpx.post(f"{shown.base}/api/artifacts/latest/filter", json={}, timeout=30).json()
    ids = {found["key"]: found["latest_id"] for found in artifacts}
    for key, texts in {
        "digits-decision": ("Decision",),
        "digits-compatibility-matrix": ("g001", "g002"),
        "digits-learning-curve": ("The loss went from",),
    }.items():
        page.goto(f"{shown.base}/artifacts/artifact/{ids[key]}")
        page.wait_for_load_state("networkidle")
        for text in texts:
            expect(page.get_by_text(text).first).to_be_visible(timeout=20_000)
        picture = page.locator("img[src^='data:image/png']").first
        expect(picture).to_be_visible(timeout=20_000)
        assert picture.evaluate("image => image.naturalWidth") > 100
        names = {"digits-decision": "flow-decision.png", "digits-compatibility-matrix": "flow-artifacts.png"}
        keep(page, pictures / names.get(key, "flow-learning-curve.png"), 860)
    assert seen.outside == []
    page.close()


def test_a_decision_is_accepted_in_the_form_and_the_runs_read_as_a_history(
    browser: Any, shown: ShownUpdate, pictures: Path, spawn: Spawn, tmp_path: Path
) -> None:
    """A run that finds nothing new, one that is skipped, and one that waits until somebody has pressed Resume."""
    from playwright.sync_api import expect

    api = f"{shown.base}/api"
    ask = functools.partial(running.ask_server, api)
    flow = ask("POST", "/flows/", {"name": "graceful-update"})["id"]
    deployment = ask("POST", "/deployments/", {"name": "digits", "flow_id": flow, "enforce_parameter_schema": False})

    def begun(*, train_paragon: bool = False, **state: str) -> str:
        parameters = {"workspace": str(shown.root), "train_paragon": train_paragon}
        wanted = {"parameters": parameters, "state": {"type": "SCHEDULED", **state}}
        return str(ask("POST", f"/deployments/{deployment['id']}/create_flow_run", wanted)["id"])

    def carried_out(run: str) -> str:
        log = tmp_path / "log"
        process = spawn(running.deployed_run_in_child, run, str(log), {"PREFECT_API_URL": api})
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
        return str(ask("GET", f"/flow_runs/{run}")["state_name"])

    begun(type="CANCELLED", name=SKIPPED, message="Skipped: another update was under way when it was due.")
    assert carried_out(begun(train_paragon=True)) == "Nothing new"
    wide = {"name": "digits", "training.epochs": 2, "rollout.approval": "always", **tiny.grown(6)}
    tiny.write_config(shown.root, shown.root / "digits.parquet", wide)
    waits = begun()
    assert carried_out(waits) == "AWAITING APPROVAL"

    seen = visit(browser, shown.base, 1280, 1600)
    page = seen.page
    page.goto(f"{shown.base}/runs/flow-run/{waits}")
    page.get_by_role("button", name="Resume").first.click()
    form = page.get_by_role("dialog")
    expect(form.get_by_text("guards pass").first).to_be_visible(timeout=20_000)
    answer = form.locator(".p-select-button__control").first
    answer.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".p-select-option").first).to_have_text("accept")
    page.keyboard.press("Enter")
    for place, text in zip(form.locator("textarea").all(), ("fewer are lost than are won", "Ada"), strict=True):
        place.fill(text)
    keep(page, pictures / "flow-approval.png", 1500)
    form.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Flow run resumed").first).to_be_visible(timeout=20_000)
    assert carried_out(waits).startswith("COMPATIBLE_ROLLOUT")
    (given,) = open_workspace(str(shown.root)).registry.events(ApprovalAnswered)
    assert (given.payload.answer, given.payload.by) == ("accepted", "Ada")

    page.goto(f"{shown.base}/runs")
    for text in ("COMPATIBLE_ROLLOUT", "Nothing new", SKIPPED, shown.outcome):
        expect(page.get_by_text(text).first).to_be_visible(timeout=20_000)
    keep(page, pictures / "flow-history.png", 1160)
    assert seen.outside == []
    page.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (400, 850)])
def test_the_report_opens_offline_without_a_complaint_on_desk_and_phone(
    browser: Any, shown: ShownUpdate, width: int, height: int
) -> None:
    seen = visit(browser, shown.report.as_uri(), width, height, offline=True)
    seen.page.goto(shown.report.as_uri())
    seen.page.wait_for_load_state("networkidle")
    assert seen.errors == []
    assert seen.outside == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert seen.page.evaluate(broken) == 0
    assert seen.page.evaluate("document.images.length") > 0, "pictures of the digits that would be lost"
    seen.page.close()
