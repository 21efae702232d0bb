"""What opening, following and searching an index cost: at 10,000, 100,000 and 1,000,000 rows of 128 values.

The vectors are synthetic and resemble embeddings: classes of about 500, which vary in 24 directions shared by all (0.6
in all) and a little in every direction (0.2), of unit length. Queries are drawn in the same way and are not stored.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.harness import Ratio, paired
from graceful.indexing.embedding_files import write_embedding_file
from graceful.indexing.following import IndexFollower, Target
from graceful.indexing.gallery import Gallery
from graceful.indexing.index_choice import SearchConfig
from graceful.indexing.parts import AddedRows
from graceful.indexing.search import IndexState, build_state
from graceful.indexing.snapshots import SegmentRows

WIDTH = 128
LARGE = 1_000_000
PER_CLASS, DIRECTIONS, SPREAD, NOISE = 500, 24, 0.6, 0.2
VECTORS = f"synthetic clusters of {PER_CLASS}, {DIRECTIONS} directions of variation, {WIDTH}-d"
G1 = Target("g001-000000", ("g001-000000",))


def embeddings(num_rows: int, seed: int, num_classes: int) -> NDArray[np.float32]:
    """Rows (n, D) of unit length; the classes are the same for every seed."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres = world.standard_normal((num_classes, WIDTH), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    directions = np.linalg.qr(world.standard_normal((WIDTH, DIRECTIONS)))[0].astype(np.float32).T
    rows = centres[rng.integers(0, num_classes, num_rows)]
    rows += (SPREAD / np.sqrt(DIRECTIONS)) * rng.standard_normal((num_rows, DIRECTIONS), dtype=np.float32) @ directions
    rows += (NOISE / np.sqrt(WIDTH)) * rng.standard_normal((num_rows, WIDTH), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


class Shop:
    """A gallery of some size, embedded by one generation, and its index."""

    def __init__(self, folder: str, num_rows: int) -> None:
        self.root, self.num_rows, self.units = Path(folder), num_rows, 0
        self.gallery = Gallery(f"{folder}/gallery", create=True)
        for start in range(0, num_rows, 250_000):
            names = [f"item-{number:07d}" for number in range(start, min(start + 250_000, num_rows))]
            self.ingest(names, "a")
        self.embed()
        self.follower = self.open()

    def open(self) -> IndexFollower:
        """Open the index for search, as a process that starts does."""
        gallery = Gallery(str(self.gallery.location))
        follower = IndexFollower(gallery, self.root / "index", SearchConfig(index="flat"))
        follower.follow(G1)
        return follower

    def ingest(self, names: list[str], content: str) -> None:
        sources = [f"{content}/{name}" for name in names]
        columns = {"item_id": names, "source": sources, "content_sha256": sources, "label": [""] * len(names)}
        self.gallery.ingest(pa.table({**columns, "attributes": ["{}"] * len(names)}))

    def embed(self) -> None:
        missing = self.gallery.missing_vectors(G1.query_generation)
        for start in range(0, len(missing), 250_000):
            revisions = missing[start : start + 250_000]
            vectors = embeddings(len(revisions), self.units, max(1, self.num_rows // PER_CLASS))
            self.units += 1
            staged = self.gallery.staging_file(G1.query_generation, f"unit{self.units}")
            write_embedding_file(staged, pa.table({"revision": revisions}), vectors)
            self.gallery.commit_vectors(G1.query_generation, f"unit{self.units}")

    def time_to_see_a_changed_photo(self) -> float:
        """Seconds that the index takes to show a photo whose new vector has just been committed."""
        self.ingest([f"item-{self.units % self.num_rows:07d}"], f"content {self.units}")
        self.embed()
        started = time.perf_counter()
        followed = self.follower.follow(G1)
        seconds = time.perf_counter() - started
        assert followed.num_unreadable == 0
        return seconds


def open_gallery() -> Ratio:
    """Open 1,000,000 x 128 for search, every file compared with its checksum / read the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(folder, LARGE)
        files = [path for path in (shop.root / "index").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)

        def read() -> None:
            for path in files:
                np.fromfile(path, np.uint8)

        return paired(
            "open_gallery",
            read,
            lambda: _nothing(shop.open()),
            pairs=9,
            at_most=1.5,
            note=f"{LARGE:,} x {WIDTH}, exact index, {size / 1e6:,.0f} MB in the page cache; items included",
        )


def change_visible() -> Ratio:
    """A changed photo in 1,000,000 items / in 10,000 items: from its committed vector to the state that shows it."""
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        few, many = Shop(small, 10_000), Shop(large, LARGE)
        for shop in (few, many):
            shop.time_to_see_a_changed_photo()
        return paired(
            "change_visible",
            few.time_to_see_a_changed_photo,
            many.time_to_see_a_changed_photo,
            pairs=15,
            at_most=1.5,
            note=f"one photo, {WIDTH}-d, by the feed of changes; a look of the service every 0.5 s comes on top",
        )


def search_approximate() -> Ratio:
    """Throughput of an IVF index at a measured recall@10 of 0.99 / exact search: one thread, 1,000,000 rows."""
    classes = LARGE // PER_CLASS
    vectors, queries = embeddings(LARGE, 1, classes), embeddings(1_000, 2, classes)
    exact, approximate = _state(vectors, "flat"), _state(vectors, "ivf")
    report = approximate.reports[WIDTH]
    assert report is not None, "no breadth reaches the recall"
    found, wanted = approximate.search(queries, 10).revisions, exact.search(queries, 10).revisions
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, wanted, strict=True)])
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        alone = _seconds(lambda: exact.search(queries[:1], 10)) / _seconds(lambda: approximate.search(queries[:1], 10))
        return paired(
            "search_approximate",
            lambda: _nothing(exact.search(queries[:100], 10)),
            lambda: _nothing(approximate.search(queries[:100], 10)),
            pairs=9,
            at_least=10,
            invert=True,
            note=f"{VECTORS}; {LARGE:,} rows, batches of 100, {report.parameters['lists']:,} lists, "
            f"{report.measured[0].breadth} visited; recall@10 {report.measured[0].recall:.4f} when it was built, "
            f"{recall:.4f} on 1,000 queries that are not stored; one query at a time: {alone:.0f}",
        )
    finally:
        faiss.omp_set_num_threads(before)


def search_mixed() -> Ratio:
    """A gallery of five generations / of one: the same rows, exact search, equal results; 1,000,000 rows."""
    classes = LARGE // PER_CLASS
    vectors, queries = embeddings(LARGE, 1, classes), embeddings(100, 2, classes)
    one, five = _state(vectors, "flat"), _state(vectors, "flat", num_generations=5)
    assert one.search(queries, 10).revisions.tolist() == five.search(queries, 10).revisions.tolist()
    return paired(
        "search_mixed",
        lambda: _nothing(one.search(queries, 10)),
        lambda: _nothing(five.search(queries, 10)),
        pairs=11,
        at_most=1.1,
        note=f"{VECTORS}; {LARGE:,} rows, 100 queries, K = 10",
    )


def search_changed() -> Ratio:
    """An index of which 5 % of the rows were embedded again since its base was made / the base: 1,000,000 rows."""
    classes = LARGE // PER_CLASS
    vectors, queries = embeddings(LARGE, 1, classes), embeddings(100, 2, classes)
    base = _state(vectors, "flat")
    chosen = np.sort(np.random.default_rng(3).permutation(LARGE)[: LARGE // 20])
    changed = base.changed("changed", np.empty(0, np.int64), [AddedRows("g9", chosen, vectors[chosen])])
    assert base.search(queries, 10).revisions.tolist() == changed.search(queries, 10).revisions.tolist()
    return paired(
        "search_changed",
        lambda: _nothing(base.search(queries, 10)),
        lambda: _nothing(changed.search(queries, 10)),
        pairs=11,
        at_most=1.25,
        note=f"{VECTORS}; {LARGE:,} rows, 100 queries, K = 10; equal results",
    )


def _state(vectors: NDArray[np.float32], kind: str, num_generations: int = 1) -> IndexState:
    parts = []
    for number in range(num_generations):
        mine = np.arange(number, len(vectors), num_generations)
        parts.append(SegmentRows(f"g{number}", mine, functools.partial(_rows, vectors, mine)))
    return build_state("s", "g0", parts, config=SearchConfig.model_validate({"index": kind}))


def _rows(vectors: NDArray[np.float32], mine: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    return vectors[mine[positions]]


def _nothing(_: object) -> None:
    """Time from outside."""


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
