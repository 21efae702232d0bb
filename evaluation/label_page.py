"""The page on which a person says which of two answers to a query is right: one file, no network, a CSV to save.

Which side shows today's answer and which the candidate's is drawn from the query, so that nobody labels in favour of
either. What was said is in the CSV file alone; `LABEL_COLUMNS` are its columns, on this page and beside it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LABEL_COLUMNS = ("evaluation", "query", "before", "after", "label", "query_source", "before_source", "after_source")


class ToLabel(NamedTuple):
    """One question: a query and its two answers, each with the content hashes and sources of the items behind it."""

    evaluation: str
    query: str
    before: str
    after: str
    query_source: str
    before_items: tuple[str, ...] = ()
    after_items: tuple[str, ...] = ()
    before_source: str = ""
    after_source: str = ""

    @property
    def swapped(self) -> bool:
        """Whether the answer of today stands on the right, by the query's hash."""
        return bool(self.query) and int(self.query[-1], 16) % 2 == 1

    def row(self) -> dict[str, str]:
        """As a row of the CSV file, not labelled yet."""
        known = self._asdict() | {"label": ""}
        return {name: str(known[name]) for name in LABEL_COLUMNS}


def label_csv(questions: Sequence[ToLabel]) -> str:
    """The questions as a CSV file whose column `label` is to be filled in."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LABEL_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(question.row() for question in questions)
    return text.getvalue()


def label_page(questions: Sequence[ToLabel], pictures: Mapping[str, str], *, title: str, file_name: str) -> str:
    """Render the page. `pictures` maps content hashes to data URIs; one that is not there is shown by its source."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    rows = [
        {**question.row(), "swapped": question.swapped, "query_items": [question.query],
         "before_items": list(question.before_items), "after_items": list(question.after_items)}
        for question in questions
    ]  # fmt: skip
    return environment.get_template("labels.html.j2").render(
        title=title, rows=rows, pictures=dict(pictures), columns=LABEL_COLUMNS, file_name=file_name
    )
