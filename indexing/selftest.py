"""Tries a storage out: writes a small gallery, kills the writers, tears its files, and compares with a dictionary.

Vectors are drawn from names, so that a wrong one is known. Every step may be tried again: a child process that was
killed in the middle of one is started once more from that step, and what anybody can read in between must be the state
before the step or after it, item by item.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError, in_one_line
from graceful.files import exists, join, list_files, read_bytes, remove, set_crash_hook, write_bytes
from graceful.indexing import checked_files
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.doctor import examine_gallery
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.embedding_files import write_embedding_file
from graceful.indexing.gallery import Gallery
from graceful.indexing.maintenance import collect, forget
from graceful.indexing.reindex import carry_out, embed_missing
from graceful.indexing.tables import TableConflictError

POINTS = (
    "table-file-written", "table-committed", "vectors-before-commit", "vectors-after-commit", "wave-done",
    "rewrite-before-commit", "rewrite-after-commit", "merge-before-commit",
)  # fmt: skip
FIRST, SECOND = "g001-selftest", "g002-selftest"
READABLE = ([FIRST], [FIRST, SECOND])
_WIDTH = 16
_CHILD_S = 120.0
Model = dict[str, str]
"""Item id -> image: what must be there."""


@dataclass(frozen=True)
class Step:
    """One thing that is done to the gallery."""

    kind: str
    items: tuple[tuple[str, str], ...] = ()


@dataclass
class Trial:
    """What was tried, how often, and what was seen; `failures` are empty when all is well."""

    name: str
    times: int = 0
    seen: str = ""
    failures: list[str] = field(default_factory=list)


def run_selftest(location: str, *, rounds: int = 3, seed: int = 0) -> list[Trial]:
    """Try everything below a location that is empty; what is left there is the caller's to remove."""
    trials = [storage_properties(join(location, "storage")), conflicts(join(location, "conflicts"))]
    history = draw_history(seed)
    trials.append(killed_at_every_point(location, history))
    trials.append(killed_at_random(location, rounds, seed))
    trials.append(two_writers(join(location, "writers")))
    trials.append(damage(join(location, "damage")))
    return trials


def draw_history(seed: int, num_steps: int = 14) -> list[Step]:
    """Steps that meet every crash point: ingests, changes, deletes, waves of two generations, collections, forgets."""
    draw = random.Random(seed)
    steps = [Step("ingest", ((f"item-{number}", "a"),)) for number in range(8)] + [Step("embed")]
    live = {f"item-{number}": "a" for number in range(8)}
    for number in range(num_steps):
        kind = draw.choice(["ingest", "change", "delete", "wave", "collect", "forget", "embed"])
        name = draw.choice(sorted(live))
        if kind == "ingest":
            part = tuple((f"item-{100 + number}-{extra}", "a") for extra in range(3))
            live.update(part)
            steps.append(Step("ingest", part))
        elif kind == "change":
            live[name] = f"{number}"
            steps.append(Step("ingest", ((name, f"{number}"),)))
        elif kind in ("delete", "forget") and len(live) > 3:
            del live[name]
            steps += [Step("delete", ((name, ""),))] + ([Step("forget", ((name, ""),))] if kind == "forget" else [])
        else:
            steps.append(Step(kind if kind in ("wave", "collect") else "embed"))
    last = sorted(live)[0]
    ending = [Step("ingest", tuple((name, "z") for name in sorted(live)[1:4])), Step("embed"), Step("wave")]
    return [
        *steps,
        *ending,
        Step("merge"),
        Step("collect"),
        Step("delete", ((last, ""),)),
        Step("forget", ((last, ""),)),
    ]


def after(model: Model, step: Step) -> Model:
    """What must be there after a step."""
    if step.kind == "ingest":
        return {**model, **dict(step.items)}
    if step.kind == "delete":
        gone = {name for name, _ in step.items}
        return {name: image for name, image in model.items() if name not in gone}
    return model


def carry_out_step(gallery: Gallery, step: Step) -> None:
    """Do one thing; done before, it does nothing."""
    names = [name for name, _ in step.items]
    if step.kind == "ingest":
        gallery.ingest(pa.Table.from_pylist([_row(name, image) for name, image in step.items]))
    elif step.kind == "delete":
        gallery.delete(names)
    elif step.kind == "forget":
        forget(gallery, names)
    elif step.kind == "embed":
        embed_missing(gallery, FIRST, _embedder(FIRST), unit_rows=4)
    elif step.kind == "wave":
        live = gallery.view([]).revisions
        plan = pa.table({"wave": np.arange(len(live)) % 2 + 1, "position": np.arange(len(live)), "revision": live})
        carry_out(gallery, SECOND, plan, _embedder(SECOND), unit_rows=4)
    elif step.kind == "merge":
        gallery.merge_small_files()
    else:
        collect(gallery, lambda: list(READABLE), orphan_age_s=0)


def compare(location: str, before: Model, now: Model) -> list[str]:
    """What is wrong: an item that is neither as before the step nor as after it, or a vector of something else."""
    gallery = Gallery(location)
    wrong: list[str] = []
    for readable in READABLE:
        view = gallery.view(readable)
        names = view.column("item_id").to_pylist()
        sources = view.column("source").to_pylist()
        found = {name: source.rpartition("/")[2] for name, source in zip(names, sources, strict=True)}
        if len(found) != len(names):
            wrong.append("an item is there twice")
        for name in before.keys() | now.keys() | found.keys():
            if found.get(name) not in (before.get(name), now.get(name)):
                wrong.append(f"{name}: found {found.get(name)}, expected {before.get(name)} or {now.get(name)}")
        for code, generation in enumerate(readable):
            positions = np.flatnonzero(view.owner == code)
            if len(positions):
                expected = _encode(generation, [sources[position] for position in positions])
                if not np.array_equal(view.vectors(positions), expected):
                    wrong.append(f"a vector of {generation} is that of another image")
    return wrong


def killed_at_every_point(location: str, history: Sequence[Step]) -> Trial:
    """Kill a writer at each crash point, the first time and a later one, and let it go on."""
    trial, hit = Trial("killed at every crash point, then resumed"), set()
    for point in POINTS:
        for number in (1, 3):
            place = join(location, f"{point}-{number}")
            killed = _live_through(place, history, trial, point=point, number=number)
            trial.times += killed
            hit |= {point} if killed else set()
            _clean(place, trial)
    missed = [point for point in POINTS if point not in hit]
    if missed:
        trial.failures.append(f"never reached: {', '.join(missed)}")
    trial.seen = f"{len(hit)} points"
    return trial


def killed_at_random(location: str, rounds: int, seed: int) -> Trial:
    """Kill writers (SIGKILL) again and again at random moments of a history."""
    trial, draw = Trial("killed at random moments (SIGKILL), then resumed"), random.Random(seed)
    for number in range(rounds):
        place = join(location, f"random-{number}")
        trial.times += _live_through(place, draw_history(seed + 1 + number), trial, draw=draw)
        _clean(place, trial)
    trial.seen = f"{rounds} histories"
    return trial


def two_writers(location: str) -> Trial:
    """Let two processes ingest at the same time, some of it the same."""
    Gallery(location, create=True)
    trial = Trial("two writers at once", times=2)
    context = _context()
    children = [context.Process(target=_ingest_some, args=(location, start)) for start in (0, 5)]
    for child in children:
        child.start()
    for child in children:
        child.join(_CHILD_S)
    if any(child.exitcode != 0 for child in children):
        trial.failures.append(f"exit codes {[child.exitcode for child in children]}")
    expected = {f"item-{number}": "a" for number in range(15)}
    trial.failures += compare(location, expected, expected)
    carry_out_step(Gallery(location), Step("collect"))
    return _examined(location, trial)


def conflicts(location: str) -> Trial:
    """Commit from a version that is no longer the newest: it must be refused, and change nothing."""
    gallery, other = Gallery(location, create=True), Gallery(location)
    table = gallery.items_table
    trial = Trial("compare-and-swap from a stale version")
    for number in range(5):
        stale = table.version()
        row = pa.Table.from_pylist([_complete(f"winner-{number}", number)], schema=table.schema)
        other.items_table.append(row, expected_version=stale)
        trial.times += 1
        try:
            late = pa.Table.from_pylist([_complete(f"loser-{number}", 100 + number)], schema=table.schema)
            table.append(late, expected_version=stale)
            trial.failures.append("a stale write was not refused")
        except TableConflictError:
            pass
    names = Gallery(location).items_table.snapshot().rows(["item_id"])["item_id"].to_pylist()
    if any(name.startswith("loser") for name in names) or len(names) != 5:
        trial.failures.append(f"found {len(names)} rows, expected 5 of the winners")
    trial.seen = "refused each time"
    return trial


def storage_properties(location: str) -> Trial:
    """Write, overwrite, list and remove: each must be seen at once."""
    trial = Trial("written, replaced, listed and removed files are seen at once")
    for number in range(20):
        place = join(location, f"file-{number}")
        write_bytes(place, b"first")
        write_bytes(place, b"second")
        if read_bytes(place) != b"second":
            trial.failures.append("an old content was read after it was replaced")
        if not exists(place) or not any(path.endswith(f"/file-{number}") for path in list_files(location)):
            trial.failures.append("a file that was written is not listed")
        remove(place)
        if exists(place) or any(path.endswith(f"/file-{number}") for path in list_files(location)):
            trial.failures.append("a file that was removed is still listed")
        trial.times += 1
    trial.seen = "consistent"
    return trial


def damage(location: str) -> Trial:
    """Flip bytes, tear and remove files: every reader must be told."""
    gallery = Gallery(location, create=True)
    carry_out_step(gallery, Step("ingest", tuple((f"item-{number}", "a") for number in range(6))))
    carry_out_step(gallery, Step("embed"))
    expected = {f"item-{number}": "a" for number in range(6)}
    trial, draw = Trial("flipped bytes, torn and missing files are found"), random.Random(0)
    num_found = 0
    for table in (gallery.items_table, gallery.vectors_table):
        path = table.snapshot().location(table.snapshot().files[0])
        content = read_bytes(path)
        places = [draw.randrange(4, len(content) - 4) for _ in range(20)]
        faults = [content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :] for at in places]
        for fault in [*faults, content[:-50], b""]:
            write_bytes(path, fault)
            checked_files.forget_verified()
            trial.times += 1
            try:
                trial.failures += compare(location, expected, expected)
            except DamagedFileError:
                num_found += 1
        write_bytes(path, content)
        checked_files.forget_verified()
    trial.failures += compare(location, expected, expected)
    trial.seen = f"{num_found} found, {trial.times - num_found} harmless"
    return _examined(location, trial)


def _live_through(
    place: str,
    history: Sequence[Step],
    trial: Trial,
    *,
    point: str = "",
    number: int = 0,
    draw: random.Random | None = None,
) -> int:
    """Carry a history out in child processes that are killed; returns how often. Compares after each one's end."""
    Gallery(place, create=True)
    context = _context()
    models: list[Model] = [{}]
    for step in history:
        models.append(after(models[-1], step))
    num_killed, done, left = 0, 0, 6
    while done < len(history):
        progress = context.Value("i", done)
        aim = (point, number) if num_killed == 0 else ("", 0)
        child = context.Process(target=_carry_out_all, args=(place, history[done:], progress, *aim))
        child.start()
        if draw is not None and left:
            left -= 1
            _kill_later(child, progress, done, draw)
        child.join(_CHILD_S)
        killed = child.exitcode == -signal.SIGKILL
        num_killed += killed
        if not killed and child.exitcode != 0:
            trial.failures.append(f"a writer ended with {child.exitcode} in {history[progress.value].kind}")
            return num_killed
        done = progress.value
        trial.failures += compare(place, models[done], models[min(done + 1, len(history))])
        if trial.failures:
            return num_killed
    carry_out_step(Gallery(place), Step("collect"))
    trial.failures += compare(place, models[-1], models[-1])
    _examined(place, trial)
    return num_killed


def _kill_later(child: BaseProcess, progress: Any, done: int, draw: random.Random) -> None:
    """Wait until a few steps are done, then a random moment, and kill."""
    wanted, deadline = done + draw.randrange(1, 6), time.monotonic() + _CHILD_S
    while child.is_alive() and progress.value < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.03))
    if child.is_alive():
        child.kill()


def _carry_out_all(place: str, steps: Sequence[Step], progress: Any, point: str, number: int) -> None:
    left = number

    def die(name: str) -> None:
        nonlocal left
        if name == point:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    set_crash_hook(die)
    gallery = Gallery(place)
    for step in steps:
        carry_out_step(gallery, step)
        progress.value += 1


def _ingest_some(location: str, start: int) -> None:
    gallery = Gallery(location)
    for number in range(start, start + 10):
        carry_out_step(gallery, Step("ingest", ((f"item-{number}", "a"),)))
    carry_out_step(gallery, Step("embed"))


def _examined(location: str, trial: Trial) -> Trial:
    try:
        found = examine_gallery(location, protected=READABLE, deep=True)
        trial.failures += [finding.what for finding in found if finding.severity == "error"]
    except GracefulError as error:
        trial.failures.append(in_one_line(error))
    return trial


def _clean(place: str, trial: Trial) -> None:
    if not trial.failures:
        remove(place)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graceful.indexing.selftest"])
    return context


def _row(name: str, image: str) -> dict[str, str]:
    source = f"selftest:{name}/{image}"
    digest = hashlib.sha256(source.encode()).hexdigest()
    return {"item_id": name, "source": source, "content_sha256": digest, "label": "", "attributes": "{}"}


def _complete(name: str, revision: int) -> dict[str, Any]:
    return {**_row(name, "a"), "revision": revision, "replaces": -1, "deleted": False, "source_key": 0}


def _encode(generation: str, sources: Sequence[str]) -> NDArray[np.float32]:
    rows = []
    for source in sources:
        seed = int.from_bytes(hashlib.sha256(f"{generation}/{source}".encode()).digest()[:8], "little")
        row = np.random.default_rng(seed).standard_normal(_WIDTH)
        rows.append(row / np.linalg.norm(row))
    return np.asarray(rows, np.float32).reshape(len(rows), _WIDTH)


def _embedder(generation: str) -> Callable[[Sequence[EmbedUnit], Callable[[EmbeddedUnit], None]], None]:
    def embed(units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
        for unit in units:
            keys = unit.keys if isinstance(unit.keys, pa.Table) else pa.table(unit.keys)
            num, size = len(unit.sources), write_embedding_file(unit.path, keys, _encode(generation, unit.sources))
            on_unit(EmbeddedUnit(unit.unit_id, unit.path, num, size, _WIDTH, (), 0.0))

    return embed
