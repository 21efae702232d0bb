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

Six threads beside the event loop: one looks at the serving state, one at other generations and the canary, one answers
vectors, one texts, one images (with others that decode for it), and one compares answers of a canary and judges labels.
The event loop itself reads bodies and writes answers, and waits for nobody: a probe of /health is answered whatever
waits, and on Linux the other threads have a lower priority. Every answer names the query generation and the snapshot
that it comes from, whole. Safe to run in any number of processes on one workspace.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from graceful.flows.search.answering import (
    MAX_K,
    Answer,
    ImageQuestion,
    TextQuery,
    TextQuestion,
    VectorQuery,
    VectorQuestion,
    answer_images,
    answer_texts,
    answer_vectors,
)
from graceful.flows.search.batches import Batches, QueueFullError
from graceful.flows.search.beside import Beside
from graceful.flows.search.bodies import BodyBudget, HeldBody, json_limit, read_body
from graceful.flows.search.comparing import Comparison, Judged, Labelled
from graceful.flows.search.describing import IMAGE_BODY, REFUSALS, REQUEST_BODY, SEARCH_EXAMPLE, page
from graceful.flows.search.guarding import Guard, Token
from graceful.flows.search.looking import SearchState
from graceful.flows.search.metrics import CONTENT_TYPE, SearchMetrics
from graceful.flows.search.pauses import short_collections, short_turns, stand_back
from graceful.flows.search.refusals import ANSWERABLE, Refused, busy, refusal_of
from graceful.flows.search.report_pages import report_pages
from graceful.flows.search.searcher import GallerySearcher, NothingServedError, OpenSearcher, ServedSnapshot
from graceful.flows.search.watching import NothingWatchedError
from graceful.flows.settings.config import load_endpoint_config, load_search_config
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.training.generation import variant_in
from graceful.training.texts import MAX_TEXT_CHARS

MAX_DECODERS = 8
_AS = "Query as a variant, such as edge, instead of the champion."
_GENERATION = "Who answers, by id or ordinal (g003); any that may query. By default the one that serves, or a canary."

_log = logging.getLogger("graceful.search")


class Wanted(NamedTuple):
    """What a request asks for beside its picture or vector."""

    k: int
    with_sources: bool
    generation: str | None
    asked_as: str | None

    @property
    def variant(self) -> str | None:
        """The variant that is to answer, by its name or id."""
        return self.asked_as or (self.generation if variant_in(self.generation or "") else None)


class Given(NamedTuple):
    """An answer, and the seconds of computing that it took (its part of what was answered together)."""

    body: bytes
    seconds: float


Asked = TypeVar("Asked", ImageQuestion, VectorQuestion, TextQuestion)
Sent = TypeVar("Sent", TextQuery, VectorQuery)
Waited = TypeVar("Waited")


class Endpoint:
    """What is behind the application: the state that is followed, and the queues."""

    def __init__(self, root: str, config: EndpointConfig, open_searcher: OpenSearcher) -> None:
        self.config = config
        self.state = SearchState(root, open_searcher)
        self.budget = BodyBudget(config.max_waiting_mib * 2**20)
        limits = {"max_waiting": config.max_waiting, "max_batch": config.batch_searches}
        self.images = Batches[ImageQuestion, Given]("images", self._answer_images, **limits)
        self.vectors = Batches[VectorQuestion, Given]("vectors", self._answer_vectors, **limits)
        self.texts = Batches[TextQuestion, Given]("texts", self._answer_texts, **limits)
        self.beside = Beside(root, open_searcher)
        self.comparisons = Batches[Comparison | Labelled, Judged | None](
            "comparisons", self._compare, max_waiting=config.batch_searches, max_batch=config.batch_searches
        )
        self.metrics = SearchMetrics(
            self.state,
            self.budget,
            {"image": self.images, "vector": self.vectors, "text": self.texts},
            self.beside.watch,
        )
        num_decoders = min(os.cpu_count() or 1, MAX_DECODERS)
        self._decoders = ThreadPoolExecutor(num_decoders, "search-decoding", initializer=stand_back)
        self.reading = ThreadPoolExecutor(2, "search-reports", initializer=stand_back)

    @contextlib.asynccontextmanager
    async def running(self, refresh_s: float, first_look_s: float | None) -> AsyncIterator[None]:
        """Follow the serving state and answer, for as long as the block runs."""
        self.images.start()
        self.vectors.start()
        self.texts.start()
        self.comparisons.start()
        self.beside.start(refresh_s)
        looked = self.state.follow(refresh_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(looked, first_look_s)
        try:
            with short_turns(), short_collections():
                yield
        finally:
            ending = (
                self.state.close,
                self.beside.close,
                self.images.close,
                self.vectors.close,
                self.texts.close,
                self.comparisons.close,
            )
            await asyncio.gather(*(asyncio.to_thread(end) for end in ending))
            for pool in (self._decoders, self.reading):
                pool.shutdown(wait=False, cancel_futures=True)

    async def search(self, request: Request, wanted: Wanted) -> bytes:
        """The body of the answer to one request.

        Raises:
            Refused, or an error of `refusals.ANSWERABLE`: it is not answered.
            ClientDisconnect: the client has gone, and its question with it.
        """
        served, generation = self.state.served(), await self._named(wanted)
        width = self._snapshot(generation, served).width
        is_json = _media_type(request) == "application/json"
        lane: Batches[Any, Given] = self.vectors if is_json else self.images
        if lane.num_waiting >= lane.max_waiting:  # known before the body is here
            raise busy(f"searching: {lane.max_waiting} {lane.name} wait already; ask again")
        limit = json_limit(width) if is_json else self.config.max_image_mib * 2**20
        with self.budget.hold() as held:
            body = await self._body(request, held, limit)
            started = time.perf_counter()
            question = _json_question(body, wanted) if is_json else _image(body, wanted)
            _refuse_both(wanted, question.generation)
            if question.generation is not None:
                generation = self.state.variants.served(question.generation).generation
            if isinstance(question, TextQuestion):
                return await self._text(request, replace(question, generation=generation), started)
            arm = None if is_json or generation is not None else self.beside.watch.arm_for(body)
            if arm is not None and arm.canary.answers and isinstance(question, ImageQuestion):
                question = replace(question, generation=arm.canary.candidate, replaceable=True)
            else:
                question = replace(question, generation=generation)
            given = await _unless_gone(request, lane.ask(question))
        self.metrics.answered("vector" if is_json else "image", time.perf_counter() - started)
        if is_json and generation is None:
            self.beside.watch.vector_came()
        if arm is not None:
            asked = ImageQuestion(body, wanted.k, with_sources=False)
            self._compare_later(Comparison(arm.canary.number, asked, given.body, given.seconds))
        return given.body

    async def search_text(self, request: Request, text: str, wanted: Wanted) -> bytes:
        """The body of the answer to a text that came in the address; raises as `search`."""
        started = time.perf_counter()
        _refuse_both(wanted, None)
        generation = await self._named(wanted)
        return await self._text(request, TextQuestion(text, wanted.k, wanted.with_sources, generation), started)

    async def _text(self, request: Request, question: TextQuestion, started: float) -> bytes:
        given = await _unless_gone(request, self.texts.ask(question))
        self.metrics.answered("text", time.perf_counter() - started)
        return given.body

    async def _named(self, wanted: Wanted) -> str | None:
        """The generation or variant that the address names; None for the one that serves."""
        if wanted.variant is not None:
            return self.state.variants.served(wanted.variant).generation
        return None if wanted.generation is None else await self.beside.ready(wanted.generation)

    async def label(self, request: Request, label: str | None, item_id: str | None) -> Judged:
        """Who is right about a picture, of the two generations of the canary under way; it is counted.

        Raises:
            NothingWatchedError: there is none.
            Refused, or another error of `refusals.ANSWERABLE`: nothing was counted.
            ClientDisconnect: the client has gone.
        """
        if self.beside.watch.arm is None:
            raise NothingWatchedError(
                "judging a label: expected a canary under way, found none; begin with 'graceful canary start'"
            )
        if (label is None) == (item_id is None) or _media_type(request) == "application/json":
            line = "judging a label: expected a picture, and either ?label= or ?item=; a vector is of one generation"
            raise Refused(422, "wrong_request", line)
        with self.budget.hold() as held:
            body = await self._body(request, held, self.config.max_image_mib * 2**20)
            question = _image(body, Wanted(1, False, None, None))
            judged = await _unless_gone(request, self.comparisons.ask(Labelled(question, label, item_id)))
            assert judged is not None
            return judged

    async def _body(self, request: Request, held: HeldBody, limit: int) -> bytes:
        is_form = _media_type(request) == "multipart/form-data"
        return await read_body(request, held, limit=limit, timeout_s=self.config.body_timeout_s, is_form=is_form)

    def _snapshot(self, generation: str | None, served: ServedSnapshot) -> ServedSnapshot:
        """What a generation or variant answers from; by default the one that serves.

        Raises: OtherGenerationError, NoVariantError.
        """
        if generation is None or generation == served.generation:
            return served
        if variant_in(generation) is not None:
            return self.state.variants.served(generation)
        return self.beside.snapshot(generation)

    def _compare_later(self, comparison: Comparison) -> None:
        """Let an answer be compared where there is room for it: the client has it already."""
        size = len(comparison.question.payload)
        try:
            if self.budget.held_bytes + size > self.budget.max_bytes:
                raise QueueFullError("comparing: no room for the picture")
            waiting = self.comparisons.ask(comparison)
        except QueueFullError:
            self.beside.watch.dropped()
            return
        self.budget.held_bytes += size

        def release(_: object) -> None:
            self.budget.held_bytes -= size

        waiting.add_done_callback(release)

    def _answer_images(self, questions: Sequence[ImageQuestion]) -> Sequence[Given | Exception]:
        self.metrics.together("image", len(questions))
        given = self._by_generation(questions, self._ask_images)
        again = [row for row, one in enumerate(given) if isinstance(one, Exception) and questions[row].replaceable]
        if again:
            served = self._ask_images(self.state.served(), [questions[row] for row in again])
            for row, body in zip(again, served, strict=True):
                given[row] = body if isinstance(body, Exception) else Given(body, 0.0)
        return given

    def _answer_vectors(self, questions: Sequence[VectorQuestion]) -> Sequence[Given | Exception]:
        self.metrics.together("vector", len(questions))
        return self._by_generation(questions, answer_vectors)

    def _answer_texts(self, questions: Sequence[TextQuestion]) -> Sequence[Given | Exception]:
        self.metrics.together("text", len(questions))
        return self._by_generation(questions, answer_texts)

    def _ask_images(self, served: ServedSnapshot, questions: Sequence[ImageQuestion]) -> Sequence[bytes | Exception]:
        return answer_images(served, questions, max_pixels=self.config.max_pixels, mapper=self._decoders.map)

    def _by_generation(
        self, questions: Sequence[Asked], ask: Callable[[ServedSnapshot, Sequence[Asked]], Sequence[bytes | Exception]]
    ) -> list[Given | Exception]:
        """Answer questions, those for one generation together; what goes wrong with one is not that of another."""
        serving = self.state.served()
        given: list[Given | Exception] = [NothingServedError("searching: nothing answered")] * len(questions)
        for generation in dict.fromkeys(question.generation for question in questions):
            rows = [row for row, question in enumerate(questions) if question.generation == generation]
            started = time.perf_counter()
            try:
                bodies = ask(self._snapshot(generation, serving), [questions[row] for row in rows])
            except Exception as error:
                bodies = [error] * len(rows)
            seconds = (time.perf_counter() - started) / len(rows)
            for row, body in zip(rows, bodies, strict=True):
                given[row] = body if isinstance(body, Exception) else Given(body, seconds)
        return given

    def _compare(self, given: Sequence[Comparison | Labelled]) -> Sequence[Judged | Exception | None]:
        comparisons = [one for one in given if isinstance(one, Comparison)]
        try:
            self.beside.watch.compare(comparisons, self.state.served(), self._ask_images)
        except Exception as error:  # what cannot be compared is not counted; the answers are out
            _log.warning("comparing answers: %s: %s", type(error).__name__, error)
        labelled = [one for one in given if isinstance(one, Labelled)]
        judged: list[Judged | Exception] = []
        try:
            judged = self.beside.watch.judge(labelled, self.state.served(), self._ask_images)
        except Exception as error:
            judged = [error] * len(labelled)
        of_labels = iter(judged)
        return [next(of_labels) if isinstance(one, Labelled) else None for one in given]


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


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _unless_gone(request: Request, answer: "asyncio.Future[Waited]") -> Waited:
    """Wait for an answer; where the client goes first, its question is not answered."""
    gone = asyncio.ensure_future(_until_gone(request))
    either: set[asyncio.Future[Any]] = {answer, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _image(body: bytes, wanted: Wanted) -> ImageQuestion:
    if not body:
        line = "searching: expected an image or a vector in the body, found nothing"
        raise Refused(400, "wrong_request", line)
    return ImageQuestion(body, wanted.k, wanted.with_sources)


def _refuse_both(wanted: Wanted, named: str | None) -> None:
    """Refuse who names a variant that asks, in the address or the body, and a generation that answers."""
    if wanted.generation is not None and {wanted.asked_as, named} - {None, wanted.generation}:
        line = "searching: expected a variant that asks or a generation that answers, found both; leave one out"
        raise Refused(422, "wrong_request", line)


def _json_question(body: bytes, wanted: Wanted) -> VectorQuestion | TextQuestion:
    """A vector, or a text; `generation` is the variant that its body names, if it does."""
    return _text_question(body, wanted) if _has_text(body) else _vector_question(body, wanted)


def _has_text(body: bytes) -> bool:
    """Whether a JSON body has the key text: few have, and only those are parsed to see."""
    if b'"text"' not in body:
        return False
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and "text" in found


def _read(kind: type[Sent], body: bytes, example: str) -> Sent:
    """A body as the query that it should be; what it is not is said with an example. Raises Refused."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "body"
        line = f"searching: {place}: {problem['msg']}; send {example}"
        raise Refused(422, "wrong_request", line) from None


def _text_question(body: bytes, wanted: Wanted) -> TextQuestion:
    query = _read(TextQuery, body, '{"text": "...", "as": "words"}')
    return TextQuestion(query.text, query.k or wanted.k, wanted.with_sources, query.asked_as)


def _vector_question(body: bytes, wanted: Wanted) -> VectorQuestion:
    """A vector; `generation` is the variant that its body names, if it does."""
    query = _read(VectorQuery, body, '{"vector": [...]}')
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused as that
        vector = np.asarray(query.vector, np.float32)
    return VectorQuestion(vector, query.generation, query.k or wanted.k, wanted.with_sources, query.asker)
