"""The HTTP endpoint over a small gallery of digits: answers, refusals, and following the serving state."""

import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher
from graceful.flows.search.views import open_follower
from graceful.flows.settings.config import ConfigError
from graceful.flows.store.workspace import UnsupportedGenerationError, Workspace, open_workspace
from graceful.flows.update.serving import release_previous, rollback
from graceful.indexing.embedding_files import write_embedding_file
from graceful.indexing.exact import WidthMismatchError
from graceful.indexing.following import Target
from graceful.indexing.gallery import Gallery
from tests.flows import running, tiny


def _too_large() -> bytes:
    """A small PNG of 13,300 x 13,300 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(buffer, "PNG")
    return buffer.getvalue()


TOO_LARGE = _too_large()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("service") / "ws")
    updated(root)
    return root


def updated(root: Path) -> str:
    """Run an update of the workspace; the generation that serves then."""
    running.update(root)
    return str(open_workspace(str(root)).registry.serving().champion)


@pytest.fixture(scope="module")
def client(workspace: Path) -> Iterator[TestClient]:
    with TestClient(make_app(str(workspace), refresh_s=0.1)) as found:
        yield found


def image_of(root: Path, row: int) -> bytes:
    return bytes(pq.read_table(root / "digits.parquet")["image"][row].as_py()["bytes"])


def gallery_row(root: Path) -> tuple[str, int]:
    """An item of the gallery, and its row in the data set."""
    item_id = str(open_workspace(str(root)).gallery.view(()).item_ids[7])
    return item_id, int(item_id.rpartition("#")[2])


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


def test_an_image_finds_itself_first_as_raw_bytes_and_as_a_form(workspace: Path, client: TestClient) -> None:
    item_id, row = gallery_row(workspace)
    payload = image_of(workspace, row)
    raw = client.post("/search?k=5", content=payload, headers={"content-type": "image/png"})
    form = client.post("/search", params={"k": 5}, files={"image": ("query.png", payload, "image/png")})
    assert raw.status_code == form.status_code == 200, raw.text + form.text
    assert raw.json() == form.json()
    answer = raw.json()
    assert len(answer["hits"]) == 5
    assert answer["hits"][0]["item_id"] == item_id
    assert answer["hits"][0]["score"] == pytest.approx(1.0, abs=1e-2)
    status = client.get("/status").json()
    assert answer["query_generation"] == status["query_generation"]
    assert answer["snapshot_id"] == status["snapshot_id"]
    assert {hit["generation"] for hit in answer["hits"]} == {answer["query_generation"]}
    assert client.get("/health").json() == {"status": "ok"}


def test_a_vector_is_searched_with_exactly_and_k_counts(workspace: Path, client: TestClient) -> None:
    searcher = GallerySearcher(open_workspace(str(workspace)))
    vector = np.random.default_rng(0).standard_normal(searcher.served.width).astype(np.float32)
    answer = client.post("/search", json={"vector": vector.tolist(), "k": 300, "generation": searcher.generation})
    assert answer.status_code == 200, answer.text
    view = open_workspace(str(workspace)).view(searcher.generation)
    scores = view.vectors(np.arange(view.num_items)) @ (vector / np.linalg.norm(vector))
    assert [hit["item_id"] for hit in answer.json()["hits"]] == list(view.item_ids[np.argsort(-scores, kind="stable")])
    assert len(client.post("/search?k=2", json={"vector": vector.tolist()}).json()["hits"]) == 2


@pytest.mark.parametrize(
    ("request_values", "code", "text"),
    [
        ({"content": b"", "headers": {"content-type": "image/png"}}, 400, "found nothing"),
        ({"content": b"no image", "headers": {"content-type": "image/png"}}, 422, "give a readable image"),
        ({"files": {"image": ("a.png", b"\x89PNG\r\n\x1a\nrest", "image/png")}}, 422, "give a readable image"),
        ({"data": {"k": "3"}, "files": {}}, 422, "give a readable image"),
        (
            {"content": TOO_LARGE, "headers": {"content-type": "image/png"}},
            422,
            "at most 67,108,864 pixels, found 13300x1",
        ),
        ({"files": [("a", ("a.png", b"x")), ("b", ("b.png", b"y"))]}, 400, "one file, found 2"),
        ({"json": {"vector": [1.0, 2.0]}}, 422, "width 16"),
        ({"json": {"vector": [0.0] * 16}}, 422, "not zero"),
        ({"content": b'{"vector": [NaN, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}'}, 422, "NaN"),
        ({"content": b'{"vector": [1e300, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}'}, 422, "infinity"),
        ({"content": b"{"}, 422, "vector"),
        ({"json": {"vektor": [1.0]}}, 422, "vector"),
        ({"json": {"vector": [1.0] * 16, "k": 0}}, 422, "k"),
        ({"json": {"vector": [1.0] * 16, "generation": "g000-000000"}}, 409, "encode it again"),
        ({"content": b"x" * (32 * 2**20 + 1), "headers": {"content-type": "image/png"}}, 413, "32 MiB"),
        ({"files": {"image": ("a.png", b"x" * (32 * 2**20 + 1), "image/png")}}, 413, "32 MiB"),
        ({"files": {"text": (None, b"no file")}}, 400, "one file, found 0"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "oundary"),
        ({"content": b"none", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_query_that_cannot_be_answered_is_refused_with_one_clear_line(
    client: TestClient, request_values: dict[str, Any], code: int, text: str
) -> None:
    if "content" in request_values and "headers" not in request_values:
        request_values = {**request_values, "headers": {"content-type": "application/json"}}
    answer = client.post("/search", **request_values)
    assert answer.status_code == code, answer.text
    assert text in answer.text
    assert "\n" not in str(answer.json()["detail"])


def test_a_client_is_told_what_a_search_may_send(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"]["/search"]["post"]["requestBody"]
    assert set(body["content"]) == {"image/*", "multipart/form-data", "application/json"}
    assert body["content"]["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    vector, text = body["content"]["application/json"]["schema"]["oneOf"]
    assert set(vector["properties"]) == {"vector", "generation", "k", "as"}
    assert set(text["properties"]) == {"text", "k", "as"}


def test_k_outside_its_range_is_refused(client: TestClient) -> None:
    assert client.post("/search?k=0", content=b"x").status_code == 422
    assert client.post("/search?k=100000", content=b"x").status_code == 422


def test_without_a_generation_that_serves_health_says_so_until_one_does(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:
        assert client.get("/health").status_code == 503
        refused = client.post("/search", content=b"x")
        assert refused.status_code == 503
        assert "graceful update" in refused.json()["detail"]
        assert client.get("/status").json()["last_look"]["ok"] is False
        generation = updated(root)
        until(lambda: client.get("/health").status_code == 200)
        assert client.get("/status").json()["query_generation"] == generation


def test_searches_go_on_while_the_service_follows_an_update_and_a_rollback_over_a_damaged_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    first = updated(root)
    item_id, row = gallery_row(root)
    payload, seen, wrong, stop = image_of(root, row), [], [], threading.Event()
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:

        def keep_searching() -> None:
            while not stop.is_set():
                answer = client.post("/search?k=20", content=payload)
                found = answer.json()  # by another generation's vector an item may not be the first
                right = answer.status_code == 200 and item_id in [hit["item_id"] for hit in found["hits"]]
                if not right or not found["snapshot_id"].startswith(found["query_generation"]):
                    wrong.append(answer.text)
                elif not seen or seen[-1] != found["query_generation"]:
                    seen.append(found["query_generation"])

        searching = threading.Thread(target=keep_searching)
        searching.start()
        try:
            until(lambda: seen == [first])
            tiny.write_config(root, root / "digits.parquet", {"training.seed": 1})
            second = updated(root)
            until(lambda: seen == [first, second])

            # What is served is in memory; the files are read by whoever opens the index next.
            for path in (root / "index").rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[:-8] + b"\0\1\2\3\4\5\6\7")
            rollback(open_workspace(str(root)), reason="test")
            until(lambda: seen == [first, second, first])
            assert client.get("/status").json()["last_look"]["ok"]
        finally:
            stop.set()
            searching.join()
    assert wrong == []
    caplog.clear()
    with TestClient(make_app(str(root), refresh_s=0.1)) as client:
        answer = client.post("/search?k=1", content=payload).json()
    assert (answer["hits"][0]["item_id"], answer["query_generation"]) == (item_id, first)
    assert caplog.text.count("built again from the gallery") == 1


def test_refreshing_without_a_change_reads_no_view(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_workspace(str(workspace))
    searcher = GallerySearcher(opened)
    monkeypatch.setattr(opened.gallery, "view", lambda *_: pytest.fail("the view was read"))
    monkeypatch.setattr(opened.gallery, "lease", lambda *_: pytest.fail("a lease was taken"))
    assert searcher.refresh() is False


def test_a_deleted_photo_is_gone_within_a_second_and_nothing_is_published_for_it(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    updated(root)
    item_id, row = gallery_row(root)
    with TestClient(make_app(str(root))) as client:

        def first() -> str:
            return str(client.post("/search?k=1", content=image_of(root, row)).json()["hits"][0]["item_id"])

        assert first() == item_id
        published = sorted((root / "index").rglob("*"))
        open_workspace(str(root)).gallery.delete([item_id])
        started = time.monotonic()
        while first() == item_id:
            time.sleep(0.01)
        assert time.monotonic() - started < 1
        assert client.get("/status").json()["unreadable"] == 0
        assert sorted((root / "index").rglob("*")) == published


def test_a_workspace_whose_index_cannot_be_written_is_searched_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    updated(root)
    (root / "index").write_bytes(b"no folder")
    searcher = GallerySearcher(open_workspace(str(root)))
    assert len(searcher.search_vectors(np.ones((1, 16), np.float32), 3)[0]) == 3
    assert caplog.text.count("kept in memory") == 1


def test_the_index_is_of_the_kind_that_the_configuration_asks_for(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    updated(root)
    tiny.write_config(root, root / "digits.parquet", {"search.index": "ivf", "search.recall_target": 0.05})
    searcher = GallerySearcher(open_workspace(str(root)))
    assert searcher.search_vectors(np.ones((1, 16), np.float32), 3)[0]
    manifest = next((root / "index").glob("*/*/manifest.json")).read_text()
    assert '"kind": "ivf"' in manifest
    tiny.write_config(root, root / "digits.parquet", {"search.index": "tree"})
    with pytest.raises(ConfigError, match=r"search\.index"):
        GallerySearcher(open_workspace(str(root)))


def test_query_vectors_of_another_width_are_refused_by_name(workspace: Path) -> None:
    searcher = GallerySearcher(open_workspace(str(workspace)))
    with pytest.raises(WidthMismatchError, match=f"encode queries with {searcher.generation}"):
        searcher.search_vectors(np.ones((1, 8), np.float32))


def test_the_endpoint_imports_neither_prefect_nor_ray() -> None:
    code = "import sys, graceful.flows.search.serving; print([m for m in ('prefect', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert done.stdout.strip() == "[]"


def test_a_released_client_is_refused_by_name_and_a_supported_one_is_served(tmp_path: Path) -> None:
    root = tiny.new_workspace(tmp_path / "ws")
    first = updated(root)
    tiny.write_config(root, root / "digits.parquet", {"training.seed": 1})
    second = updated(root)
    workspace = open_workspace(str(root))
    assert GallerySearcher(workspace, first).generation == first, "a rollback returns to it"
    release_previous(workspace)
    with pytest.raises(UnsupportedGenerationError, match=f"querying as {first}: .* may query: {second}; list old"):
        GallerySearcher(workspace, first)
    changed = {"training.seed": 1, "gallery.supported_query_generations": [first]}
    tiny.write_config(root, root / "digits.parquet", changed)
    assert GallerySearcher(workspace, first).generation == first


def test_a_gallery_made_anew_beside_an_old_index_is_not_answered_from_that_index(tmp_path: Path) -> None:
    """Both galleries have the same name, the same versions and the same revisions."""
    found = []
    for content in (1.0, -1.0):
        gallery = Gallery(str(tmp_path / "gallery"), create=True)
        workspace = Workspace(str(tmp_path))
        vector = np.full((1, 4), content / 2, np.float32)
        digest = {"content_sha256": [str(content)], "label": [""], "attributes": ["{}"]}
        result = gallery.ingest(pa.table({"item_id": ["one"], "source": ["one"], **digest}))
        staged = gallery.staging_file("g001-aaaaaa", "unit")
        write_embedding_file(staged, pa.table({"revision": result.revisions}), vector)
        gallery.commit_vectors("g001-aaaaaa", "unit")
        followed = open_follower(workspace).follow(Target("g001-aaaaaa", ("g001-aaaaaa",), ()))
        found.append(float(followed.index.search(np.full((1, 4), 0.5, np.float32), 1).scores[0, 0]))
        shutil.rmtree(tmp_path / "gallery")
    assert found == pytest.approx([1.0, -1.0])
    assert len(list((tmp_path / "index").iterdir())) == 2
