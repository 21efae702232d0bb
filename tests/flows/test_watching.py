"""New images in a folder or a bucket begin an update: once, when it is quiet, and also after a restart."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Suspended

from graceful.files import write_bytes
from graceful.flows import schedule
from graceful.flows.deployments import UPDATE, deployments
from graceful.flows.runtime.notify import Notice
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.claim import claim
from graceful.flows.watching import NEW_DATA, begin_update, digest_of, watch_data
from tests.flows import tiny
from tests.flows.test_object_store import bucket  # noqa: F401  a fixture

pytestmark = pytest.mark.timeout(120)

QUIET_S = 0.6
LOOK_S = 0.1


@contextlib.contextmanager
def watching(root: Path, begin: Callable[[], Any]) -> Iterator[None]:
    """The service's loop, with short times, in a thread of its own."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(watch_data(str(root), LOOK_S, QUIET_S, begin))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        loop.close()


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where images come: a folder, or a prefix of a bucket."""
    return str(tmp_path / "photos") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/photos"


def workspace_of(folder: Path, place: str) -> Path:
    root = folder / "ws"
    tiny.write_config(root, folder / "unused", {"training_data": {"source": "folder", "path": place}})
    (root / ".prefect").mkdir()
    return root


def waited(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_new_images_begin_one_update_once_they_are_all_there(tmp_path: Path, place: str) -> None:
    root, begun = workspace_of(tmp_path, place), []

    async def begin() -> None:
        begun.append(time.monotonic())

    with watching(root, begin):
        time.sleep(3 * QUIET_S)
        assert begun == [], "there is nothing yet"
        for number in range(8):  # an upload that takes longer than it has to be quiet
            write_bytes(f"{place}/ann/{number}.png", bytes(number))
            time.sleep(QUIET_S / 4)
        last = time.monotonic()
        assert begun == [], "they still come"
        waited(lambda: begun)
        assert begun[0] - last > QUIET_S / 2
        time.sleep(3 * QUIET_S)
        assert len(begun) == 1, "nothing new"
        write_bytes(f"{place}/ann/3.png", b"another image")
        waited(lambda: len(begun) == 2)
        time.sleep(QUIET_S)
    with watching(root, begin):
        time.sleep(3 * QUIET_S)
        assert len(begun) == 2, "a service that starts again knows what it began for"
    write_bytes(f"{place}/ben/1.png", b"while no service ran")
    with watching(root, begin):
        waited(lambda: len(begun) == 3)


def test_a_file_that_grows_or_is_written_anew_is_new_and_one_that_is_only_read_is_not(tmp_path: Path) -> None:
    image = tmp_path / "photos" / "ann" / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"1")
    places = [str(tmp_path / "photos")]
    seen = digest_of(places)
    image.read_bytes()
    assert digest_of(places) == seen
    os.utime(image, ns=(0, 123))
    touched = digest_of(places)
    assert touched != seen
    image.write_bytes(b"12")
    os.utime(image, ns=(0, 123))
    assert digest_of(places) != touched, "by size"
    image.rename(image.with_name("2.png"))
    assert digest_of([str(image.with_name("2.png"))]) not in (None, seen, touched)
    assert digest_of([str(tmp_path / "nowhere")]) is None


def test_what_could_not_be_begun_or_seen_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "photos"
    root, tries = workspace_of(tmp_path, str(place)), []
    write_bytes(f"{place}/ann/1.png", b"1")
    configuration = (root / "graceful.toml").read_text()
    (root / "graceful.toml").write_text("half a li")

    async def begin() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("the flow server does not answer")

    with watching(root, begin):
        time.sleep(2 * QUIET_S)
        assert not tries
        (root / "graceful.toml").write_text(configuration)
        waited(lambda: len(tries) == 3)
        time.sleep(2 * QUIET_S)
    assert len(tries) == 3
    assert caplog.text.count("looking for new data: the flow server does not answer") == 2


def test_an_update_that_waits_already_is_enough(
    workspace_root: Path, flow_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in flow_server.items():
        monkeypatch.setenv(name, value)

    async def twice() -> tuple[list[bool], list[Any]]:
        config = load_workspace_config(str(workspace_root))
        wanted = await deployments(str(workspace_root), config, "a test", name="watched", schedules=[])
        identity = await wanted[UPDATE].aapply()
        begun = [await begin_update(identity), await begin_update(identity)]
        async with get_client() as client:
            return begun, [run for run in await client.read_flow_runs() if run.deployment_id == identity]

    with temporary_settings({PREFECT_API_URL: flow_server["PREFECT_API_URL"]}):
        begun, runs = asyncio.run(twice())
    assert begun == [True, False]
    assert [sorted(run.tags) for run in runs] == [["graceful", NEW_DATA]]


def test_the_service_looks_for_data_for_stuck_updates_and_for_answers_beside_its_runs(
    tmp_path: Path, flow_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own order, on a real server; nothing is carried out, and it ends once all three were seen."""
    root = workspace_of(tmp_path, str(tmp_path / "photos"))
    write_bytes(str(tmp_path / "photos" / "ann" / "1.png"), b"1")
    name = f"beside-{os.getpid()}"
    changes = {"watch_minutes": LOOK_S / 60, "quiet_minutes": QUIET_S / 60}
    tables = {"training_data": {"source": "folder", "path": str(tmp_path / "photos")}, "schedule": changes}
    tiny.write_config(root, tmp_path / "unused", {**tables, "name": name, "notify": {"stuck_hours": 1e-6}})
    told: list[Notice] = []
    monkeypatch.setattr(schedule, "tell", lambda *given: told.append(given[-1]))
    monkeypatch.setattr(schedule, "is_answered", lambda where, key: (where, key) == (str(root), "answered"))
    seen: set[str] = set()

    async def until_all_were_seen(_: object) -> None:
        deadline = time.monotonic() + 60
        async with get_client() as client:
            deployment = await client.read_deployment_by_name(f"{UPDATE}/{name}")
            asked = await client.create_flow_run_from_deployment(deployment.id, state=Suspended(pause_key="answered"))
            while seen != {"new data", "stuck", "woken"}:
                assert time.monotonic() < deadline, f"within the time only {seen}"
                for run in await client.read_flow_runs():
                    if run.deployment_id == deployment.id and NEW_DATA in run.tags:
                        seen.add("new data")
                asked = await client.read_flow_run(asked.id)
                seen.update({"woken"} if asked.state_name == "Resuming" else ())
                seen.update(notice.kind for notice in told)
                await asyncio.sleep(0.1)

    monkeypatch.setattr(schedule, "_until_signalled", until_all_were_seen)
    with temporary_settings({PREFECT_API_URL: flow_server["PREFECT_API_URL"]}), claim(str(root), "an update"):
        config = load_workspace_config(str(root))
        asyncio.run(schedule._run(str(root), config, flow_server["PREFECT_API_URL"], at_once=False))
    assert seen == {"new data", "stuck", "woken"}
    assert len(told) == 1
