"""Collects what nobody can read, and forgets what must be gone.

Nothing that a protected query generation can read, or that a lease pins, is ever collected. A vector stays if it is
the one by which some protected view reads its item; everything else goes, row by row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graceful.errors import GracefulError, UsageError
from graceful.files import crash_point, file_stats, join, list_files, remove
from graceful.indexing.gallery import PROTECTION, Gallery, GalleryVersion
from graceful.indexing.items import not_deleted
from graceful.indexing.revisions import is_member
from graceful.indexing.tables import ORPHAN_AGE_S, DataFile, TableSnapshot

DEAD_SHARE = 0.2
"""A file is written again when more than this share of its rows goes, so that collecting costs what it frees."""


@dataclass(frozen=True)
class Collection:
    """What a collection removed: generations whose vectors all went, rows, files deleted, and bytes freed."""

    generations: tuple[str, ...]
    rows: int
    files: int
    size_bytes: int = 0


class LeasedError(GracefulError):
    """What is to be removed is pinned by an open lease."""


def collect(
    gallery: Gallery,
    protected: Callable[[], Sequence[Sequence[str]]],
    *,
    dead_share: float = DEAD_SHARE,
    orphan_age_s: float = ORPHAN_AGE_S,
) -> Collection:
    """Drop the vectors that no protected view reads, merge small files, and delete the files that nothing names.

    `protected` gives one readable list (oldest first) for each query generation that must keep seeing what it sees. It
    is asked on every attempt, after the version is pinned that the commit is made on; whoever begins to protect a
    generation says so first and then calls `Gallery.fence`, which lets a commit fail that was made without it.
    """
    before, size_before = set(gallery.generations()), _size_bytes(gallery)
    needed: dict[str, NDArray[np.int64]] = {}

    def look(snapshot: TableSnapshot) -> None:
        version = GalleryVersion(gallery.items_table.version(), snapshot.version)
        needed.clear()
        needed.update(needed_vectors(gallery, protected(), version))

    def keep(file: DataFile, keys: pa.Table) -> NDArray[np.bool_]:
        return is_member(keys["revision"].to_numpy(), needed.get(str(file.partition), np.empty(0, np.int64)))

    rows = gallery.vectors_table.rewrite(
        keep, keys=["revision"], serial=(PROTECTION,), least_share=dead_share, prepare=look
    )
    gallery.merge_small_files()
    # The version first, the leases then: a reader that takes its lease later pins this version or a later one.
    now = gallery.version()
    crash_point("collect-before-leases")
    leased = gallery.leased_versions()
    crash_point("collect-after-leases")
    files = gallery.vectors_table.vacuum(
        [version.vectors for version in leased], at=now.vectors, orphan_age_s=orphan_age_s
    )
    files += gallery.items_table.vacuum([version.items for version in leased], at=now.items, orphan_age_s=orphan_age_s)
    freed = max(0, size_before - _size_bytes(gallery)) if files else 0
    return Collection(tuple(sorted(before - set(gallery.generations()))), rows, len(files), freed)


def survey(
    gallery: Gallery,
    protected: Sequence[Sequence[str]],
    *,
    dead_share: float = DEAD_SHARE,
    orphan_age_s: float = ORPHAN_AGE_S,
) -> Collection:
    """What `collect` would remove now. Changes nothing; merges of small files are left out."""
    version = gallery.version()
    needed = needed_vectors(gallery, protected, version)
    snapshot = gallery.vectors_table.snapshot(version.vectors)
    left: dict[str, int] = {}
    rows, num_files, size = 0, 0, 0
    for file in snapshot.files:
        held = gallery.column_of(snapshot.location(file), "revision")
        dead = int((~is_member(held, needed.get(str(file.partition), np.empty(0, np.int64)))).sum())
        goes = dead > dead_share * len(held)
        left[str(file.partition)] = left.get(str(file.partition), 0) + len(held) - (dead if goes else 0)
        if goes:
            rows, num_files, size = rows + dead, num_files + 1, size + file.size_bytes * dead // max(1, len(held))
    leased = gallery.leased_versions()
    for table, kept in (
        (gallery.vectors_table, [pinned.vectors for pinned in leased]),
        (gallery.items_table, [pinned.items for pinned in leased]),
    ):
        stats = file_stats(table.uri)
        superseded = {join(table.uri, path) for path in table.superseded()}
        gone = [path for path in table.orphans(kept, older_than_s=0) if path in superseded]
        gone += [path for path in table.orphans(kept, older_than_s=orphan_age_s) if path not in superseded]
        num_files += len(gone)
        size += sum(stats.get(path.removeprefix(f"{table.uri}/"), (0.0, 0))[1] for path in gone)
    return Collection(tuple(sorted(name for name, num in left.items() if not num)), rows, num_files, size)


def _size_bytes(gallery: Gallery) -> int:
    tables = (gallery.items_table, gallery.vectors_table)
    return sum(
        size for table in tables for path, (_, size) in file_stats(table.uri).items() if path.endswith("parquet")
    )


def needed_vectors(
    gallery: Gallery, protected: Sequence[Sequence[str]], version: GalleryVersion
) -> dict[str, NDArray[np.int64]]:
    """Revisions (ascending) whose vectors of each generation some protected view reads."""
    if not protected:
        raise UsageError("collecting vectors: expected at least one protected query generation, found none")
    needed: dict[str, NDArray[np.int64]] = {}
    for readable in {tuple(names) for names in protected}:
        view = gallery.view(readable, version)
        for name in readable:
            owned = view.revisions[view.owned_by(name)]
            needed[name] = np.union1d(needed[name], owned) if name in needed else owned
    return needed


def forget(gallery: Gallery, item_ids: Sequence[str], *, orphan_age_s: float = ORPHAN_AGE_S) -> int:
    """Remove items physically: their rows, vectors and history. They must have been deleted before.

    Older versions of both tables become unreadable, so that no time travel brings the items back; an open lease is a
    reason to refuse. Their numbers are never given again. Returns the number of revisions that are gone.

    Raises:
        LeasedError: a reader still pins a version.
        ValueError: one of the items is not deleted.
    """
    leases = gallery.leased_versions()
    if leases:
        raise LeasedError(f"forgetting items: expected no open lease, found {len(leases)}; wait for the readers to end")
    latest = gallery.items.find(list(item_ids))
    alive = not_deleted(latest)
    if alive.num_rows:
        raise UsageError(
            f"forgetting items: expected deleted items, found live ones ({alive['item_id'][0]}); delete them first"
        )
    # Units under way look again, and find the tombstones.
    gallery.fence_writers()
    revisions = np.sort(revisions_of(gallery, item_ids))

    def keep(_: DataFile, keys: pa.Table) -> NDArray[np.bool_]:
        return ~is_member(keys["revision"].to_numpy(), revisions)

    gallery.vectors_table.rewrite(keep, keys=["revision"])
    for staged in list_files(gallery.staging_location()):
        remove(staged)
    gallery.vectors_table.vacuum(orphan_age_s=orphan_age_s)
    gallery.items_table.rewrite(keep, keys=["revision"])
    gallery.items_table.vacuum(orphan_age_s=orphan_age_s)
    gallery.forget_cached()
    return len(revisions)


def revisions_of(gallery: Gallery, item_ids: Sequence[str]) -> NDArray[np.int64]:
    """All revisions ever stored of some items, (n,)."""
    wanted = pa.array(item_ids, pa.string())
    rows = gallery.items_table.snapshot().rows(["revision", "item_id"])
    return rows.filter(pc.is_in(rows["item_id"], value_set=wanted))["revision"].to_numpy()
