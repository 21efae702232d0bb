"""One update of a workspace at a time, from training to decision: a claim that its holder keeps alive.

The claim is a row in a versioned table, taken by compare-and-swap, so that it holds across machines. A holder that died
on this machine is recognised at once; one on another machine when its claim runs out. A background re-index and an
ingest need no claim.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa

from graceful.errors import GracefulError
from graceful.files import exists, join
from graceful.indexing.tables import TableConflictError, VersionedTable
from graceful.processes import process_start

SERVICE_VARIABLE = "GRACEFUL_SERVICE"
"""Environment variable by which a run knows the service that started it: "pid@start"."""

LIFETIME_S = 120.0
_RENEW_S = 30.0
CLAIM_SCHEMA = pa.schema([("sequence", pa.int64()), ("claim", pa.string())])


class UpdateInProgressError(GracefulError):
    """Another update of this workspace is running."""


@contextmanager
def claim(root: str, purpose: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the workspace's claim while the block runs; wait up to `wait_s` for another holder to end.

    Raises:
        UpdateInProgressError: another update holds it.
    """
    table = VersionedTable(join(root, "registry", "claims"), CLAIM_SCHEMA, create=True)
    me = {
        "purpose": purpose,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "nonce": time.time_ns(),
        # The service that started this run, if one did.
        "service": os.environ.get(SERVICE_VARIABLE),
    }
    deadline = time.monotonic() + wait_s
    while not _take(table, me):
        holder = _newest(table)[2]
        if time.monotonic() >= deadline:
            raise UpdateInProgressError(
                f"starting {purpose}: another update of this workspace is in progress ({holder.get('purpose')}, "
                f"process {holder.get('pid')} on {holder.get('host')}); wait for it to end"
            )
        time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))
    stop = threading.Event()
    renewer = threading.Thread(target=_renew, args=(table, me, stop), daemon=True, name="claim")
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        # A claim that cannot be given back (a full disk) runs out; what happened in the block matters more.
        with suppress(Exception):
            _write_if_mine(table, me, expires_at=0.0)
            table.compact()


def holder(root: str) -> tuple[dict[str, object], bool]:
    """Who took the workspace's claim last, and whether it is still held; ({}, False) where nobody ever did."""
    location = join(root, "registry", "claims")
    if not exists(location):
        return {}, False
    found = _newest(VersionedTable(location, CLAIM_SCHEMA))[2]
    return found, _alive(found)


def _take(table: VersionedTable, me: dict[str, object]) -> bool:
    version, sequence, holder = _newest(table)
    if _alive(holder):
        return False
    return _write(table, version, sequence + 1, {**me, "expires_at": time.time() + LIFETIME_S})


def _alive(holder: dict[str, object]) -> bool:
    if not holder or float(str(holder["expires_at"])) < time.time():
        return False
    if holder["host"] != socket.gethostname():
        return True
    return process_start(int(str(holder["pid"]))) == holder["started"]


def _renew(table: VersionedTable, me: dict[str, object], stop: threading.Event) -> None:
    while not stop.wait(_RENEW_S):
        # A store that does not answer now may answer before the claim runs out.
        with suppress(Exception):
            _write_if_mine(table, me, expires_at=time.time() + LIFETIME_S)


def _write_if_mine(table: VersionedTable, me: dict[str, object], *, expires_at: float) -> None:
    version, sequence, holder = _newest(table)
    if holder.get("nonce") == me["nonce"]:
        _write(table, version, sequence + 1, {**me, "expires_at": expires_at})


def _newest(table: VersionedTable) -> tuple[int, int, dict[str, object]]:
    snapshot = table.snapshot()
    rows = snapshot.rows().sort_by("sequence").to_pylist()
    return (
        (snapshot.version, rows[-1]["sequence"], json.loads(rows[-1]["claim"])) if rows else (snapshot.version, 0, {})
    )


def _write(table: VersionedTable, version: int, sequence: int, holder: dict[str, object]) -> bool:
    row = pa.Table.from_pylist([{"sequence": sequence, "claim": json.dumps(holder)}], schema=CLAIM_SCHEMA)
    try:
        return table.append(row, expected_version=version)
    except TableConflictError:
        return False
