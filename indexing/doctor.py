"""Looks a gallery over: every table, every file, every row, and what of it is damaged, doubled, dead or in the way.

Nothing is changed here. Findings that cost data or answers are errors; what only costs room or time is a warning. By
default files are compared with the log by size, and their footers and numbers are read; `deep` reads every byte and
looks at the norm of every vector.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError, in_one_line
from graceful.files import file_stats, join, list_files, read_bytes, read_json
from graceful.indexing.checked_files import CheckedFile, DamagedFileError, verify
from graceful.indexing.embedding_files import read_rows
from graceful.indexing.gallery import VECTORS_SCHEMA, Gallery
from graceful.indexing.items import ITEMS_SCHEMA
from graceful.indexing.maintenance import needed_vectors
from graceful.indexing.revisions import is_member
from graceful.indexing.tables import (
    MERGE_FILES,
    ORPHAN_AGE_S,
    STAGING,
    DataFile,
    MissingTableError,
    TableSnapshot,
    VersionedTable,
)
from graceful.indexing.view import NORM_TOLERANCE

Severity = Literal["error", "warning", "note"]
NUM_EXAMPLES = 3
_BLOCK = 16_384


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be: how often, the first examples, and what to do.

    `repair` names what `graceful doctor --repair` does about it; empty where it can do nothing.
    """

    severity: Severity
    what: str
    remedy: str
    count: int = 1
    examples: tuple[str, ...] = ()
    repair: str = ""
    place: str = field(default="", repr=False)


def examine_table(
    location: str,
    schema: pa.Schema,
    *,
    partition_by: str | None = None,
    key: str | None = None,
    deep: bool = False,
    orphan_age_s: float = ORPHAN_AGE_S,
    derived: bool = False,
) -> list[Finding]:
    """Look over one table: its log, the files it names, and those it does not. `derived`: it can be made anew."""
    name = "/".join(location.rstrip("/").split("/")[-2:])
    try:
        table = VersionedTable(location, schema, partition_by=partition_by, key=key)
    except MissingTableError:
        if derived:
            return [_finding("error", f"table {name} is gone", "run 'graceful doctor --repair'", "create", location)]
        return [_finding("error", f"table {name} is gone", f"restore {location} from a backup", "", location)]
    except GracefulError as error:
        found = _damaged_log(name, location, error)
        return [found]
    snapshot = table.snapshot()
    stats = file_stats(location)
    return [
        *_examine_files(name, snapshot, stats, key, deep),
        *_examine_strangers(name, table, orphan_age_s, stats),
        *_examine_sizes(name, location, snapshot),
    ]


def examine_gallery(
    location: str,
    *,
    protected: Sequence[Sequence[str]] = (),
    known: Sequence[str] | None = None,
    deep: bool = False,
    orphan_age_s: float = ORPHAN_AGE_S,
) -> list[Finding]:
    """Look over a whole gallery.

    `protected`: what each query generation that must keep seeing reads; `known`: generations of the registry, all
    where None.
    """
    shape: Mapping[str, tuple[pa.Schema, str | None, str | None, bool]] = {
        "items": (ITEMS_SCHEMA, None, "revision", False),
        "vectors": (VECTORS_SCHEMA, "generation", "revision", False),
    }
    found: list[Finding] = []
    for name, (schema, partition_by, key, derived) in shape.items():
        place = join(location, name)
        findings = examine_table(
            place, schema, partition_by=partition_by, key=key, deep=deep, orphan_age_s=orphan_age_s, derived=derived
        )
        if name == "vectors" and any(one.what.endswith("is gone") and one.place == place for one in findings):
            remedy = (
                f"restore {place} from a backup, or embed every image again: 'graceful doctor --repair --yes' makes an "
                "empty table, and until the next embedding nothing can be found"
            )
            findings = [_finding("error", "table gallery/vectors is gone", remedy, "create vectors", place)]
        found += findings
    if any(one.severity == "error" and one.what.startswith("table") for one in found):
        return found
    gallery = Gallery(location)
    try:
        found += examine_rows(gallery, protected, known)
        found += examine_leases(gallery)
        if deep:
            found += examine_norms(gallery)
    except DamagedFileError as error:
        if not any(one.severity == "error" for one in found):
            found.append(_finding("error", in_one_line(error, 500), "restore the file from a backup"))
    return found


def examine_rows(
    gallery: Gallery, protected: Sequence[Sequence[str]], known: Sequence[str] | None = None
) -> list[Finding]:
    """Look for vectors that are stored twice, that belong to nothing, that nobody may read, and items nobody finds."""
    version = gallery.version()
    items = gallery.items_table.snapshot(version.items)
    revisions = np.sort(_column(gallery, items.files, items, "revision"))
    found = []
    doubled = revisions[1:][revisions[1:] == revisions[:-1]]
    if len(doubled):
        found.append(
            _finding("error", f"{len(doubled):,} revisions of items are stored twice", "restore gallery/items",
                     count=len(doubled), examples=doubled)
        )  # fmt: skip
    vectors = gallery.vectors_table.snapshot(version.vectors)
    readable = {name for names in protected for name in names}
    needed = needed_vectors(gallery, protected, version) if protected else {}
    highest = gallery.items.counters()
    num_dead = 0
    for generation, files in sorted(vectors.by_partition.items(), key=lambda pair: str(pair[0])):
        held = np.sort(_column(gallery, files, vectors, "revision"))
        twice = held[1:][held[1:] == held[:-1]]
        if len(twice):
            found.append(
                _finding("error", f"vectors of {generation}: {len(twice):,} rows are stored twice",
                         "run 'graceful collect' after restoring gallery/vectors", count=len(twice), examples=twice)
            )  # fmt: skip
        if known is not None and generation not in known:
            found.append(
                _finding("error", f"{len(held):,} vectors of {generation}, which the registry does not know",
                         "restore the registry from a backup; 'graceful collect' would drop them", count=len(held))
            )  # fmt: skip
        elif protected and generation not in readable:
            found.append(
                _finding("warning", f"{len(held):,} vectors of {generation}, which nobody may read",
                         "run 'graceful collect' to drop them", count=len(held))
            )  # fmt: skip
        # Above the highest number given out: the next image with that number would be found by another's vector.
        unborn = held[(held & ((1 << 40) - 1)) > highest[held >> 40]]
        if len(unborn):
            found.append(
                _finding("error", f"{len(unborn):,} vectors of {generation} belong to images that were lost",
                         "the items table lost commits: restore gallery/items; do not ingest before", count=len(unborn),
                         examples=unborn)
            )  # fmt: skip
        if protected and generation in readable:
            num_dead += int((~is_member(held, needed.get(str(generation), np.empty(0, np.int64)))).sum())
    if num_dead:
        found.append(
            _finding("note", f"{num_dead:,} vectors that nobody reads", "run 'graceful collect'", count=num_dead)
        )
    return found


def unreadable_items(gallery: Gallery, readable: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Revisions (n,) that a query generation cannot read, and of how many each other generation has a vector."""
    version = gallery.version()
    view = gallery.view(readable, version)
    blind = view.revisions[view.unreadable()]
    others: dict[str, int] = {}
    if len(blind):
        snapshot = gallery.vectors_table.snapshot(version.vectors)
        for generation, files in snapshot.by_partition.items():
            if generation not in readable:
                held = np.sort(_column(gallery, files, snapshot, "revision"))
                if num := int(is_member(blind, held).sum()):
                    others[str(generation)] = num
    return blind, others


def examine_leases(gallery: Gallery) -> list[Finding]:
    """Tell how many readers pin versions, and how many leases ran out."""
    now, num_open, num_over = time.time(), 0, 0
    for path in list_files(join(gallery.location, "leases")):
        if path.endswith(".json"):
            try:
                ends = float(read_json(path).get("expires_at", 0))
            except (FileNotFoundError, ValueError):
                continue
            num_open, num_over = num_open + (ends > now), num_over + (ends <= now)
    found = []
    if num_open:
        what = f"{num_open:,} open leases"
        found.append(_finding("note", what, "what open readers pin is not collected", count=num_open))
    if num_over:
        what = f"{num_over:,} leases of readers that ended without a word"
        found.append(_finding("note", what, "run 'graceful collect'", "leases", count=num_over))
    return found


def examine_norms(gallery: Gallery) -> list[Finding]:
    """Look at every vector: finite, and of norm 1."""
    snapshot = gallery.vectors_table.snapshot()
    bad: list[str] = []
    num_bad = 0
    for file in snapshot.files:
        location = snapshot.location(file)
        try:
            for start in range(0, file.num_rows, _BLOCK):
                vectors = read_rows(location, np.arange(start, min(file.num_rows, start + _BLOCK)))
                squares = np.einsum("nd,nd->n", vectors, vectors)
                wrong = np.flatnonzero(~(np.abs(squares - 1) <= 2 * NORM_TOLERANCE))
                num_bad += len(wrong)
                bad += [f"{file.path}, row {start + row}" for row in wrong[: NUM_EXAMPLES - len(bad)]]
        except DamagedFileError:
            continue  # a finding of its own
    if not num_bad:
        return []
    return [
        _finding("error", f"{num_bad:,} vectors are not finite or not of norm 1",
                 "an encoder returned them: drop them and embed again", count=num_bad, examples=bad)
    ]  # fmt: skip


def _examine_files(
    name: str, snapshot: TableSnapshot, stats: Mapping[str, tuple[float, int]], key: str | None, deep: bool
) -> Iterator[Finding]:
    """Compare every file with what the log and its name say of it."""
    gone, torn, damaged = [], [], []
    for file in snapshot.files:
        if file.path not in stats:
            gone.append(file.path)
        elif stats[file.path][1] != file.size_bytes:
            torn.append(f"{file.path} ({stats[file.path][1]:,} of {file.size_bytes:,} bytes)")
        elif (problem := _problem_of(snapshot.location(file), file, key, deep)) is not None:
            damaged.append(problem)
    where, repair = f"restore them to {snapshot.uri} from a backup; the rows in them are lost otherwise", ""
    if name == "gallery/vectors":
        where = (
            f"restore them to {snapshot.uri} from a backup; or give --repair --yes, which drops them, and run "
            "'graceful update', which embeds their images again"
        )
        repair = "drop vectors"
    for what, files in (("gone", gone), ("torn", torn), ("damaged", damaged)):
        if files:
            yield _finding(
                "error", f"table {name}: files that are {what}: {len(files):,}", where, repair, snapshot.uri,
                count=len(files), examples=files,
            )  # fmt: skip


def drop_damaged_vectors(gallery: Gallery) -> tuple[int, int]:
    """Take files of vectors that are gone or damaged out of the newest version; returns files and rows.

    The images are there still: their items can be read by another generation, or not until they are embedded again.
    """
    snapshot = gallery.vectors_table.snapshot()
    stats = file_stats(snapshot.uri)
    bad = [
        file
        for file in snapshot.files
        if stats.get(file.path, (0.0, -1))[1] != file.size_bytes
        or _problem_of(snapshot.location(file), file, "revision", True) is not None
    ]
    if bad:
        gallery.vectors_table.drop(bad, at=snapshot.version)
    return len(bad), sum(file.num_rows for file in bad)


def _problem_of(location: str, file: DataFile, key: str | None, deep: bool) -> str | None:
    try:
        if deep:
            verify(location, again=True)
        opened = CheckedFile(location)
        if opened.num_rows != file.num_rows:
            return f"{file.path}: {opened.num_rows:,} rows, the log says {file.num_rows:,}"
        if key is not None and opened.num_rows:
            keys = opened.read([key])[key].to_numpy()
            if (int(keys.min()), int(keys.max())) != (file.lowest, file.highest):
                return f"{file.path}: its {key}s are not in the range that the log says"
    except DamagedFileError as error:
        return in_one_line(error, 500)
    return None


def _examine_strangers(
    name: str, table: VersionedTable, orphan_age_s: float, stats: Mapping[str, tuple[float, int]]
) -> Iterator[Finding]:
    """Files that no version names: staged ones, and what killed writers left."""
    orphans = [path.removeprefix(table.uri).lstrip("/") for path in table.orphans(older_than_s=0)]
    superseded = set(table.superseded())
    staged = [path for path in orphans if path.startswith(f"{STAGING}/")]
    left = [path for path in orphans if path not in superseded and path not in staged]
    for what, files in (("files that no commit names", left), ("staged files", staged)):
        if not files:
            continue
        there = [stats.get(path, (0.0, 0)) for path in files]
        size, oldest = sum(one[1] for one in there), max(one[0] for one in there)
        old = any(one[0] >= orphan_age_s for one in there)
        yield _finding(
            "warning" if old else "note",
            f"table {name}: {len(files):,} {what}, {size:,} bytes, the oldest {oldest / 3600:,.1f} h old",
            "run 'graceful collect'" if old else "a writer may be about to commit them",
            "orphans" if old else "", table.uri, count=len(files), examples=files,
        )  # fmt: skip


def _examine_sizes(name: str, location: str, snapshot: TableSnapshot) -> Iterator[Finding]:
    small = sum(len(files) for files in snapshot.by_partition.values() if len(files) >= 4 * MERGE_FILES)
    if small:
        yield _finding("note", f"table {name}: {small:,} small files", "run 'graceful collect', which merges them",
                       "merge", location, count=small)  # fmt: skip


def _damaged_log(name: str, location: str, error: GracefulError) -> Finding:
    """A log that cannot be read; where every entry is there, the checkpoints are derived and may go."""
    entries = sorted(path.rsplit("/", 1)[1] for path in list_files(join(location, "_delta_log")))
    commits = [entry for entry in entries if entry.endswith(".json") and entry[:20].isdigit()]
    whole = [f"{number:020d}.json" for number in range(len(commits))] == commits
    checkpoints = [entry for entry in entries if "checkpoint" in entry]
    if whole and checkpoints and all(read_bytes(join(location, "_delta_log", entry)).strip() for entry in commits):
        lines = in_one_line(error, 400)
        if "Json" not in lines and "digest" not in lines and "lost its newest" not in lines:
            remedy = "every entry of the log is there: 'graceful doctor --repair' makes it readable without checkpoints"
            return _finding(
                "error", f"table {name}: a checkpoint of its log is damaged", remedy, "checkpoints", location
            )
    return _finding(
        "error", f"table {name}: {in_one_line(error, 600)}", "its commits cannot be made again", "", location
    )


def _column(gallery: Gallery, files: Sequence[DataFile], snapshot: TableSnapshot, name: str) -> NDArray[np.int64]:
    parts = [gallery.column_of(snapshot.location(file), name) for file in files]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _finding(
    severity: Severity,
    what: str,
    remedy: str,
    repair: str = "",
    place: str = "",
    *,
    count: int = 1,
    examples: Sequence[object] | NDArray[np.int64] = (),
) -> Finding:
    shown = tuple(str(example) for example in list(examples)[:NUM_EXAMPLES])
    return Finding(severity, what, remedy, count, shown, repair, place)
