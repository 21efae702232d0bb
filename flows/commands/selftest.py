"""`graceful selftest`: the battery of crashes and faults, on the storage that a workspace is to lie in."""

import time
import uuid
from dataclasses import asdict
from typing import Any

from graceful.files import is_remote, join, remove
from graceful.indexing.selftest import run_selftest


def try_storage(root: str, *, rounds: int = 3, seed: int | None = None) -> dict[str, Any]:
    """Try the storage below a root out, in a folder of its own; it stays there only where something failed."""
    started = time.monotonic()
    place = join(root, f"selftest-{uuid.uuid4().hex[:8]}")
    trials = run_selftest(place, rounds=rounds, seed=time.time_ns() % 100_000 if seed is None else seed)
    passed = not any(trial.failures for trial in trials)
    if passed:
        remove(place)
    return {
        "passed": passed,
        "storage": "object store: commits by conditional put" if is_remote(root) else "files: commits by atomic rename",
        "trials": [asdict(trial) for trial in trials],
        "kept": None if passed else place,
        "seconds": round(time.monotonic() - started, 1),
    }
