"""The flip explorer of a report: the worst of the lost searches with small pictures, read from where the images lie."""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from graceful.evaluation.report import FlipCard, FlipExplorer, Picture
from graceful.flows.settings.config import ReportConfig
from graceful.flows.store.evaluations import worst_first
from graceful.training.images import UnreadableImageError, read_payloads, thumbnail


def explore(flips: pa.Table, state: str, shows: ReportConfig) -> FlipExplorer:
    """The flips of one state, the worst ranked first; of equals the one whose wrong answer is furthest ahead.

    A picture that cannot be read any more is left out; nothing is read where pictures are private.
    """
    rows = worst_first(flips.filter(pc.equal(flips["state"], state)))
    shown = rows.slice(0, shows.num_flips).to_pylist()
    wanted = [row[name] for row in shown for name in ("query", "right_item", "wrong_item") if row[name] is not None]
    pictures = _pictures(dict.fromkeys(wanted)) if shows.pictures else {}
    return FlipExplorer(
        num_flips=rows.num_rows,
        causes=dict(sorted(Counter(rows["cause"].to_pylist()).items())),
        cards=[_card(row, pictures) for row in shown],
    )


def _card(row: Mapping[str, Any], pictures: Mapping[str, Picture]) -> FlipCard:
    names = (
        "query", "identity", "rank_before", "rank_after", "right_item", "wrong_item", "wrong_identity", "wrong_owner",
        "margin", "cause",
    )  # fmt: skip
    return FlipCard(
        **{name: row[name] for name in names},
        query_picture=pictures.get(row["query"]),
        right_picture=pictures.get(row["right_item"]),
        wrong_picture=pictures.get(row["wrong_item"]),
    )


def _pictures(sources: Iterable[str]) -> dict[str, Picture]:
    names = list(sources)
    failures: dict[int, str] = {}
    payloads = read_payloads(names, failures)
    found = {}
    for place, (name, payload) in enumerate(zip(names, payloads, strict=True)):
        if place in failures:
            continue
        try:
            small = base64.b64encode(thumbnail(payload)).decode()
        except UnreadableImageError:
            continue
        found[name] = Picture(f"data:image/jpeg;base64,{small}", hashlib.sha256(payload).hexdigest())
    return found
