"""Where a report lies, what others may read of it, and how a forgotten picture is taken out of it.

Loads nothing that judges or draws.
"""

import re
from collections.abc import Iterable

from graceful.files import exists, join, read_bytes, write_bytes

REPORT_FILE, REPORT_JSON = "report.html", "report.json"
PUBLISHED = {
    REPORT_FILE: "text/html; charset=utf-8",
    "label-next.html": "text/html; charset=utf-8",
    "label-next.csv": "text/csv; charset=utf-8",
    **dict.fromkeys((REPORT_JSON, "decision.json", "evidence.json", "policy.json"), "application/json"),
    **dict.fromkeys(("flips.parquet", "outcomes.parquet"), "application/vnd.apache.parquet"),
}
"""The files of an evaluation that the report names or is, and what they are; nothing else is shown to others."""

_EVALUATION = re.compile(r"[0-9a-z][0-9a-z-]*")
_PICTURE = re.compile(rb'<img [^>]*data-content="(?P<content>[0-9a-f]+)"[^>]*>')


def report_address(url: str | None, evaluation: str) -> str | None:
    """Where a browser finds the report of an evaluation, below the address of an endpoint; None where there is none.

    >>> report_address("http://search:8080/", "84c91562b365e4ea")
    'http://search:8080/reports/84c91562b365e4ea/report.html'
    """
    return None if url is None else f"{url.rstrip('/')}/reports/{evaluation}/{REPORT_FILE}"


def read_published(root: str, evaluation: str, file: str) -> tuple[bytes, str] | None:
    """Content and type of a published file; None where there is none, whatever the names are."""
    if file not in PUBLISHED or not _EVALUATION.fullmatch(evaluation):
        return None
    place = join(root, "evaluations", evaluation, file)
    return (read_bytes(place), PUBLISHED[file]) if exists(place) else None


def forget_pictures(location: str, hashes: Iterable[str]) -> int:
    """Take the pictures made from images of these content hashes out of an evaluation's report; returns how many."""
    report = join(location, REPORT_FILE)
    wanted = {digest.encode() for digest in hashes}
    if not wanted or not exists(report):
        return 0
    page, num_forgotten = read_bytes(report), 0

    def without(found: re.Match[bytes]) -> bytes:
        nonlocal num_forgotten
        if found["content"] not in wanted:
            return found[0]
        num_forgotten += 1
        return b""

    kept = _PICTURE.sub(without, page)
    if num_forgotten:
        write_bytes(report, kept)
    return num_forgotten
