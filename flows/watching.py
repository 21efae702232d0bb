"""New training images start an update: where they lie is looked at again and again, and a run begins once it is quiet.

What is compared is path, size and modification time of every file, as one digest; nothing is read. What the last run
was started for stands beside the flow server's database, so that images which came while no service ran are noticed
too. A place that cannot be looked at, or is empty, is looked at again later.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow.fs as pafs

from graceful.errors import GracefulError
from graceful.files import resolve, write_bytes
from graceful.flows.settings.config import load_workspace_config

NEW_DATA = "new data"
"""Tag of a run that began because there were new images."""

_RECORD = "watched.txt"

logger = logging.getLogger(__name__)


def digest_of(places: Sequence[str]) -> str | None:
    """Digest of path, size and modification time of every file at these files and below these folders; None for none.

    Raises: OSError where they cannot be looked at.
    """
    found: list[str] = []
    for place in places:
        filesystem, path = resolve(place)
        here = filesystem.get_file_info(path)
        files = [here]
        if here.type == pafs.FileType.Directory:
            files = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        found += [f"{file.path}\0{file.size}\0{file.mtime_ns}" for file in files if file.type == pafs.FileType.File]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() if found else None


class Watch:
    """Says when to begin, from what is seen at each look.

    >>> watch = Watch(begun_for="a", quiet_s=60)
    >>> [watch.is_due(seen, now) for now, seen in enumerate("aab")]  # the same as before; something new
    [False, False, False]
    >>> [watch.is_due("c", now) for now in (50, 100, 110, 120)]  # more has come; it is quiet; begun for it
    [False, False, True, False]
    """

    def __init__(self, begun_for: str | None, quiet_s: float) -> None:
        self.begun_for = begun_for
        self._quiet_s = quiet_s
        self._seen: str | None = None
        self._since = 0.0

    def is_due(self, seen: str | None, now: float) -> bool:
        """Whether what is seen is new, and has been the same for so long; once for each."""
        if seen is None:
            return False
        if seen != self._seen:
            self._seen, self._since = seen, now
        if seen == self.begun_for or now - self._since < self._quiet_s:
            return False
        self.begun_for = seen
        return True


async def watch_data(root: str, between_looks_s: float, quiet_s: float, begin: Callable[[], Awaitable[object]]) -> None:
    """Look at a workspace's training data until cancelled; `begin` is called for what is new once it is quiet."""
    record = Path(root, ".prefect", _RECORD)
    watch = Watch(record.read_text() if record.exists() else None, quiet_s)
    while True:
        before = watch.begun_for
        try:
            seen = await asyncio.to_thread(_look, root)
            if watch.is_due(seen, time.monotonic()):
                await begin()
                await asyncio.to_thread(write_bytes, str(record), str(seen).encode())
        except Exception as error:  # a store or a flow server that does not answer: the next look may find it
            watch.begun_for = before
            logger.warning("looking for new data: %s", " ".join(str(error).split())[:300])
        await asyncio.sleep(between_looks_s)


def _look(root: str) -> str | None:
    with contextlib.suppress(GracefulError):  # a configuration that is being edited
        return digest_of(load_workspace_config(root).training_data.paths)
    return None


async def begin_update(deployment: UUID) -> bool:
    """Have an update begin; False where one waits for its turn already, which will find the same data."""
    from prefect.client.orchestration import get_client

    from graceful.flows.overlap import waiting_runs

    async with get_client() as client:
        if [run for run in await waiting_runs(client, deployment) if run.expected_start_time <= datetime.now(UTC)]:
            return False
        run: Any = await client.create_flow_run_from_deployment(deployment, tags=["graceful", NEW_DATA])
    print(f"New data: update {run.name} begins.", flush=True)
    return True
