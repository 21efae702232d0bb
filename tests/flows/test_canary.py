"""A candidate beside what serves: who answers, what is counted, when it ends, and what happens to the serving state."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from graceful.flows.runtime.session import open_session
from graceful.flows.search import watching
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, OpenSearcher, ServedSnapshot
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.flows.store.canaries import read_tallies
from graceful.flows.store.events import CanaryEnded, RolledBack
from graceful.flows.store.workspace import open_workspace
from graceful.indexing.reindex import embed_missing
from tests.flows import running, tiny
from tests.flows.conftest import Spawn


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits served by one generation; a second one waits for a person's word."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("canary") / "ws")
    running.update(root)
    tiny.write_config(root, root / "digits.parquet", {"training.seed": 1, "rollout.approval": "always"})
    assert running.update(root).approval == "waiting"
    return root


@pytest.fixture
def root(world: Path, tmp_path: Path) -> Path:
    return tiny.copy_workspace(world, tmp_path / "ws")


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[watching.Notice]:
    """What the endpoints told others."""
    found: list[watching.Notice] = []
    monkeypatch.setattr(watching, "tell_of", lambda _, notice: found.append(notice))
    monkeypatch.setattr(watching, "FLUSH_S", 0.05)
    return found


def names(root: Path) -> tuple[str, str]:
    first, second = open_workspace(str(root)).registry.generations()
    return first, second


def pictures(root: Path, start: int, number: int) -> list[bytes]:
    rows = pq.read_table(root / "digits.parquet")["image"].slice(start, number).to_pylist()
    return [bytes(row["bytes"]) for row in rows]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def start(root: Path, *options: object) -> dict[str, Any]:
    return dict(running.document("canary", "start", "g002", "-r", root, *options))


def stands(root: Path) -> dict[str, Any]:
    return dict(running.document("canary", "status", "-r", root))


def said_by(address: str) -> str:
    try:
        return str(httpx.get(f"{address}/status").json())
    except httpx.HTTPError:
        return ""


class Client:
    """An endpoint of its own on a workspace, as another process would be."""

    def __init__(
        self, root: Path, config: EndpointConfig | None = None, open_searcher: OpenSearcher = GallerySearcher
    ) -> None:
        self.http = TestClient(make_app(str(root), refresh_s=0.05, config=config, open_searcher=open_searcher))

    def __enter__(self) -> "Client":
        self.http.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.__exit__(*error)

    def watches(self) -> bool:
        return bool((self.http.get("/status").json()["canary"] or {}).get("watched_here"))

    def label(self, payload: bytes, **params: str) -> dict[str, Any]:
        judged = self.http.post("/labels", params=params, content=payload)
        assert judged.status_code == 200, judged.text
        return dict(judged.json())

    def ask(self, payload: bytes, **params: object) -> dict[str, Any]:
        answer = self.http.post("/search", params={"k": 5, **params}, content=payload)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture
def client(root: Path) -> Iterator[Client]:
    with Client(root) as found:
        yield found


# Who answers


def test_the_same_picture_is_answered_by_the_same_generation_in_every_process(root: Path, client: Client) -> None:
    first, second = names(root)
    asked = pictures(root, 0, 60)
    assert {client.ask(payload)["query_generation"] for payload in asked} == {first}, "before it begins"
    start(root, "--share", "50%", "--max-changed", "100%")
    until(client.watches)
    answered = [client.ask(payload)["query_generation"] for payload in asked]
    assert 15 <= answered.count(second) <= 45
    assert set(answered) == {first, second}
    assert [client.ask(payload)["query_generation"] for payload in asked] == answered
    with Client(root) as other:
        until(other.watches)
        assert [other.ask(payload)["query_generation"] for payload in asked] == answered
    running.command("canary", "stop", "--reason", "seen enough", "-r", root)
    until(lambda: not client.watches())
    assert {client.ask(payload)["query_generation"] for payload in asked} == {first}
    assert open_workspace(str(root)).registry.certificates() == {(first, first)}, "nothing is certified by watching"


def test_a_shadow_never_answers_and_counts_what_its_answers_would_change(root: Path, client: Client) -> None:
    first, second = names(root)
    started = start(root, "--share", "100%", "--shadow", "--max-changed", "100%")
    assert (started["kind"], started["reference"], started["ended"]) == ("shadow", first, None)
    until(client.watches)
    asked = pictures(root, 0, 80)
    serving = [client.ask(payload) for payload in asked]
    assert {answer["query_generation"] for answer in serving} == {first}
    for payload in asked[:10]:
        client.ask(payload)  # seen before: says nothing new
    until(lambda: stands(root)["compared"] + stands(root)["dropped"] + stands(root)["repeated"] == 90)
    by_name = {}
    for name, header in ((first, None), (second, second)):
        answers = [
            client.http.post(
                "/search?k=5", content=payload, headers={"x-graceful-generation": header} if header else {}
            )
            for payload in asked
        ]
        by_name[name] = [answer.json()["hits"][0]["label"] for answer in answers]
        assert {answer.json()["query_generation"] for answer in answers} == {name}
    found = stands(root)
    assert found["repeated"] + found["dropped"] >= 10
    if not found["dropped"]:
        assert found["compared"] == 80
        assert found["changed"] == sum(one != other for one, other in zip(*by_name.values(), strict=True))
        assert 0 < found["changed"] < 80
    assert 0 < found["overlap"] < 1


def test_a_generation_may_be_asked_by_name_and_one_that_may_not_query_is_refused_by_name(
    root: Path, client: Client
) -> None:
    first, second = names(root)
    payload = pictures(root, 0, 1)[0]
    assert client.ask(payload, generation="g001")["query_generation"] == first
    for name, text in (("g002", f"reading the gallery as {second}"), ("g007", "expected one of g001")):
        refused = client.http.post("/search", params={"generation": name}, content=payload)
        assert (refused.status_code, refused.json()["kind"]) == (409, "other_generation")
        assert text in refused.json()["detail"]
    running.command("accept", "g002", "--reason", "good", "-r", root)
    until(lambda: client.ask(payload)["query_generation"] == second)
    assert client.ask(payload, generation="g001")["query_generation"] == first, "a rollback returns to it"
    vector = [1.0] * 16
    answer = client.http.post("/search?generation=g001", json={"vector": vector, "generation": first})
    assert answer.json()["query_generation"] == first
    assert client.http.post("/search", json={"vector": vector, "generation": first}).status_code == 409


# When it ends


class Shuffled(GallerySearcher):
    """A candidate whose answers have nothing to do with the pictures."""

    @property
    def served(self) -> ServedSnapshot:
        found = super().served
        encode, draw = found.encoder.encode_pixels, np.random.default_rng(0)

        class Encoder:
            card = found.encoder.card

            @staticmethod
            def encode_pixels(pixels: np.ndarray) -> np.ndarray:
                return draw.standard_normal(encode(pixels).shape).astype(np.float32)

        return replace(found, encoder=Encoder())  # type: ignore[arg-type]


def beside(kind: type[GallerySearcher]) -> OpenSearcher:
    """Who does not serve is a searcher of this kind."""
    return lambda workspace, name, granted: (kind if name else GallerySearcher)(workspace, name, granted)


@pytest.mark.parametrize("mode", ["--shadow", "--share=100%"])
def test_a_bad_candidate_is_ended_by_the_bound_and_answers_no_more(
    root: Path, told: list[watching.Notice], mode: str
) -> None:
    first, second = names(root)
    start(root, mode, *([] if "share" in mode else ["--share", "100%"]), "--max-changed", "50%")
    with Client(root, EndpointConfig(batch_searches=64), beside(Shuffled)) as client:
        until(client.watches)
        for payload in pictures(root, 0, 80):
            client.ask(payload)
        until(lambda: stands(root)["ended"])
        found = stands(root)
        assert found["ended"]["outcome"] == "changed"
        assert found["changed_lower"] > 0.5
        assert "above 50.0%" in found["ended"]["reason"]
        until(lambda: not client.watches())
        answered = {client.ask(payload)["query_generation"] for payload in pictures(root, 0, 40)}
        assert answered == {first}
    assert open_workspace(str(root)).registry.serving().champion == first
    until(lambda: [notice.kind for notice in told] == ["canary"])
    assert told[0].generation == second
    assert f"{second} is watched no longer (changed): at least" in running.command("history", "-r", root).output
    assert "ended (changed)" in running.command("canary", "status", "-r", root).output


def test_a_good_candidate_goes_on_until_its_time_is_over(
    root: Path, told: list[watching.Notice], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(root, "--share", "100%", "--max-changed", "60%", "--hours", "0.0015")
    with Client(root) as client:
        until(client.watches)
        began = time.monotonic()
        now = time.time
        for payload, clock in zip(pictures(root, 0, 60), [0.0, -86_400.0, 864_000.0] * 20, strict=True):
            monkeypatch.setattr(time, "time", lambda clock=clock: now() + clock)
            client.ask(payload)
        monkeypatch.setattr(time, "time", now)
        if time.monotonic() - began < 4:
            assert stands(root)["ended"] is None, "a clock that steps ends nothing"
        until(lambda: stands(root)["ended"])
        assert 5.0 < time.monotonic() - began < 15.0
    found = stands(root)
    assert (found["ended"]["outcome"], found["changed_lower"] < 0.6) == ("time", True)
    assert found["answered_by_candidate"] > 0
    assert [notice.kind for notice in told] == ["canary"]
    assert "watched for 0.0015 hours" in told[0].summary


def test_a_candidate_that_fails_is_replaced_for_the_client_and_ended(root: Path) -> None:
    first, _ = names(root)

    class Failing(GallerySearcher):
        @property
        def served(self) -> ServedSnapshot:
            return replace(super().served, encoder=None)  # type: ignore[arg-type]

    start(root, "--share", "100%", "--max-changed", "100%")
    with Client(root, open_searcher=beside(Failing)) as client:
        until(client.watches)
        for payload in pictures(root, 0, 30):
            assert client.ask(payload)["query_generation"] == first
        until(lambda: stands(root)["ended"])
    assert stands(root)["ended"]["outcome"] == "failing"


def test_accepting_the_candidate_ends_its_canary(root: Path, client: Client) -> None:
    start(root, "--share", "100%", "--max-changed", "100%")
    until(client.watches)
    running.command("accept", "g002", "--reason", "good", "-r", root)
    until(lambda: stands(root)["ended"])
    assert stands(root)["ended"]["outcome"] == "moved"
    assert open_workspace(str(root)).registry.serving().champion == names(root)[1]


# The champion is watched


def test_a_champion_that_changes_too_much_is_rolled_back_through_the_gate(
    root: Path, told: list[watching.Notice]
) -> None:
    first, second = names(root)
    running.command("accept", "g002", "--reason", "good", "-r", root)
    assert start(root, "--share", "100%", "--max-changed", "0.1%")["kind"] == "probation"
    with Client(root) as client:
        until(client.watches)
        for payload in pictures(root, 0, 100):
            client.ask(payload)
        until(lambda: stands(root)["ended"])
        until(lambda: client.ask(pictures(root, 0, 1)[0])["query_generation"] == first)
    registry = open_workspace(str(root)).registry
    assert (registry.serving().champion, registry.serving().left) == (first, second)
    back = registry.events(RolledBack)
    assert [event.generation for event in back] == [second]
    assert back[0].payload.reason.startswith("canary 1: at least")
    assert stands(root)["ended"]["move"] == f"rolled back to {first}"
    until(lambda: sorted(notice.kind for notice in told) == ["canary", "rollback"])


def test_a_rollback_that_would_hide_items_is_refused_by_the_gate_and_said(root: Path) -> None:
    _, second = names(root)
    running.command("accept", "g002", "--reason", "good", "-r", root)
    hide_from_the_first(root)
    start(root, "--share", "100%", "--max-changed", "0.1%")
    with Client(root) as client:
        until(client.watches)
        for payload in pictures(root, 0, 100):
            client.ask(payload)
        until(lambda: stands(root)["ended"])
        assert client.ask(pictures(root, 0, 1)[0])["query_generation"] == second
    ended = stands(root)["ended"]
    assert ended["outcome"] == "changed"
    assert "not rolled back: rolling back: expected every item" in ended["move"]
    registry = open_workspace(str(root)).registry
    assert registry.serving().champion == second
    assert registry.events(RolledBack) == []


def test_a_process_that_died_between_the_rollback_and_its_record_is_taken_over(root: Path) -> None:
    first, second = names(root)
    running.command("accept", "g002", "--reason", "good", "-r", root)
    start(root, "--share", "100%", "--max-changed", "10%")
    running.command("rollback", "-r", root, "--reason", "canary 1: at least 20.0% of the first answers change")
    with Client(root):
        until(lambda: stands(root)["ended"])
    assert stands(root)["ended"] == {
        "outcome": "changed", "reason": "at least 20.0% of the first answers change",
        "move": f"rolled back to {first}", "by": "",
    }  # fmt: skip
    running.command("promote", second, "-r", root, "--reason", "my word")
    with Client(root) as client:
        until(lambda: client.http.get("/health").status_code == 200)
        time.sleep(0.3)
    assert open_workspace(str(root)).registry.serving().champion == second, "a canary that has ended moves nothing"


def hide_from_the_first(root: Path) -> None:
    """Add items that the second generation alone has embedded."""
    with open_session(str(root), tiny.open_config(root)) as session:
        workspace = session.workspace
        view = workspace.gallery.view([])
        known = workspace.gallery.items.take(view.revisions[:3], ["source", "content_sha256", "label"])
        new = known.append_column("item_id", pa.array(["new-0", "new-1", "new-2"]))
        added = workspace.gallery.ingest(new.append_column("attributes", pa.array(["{}"] * 3)))
        second = names(root)[1]
        embed_missing(workspace.gallery, second, workspace.embed_with(second), revisions=added.revisions)


# What is counted


def test_what_two_processes_have_seen_adds_up_and_what_was_written_is_kept(root: Path) -> None:
    start(root, "--share", "100%", "--shadow", "--max-changed", "100%")
    config = EndpointConfig(batch_searches=64)
    with Client(root, config) as one, Client(root, config) as other:
        until(one.watches)
        until(other.watches)
        for payload in pictures(root, 0, 20):
            one.ask(payload)
        for payload in pictures(root, 20, 30):
            other.ask(payload)
        until(lambda: stands(root)["compared"] == 50)
        assert stands(root)["processes"] == 2
        until(lambda: one.http.get("/status").json()["canary"]["compared"] == 50)
    watched = stands(root)["watched_hours"]
    with Client(root, config) as third:
        until(third.watches)
        third.ask(pictures(root, 60, 1)[0])
        until(lambda: stands(root)["compared"] == 51)
        assert stands(root)["watched_hours"] >= watched, "a process that starts goes on where the others were"
        assert stands(root)["processes"] == 3
    assert len(read_tallies(str(root), 1)) == 3


def test_a_killed_endpoint_loses_at_most_what_it_had_not_written(root: Path, spawn: Spawn, tmp_path: Path) -> None:
    """The real command, which writes once a second; another one goes on with the counts and the hours of the first."""
    start(root, "--share", "100%", "--shadow", "--max-changed", "100%")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    port, log = address.rpartition(":")[2], tmp_path / "log"
    served = spawn(running.command_in_child, ["serve", "--http", "-r", str(root), "--port", port], "", str(log))
    until(lambda: "'watched_here': True" in said_by(address), 90)
    for payload in pictures(root, 0, 12):
        assert httpx.post(f"{address}/search", content=payload).status_code == 200
    until(lambda: stands(root)["compared"] + stands(root)["dropped"] == 12)
    before = stands(root)
    for payload in pictures(root, 12, 5):
        httpx.post(f"{address}/search", content=payload)
    served.kill()
    served.join(10)
    found = stands(root)
    assert before["compared"] <= found["compared"] <= before["compared"] + 5
    with Client(root) as client:
        until(client.watches)
        client.ask(pictures(root, 30, 1)[0])
        until(lambda: stands(root)["compared"] == found["compared"] + 1)
        assert stands(root)["watched_hours"] >= found["watched_hours"] > 0


def test_comparing_delays_no_answer_and_what_finds_no_room_is_dropped_and_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(root, "--share", "100%", "--shadow", "--max-changed", "100%")
    go_on = threading.Event()
    compare = watching.CanaryWatch.compare
    monkeypatch.setattr(watching.CanaryWatch, "compare", lambda *given: go_on.wait(30) and compare(*given))
    with Client(root, EndpointConfig(batch_searches=1)) as client:
        until(client.watches)
        for payload in pictures(root, 0, 12):
            client.ask(payload)
        go_on.set()
        until(lambda: stands(root)["dropped"] == 10)
        until(lambda: stands(root)["compared"] == 2)


# Searches that cannot be watched, and answers whose label is known


def test_searches_by_a_vector_are_counted_and_named_wherever_the_canary_is_shown(
    root: Path, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    start(root, "--share", "100%", "--shadow", "--max-changed", "100%", "--hours", "0.0015")
    assert "vector" not in running.command("canary", "status", "-r", root).output
    until(client.watches)
    for _ in range(3):
        assert client.http.post("/search", json={"vector": [1.0] * 16}).status_code == 200
    until(lambda: stands(root)["vectors"] == 3)
    assert stands(root)["compared"] == 0
    assert "not watched: 3 searches by a vector" in running.command("canary", "status", "-r", root).output
    assert "graceful_canary_vectors" in client.http.get("/metrics").text
    assert [record.message for record in caplog.records if "such searches are not watched" in record.message] != []
    until(lambda: stands(root)["ended"])
    assert "; 3 searches came as vectors" in stands(root)["ended"]["reason"]


def test_a_label_says_of_both_generations_whether_they_are_right_and_counts_once(root: Path, client: Client) -> None:
    first, second = names(root)
    asked = pictures(root, 0, 40)
    refused = client.http.post("/labels?label=3", content=asked[0])
    assert (refused.status_code, refused.json()["kind"]) == (409, "nothing_watched")
    assert start(root, "--shadow", "--max-changed", "100%")["max_nfr"] == 0.9, "the policy's"
    until(client.watches)
    lost = won = 0
    for row, payload in enumerate(asked):
        before, after = (client.ask(payload, generation=name)["hits"][0] for name in (first, second))
        key, by = ("label", "label") if row % 2 else ("item", "item_id")
        right = (before, after)[row % 3 == 0][by]
        judged = client.label(payload, **{key: right})
        assert (judged["reference"], judged["candidate"], judged["counted"]) == (first, second, True)
        assert judged["reference_is_right"] == (before[by] == right)
        assert judged["candidate_is_right"] == (after[by] == right)
        lost += before[by] == right != after[by]
        won += after[by] == right != before[by]
    assert lost > 0
    assert won > 0
    assert not client.label(asked[0], label="3")["counted"]
    until(lambda: stands(root)["labelled"] == 40)
    found = stands(root)
    assert (found["negative_flips"], found["positive_flips"]) == (lost, won)
    assert found["nfr_lower"] < found["nfr"] == lost / 40 < found["nfr_upper"]
    assert f"negative flips: {lost / 40:.1%} of 40 labelled" in running.command("canary", "status", "-r", root).output
    for params, body in (("", asked[0]), ("?label=3&item=x", asked[0])):
        assert client.http.post(f"/labels{params}", content=body).status_code == 422
    assert "a vector is of one" in client.http.post("/labels?label=3", json={"vector": [1.0] * 16}).json()["detail"]
    assert client.http.post("/labels?label=3", content=b"no picture").json()["kind"] == "unreadable_image"
    assert stands(root)["labelled"] == 40


def test_a_champion_that_loses_too_many_labelled_pictures_is_rolled_back(root: Path) -> None:
    """Although as many answers may change as will."""
    first, _ = names(root)
    running.command("accept", "g002", "--reason", "good", "-r", root)
    with Client(root) as client:
        asked = pictures(root, 0, 100)
        right = [client.ask(payload, generation=first)["hits"][0]["item_id"] for payload in asked]
        started = start(root, "--share", "100%", "--max-changed", "100%", "--max-nfr", "1%")
        assert (started["kind"], started["max_nfr"]) == ("probation", 0.01)
        until(client.watches)
        for payload, item in zip(asked, right, strict=True):
            judged = client.http.post("/labels", params={"item": item}, content=payload)
            if judged.status_code != 200:
                assert judged.json()["kind"] == "nothing_watched"
                break
        until(lambda: stands(root)["ended"])
    found = stands(root)
    assert (found["ended"]["outcome"], found["ended"]["move"]) == ("flipping", f"rolled back to {first}")
    assert "of the labelled pictures flip negatively, above 1.0%" in found["ended"]["reason"]
    assert open_workspace(str(root)).registry.serving().champion == first


def test_the_limit_is_what_the_evaluation_measured_on_its_query_log_and_the_excess(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    where = {"label": tiny.DIGITS[:5], "instance": {"min": 100, "max": 129}}
    log = {"source": "digits", "label_columns": [], "where": where, "path": str(root / "digits.parquet")}
    tiny.new_workspace(root, {"evaluation.log": log})
    running.update(root)
    changes = {"evaluation.log": log, "training.seed": 1, "rollout.approval": "always"}
    tiny.write_config(root, root / "digits.parquet", changes | {"canary.max_changed_excess": 0.07})
    assert running.update(root).approval == "waiting"
    started = start(root, "--share", "100%", "--shadow")
    assert started["max_changed"] == pytest.approx(started["measured"] + 0.07)
    rows = pq.read_table(root / "digits.parquet").to_pylist()
    logged = [row for row in rows if row["label"] in where["label"] and 100 <= row["instance"] <= 129]
    assert len(logged) == 150
    with Client(root) as client:
        until(client.watches)
        shown = [
            [client.ask(bytes(row["image"]["bytes"]), generation=name)["hits"][0]["label"] for row in logged]
            for name in names(root)
        ]
    share = np.mean([before != after for before, after in zip(*shown, strict=True)])
    assert 0 < started["measured"] == pytest.approx(share)


# What is refused


def test_who_may_be_watched_and_by_which_limit_is_said_by_name(root: Path) -> None:
    first, second = names(root)

    def refusal(*arguments: object, code: int = 1) -> str:
        return " ".join(running.command("canary", *arguments, "-r", root, code=code).output.split())

    assert "give --max-changed 10%" in refusal("start", "g002")
    assert "its probation is over" in refusal("start", "g001", "--max-changed", "10%")
    assert "has been none" in refusal("status")
    assert "found none" in refusal("stop", "--reason", "x")
    assert "write 5% or 0.05" in refusal("start", "g002", "--share", "500%", code=2)
    start(root, "--max-changed", "10%")
    assert f"found that of {second} under way" in refusal("start", "g002", "--max-changed", "10%")
    running.command("canary", "stop", "--reason", "x", "-r", root)
    running.command("reject", "g002", "--reason", "no", "-r", root)
    refused = refusal("start", "g002", "--max-changed", "10%")
    assert f"another one; those are {first}" in refused
    assert open_workspace(str(root)).registry.events(CanaryEnded)[0].payload.outcome == "stopped"
