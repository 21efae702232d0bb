"""Where a report lies, and how a forgotten picture is taken out of it. Loads nothing that judges or draws."""

import re
from collections.abc import Iterable

from graceful.files import exists, join, read_bytes, write_bytes

REPORT_FILE, REPORT_JSON = "report.html", "report.json"
_PICTURE = re.compile(rb'<img [^>]*data-content="(?P<content>[0-9a-f]+)"[^>]*>')


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
