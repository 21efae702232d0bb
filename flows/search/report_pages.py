"""The reports of a workspace for browsers on other machines: a list, and what an evaluation has published."""

import asyncio
import html
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from graceful.flows.search.refusals import Refused
from graceful.flows.store.events import Decided
from graceful.flows.store.reports import REPORT_FILE, read_published
from graceful.flows.store.workspace import open_workspace

T = TypeVar("T")
# What a page names its like by is no one else's business, and what it shows may be taken back ('delete --forget').
_HEADERS = {"cache-control": "no-store", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
_LIST = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Reports</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<body style="font-family: sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em">
<h1>Reports</h1><table cellpadding="6">{}</table>"""


def report_pages(root: str, reading: Executor) -> APIRouter:
    """GET /reports/ and /reports/<evaluation>/<file>; `reading` reads them, so that a slow store delays no search."""
    router = APIRouter(prefix="/reports")

    async def read(act: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(reading, act, *given)

    @router.get("/", summary="The reports of all decisions, the newest first", response_class=HTMLResponse)
    async def reports() -> HTMLResponse:
        return HTMLResponse(await read(_list, root), headers=_HEADERS)

    @router.get(
        "/{evaluation}/{file}",
        summary="A report, or what lies beside it",
        response_class=Response,
        responses={404: {"description": "no such evaluation, or a file that is not published"}},
    )
    async def report(evaluation: str, file: str) -> Response:
        found = await read(read_published, root, evaluation, file)
        if found is None:
            line = f"reading a report: expected one of those that /reports/ lists, found none ({evaluation}/{file})"
            raise Refused(404, "no_report", line)
        return Response(found[0], media_type=found[1], headers=_HEADERS)

    return router


def _list(root: str) -> str:
    rows = []
    for event in reversed(open_workspace(root).registry.events(Decided)):
        cells = (event.generation or "", event.payload.outcome, event.payload.summary)
        address = f"{html.escape(event.payload.evaluation)}/{REPORT_FILE}"
        first, *others = (html.escape(cell) for cell in cells)
        rows.append(f'<tr><td><a href="{address}">{first}</a>' + "".join(f"<td>{other}" for other in others))
    return _LIST.format("".join(rows) or "<tr><td>Nothing has been decided yet.")
