"""Collects what nobody can read, and forgets what must be gone.

Nothing that a protected query generation can read, or that a lease pins, is ever collected: a generation's vectors go
only when no protected view owns a single row of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from graceful.errors import GracefulError, UsageError
from graceful.files import list_files, remove
from graceful.indexing.gallery import Gallery


@dataclass(frozen=True)
class Collection:
    """What a collection removed: generations whose vectors went, and files deleted."""

    generations: tuple[str, ...]
    files: int


class LeasedError(GracefulError):
    """What is to be removed is pinned by an open lease."""


def collect(gallery: Gallery, protected: Sequence[Sequence[str]]) -> Collection:
    """Drop the vectors of every generation that owns no row in any protected view, then delete unused files.

    `protected` has one readable list (oldest first) for each query generation that must keep seeing what it sees.
    """
    if not protected:
        raise UsageError("collecting vectors: expected at least one protected query generation, found none")
    needed: set[str] = set()
    for readable in protected:
        needed |= {name for name, rows in gallery.view(readable).rows_by_generation().items() if rows}
        needed |= set(readable[-1:])
    dropped = tuple(sorted(set(gallery.generations()) - needed))
    for generation in dropped:
        gallery.vectors_table.drop_partition(generation)
    keep = [version.vectors for version in gallery.leased_versions()]
    return Collection(dropped, len(gallery.vectors_table.vacuum(keep)))


def forget(gallery: Gallery, item_ids: Sequence[str]) -> int:
    """Remove items physically: their rows, vectors and history. They must have been deleted before.

    Older versions of both tables become unreadable, so that no time travel brings the items back; an open lease is a
    reason to refuse. Returns the number of revisions that are gone.

    Raises:
        LeasedError: a reader still pins a version.
        ValueError: one of the items is not deleted.
    """
    leases = gallery.leased_versions()
    if leases:
        raise LeasedError(f"forgetting items: expected no open lease, found {len(leases)}; wait for the readers to end")
    latest = gallery.latest_items()
    wanted = set(item_ids)
    alive = [
        row["item_id"]
        for row in latest.select(["item_id", "deleted"]).to_pylist()
        if row["item_id"] in wanted and not row["deleted"]
    ]
    if alive:
        raise UsageError(f"forgetting items: expected deleted items, found live ones ({alive[0]}); delete them first")
    before = sum(file.num_rows for file in gallery.items_table.snapshot().files)
    for table in (gallery.vectors_table, gallery.items_table):
        table.delete_rows("item_id", sorted(wanted))
        table.vacuum()
    for staged in list_files(gallery.staging_location()):
        remove(staged)
    gallery.forget_cached_keys()
    return before - gallery.items_table.snapshot().rows(["item_id"]).num_rows
