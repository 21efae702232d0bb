"""What happens to a workspace is told to a webhook and to the flow server, and what cannot be told stops nothing."""

import http.server
import json
import threading
import time
import uuid

import httpx
import pyarrow as pa
import pytest

from graceful.errors import GracefulError
from graceful.flows.commands.status import roll_back
from graceful.flows.runtime import notify
from graceful.flows.runtime.notify import Notice, tell
from graceful.flows.runtime.service import stuck_update
from graceful.flows.settings.config import load_notify_config, load_workspace_config
from graceful.flows.settings.notify import NotifyConfig
from graceful.flows.store.claim import claim
from graceful.flows.store.workspace import Workspace
from graceful.indexing.items import NEW_ITEM_COLUMNS
from tests.flows import running, tiny

NOTICE = Notice("hold", "HOLD: too many flips", "e1/None", "g002-abcdef", {"outcome": "HOLD"})


class Receiver:
    """Takes what is posted; `refuse` answers so many times with 503 first, `hang` never answers."""

    def __init__(self):
        self.posted, self.refuse, self.hang = [], 0, threading.Event()
        self.hang.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.hang.wait(20)
                outer.posted.append(body)
                outer.refuse -= 1
                self.send_response(503 if outer.refuse >= 0 else 204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=s3cret"


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setattr(notify, "_SECONDS_BETWEEN_TRIES", 0.01)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    found = Receiver()
    yield found
    found.hang.set()
    found.server.shutdown()
    found.server.server_close()


def test_a_notice_is_posted_as_json_and_the_same_one_has_the_same_id(receiver):
    for _ in range(2):
        assert tell("/srv/shop", "shop", NotifyConfig(webhook=receiver.url), NOTICE) == []
    first, second = receiver.posted
    assert first["id"] == second["id"]
    assert {**first, "at": "", "id": ""} == {
        "id": "", "event": "graceful.hold", "at": "", "pipeline": "shop", "workspace": "/srv/shop",
        "generation": "g002-abcdef", "summary": "HOLD: too many flips", "outcome": "HOLD",
    }  # fmt: skip


def test_a_webhook_that_refuses_is_asked_again_and_then_given_up_without_its_address(receiver, caplog):
    config = NotifyConfig(webhook=receiver.url)
    receiver.refuse = 2
    assert tell("/srv/shop", "shop", config, NOTICE) == []
    assert len(receiver.posted) == 3
    receiver.refuse = 100
    (line,) = tell("/srv/shop", "shop", config, NOTICE)
    assert line == "the webhook at 127.0.0.1 did not take it (HTTPError 503)"
    assert len(receiver.posted) == 6
    assert "did not take it" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.timeout(60)
def test_a_webhook_that_hangs_is_not_waited_for(receiver):
    receiver.hang.clear()
    started = time.monotonic()
    (line,) = tell("/srv/shop", "shop", NotifyConfig(webhook=receiver.url, timeout_s=0.2), NOTICE)
    assert "did not take it (TimeoutError)" in line or "did not answer in time" in line
    assert time.monotonic() - started < 10


def test_an_address_may_come_from_the_environment_and_must_be_one(tmp_path, monkeypatch):
    tiny.write_config(tmp_path, tmp_path / "digits.parquet", {"notify.webhook": "$SHOP_HOOK"})
    monkeypatch.setenv("SHOP_HOOK", "https://hooks.example.org/1")
    assert load_notify_config(str(tmp_path)) == ("tiny", NotifyConfig(webhook="https://hooks.example.org/1"))
    monkeypatch.delenv("SHOP_HOOK")
    with pytest.raises(GracefulError, match="SHOP_HOOK"):
        load_workspace_config(str(tmp_path))
    with pytest.raises(ValueError, match="https://"):
        NotifyConfig(webhook="ftp://nowhere")


def test_an_update_tells_what_was_decided_and_a_rollback_tells_who_and_why(workspace_root, digits_file, receiver):
    changes = {**tiny.grown(5), "notify.webhook": receiver.url, "rollout.approval": "always"}
    tiny.write_config(workspace_root, digits_file, changes)
    result = running.update(workspace_root)
    (asked,) = receiver.posted
    assert (asked["event"], asked["generation"]) == ("graceful.awaiting_approval", result.candidate)
    assert asked["outcome"] == result.outcome
    tiny.write_config(workspace_root, digits_file, {**changes, "rollout.approval": "never"})
    running.update(workspace_root)
    decided = receiver.posted[-1]
    assert (decided["event"], decided["champion"]) == ("graceful.decision", result.candidate)
    receiver.refuse = 100  # and nobody there to be told stops no rollback
    roll_back(str(workspace_root), "not what we wanted")
    told = receiver.posted[-1]
    assert (told["event"], told["reason"], "@" in told["by"]) == ("graceful.rollback", "not what we wanted", True)
    assert Workspace(str(workspace_root)).registry.serving().champion == told["champion"] != result.candidate


def test_items_that_cannot_be_read_are_told_above_the_limit(workspace_root, digits_file, receiver):
    """A decided update run again embeds what it can; here one image in eleven has gone for good."""
    workspace = Workspace(str(workspace_root))
    items = workspace.gallery.items_table.snapshot().rows(list(NEW_ITEM_COLUMNS))
    gone = [{**row, "item_id": f"gone-{row['item_id']}", "source": "/nowhere.png"} for row in items.to_pylist()[:10]]
    workspace.gallery.ingest(pa.Table.from_pylist(gone, schema=items.schema))
    for share in (0.2, 0.05):
        tiny.write_config(
            workspace_root, digits_file, {"notify": {"webhook": receiver.url, "max_unreadable_share": share}}
        )
        assert running.update(workspace_root).repeated
    (told,) = receiver.posted
    assert (told["event"], told["unreadable"], told["items"]) == ("graceful.unreadable", 10, 110)


def test_an_update_under_way_for_too_long_is_stuck(tmp_path):
    assert stuck_update(str(tmp_path), 1e-6) is None
    with claim(str(tmp_path), "an update"):
        assert stuck_update(str(tmp_path), 24) is None
        found = stuck_update(str(tmp_path), 1e-6)
        assert found.kind == "stuck"
        assert "an update has been under way for more than 1e-06 hours (process " in found.summary
        assert stuck_update(str(tmp_path), 1e-6).key == found.key, "the same one, told once"
    assert stuck_update(str(tmp_path), 1e-6) is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_flow_server_has_it_as_an_event(flow_server, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", flow_server["PREFECT_API_URL"])
    name = f"shop-{uuid.uuid4().hex[:8]}"  # other tests tell the same server
    assert tell("/srv/shop", name, NotifyConfig(timeout_s=30), NOTICE) == []
    wanted = {"filter": {"resource": {"id": [f"graceful.pipeline.{name}"]}}}
    deadline = time.monotonic() + 60
    events = []
    while not events and time.monotonic() < deadline:
        events = httpx.post(f"{flow_server['PREFECT_API_URL']}/events/filter", json=wanted, timeout=30).json()["events"]
        time.sleep(0.2)
    (event,) = events
    assert event["resource"]["prefect.resource.id"] == f"graceful.pipeline.{name}"
    assert event["payload"]["summary"] == "HOLD: too many flips"
