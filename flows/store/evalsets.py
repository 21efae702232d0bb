"""Evaluation sets that grow: queries, gallery and query log as CSV files that name images, and what came when.

A set lies in `evalsets/<name>`: queries.csv (file, identity, part, added), gallery.csv (file, identity, added), log.csv
(file, added), with a column per slice, and set.json, which is written last. `file` is where an image is, a row of a
Parquet file as `place#row`; images are not copied. Rows are only ever added, and carry the number of the version that
brought them. An identity is in one part, dev or test, by its hash: it stays there whatever comes later.
"""

import csv
import getpass
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import exists, join, list_files, read_bytes, read_json, write_bytes, write_json

FORMAT_VERSION = 1
FILES = ("queries", "gallery", "log")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Row = dict[str, str]


class EvalsetError(GracefulError, ValueError):
    """A set that cannot be made, found or grown."""


@dataclass(frozen=True)
class Evalset:
    """A set as it is stored. `versions` say what came when, from where, and by whom."""

    name: str
    slices: tuple[str, ...]
    dev_share: float
    parent: str | None = None
    versions: tuple[dict[str, Any], ...] = ()
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def known(self, part: str) -> set[str]:
        """Images that a file of the set names."""
        return {row["file"] for row in self.rows.get(part, ())}

    @property
    def identities(self) -> set[str]:
        """Identities that have a query."""
        return {row["identity"] for row in self.rows.get("queries", ())}


def evalset_uri(root: str, name: str) -> str:
    """The folder of a set. Raises EvalsetError on a name that is no folder's."""
    if not _NAME.fullmatch(name):
        raise EvalsetError(
            f"naming an evaluation set: expected letters, digits, '.', '_' and '-', found {name!r}; choose another name"
        )
    return join(root, "evalsets", name)


def evalset_names(root: str) -> list[str]:
    """Names of the sets of a workspace."""
    places = list_files(join(root, "evalsets"))
    return sorted(place.rsplit("/", 2)[-2] for place in places if place.endswith("/set.json"))


def read_evalset(root: str, name: str) -> Evalset:
    """Read a set. Raises EvalsetError, naming those that there are."""
    place = evalset_uri(root, name)
    if not exists(join(place, "set.json")):
        there = ", ".join(evalset_names(root)) or "none yet"
        raise EvalsetError(
            f"opening an evaluation set: expected {name}, found no set of this name (sets: {there}); make it with "
            "'graceful evalset create'"
        )
    stored = read_json(join(place, "set.json"))
    if stored.get("format_version") != FORMAT_VERSION:
        raise UnknownFormatError(
            f"opening an evaluation set: expected format version {FORMAT_VERSION}, found "
            f"{stored.get('format_version')} (at {place}); use the program version that wrote it"
        )
    return Evalset(
        name=name,
        slices=tuple(stored["slices"]),
        dev_share=stored["dev_share"],
        parent=stored["parent"],
        versions=tuple(stored["versions"]),
        rows={part: _read_rows(join(place, f"{part}.csv")) for part in FILES},
    )


def with_version(
    evalset: Evalset, rows: Mapping[str, Sequence[Row]], sources: Sequence[str], **told: int
) -> tuple[Evalset, dict[str, Any]]:
    """A set with more rows; those that it names already are left out. Returns what the new version says."""
    number = len(evalset.versions) + 1
    fresh: dict[str, tuple[Row, ...]] = {}
    for part in FILES:
        new = {row["file"]: {**row, "added": str(number)} for row in rows.get(part, ())}
        fresh[part] = tuple(row for file, row in new.items() if file not in evalset.known(part))
    version = {
        "number": number,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": getpass.getuser(),
        "from": list(sources),
        **{f"added_{part}": len(fresh[part]) for part in FILES},
        "added_identities": len({row["identity"] for row in fresh["queries"]} - evalset.identities),
        **told,
    }
    grown = Evalset(
        name=evalset.name,
        slices=evalset.slices,
        dev_share=evalset.dev_share,
        parent=evalset.parent,
        versions=(*evalset.versions, version),
        rows={part: (*evalset.rows.get(part, ()), *fresh[part]) for part in FILES},
    )
    return grown, version


def write_evalset(root: str, evalset: Evalset) -> str:
    """Store a set; returns its folder. A file without rows is not written."""
    place = evalset_uri(root, evalset.name)
    columns = {
        "queries": ("file", "identity", "part", "added", *evalset.slices),
        "gallery": ("file", "identity", "added", *evalset.slices),
        "log": ("file", "added", *evalset.slices),
    }
    for part, names in columns.items():
        if evalset.rows.get(part):
            text = io.StringIO()
            writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(evalset.rows[part])
            write_bytes(join(place, f"{part}.csv"), text.getvalue().encode())
    write_json(
        join(place, "set.json"),
        {
            "format_version": FORMAT_VERSION,
            "name": evalset.name,
            "slices": list(evalset.slices),
            "dev_share": evalset.dev_share,
            "parent": evalset.parent,
            "versions": list(evalset.versions),
        },
    )
    return place


def part_of(identity: str, dev_share: float) -> Literal["dev", "test"]:
    """The part that an identity belongs to, by its hash.

    >>> part_of("cat", 0.0), part_of("cat", 1.0)
    ('test', 'dev')
    """
    return "dev" if _hashed(identity) < dev_share else "test"


def drawn(names: Sequence[str]) -> list[str]:
    """The names in a random order that is always the same."""
    return sorted(names, key=lambda name: (_hashed(name), name))


def _hashed(name: str) -> float:
    return int(hashlib.sha256(f"evalset/{name}".encode()).hexdigest()[:13], 16) / 16**13


def _read_rows(place: str) -> tuple[Row, ...]:
    if not exists(place):
        return ()
    return tuple(csv.DictReader(io.StringIO(read_bytes(place).decode(), newline="")))
