"""Items by revision, looked up for the few rows that a search finds: one Arrow file, read into memory.

Derived from the gallery, written once, never changed; no Python object per item. It is read and not mapped:
a mapped file that somebody cuts kills the process (SIGBUS). What came later is in an overlay of
the book that reads it. A revision says the same for ever, so an entry of a deleted item harms nobody: who is live is
said elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.indexing.derived_files import corrupted, read_checked

SIDECAR_SCHEMA = pa.schema(
    [
        ("revision", pa.int64()),
        ("item_id", pa.large_string()),
        ("source", pa.large_string()),
        ("label", pa.large_string()),
    ]
)
ItemEntry = tuple[str, str, str]
"""Item id, source, label."""


def write_sidecar(path: str, items: pa.Table) -> None:
    """Write a table (revision, item_id, source, label) sorted by revision, as one record batch."""
    table = as_sidecar(items)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, SIDECAR_SCHEMA) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch)


def as_sidecar(items: pa.Table) -> pa.Table:
    """The same items in the form and order of a sidecar, in one piece; null texts become empty ones."""
    table = items.select(SIDECAR_SCHEMA.names).cast(SIDECAR_SCHEMA).combine_chunks()
    revisions = table["revision"].to_numpy()
    if (np.diff(revisions) <= 0).any():
        table = table.take(pa.array(np.argsort(revisions, kind="stable"))).combine_chunks()
    return table


def open_sidecar(path: Path, num_items: int, expected: str) -> pa.Table:
    """Read a sidecar into memory and compare its checksum. Raises IndexCorruptedError."""
    try:
        content = np.empty(path.stat().st_size, np.uint8)
        read_checked(path, content, expected)
        table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise corrupted(path, f"an Arrow file, found {error}") from error
    if table.num_rows != num_items or table.schema != SIDECAR_SCHEMA:
        raise corrupted(path, f"{num_items} items, found {table.num_rows}")
    return table


class ItemBook:
    """All live items at one version of the gallery, kept up by one writer; any thread may look entries up."""

    def __init__(self, items: pa.Table) -> None:
        """Start from a sidecar: sorted by revision, in one piece."""
        assert all(column.num_chunks <= 1 for column in items.columns)
        self._table = items
        self._revisions: NDArray[np.int64] = items["revision"].to_numpy()
        self._added: dict[int, ItemEntry] = {}
        self._dead: set[int] = set()

    @property
    def num_items(self) -> int:
        """Items that are live, readable or not."""
        return len(self._revisions) + len(self._added) - len(self._dead)

    def copy(self) -> ItemBook:
        """The same items in a book of its own; costs what has changed since the sidecar was written."""
        other = ItemBook(self._table)
        other._added, other._dead = dict(self._added), set(self._dead)
        return other

    def entries(self, revisions: NDArray[np.int64]) -> dict[int, ItemEntry]:
        """Item id, source and label of each revision; one that never was here is left out."""
        wanted = np.unique(revisions)
        found: dict[int, ItemEntry] = {}
        if len(self._revisions):
            places = np.minimum(np.searchsorted(self._revisions, wanted), len(self._revisions) - 1)
            known = self._revisions[places] == wanted
            taken = self._table.take(pa.array(places[known]))
            columns = [taken[name].to_pylist() for name in SIDECAR_SCHEMA.names]
            found = {revision: (i or "", s or "", text or "") for revision, i, s, text in zip(*columns, strict=True)}
            wanted = wanted[~known]
        for revision in wanted.tolist():
            entry = self._added.get(revision)
            if entry is not None:
                found[revision] = entry
        return found

    def is_live(self, revisions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for each revision (n,) whether it is a live item."""
        known = self._in_table(revisions)
        given = revisions.tolist()
        return np.array(
            [(old or r in self._added) and r not in self._dead for old, r in zip(known, given, strict=True)], bool
        )

    def add(self, items: pa.Table) -> None:
        """Add live items (revision, item_id, source, label); what is here already is left alone."""
        rows = items.select(SIDECAR_SCHEMA.names).cast(SIDECAR_SCHEMA)
        known = self._in_table(rows["revision"].to_numpy())
        columns = [rows[name].to_pylist() for name in SIDECAR_SCHEMA.names]
        for old, revision, item_id, source, label in zip(known, *columns, strict=True):
            if not old:
                self._added[revision] = (item_id or "", source or "", label or "")

    def remove(self, revisions: Iterable[int] | NDArray[np.int64]) -> None:
        """Count revisions as dead; those that are not here are passed over."""
        given = np.asarray(revisions, np.int64)
        self._dead.update(given[self.is_live(given)].tolist())

    def live_revisions(self) -> NDArray[np.int64]:
        """All live revisions, ascending. Costs a pass over all items."""
        everything = np.concatenate([self._revisions, np.fromiter(self._added, np.int64, len(self._added))])
        return np.setdiff1d(everything, np.fromiter(self._dead, np.int64, len(self._dead)), assume_unique=True)

    def table(self) -> pa.Table:
        """All live items as a sidecar's table. Costs a pass over all items."""
        added = [(revision, *entry) for revision, entry in self._added.items()]
        columns = list(zip(*added, strict=True)) or [(), (), (), ()]
        more = pa.table([pa.array(column, field.type) for column, field in zip(columns, SIDECAR_SCHEMA, strict=True)],
                        schema=SIDECAR_SCHEMA)  # fmt: skip
        whole = as_sidecar(pa.concat_tables([self._table, more]))
        if not self._dead:
            return whole
        dead = np.fromiter(self._dead, np.int64, len(self._dead))
        return as_sidecar(whole.filter(pa.array(~np.isin(whole["revision"].to_numpy(), dead))))

    def _in_table(self, revisions: NDArray[np.int64]) -> NDArray[np.bool_]:
        if not len(self._revisions):
            return np.zeros(len(revisions), bool)
        places = np.minimum(np.searchsorted(self._revisions, revisions), len(self._revisions) - 1)
        return np.asarray(self._revisions[places] == revisions)
