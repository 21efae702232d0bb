"""What a query generation sees of the gallery at one version, and what changes between two versions.

Shapes: N items of a view, n rows, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from graceful.errors import GracefulError, UsageError
from graceful.indexing.embedding_files import read_rows
from graceful.indexing.leases import GalleryVersion

NORM_TOLERANCE = 1e-3
ReadItems = Callable[[NDArray[np.int64], Sequence[str]], pa.Table]


class DamagedVectorError(GracefulError):
    """A stored vector is not finite or not of norm 1."""


@dataclass(frozen=True)
class View:
    """What a query generation sees at one gallery version. Rows are in the order of their revision.

    `revisions` (N,) int64, ascending; `owner` (N,) int16 indexes `readable`, -1 marks an unreadable item; `file` and
    `row` (N,) say where the vector lies.
    """

    version: GalleryVersion
    readable: tuple[str, ...]
    revisions: NDArray[np.int64]
    owner: NDArray[np.int16]
    file: NDArray[np.int32]
    row: NDArray[np.int32]
    files: tuple[str, ...] = field(repr=False)
    read_items: ReadItems = field(repr=False)

    @property
    def num_items(self) -> int:
        """Items that are not deleted, readable or not."""
        return len(self.revisions)

    def column(self, name: str, positions: NDArray[np.int64] | None = None) -> pa.Array:
        """A column of the items, of all or of those at some positions: item_id, source, label, content_sha256 ..."""
        return self.items([name], positions)[name].combine_chunks()

    def items(self, columns: Sequence[str], positions: NDArray[np.int64] | None = None) -> pa.Table:
        """Several columns of the items, of all or of those at some positions."""
        return self.read_items(self.revisions if positions is None else self.revisions[positions], columns)

    @property
    def item_ids(self) -> NDArray[np.object_]:
        """Item ids (N,), read each time."""
        return self.column("item_id").to_numpy(zero_copy_only=False)

    def unreadable(self) -> NDArray[np.int64]:
        """Positions of the items that this query generation cannot read."""
        return np.flatnonzero(self.owner < 0)

    def owned_by(self, generation: str) -> NDArray[np.int64]:
        """Positions of the items read from vectors of one generation."""
        if generation not in self.readable:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.owner == self.readable.index(generation))

    def rows_by_generation(self) -> dict[str, int]:
        """Number of items read from each readable generation."""
        counts = np.bincount(self.owner[self.owner >= 0], minlength=len(self.readable))
        return {generation: int(count) for generation, count in zip(self.readable, counts, strict=True)}

    def vectors(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read the vectors (n, D) of items that one generation, or generations of one width, own.

        Raises:
            DamagedFileError: a file is not what was written.
            DamagedVectorError: a vector is not finite or not of norm 1.
        """
        if np.any(self.owner[positions] < 0):
            raise UsageError("reading vectors of a view: expected readable positions, found unreadable items")
        if not len(positions):
            return np.empty((0, 0), np.float32)
        vectors: NDArray[np.float32] | None = None
        file_of = self.file[positions]
        for file in np.unique(file_of):
            chosen = np.flatnonzero(file_of == file)
            part = read_rows(self.files[file], self.row[positions[chosen]])
            check_norms(part, self.files[file])
            if vectors is None:
                vectors = np.empty((len(positions), part.shape[1]), np.float32)
            vectors[chosen] = part
        assert vectors is not None
        return vectors


@dataclass(frozen=True)
class VectorRows:
    """Vectors of one generation that were added: `revisions` (n,), and `load` reads those at positions, (m,) to (m, D).

    A revision may be dead, or be read from a newer generation already.
    """

    generation: str
    revisions: NDArray[np.int64]
    load: Callable[[NDArray[np.int64]], NDArray[np.float32]] = field(repr=False)


@dataclass(frozen=True)
class Changes:
    """What happened between two versions: revisions no longer live, new live items, vectors added.

    `items` has revision, item_id, source, label. An item that came and went in between is in neither.
    """

    dead: NDArray[np.int64]
    items: pa.Table
    vectors: tuple[VectorRows, ...]


def check_norms(vectors: NDArray[np.float32], where: str) -> None:
    """Raise DamagedVectorError for a vector that is not finite or not of norm 1."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    good = np.abs(squares - 1) <= 2 * NORM_TOLERANCE  # false for NaN as well
    if not good.all():
        row = int(np.argmin(good))
        raise DamagedVectorError(
            f"reading vectors: expected norm 1, found {np.sqrt(squares[row]):.4g} ({int((~good).sum())} such rows in "
            f"{where}); see 'graceful doctor'"
        )
