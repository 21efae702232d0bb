"""What is behind the HTTP endpoint: the state that is followed, and queues whose threads answer.

Six threads beside the event loop: one looks at the serving state, one at other generations and the canary, one answers
vectors, one texts, one images (with others that decode for it), and one compares answers of a canary and judges labels.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from graceful.flows.search.answering import (
    ImageQuestion,
    TextQuestion,
    VectorQuestion,
    answer_images,
    answer_texts,
    answer_vectors,
)
from graceful.flows.search.batches import Batches, QueueFullError
from graceful.flows.search.beside import Beside
from graceful.flows.search.bodies import BodyBudget, HeldBody, json_limit, read_body
from graceful.flows.search.comparing import Comparison, Judged, Labelled
from graceful.flows.search.looking import SearchState
from graceful.flows.search.metrics import SearchMetrics
from graceful.flows.search.pauses import short_collections, short_turns, stand_back
from graceful.flows.search.refusals import Refused, busy
from graceful.flows.search.requests import Wanted, image_question, json_question, media_type, refuse_both
from graceful.flows.search.searcher import NothingServedError, OpenSearcher, ServedSnapshot
from graceful.flows.search.watching import NothingWatchedError
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.training.generation import variant_in

MAX_DECODERS = 8
_log = logging.getLogger("graceful.search")

Asked = TypeVar("Asked", ImageQuestion, VectorQuestion, TextQuestion)
Waited = TypeVar("Waited")


class Given(NamedTuple):
    """An answer, and the seconds of computing that it took (its part of what was answered together)."""

    body: bytes
    seconds: float


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
        is_json = media_type(request) == "application/json"
        lane: Batches[Any, Given] = self.vectors if is_json else self.images
        if lane.num_waiting >= lane.max_waiting:  # known before the body is here
            raise busy(f"searching: {lane.max_waiting} {lane.name} wait already; ask again")
        limit = json_limit(width) if is_json else self.config.max_image_mib * 2**20
        with self.budget.hold() as held:
            body = await self._body(request, held, limit)
            started = time.perf_counter()
            question = json_question(body, wanted) if is_json else image_question(body, wanted)
            refuse_both(wanted, question.generation)
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
        refuse_both(wanted, None)
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
        if (label is None) == (item_id is None) or media_type(request) == "application/json":
            line = "judging a label: expected a picture, and either ?label= or ?item=; a vector is of one generation"
            raise Refused(422, "wrong_request", line)
        with self.budget.hold() as held:
            body = await self._body(request, held, self.config.max_image_mib * 2**20)
            question = image_question(body, Wanted(1, False, None, None))
            judged = await _unless_gone(request, self.comparisons.ask(Labelled(question, label, item_id)))
            assert judged is not None
            return judged

    async def _body(self, request: Request, held: HeldBody, limit: int) -> bytes:
        is_form = media_type(request) == "multipart/form-data"
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
