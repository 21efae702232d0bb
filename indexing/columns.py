"""Whole-number columns of files that never change, remembered up to a budget of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from graceful.indexing.checked_files import CheckedFile

BUDGET_BYTES = 256 * 2**20
_THREADS = 4


class ColumnCache:
    """Columns of Parquet files as arrays; the longest unused go when the budget is spent."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[tuple[str, str], NDArray[np.int64]] = OrderedDict()
        self._size_bytes = 0
        self._lock = threading.Lock()

    def read(self, location: str, *columns: str) -> tuple[NDArray[np.int64], ...]:
        """Columns of one file, (n,) each: int64, booleans as 0 and 1.

        Raises:
            DamagedFileError: the file is not what was written.
        """
        with self._lock:
            found = {name: self._held[location, name] for name in columns if (location, name) in self._held}
            for name in found:
                self._held.move_to_end((location, name))
        missing = [name for name in columns if name not in found]
        if missing:
            table = CheckedFile(location).read(missing)
            for name in missing:
                values = table[name].to_numpy().astype(np.int64, copy=False)
                found[name] = values
                self._keep((location, name), values)
        return tuple(found[name] for name in columns)

    def read_all(self, locations: Sequence[str], *columns: str) -> list[tuple[NDArray[np.int64], ...]]:
        """`read` of several files, a few at a time."""
        if len(locations) < 2:
            return [self.read(location, *columns) for location in locations]
        with ThreadPoolExecutor(_THREADS) as threads:
            return list(threads.map(lambda location: self.read(location, *columns), locations))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self._size_bytes = 0

    def _keep(self, key: tuple[str, str], values: NDArray[np.int64]) -> None:
        with self._lock:
            if key in self._held or values.nbytes > self._budget_bytes:
                return
            self._held[key] = values
            self._size_bytes += values.nbytes
            while self._size_bytes > self._budget_bytes:
                _, dropped = self._held.popitem(last=False)
                self._size_bytes -= dropped.nbytes
