"""The HTTP endpoint: one FastAPI application over a GallerySearcher. No Prefect, no Ray.

    GET  /health    200 while searches are answered, 503 before a generation serves
    GET  /status    who serves, which snapshot, and whether the last look at the serving state succeeded
    GET  /metrics   the same and more, for Prometheus
    GET  /reports/  the reports of all decisions, for browsers
    GET  /docs      this page as HTML, made from /openapi.json; loads nothing from elsewhere
    POST /search    an image (raw bytes, or a form with one file), {"vector": [...]} or, as a text tower, {"text": ...};
                    ?k=10&sources=false, and who is to answer: ?generation=g003 or ?as=edge
    GET  /search    a text: ?as=words&text=a%20red%20shoe
    POST /labels    an image and what is right for it, ?label=cat or ?item=photo-17: counted for the canary under way

The event loop reads bodies and writes answers, and waits for nobody: a probe of /health is answered whatever waits in
the queues of `search.endpoint`, and on Linux their threads have a lower priority. Every answer names the query
generation and the snapshot that it comes from, whole. Safe to run in any number of processes on one workspace.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from graceful.flows.search.answering import MAX_K, Answer
from graceful.flows.search.comparing import Judged
from graceful.flows.search.describing import IMAGE_BODY, REFUSALS, REQUEST_BODY, SEARCH_EXAMPLE, page
from graceful.flows.search.endpoint import Endpoint
from graceful.flows.search.guarding import Guard, Token
from graceful.flows.search.metrics import CONTENT_TYPE
from graceful.flows.search.refusals import ANSWERABLE, Refused, refusal_of
from graceful.flows.search.report_pages import report_pages
from graceful.flows.search.requests import Wanted
from graceful.flows.search.searcher import GallerySearcher, OpenSearcher
from graceful.flows.settings.config import load_endpoint_config, load_search_config
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.training.texts import MAX_TEXT_CHARS

_AS = "Query as a variant, such as edge, instead of the champion."
_GENERATION = "Who answers, by id or ordinal (g003); any that may query. By default the one that serves, or a canary."


def make_app(
    root: str,
    *,
    refresh_s: float | None = None,
    open_searcher: OpenSearcher = GallerySearcher,
    config: EndpointConfig | None = None,
    token: Token | None = None,
    first_look_s: float | None = None,
) -> FastAPI:
    """Return the application over a workspace.

    It looks at the gallery and the serving state every `refresh_s` seconds, by default as the configuration says, and
    is ready after its first look, or after `first_look_s`. With a token every path but /health needs it.
    """
    config = config or load_endpoint_config(root)
    endpoint = Endpoint(root, config, open_searcher)
    seconds = load_search_config(root).refresh_s if refresh_s is None else refresh_s

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with endpoint.running(seconds, first_look_s):
            yield

    app = FastAPI(
        title="graceful search",
        description="Searches a gallery of images by an image, by a vector of the serving generation, or by a text "
        "where a text tower is served.",
        lifespan=lifespan,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(report_pages(root, endpoint.reading))
    app.add_middleware(Guard, token=token, failed=endpoint.metrics.failed)

    @app.get("/health", summary="Whether searches are answered")
    async def health() -> JSONResponse:
        serving = endpoint.state.searcher is not None
        return JSONResponse({"status": "ok" if serving else "nothing served"}, 200 if serving else 503)

    @app.get("/status", summary="Who serves, and how the last look went")
    async def status() -> dict[str, Any]:
        return {**endpoint.state.status(), "canary": endpoint.beside.watch.status()}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(endpoint.metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    @app.post(
        "/search",
        summary="Find the most similar images",
        response_model=Answer,
        responses={200: {"content": {"application/json": {"example": SEARCH_EXAMPLE}}}, **REFUSALS},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def search(
        request: Request,
        k: Annotated[int, Query(ge=1, le=MAX_K, description="How many items to return.")] = 10,
        sources: Annotated[bool, Query(description="Also name the server's file of each hit.")] = config.sources,
        generation: Annotated[str | None, Query(description=_GENERATION)] = None,
        x_graceful_generation: Annotated[str | None, Header(description="The same as ?generation=.")] = None,
        asked_as: Annotated[str | None, Query(alias="as", description=_AS)] = None,
    ) -> Response:
        wanted = Wanted(k, sources, generation or x_graceful_generation, asked_as)
        try:
            return Response(await endpoint.search(request, wanted), media_type="application/json")
        except ANSWERABLE as error:
            raise refusal_of(error) from None

    @app.get(
        "/search",
        summary="Find the images that a text describes",
        response_model=Answer,
        responses={
            200: {"content": {"application/json": {"example": SEARCH_EXAMPLE}}},
            **{status: said for status, said in REFUSALS.items() if status not in (400, 408, 413)},  # it has no body
        },
    )
    async def search_text(
        request: Request,
        text: Annotated[str, Query(min_length=1, max_length=MAX_TEXT_CHARS, description="What to search for.")],
        asked_as: Annotated[
            str | None, Query(alias="as", description="The text tower that encodes it, such as words.")
        ] = None,
        k: Annotated[int, Query(ge=1, le=MAX_K, description="How many items to return.")] = 10,
        sources: Annotated[bool, Query(description="Also name the server's file of each hit.")] = config.sources,
        generation: Annotated[str | None, Query(description="Instead of ?as=: the id of a text tower.")] = None,
    ) -> Response:
        try:
            body = await endpoint.search_text(request, text, Wanted(k, sources, generation, asked_as))
            return Response(body, media_type="application/json")
        except ANSWERABLE as error:
            raise refusal_of(error) from None

    @app.post(
        "/labels",
        summary="Say what is right for a picture, while a canary is under way",
        responses=REFUSALS,
        openapi_extra={"requestBody": IMAGE_BODY},
    )
    async def labels(
        request: Request,
        label: Annotated[str | None, Query(description="The label that its first hit should have.")] = None,
        item: Annotated[str | None, Query(description="The item that should be its first hit.")] = None,
    ) -> Judged:
        try:
            return await endpoint.label(request, label, item)
        except ANSWERABLE as error:
            raise refusal_of(error) from None

    @app.exception_handler(Refused)
    async def refused(_: Request, refusal: Refused) -> JSONResponse:
        endpoint.metrics.failed(refusal.kind)
        document = {"detail": refusal.detail, "kind": refusal.kind}
        return JSONResponse(document, refusal.status_code, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        line = f"searching: {problem['loc'][-1]}: {problem['msg']}, found {problem.get('input')!r}"
        return await refused(request, Refused(422, "wrong_request", line))

    return app
