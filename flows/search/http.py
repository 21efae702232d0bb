"""The HTTP endpoint: one FastAPI application over a GallerySearcher. No Prefect, no Ray.

    GET  /health    200 while searches are answered, 503 before a generation serves
    GET  /status    who serves, which snapshot, and whether the last look at the serving state succeeded
    POST /search    an image (raw bytes, or a form with one file) or {"vector": [...]}; ?k=10

The serving state is followed in the background. A look that fails (a damaged snapshot, a store that does not answer)
leaves the snapshot in place that serves, and shows in /status. Every answer names the query generation and the
snapshot that it comes from, whole. Safe to run in any number of processes on one workspace.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graceful.flows.search.searcher import (
    GallerySearcher,
    Hit,
    IncompleteAnswerError,
    ServedSnapshot,
    ServingSearcher,
    UnreadableQueryError,
)
from graceful.flows.settings.config import load_search_config
from graceful.flows.store.workspace import Workspace, open_workspace, require_workspace
from graceful.indexing.exact import NonFiniteEmbeddingError, WidthMismatchError

MAX_BODY_BYTES = 32 * 2**20
MAX_K = 1_000

_log = logging.getLogger("graceful.search")


class VectorQuery(BaseModel):
    """A query that the client has encoded itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vector: list[float] = Field(description="One embedding, made by the serving generation.")
    generation: str | None = Field(
        default=None, description="Who made it; a query of another generation than the serving one is refused."
    )
    k: int | None = Field(default=None, ge=1, le=MAX_K, description="How many items to return.")


class FoundItem(BaseModel):
    """One item found; `generation` is the one whose vector it was found by."""

    item_id: str
    score: float
    generation: str
    source: str
    label: str
    above: dict[str, bool] = Field(description="Whether the score is at least each consumer's threshold for this hit.")


class Answer(BaseModel):
    """Hits, best first, and what they come from."""

    query_generation: str
    snapshot_id: str
    thresholds: dict[str, dict[str, float]] = Field(
        description="Consumer of scores, generation of the hit's vector: threshold for queries of this generation."
    )
    hits: list[FoundItem]


OpenSearcher = Callable[[Workspace], ServingSearcher]


class SearchState:
    """The searcher behind the application, and how the last look at the serving state went."""

    def __init__(self, root: str, open_searcher: OpenSearcher) -> None:
        self.root = root
        self.open_searcher = open_searcher
        self.searcher: ServingSearcher | None = None
        self.error: str | None = None
        self.looked_at = 0.0
        self.moved_at = 0.0
        self._one_encoding = threading.Lock()

    def refresh(self) -> None:
        """Look at the serving state; never raises: what went wrong is kept for /status."""
        try:
            if self.searcher is None:
                self.searcher = self.open_searcher(open_workspace(self.root))
                moved = True
            else:
                moved = self.searcher.refresh()
            self.error = None
        except Exception as error:
            moved, line = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
            if line != self.error:
                _log.warning("following the serving state: %s", line)
            self.error = line
        self.looked_at = time.time()
        if moved and self.searcher is not None:
            self.moved_at = self.looked_at
            served = self.searcher.served
            _log.info("serving %s (snapshot %s)", served.generation, served.snapshot_id)

    def served(self) -> ServedSnapshot:
        """What answers now; 503 where nothing does."""
        if self.searcher is None:
            raise HTTPException(503, self.error or "no generation serves yet")
        return self.searcher.served

    def search_payload(self, served: ServedSnapshot, payload: bytes, k: int) -> list[Hit]:
        """Search with an image; one at a time is encoded, with all threads, instead of many that wait for cores."""
        with self._one_encoding:
            return served.search_payload(payload, k)

    def status(self) -> dict[str, Any]:
        """What /status says."""
        served = None if self.searcher is None else self.searcher.served
        return {
            "query_generation": served.generation if served else None,
            "snapshot_id": served.snapshot_id if served else None,
            "width": served.width if served else None,
            "rows_by_generation": served.rows_by_generation if served else {},
            "unreadable": served.num_unreadable if served else None,
            "serving_since": self.moved_at or None,
            "last_look": {"at": self.looked_at or None, "ok": self.error is None, "error": self.error},
        }


def make_app(root: str, *, refresh_s: float | None = None, open_searcher: OpenSearcher = GallerySearcher) -> FastAPI:
    """Return the application over a workspace.

    It looks at the gallery and the serving state every `refresh_s` seconds, by default as the configuration says.
    """
    state = SearchState(root, open_searcher)
    seconds = load_search_config(root).refresh_s if refresh_s is None else refresh_s

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(state.refresh)
        following = asyncio.create_task(_follow(state, seconds))
        try:
            yield
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

    app = FastAPI(
        title="graceful search", lifespan=lifespan, openapi_url="/openapi.json", docs_url=None, redoc_url=None
    )
    app.state.search = state

    @app.get("/health")
    def health() -> JSONResponse:
        serving = state.searcher is not None
        return JSONResponse({"status": "ok" if serving else "nothing served"}, 200 if serving else 503)

    @app.get("/status")
    def status() -> dict[str, Any]:
        return state.status()

    @app.post("/search", openapi_extra={"requestBody": _request_body()})
    async def search(request: Request, k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> Answer:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_form, limited = kind == "multipart/form-data", _limited(request)
        body = await _form_file(limited) if is_form else await limited.body()
        served = state.served()
        try:
            if kind == "application/json":
                query = _vector_query(body)
                if query.generation not in (None, served.generation):
                    raise HTTPException(
                        409,
                        f"the query was encoded by {query.generation}, but {served.generation} serves; encode it again",
                    )
                vector = np.asarray([query.vector], np.float32)
                hits = (await run_in_threadpool(served.search_vectors, vector, query.k or k))[0]
            else:
                if not body:
                    raise HTTPException(400, "searching: expected an image or a vector in the body, found nothing")
                hits = await run_in_threadpool(state.search_payload, served, body, k)
        except (UnreadableQueryError, WidthMismatchError, NonFiniteEmbeddingError) as error:
            raise HTTPException(422, str(error)) from None
        except IncompleteAnswerError as error:
            raise HTTPException(503, str(error), {"retry-after": "1"}) from None
        found = [FoundItem(**asdict(hit)) for hit in hits]
        return Answer(
            query_generation=served.generation,
            snapshot_id=served.snapshot_id,
            thresholds={name: dict(values) for name, values in served.thresholds.items()},
            hits=found,
        )

    return app


def serve_searches(root: str, host: str, port: int, num_shards: int = 0, address: str = "local") -> None:
    """Answer searches over HTTP until interrupted.

    With `num_shards` the index lies in so many processes of a Ray cluster, which is started here, or is at `address`.
    """
    require_workspace(root)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    _log.info("searches of %s: POST http://%s:%d/search", root, host, port)
    if not num_shards:
        uvicorn.run(make_app(root), host=host, port=port, log_level="warning", access_log=False)
        return
    from graceful.flows.search.sharded import open_sharded_searcher

    with open_sharded_searcher(num_shards, address) as open_searcher:
        app = make_app(root, open_searcher=open_searcher)
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)


async def _follow(state: SearchState, refresh_s: float) -> None:
    while True:
        await asyncio.sleep(refresh_s)
        await run_in_threadpool(state.refresh)


def _limited(request: Request) -> Request:
    """The same request, whose body is refused once it is too large, before all of it is in memory."""
    size = 0

    async def receive() -> MutableMapping[str, Any]:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"searching: expected at most {MAX_BODY_BYTES >> 20} MiB; send a smaller image")
        return message

    return Request(request.scope, receive)


async def _form_file(request: Request) -> bytes:
    """The bytes of the one file of a multipart form."""
    async with request.form() as form:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if len(files) != 1:
            raise HTTPException(400, f"searching: expected a form with one file, found {len(files)}")
        return await files[0].read()


def _vector_query(body: bytes) -> VectorQuery:
    try:
        return VectorQuery.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "body"
        raise HTTPException(422, f'searching: {place}: {problem["msg"]}; send {{"vector": [...]}}') from None


def _request_body() -> dict[str, Any]:
    """What /openapi.json says about the body of a search: FastAPI cannot see that one address takes three kinds."""
    image = {"type": "string", "format": "binary", "description": "An image file."}
    form = {"type": "object", "required": ["image"], "properties": {"image": image}}
    return {
        "required": True,
        "description": f"An image, alone or as the file of a form, or a vector; at most {MAX_BODY_BYTES >> 20} MiB.",
        "content": {
            "image/*": {"schema": image},
            "multipart/form-data": {"schema": form},
            "application/json": {"schema": VectorQuery.model_json_schema()},
        },
    }
