"""Keeps the index of what a query generation sees up to date with the gallery: by the feed of changes, or comparison.

    opening    the newest usable snapshot on disk, brought up to the wanted version; none usable: built from the gallery
    following  the feed of changes between two versions; where it no longer tells, or who is readable changed, the view
    rebasing   when much has changed: a snapshot is published, and its rows become the base of the next state

Invariants:
* What is searched equals the gallery's view at the version that it names, whatever way it came about.
* A damaged derived file costs one warning and a rebuild, never an error or a wrong answer. An index folder that cannot
  be written costs one warning; the index is then kept in memory alone.
* One writer (whoever calls `follow`, and a rebase in the background, one at a time); readers take `Followed` whole.

Shapes: N rows of a view, D width.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import UnknownFormatError, in_one_line
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.derived_files import IndexCorruptedError
from graceful.indexing.gallery import Gallery
from graceful.indexing.index_choice import SearchConfig
from graceful.indexing.leases import GalleryVersion
from graceful.indexing.parts import AddedRows
from graceful.indexing.revisions import bucket_of_revision
from graceful.indexing.search import IndexState, build_state, open_snapshot
from graceful.indexing.sidecar import SIDECAR_SCHEMA, ItemBook, as_sidecar, open_sidecar
from graceful.indexing.snapshots import (
    MANIFEST_NAME,
    Manifest,
    SegmentRows,
    SnapshotSource,
    discard_snapshot,
    items_path,
    prune_snapshots,
    publish_snapshot,
    read_manifest,
)
from graceful.indexing.view import Changes, View

# A state is rebased, and a snapshot published, when more rows than both of these have changed.
REBASE_SHARE = 0.1
REBASE_ROWS = 1_024
# Snapshots that nobody opens any more go after this time.
KEPT_S = 3_600.0

_log = logging.getLogger("graceful.search")


@dataclass(frozen=True)
class Target:
    """What is to be followed: a query generation, whom it may read (oldest first), and its declared prefix widths."""

    query_generation: str
    readable: tuple[str, ...]
    prefix_widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Followed:
    """One moment of the index: rows to search, items by revision, and the version of the gallery that it shows."""

    target: Target
    version: GalleryVersion
    index: IndexState
    book: ItemBook
    num_items: int
    manifest: Manifest | None = None

    @property
    def num_unreadable(self) -> int:
        """Live items that the query generation cannot read."""
        return self.num_items - self.index.num_rows


def snapshot_id_of(query_generation: str, version: GalleryVersion, readable: Sequence[str]) -> str:
    """Name of the index of one view: the same view has the same name everywhere."""
    content = f"{query_generation}/{version.items}/{version.vectors}/{','.join(readable)}"
    return f"{query_generation}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@contextmanager
def leased(gallery: Gallery, warn: Callable[[str], object]) -> Iterator[GalleryVersion]:
    """Keep the files of the newest version while the block runs; what is read-only is read without a lease."""
    with ExitStack() as lease:
        try:
            pinned = lease.enter_context(gallery.lease())
        except Exception as error:  # what a store says to whoever may only read has many types
            warn(f"reading the gallery without a lease: {in_one_line(error)}; a collection may end a long read")
            pinned = gallery.version()
        yield pinned


class IndexFollower:
    """The index of one gallery, or of the buckets of a shard, for the query generation that serves."""

    def __init__(
        self,
        gallery: Gallery,
        index_root: str | Path,
        config: SearchConfig = SearchConfig(),
        buckets: tuple[int, int] | None = None,
    ) -> None:
        """`buckets` (low, high): follow only the items of these buckets, low <= bucket < high."""
        self._gallery = gallery
        self._root = Path(index_root)
        self._config = config
        self._buckets = buckets
        self._one_writer = threading.RLock()
        self._current: Followed | None = None
        self._rebase: threading.Thread | None = None
        self._warned: set[str] = set()

    @property
    def current(self) -> Followed | None:
        """What was followed last."""
        return self._current

    def follow(self, target: Target, version: GalleryVersion | None = None) -> Followed:
        """Bring the index to a version of the gallery, by default the newest, for a query generation.

        Between two calls nothing is read from the gallery's files.
        """
        with self._one_writer:
            current = self._current
            wanted = version or self._gallery.version()
            if current is not None and (current.target, current.version) == (target, wanted):
                return current
            advanced = None if current is None else self._fed(current, target, wanted)
            if advanced is None:
                # Long reads: what they read must stay until they end.
                with leased(self._gallery, self._warn_once) as pinned:
                    wanted = version or pinned
                    advanced = (
                        self._opened(target, wanted) if current is None else self._advanced(current, target, wanted)
                    )
            self._current = current = advanced
            if _is_far(current) and self._rebase is None:
                self._rebase = threading.Thread(target=self._rebase_in_background, args=(current,), daemon=True)
                self._rebase.start()
            return current

    def wait_for_rebase(self, timeout_s: float | None = None) -> None:
        """Wait until no rebase runs in the background."""
        running = self._rebase
        if running is not None:
            running.join(timeout_s)

    # Opening ----------------------------------------------------------------------------------------------------------

    def _opened(self, target: Target, version: GalleryVersion) -> Followed:
        damage: list[str] = []
        found = self._from_snapshots(target, version, damage)
        if damage:
            _log.warning("%s; it is built again from the gallery", " and ".join(damage))
        if found is not None:
            advanced = self._advanced(found, target, version)
            return self._rebased(advanced) if _is_far(advanced) else advanced
        return self._built(target, self._view(target, version), None)

    def _from_snapshots(self, target: Target, version: GalleryVersion, damage: list[str]) -> Followed | None:
        """The best snapshot that can be opened: of this query generation, then the newest that is not too new."""
        for manifest in self._manifests(target, version, damage):
            try:
                return self._open(manifest)
            except IndexCorruptedError as error:
                damage.append(str(error).removesuffix("; build it again from the gallery"))
                with suppress(OSError):
                    discard_snapshot(self._root, manifest.snapshot_id)
        return None

    def _manifests(self, target: Target, version: GalleryVersion, damage: list[str]) -> list[Manifest]:
        manifests = []
        for path in self._root.glob(f"*/{MANIFEST_NAME}"):
            try:
                manifests.append(read_manifest(path.parent))
            except UnknownFormatError:
                continue
            except IndexCorruptedError as error:
                if not path.exists():
                    continue  # another process has removed it meanwhile
                damage.append(str(error).removesuffix("; build it again from the gallery"))
                with suppress(OSError):
                    discard_snapshot(self._root, path.parent.name)

        def worth(manifest: Manifest) -> tuple[bool, bool, int, int]:
            items, vectors = manifest.gallery_version["items"], manifest.gallery_version["vectors"]
            same = (manifest.query_generation, manifest.readable) == (target.query_generation, target.readable)
            return (items <= version.items and vectors <= version.vectors, same, items, vectors)

        return sorted(manifests, key=worth, reverse=True)

    def _open(self, manifest: Manifest) -> Followed:
        if manifest.items is None:
            raise IndexCorruptedError(
                f"opening the index: expected items, found none ({manifest.snapshot_id}); build it again from the "
                "gallery"
            )
        state = open_snapshot(self._root / manifest.snapshot_id, manifest=manifest)
        items = manifest.items
        book = ItemBook(open_sidecar(items_path(self._root, items), items.num_items, items.checksum))
        target = Target(manifest.query_generation, manifest.readable)
        version = GalleryVersion(**manifest.gallery_version)
        return Followed(target, version, state, book, book.num_items, manifest)

    # Following --------------------------------------------------------------------------------------------------------

    def _advanced(self, current: Followed, target: Target, version: GalleryVersion) -> Followed:
        """Bring a state to another version or query generation: by the feed, otherwise by comparison with the view."""
        if (current.target, current.version) == (target, version):
            return current
        fed = self._fed(current, target, version)
        if fed is not None:
            return fed
        view = self._view(target, version)
        dead, missing = _differences(current.index, view)
        if len(dead) + len(missing) > max(REBASE_ROWS, REBASE_SHARE * view.num_items):
            return self._built(target, view, current)
        _compare_items(current.book, view)
        return _moved(current, target, version, dead, _rows_of_view(view, missing))

    def _fed(self, current: Followed, target: Target, version: GalleryVersion) -> Followed | None:
        """Bring a state to a later version by the feed; None where that does not tell, or others are readable.

        The files are younger than what collections remove; one that is gone all the same means: compare the view.
        """
        is_later = current.version.items <= version.items and current.version.vectors <= version.vectors
        if current.target.readable != target.readable or not is_later:
            return None
        try:
            changes = self._gallery.changes(current.version, version)
            if changes is None:
                return None
            dead, added = self._of_feed(current, target, changes)
        except (DamagedFileError, FileNotFoundError):
            return None
        return _moved(current, target, version, dead, added)

    def _of_feed(
        self, current: Followed, target: Target, changes: Changes
    ) -> tuple[NDArray[np.int64], list[AddedRows]]:
        """What the feed changes: revisions that go, and rows that come. The item book is brought up to date."""
        book = current.book
        book.add(changes.items.filter(pa.array(self._is_ours(changes.items["revision"].to_numpy()))))
        dead = changes.dead[self._is_ours(changes.dead)]
        book.remove(dead)
        rank = {generation: place for place, generation in enumerate(target.readable)}
        # Who owns a row now, as a place in the readable list; the last entry stands for nobody.
        ranks = np.array([*(rank.get(name, -1) for name in current.index.generations), -1], np.int64)
        parts = [rows for rows in changes.vectors if rows.generation in rank]
        columns: list[NDArray[np.int64]] = [np.empty((4, 0), np.int64)]
        for number, rows in enumerate(parts):
            revisions = np.asarray(rows.revisions, np.int64)
            positions = np.flatnonzero(self._is_ours(revisions))
            positions = positions[book.is_live(revisions[positions])]
            owned = ranks[current.index.owners(revisions[positions])]
            positions = positions[owned < rank[rows.generation]]
            numbers = np.full(len(positions), number)
            ranked = np.full(len(positions), rank[rows.generation])
            columns.append(np.stack([revisions[positions], ranked, numbers, positions]))
        revisions, ranked, numbers, positions = np.concatenate(columns, axis=1)
        order = np.lexsort((-ranked, revisions))
        first = order[np.diff(revisions[order], prepend=-1) != 0]
        added = []
        for number, rows in enumerate(parts):
            chosen = first[numbers[first] == number]
            if len(chosen):
                vectors = np.asarray(rows.load(positions[chosen]), np.float32)
                added.append(AddedRows(rows.generation, revisions[chosen], vectors))
        return dead, added

    def _is_ours(self, revisions: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self._buckets is None:
            return np.ones(len(revisions), bool)
        low, high = self._buckets
        bucket = bucket_of_revision(revisions)
        return np.asarray((low <= bucket) & (bucket < high))

    def _view(self, target: Target, version: GalleryVersion) -> View:
        return self._gallery.view(target.readable, version, self._buckets)

    # Building ---------------------------------------------------------------------------------------------------------

    def _built(self, target: Target, view: View, current: Followed | None) -> Followed:
        """A state built from a view: published and opened, or in memory alone."""

        def items() -> pa.Table:
            return _items_of(view, None)

        rows = []
        for generation in view.readable:
            positions = view.owned_by(generation)
            if len(positions):

                def load(chosen: NDArray[np.int64], mine: NDArray[np.int64] = positions) -> NDArray[np.float32]:
                    return view.vectors(mine[chosen])

                rows.append(SegmentRows(generation, view.revisions[positions], load))
        return self._published(target, view.version, rows, items, current.manifest if current else None)

    def _rebased(self, current: Followed) -> Followed:
        """The same moment with all of its rows in the base."""
        book = current.book.copy()
        return self._published(
            current.target, current.version, current.index.segment_rows(), book.table, current.manifest
        )

    def _published(
        self,
        target: Target,
        version: GalleryVersion,
        rows: Sequence[SegmentRows],
        items: Callable[[], pa.Table],
        reuse: Manifest | None,
    ) -> Followed:
        name = snapshot_id_of(target.query_generation, version, target.readable)
        stated = {"items": version.items, "vectors": version.vectors}
        source = SnapshotSource(target.query_generation, stated, target.readable, rows, items)
        for reused in self._attempts(reuse):
            try:
                with suppress(FileExistsError):  # another process was faster; the name says what is in it
                    publish_snapshot(self._root, name, source, reused, config=self._config)
                found = self._open(read_manifest(self._root / name))
            except (IndexCorruptedError, UnknownFormatError) as error:
                self._warn_once(f"{error}")
                with suppress(OSError):
                    discard_snapshot(self._root, name)
            except OSError as error:
                self._warn_once(
                    f"writing the index: expected a folder with room, found {error} ({self._root}); the index is kept "
                    "in memory"
                )
                break
            else:
                self._prune()
                index = found.index.changed(name, np.empty(0, np.int64), prefix_widths=target.prefix_widths)
                return Followed(target, version, index, found.book, found.num_items, found.manifest)
        index = build_state(
            name, target.query_generation, rows, prefix_widths=target.prefix_widths, config=self._config
        )
        book = ItemBook(as_sidecar(items()))
        return Followed(target, version, index, book, book.num_items)

    def _attempts(self, reuse: Manifest | None) -> Iterator[Manifest | None]:
        if reuse is not None:
            yield reuse
        yield from (None, None)

    def _rebase_in_background(self, start: Followed) -> None:
        """Publish a state and make its rows the base of the current one, which has moved on meanwhile."""
        try:
            rebased = self._rebased(start)
            with self._one_writer:
                current = self._current
                assert current is not None
                with leased(self._gallery, self._warn_once):
                    rebased = self._advanced(rebased, current.target, current.version)
                self._current = rebased
        except Exception as error:  # what serves goes on serving
            self._warn_once(f"rebasing the index: {type(error).__name__}: {error}; it is tried again")
        finally:
            self._rebase = None

    def _prune(self) -> None:
        """Remove snapshots that nobody opens any more: all but the newest of each query generation, after an hour."""
        newest: dict[str, str] = {}
        manifests = sorted(self._root.glob(f"*/{MANIFEST_NAME}"), key=_modified_at)
        for manifest in manifests:
            newest[manifest.parent.name.rpartition("-")[0]] = manifest.parent.name
        # Another process prunes as well; what cannot be read is healed by whoever opens it.
        with suppress(OSError, IndexCorruptedError, UnknownFormatError):
            prune_snapshots(self._root, list(newest.values()), older_than_s=KEPT_S)

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            _log.warning("%s", line)


def _moved(
    current: Followed, target: Target, version: GalleryVersion, dead: NDArray[np.int64], added: Sequence[AddedRows]
) -> Followed:
    index = current.index.changed(
        snapshot_id_of(target.query_generation, version, target.readable),
        dead,
        added,
        query_generation=target.query_generation,
        prefix_widths=target.prefix_widths,
    )
    return Followed(target, version, index, current.book, current.book.num_items, current.manifest)


def _is_far(followed: Followed) -> bool:
    """Whether so much has changed since the base was made that it is worth making it anew."""
    return followed.index.num_changed > max(REBASE_ROWS, REBASE_SHARE * followed.index.num_rows)


def _differences(index: IndexState, view: View) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Revisions that the view does not show, or shows by another owner; and positions of the view to be added."""
    revisions, codes = index.live_rows()
    place = {generation: number for number, generation in enumerate(view.readable)}
    owners = np.array([*(place.get(name, -2) for name in index.generations), -2], np.int64)[codes]
    positions = np.flatnonzero(view.owner >= 0)
    shown = view.revisions[positions]
    if len(shown):
        at = np.minimum(np.searchsorted(shown, revisions), len(shown) - 1)
        same = (shown[at] == revisions) & (view.owner[positions[at]] == owners)
    else:
        at, same = np.zeros(len(revisions), np.int64), np.zeros(len(revisions), bool)
    kept = np.zeros(len(shown), bool)
    kept[at[same]] = True
    return revisions[~same], positions[~kept]


def _rows_of_view(view: View, positions: NDArray[np.int64]) -> list[AddedRows]:
    added = []
    for number, generation in enumerate(view.readable):
        mine = positions[view.owner[positions] == number]
        if len(mine):
            added.append(AddedRows(generation, view.revisions[mine], view.vectors(mine)))
    return added


def _compare_items(book: ItemBook, view: View) -> None:
    """Bring the item book to what a view shows."""
    live = book.live_revisions()
    new = np.flatnonzero(~np.isin(view.revisions, live, assume_unique=True))
    if len(new):
        book.add(_items_of(view, new))
    book.remove(live[~np.isin(live, view.revisions, assume_unique=True)])


def _items_of(view: View, positions: NDArray[np.int64] | None) -> pa.Table:
    found = view.items(SIDECAR_SCHEMA.names[1:], positions)
    revisions = view.revisions if positions is None else view.revisions[positions]
    return pa.table([pa.array(revisions), *found.columns], names=["revision", *found.column_names])


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
