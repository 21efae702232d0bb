"""Leases on versions of the gallery: open readers' promises that the files of a version stay.

A lease is two rows of an append-only table, one when it is taken and one when it is given back. One whose reader died
runs out by itself.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from graceful.indexing.tables import VersionedTable

LEASES_SCHEMA = pa.schema(
    [
        ("lease_id", pa.string()),
        ("items_version", pa.int64()),
        ("vectors_version", pa.int64()),
        ("expires_at", pa.float64()),
        ("released", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class GalleryVersion:
    """What a reader pins: one version of the items and one of the vectors."""

    items: int
    vectors: int


class Leases:
    """The leases of one gallery."""

    def __init__(self, location: str, *, create: bool = False) -> None:
        """Open the table; with `create` it is made empty where there is none."""
        self._table = VersionedTable(location, LEASES_SCHEMA, create=create)

    @contextmanager
    def hold(self, version: GalleryVersion, lifetime_s: float) -> Iterator[GalleryVersion]:
        """Pin a version for as long as the block runs, at most `lifetime_s` seconds."""
        lease_id = uuid.uuid4().hex
        self._write(lease_id, version, time.time() + lifetime_s, released=False)
        try:
            yield version
        finally:
            self._write(lease_id, version, 0.0, released=True)

    def open_versions(self) -> list[GalleryVersion]:
        """Versions that an open lease pins now."""
        rows = self._table.snapshot().rows().to_pylist()
        released = {row["lease_id"] for row in rows if row["released"]}
        now = time.time()
        return [
            GalleryVersion(row["items_version"], row["vectors_version"])
            for row in rows
            if row["lease_id"] not in released and row["expires_at"] > now
        ]

    def drop_expired(self) -> int:
        """Remove leases that ran out or were given back; returns how many rows went."""
        rows = self._table.snapshot().rows().to_pylist()
        now = time.time()
        over = {row["lease_id"] for row in rows if row["released"] or row["expires_at"] <= now}
        return self._table.delete_rows("lease_id", sorted(over)) if over else 0

    def _write(self, lease_id: str, version: GalleryVersion, expires_at: float, *, released: bool) -> None:
        row = {
            "lease_id": lease_id,
            "items_version": version.items,
            "vectors_version": version.vectors,
            "expires_at": expires_at,
            "released": released,
        }
        self._table.append(pa.Table.from_pylist([row], schema=LEASES_SCHEMA))
        self._table.compact()
