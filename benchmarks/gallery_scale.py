"""What the gallery's bookkeeping costs at 10,000, 100,000 and 1,000,000 items: with an encoder that costs nothing.

Every gallery has two owning generations (the second owns a tenth) and at least a hundred committed units. Handles are
opened anew for each measurement, as a command does. `python -m benchmarks.gallery_scale` measures every step's seconds
for docs/scale.md; the ratios are run by `python -m benchmarks`.
"""

import datetime
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import Ratio, paired, processor
from graceful.files import join
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit, embed_units
from graceful.indexing.embedding_files import write_embedding_file
from graceful.indexing.gallery import Gallery
from graceful.indexing.maintenance import collect
from graceful.indexing.planner import OrderInputs, plan_waves, random_key_of, rank_items
from graceful.indexing.reindex import carry_out, embed_missing

SIZES = (10_000, 100_000, 1_000_000)
WIDTH = 128
FIRST, SECOND, THIRD = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"
_MIB = 2**20
_PEAK_MIB = 2_048


@functools.cache
def _vectors() -> NDArray[np.float32]:
    rows = np.random.default_rng(0).standard_normal((4096, WIDTH)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def embed(units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
    """Embed with an encoder that costs nothing."""

    def open_encoder() -> Callable[[Sequence[str]], tuple[NDArray[np.float32], dict[int, str]]]:
        return lambda sources: (np.resize(_vectors(), (len(sources), WIDTH)), {})

    embed_units(units, open_encoder, on_unit=on_unit)


def items(start: int, stop: int) -> pa.Table:
    """Rows of an ingest."""
    ids = [f"photos/{number:09d}.jpg" for number in range(start, stop)]
    return pa.table(
        {
            "item_id": ids,
            "source": [f"/data/{item}" for item in ids],
            "content_sha256": [hashlib.sha256(item.encode()).hexdigest() for item in ids],
            "label": [f"label{number % 1000}" for number in range(start, stop)],
            "attributes": ["{}"] * (stop - start),
        }
    )


def plan(gallery: Gallery, fraction: float, unit_rows: int) -> pa.Table:
    """A plan in random order, in waves of four units."""
    view = gallery.view([])
    inputs = OrderInputs(random_key_of(view.revisions, 0), np.zeros(view.num_items, np.int64))
    return plan_waves(view.revisions, rank_items("random", inputs), 0, fraction, 4 * unit_rows)


def unit_rows_of(num_items: int) -> int:
    """Rows of a unit: at least a hundred units a generation."""
    return min(4_096, num_items // 100)


@contextmanager
def a_gallery(num_items: int) -> Iterator[Gallery]:
    """A gallery of this size, read from two generations."""
    folder = tempfile.mkdtemp(prefix="graceful-scale-")
    try:
        gallery = Gallery(f"{folder}/gallery", create=True)
        gallery.ingest(items(0, num_items))
        unit_rows = unit_rows_of(num_items)
        carry_out(gallery, FIRST, plan(gallery, 1.0, unit_rows), embed, unit_rows=unit_rows)
        carry_out(gallery, SECOND, plan(gallery, 0.1, unit_rows), embed, unit_rows=unit_rows)
        yield gallery
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ingest_one() -> list[Ratio]:
    """One photo with its vector: into 100,000 and 1,000,000 items / into 10,000."""
    with a_gallery(SIZES[0]) as small:
        return [_ingest_one(small, size) for size in SIZES[1:]]


def _ingest_one(small: Gallery, size: int) -> Ratio:
    numbers = iter(range(10_000_000, 11_000_000))

    def one(location: str) -> None:
        gallery = Gallery(location)
        number = next(numbers)
        result = gallery.ingest(items(number, number + 1))
        embed_missing(gallery, SECOND, embed, revisions=result.revisions)

    with a_gallery(size) as large:
        return paired(
            f"ingest_one_{size}",
            functools.partial(one, small.location),
            functools.partial(one, large.location),
            pairs=15,
            at_most=3.0,
            note=f"one photo into {size:,} items / into {SIZES[0]:,}; items and one vector, handle opened anew",
        )


def view_scale() -> list[Ratio]:
    """The view of a mixed gallery / one pass over its keys, nothing remembered."""
    found = []
    for size in SIZES:
        with a_gallery(size) as gallery:

            def keys(location: str = gallery.location) -> None:
                opened = Gallery(location)
                for table, columns in (
                    (opened.items_table, ["item_id", "revision", "deleted"]),
                    (opened.vectors_table, ["revision"]),
                ):
                    snapshot = table.snapshot()
                    for file in snapshot.files:
                        pq.ParquetFile(snapshot.location(file), memory_map=True).read(columns=columns)

            def view(location: str = gallery.location) -> None:
                Gallery(location).view([FIRST, SECOND])

            note = f"{size:,} items, two owners; a pass reads item_id, revision, deleted and the vectors' revisions"
            found.append(paired(f"view_{size}", keys, view, pairs=9, at_most=1.5, note=note))
    return found


def reindex_scale() -> list[Ratio]:
    """Re-index 10 % / re-index everything, at every size."""
    found = []
    for size in SIZES:
        with a_gallery(size) as gallery:
            numbers = iter(range(10, 1000))
            unit_rows = unit_rows_of(size)

            def reindex(fraction: float, gallery: Gallery = gallery, numbers: Iterator[int] = numbers) -> None:
                rows = unit_rows_of(gallery.view([]).num_items)
                generation = f"g{next(numbers):03d}-ffffff"
                carry_out(gallery, generation, plan(gallery, fraction, rows), embed, unit_rows=rows)
                shutil.rmtree(join(gallery.vectors_table.uri, f"generation={generation}"))

            found.append(
                paired(
                    f"reindex_{size}",
                    functools.partial(reindex, 1.0),
                    functools.partial(reindex, 0.1),
                    pairs=7 if size < SIZES[-1] else 3,
                    at_most=0.12,
                    note=f"{size:,} items, plan included, units of {unit_rows:,} rows, free encoder",
                )
            )
    return found


def commit_unit() -> list[Ratio]:
    """Commit one unit of 1,000 rows: into a gallery of 100,000 and 1,000,000 items / of 10,000."""
    found = []
    for size in SIZES[1:]:
        with a_gallery(SIZES[0]) as small, a_gallery(size) as large:
            note = f"1,000 rows of {WIDTH}-d, gallery of {size:,} items / of {SIZES[0]:,}"
            first, second = _Committer(small), _Committer(large)
            found.append(paired(f"commit_{size}", first.time, second.time, pairs=9, at_most=1.5, note=note))
    return found


class _Committer:
    """Commits units of a third generation, each of rows that lack it."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._since = gallery.version()
        missing = gallery.missing_vectors(THIRD, version=self._since)
        self._rows = iter(np.random.default_rng(0).permutation(missing)[:9_000].reshape(-1, 1_000))

    def time(self) -> float:
        revisions = np.sort(next(self._rows))
        unit = f"unit-{revisions[0]}"
        staged = self._gallery.staging_file(THIRD, unit)
        write_embedding_file(staged, pa.table({"revision": revisions}), np.resize(_vectors(), (1_000, WIDTH)))
        started = time.perf_counter()
        done = self._gallery.commit_vectors(THIRD, unit, self._since)
        assert done.committed == len(revisions)
        return time.perf_counter() - started


def peak_memory() -> list[Ratio]:
    """Peak resident memory of ingesting and re-indexing / 2 GiB, in a process of its own."""
    return [_peak(size) for size in SIZES]


def _peak(size: int) -> Ratio:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gallery_scale", str(size)], capture_output=True, text=True, check=True
    )
    peak = json.loads(done.stdout)["peak_mib"]
    return Ratio(
        name=f"peak_memory_{size}",
        ratio=round(peak / _PEAK_MIB, 3),
        lowest=round(peak / _PEAK_MIB, 3),
        highest=round(peak / _PEAK_MIB, 3),
        num_pairs=1,
        target="<= 1.0",
        meets_target=peak <= _PEAK_MIB,
        baseline_s=0.0,
        candidate_s=0.0,
        note=f"{peak:,.0f} MiB at most while {size:,} x {WIDTH} are ingested and re-indexed, of 2 GiB; one process",
    )


def steps(size: int) -> dict[str, float]:
    """Seconds of every step at one size, and what lies on the disk."""
    folder = tempfile.mkdtemp(prefix="graceful-scale-")
    found: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        found[name] = round(time.perf_counter() - started, 4)

    try:
        gallery = Gallery(f"{folder}/gallery", create=True)
        everything, rows = items(0, size), unit_rows_of(size)
        with timed("ingest everything, without vectors"):
            gallery.ingest(everything)
        with timed("plan everything"):
            whole = plan(gallery, 1.0, rows)
        with timed("embed everything, free encoder"):
            carry_out(gallery, FIRST, whole, embed, unit_rows=rows)
        with timed("embed 10 % with the next generation, plan included"):
            carry_out(gallery, SECOND, plan(gallery, 0.1, rows), embed, unit_rows=rows)
        gallery = Gallery(gallery.location)
        with timed("view, nothing remembered"):
            gallery.view([FIRST, SECOND])
        with timed("view again after one photo"):
            since = gallery.version()
            result = gallery.ingest(items(size, size + 1))
            embed_missing(gallery, SECOND, embed, revisions=result.revisions)
            before = time.perf_counter()
            gallery.view([FIRST, SECOND])
        found["view again after one photo"] = round(time.perf_counter() - before, 4)
        with timed("feed of changes after one photo"):
            gallery.changes(since, gallery.version())
        with timed("ingest one photo and its vector"):
            result = gallery.ingest(items(size + 1, size + 2))
            embed_missing(gallery, SECOND, embed, revisions=result.revisions)
        with timed("delete one item"):
            gallery.delete([items(0, 1)["item_id"][0].as_py()])
        with timed("find an item by its source"):
            gallery.items.with_sources(items(5, 6)["source"].combine_chunks())
        with timed("collect: nothing to drop"):
            collect(gallery, lambda: [[FIRST], [FIRST, SECOND]])
        with timed("collect: a tenth of the first generation's rows"):
            collect(gallery, lambda: [[FIRST, SECOND]], dead_share=0.05)
        files = [file for table in (gallery.items_table, gallery.vectors_table) for file in table.snapshot().files]
        found["files"] = len(files)
        found["bytes on disk"] = sum(file.size_bytes for file in files)
        found["peak MiB"] = peak_mib()
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def peak_mib() -> float:
    """Peak resident memory of this process. Not getrusage: its maximum includes what the parent held before."""
    status = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / _MIB, 1)


def measure_steps() -> None:
    """Measure every step at every size, each in a process of its own, and store it."""
    found = {}
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.gallery_scale", str(size), "steps"]
        found[str(size)] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    stored = {"hardware": f"{os.cpu_count()} x {processor()}", "date": date, "width": WIDTH, "sizes": found}
    Path(__file__).with_name("results-scale.json").write_text(json.dumps(stored, indent=2) + "\n")


def ingest_and_reindex(size: int) -> float:
    """Ingest in batches as a loader would, embed twice; the peak of this process in MiB."""
    folder = tempfile.mkdtemp(prefix="graceful-scale-")
    try:
        gallery = Gallery(f"{folder}/gallery", create=True)
        for start in range(0, size, 250_000):
            gallery.ingest(items(start, min(size, start + 250_000)))
        for generation in (FIRST, SECOND):
            carry_out(gallery, generation, plan(gallery, 1.0, 4_096), embed)
        return peak_mib()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        measure_steps()
    elif sys.argv[2:] == ["steps"]:
        print(json.dumps(steps(int(sys.argv[1]))))
    else:
        print(json.dumps({"peak_mib": ingest_and_reindex(int(sys.argv[1]))}))
