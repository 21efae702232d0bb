"""Embedding caches: what one generation makes of images, keyed by content hash; extended, never recomputed.

One versioned table per generation. Training reads the predecessors' rows of it, evaluation reads everybody's.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from graceful.files import join
from graceful.indexing.checked_files import CheckedFile
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit
from graceful.indexing.embedding_files import read_embeddings, read_rows
from graceful.indexing.reindex import EmbedFunction
from graceful.indexing.tables import ORPHAN_AGE_S, STAGING, TableConflictError, TableSnapshot, VersionedTable

CACHE_SCHEMA = pa.schema([("content_sha256", pa.string()), ("embedding", pa.binary())])


class EmbeddingCache:
    """A handle on the cache of one generation."""

    def __init__(self, location: str) -> None:
        """Open the cache of one generation at `location`, or create it empty."""
        self._table = VersionedTable(location, CACHE_SCHEMA, create=True)

    def missing(self, hashes: Sequence[str]) -> list[str]:
        """Content hashes without a stored embedding, each once, in order of first appearance."""
        known = set(self._table.snapshot().rows(["content_sha256"])["content_sha256"].to_pylist())
        return [value for value in dict.fromkeys(hashes) if value not in known]

    def extend(
        self,
        hashes: Sequence[str],
        sources: Sequence[str],
        embed: EmbedFunction,
        *,
        unit_rows: int = 4096,
        on_rows: Callable[[int], None] | None = None,
    ) -> tuple[int, dict[str, str]]:
        """Embed the images not stored yet; returns how many were embedded and {source: reason} of those that failed."""
        source_of = dict(zip(hashes, sources, strict=True))
        wanted = self.missing(hashes)
        failures: dict[str, str] = {}
        mine = uuid.uuid4().hex[:8]
        units: dict[str, EmbedUnit] = {}
        parts: dict[str, list[str]] = {}
        for start in range(0, len(wanted), unit_rows):
            part = wanted[start : start + unit_rows]
            unit_id = hashlib.sha256("\n".join(part).encode()).hexdigest()[:24]
            # A place and a name of this call's own: what is discarded because another update was faster is never what
            # the other has committed.
            path = join(self._table.uri, STAGING, f"{unit_id}-{mine}.parquet")
            parts[unit_id] = part
            units[unit_id] = EmbedUnit(unit_id, tuple(source_of[h] for h in part), {"content_sha256": part}, path)
        embedded = 0

        def commit(done: EmbeddedUnit) -> None:
            nonlocal embedded
            unit = units[done.unit_id]
            failures.update({unit.sources[index]: reason for index, reason in done.failures})
            known = self._table.committed(done.unit_id)
            if done.num_rows and not (known and not self.missing(parts[done.unit_id])):
                # A unit may have committed and its images have been forgotten since: it is another unit then.
                name = f"{done.unit_id}-{mine}" if known else done.unit_id
                keys = pa.table({"content_sha256": [""] * done.num_rows})
                file = self._table.take_in(unit.path, f"{done.unit_id}-{mine}", keys)
                try:
                    with self._table.discarding([file]):
                        self._table.commit([file], unit=name)
                except TableConflictError:  # another update extended the same cache by the same images
                    return
                embedded += done.num_rows
            if on_rows is not None:
                on_rows(len(unit.sources))

        if units:
            embed(list(units.values()), commit)
        return embedded, failures

    def read(self, hashes: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings (n, d) float32 of images in the order asked; rows of images that could not be embedded are NaN."""
        snapshot = self._filled()
        keys, vectors = read_embeddings([snapshot.location(file) for file in snapshot.files])
        found = _places(hashes, keys)
        result = vectors[found]
        result[found < 0] = np.nan
        return result

    def read_blocks(self, hashes: Sequence[str], block_rows: int) -> Iterator[NDArray[np.float32]]:
        """As `read`, in blocks of rows, for more images than vectors fit in memory: only the keys are held."""
        snapshot = self._filled()
        files = [snapshot.location(file) for file in snapshot.files]
        keys = [CheckedFile(file).read(["content_sha256"]) for file in files]
        starts = np.cumsum([0, *(len(table) for table in keys)])
        places = _places(hashes, pa.concat_tables(keys))
        for start in range(0, len(places), block_rows):
            block = places[start : start + block_rows]
            of_file = np.searchsorted(starts, block, side="right") - 1
            result: NDArray[np.float32] | None = None
            for file in np.unique(of_file[block >= 0]).tolist():
                chosen = np.flatnonzero((of_file == file) & (block >= 0))
                vectors = read_rows(files[file], block[chosen] - starts[file])
                if result is None:
                    result = np.full((len(block), vectors.shape[1]), np.nan, np.float32)
                result[chosen] = vectors
            if result is None:
                raise KeyError(f"reading embeddings: expected {len(block)} rows in {self._table.uri}, found none")
            yield result

    def _filled(self) -> TableSnapshot:
        snapshot = self._table.snapshot()
        if not snapshot.files:
            raise KeyError(
                f"reading embeddings: expected rows in {self._table.uri}, found none; extend the cache first"
            )
        return snapshot

    def forget(self, hashes: Sequence[str]) -> None:
        """Remove images physically."""
        self._table.delete_rows("content_sha256", list(hashes))
        self._table.vacuum()

    def remove_orphans(self, orphan_age_s: float = ORPHAN_AGE_S) -> int:
        """Delete what nothing names any more: what was forgotten, and what killed writers left."""
        return len(self._table.vacuum(orphan_age_s=orphan_age_s))


def _places(hashes: Sequence[str], keys: pa.Table) -> NDArray[np.int64]:
    """Row of each image in `keys`; -1 for one that is not there."""
    position = pc.index_in(pa.array(hashes, pa.string()), value_set=keys["content_sha256"].combine_chunks())
    return pc.fill_null(position, -1).to_numpy().astype(np.int64)
