"""Leases on versions of the gallery: open readers' promises that the files of a version stay.

A lease is one small file below `leases/`, written before its reader knows which version it gets, renewed by a thread
while the reader lives, and removed at the end; so that the folder holds as many files as there are readers. A reader
that died on this machine is known at once; one that died elsewhere by the clock, long after its last renewal.

No gap. A reader arrives (its file says: anything), looks which version is the newest, and names it. Who removes files
commits first, notes the version that this made, then asks `open_versions` (which waits for whoever is arriving), and
removes only files that neither the noted version nor an open one names. So either the remover sees the lease, or the
reader came later and pinned a version that does not name what is being removed.
"""

import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import join, list_files, read_json, remove, write_json
from graceful.processes import process_space, process_start

LIFETIME_S = 600.0
"""How long a lease holds without being renewed; its reader renews it at a third of this."""

SLACK_S = 3600.0
"""How much later than its own end a lease of another machine is believed to be over: clocks differ."""

FORMAT_VERSION = 1
_ARRIVAL_S = 30.0
_LOOK_AGAIN_S = 0.02


class LeaseLostError(GracefulError):
    """A lease could not be renewed in time: the files that it pinned may be gone."""


class ReaderArrivingError(GracefulError):
    """A reader has announced itself and does not say what it reads."""


@dataclass(frozen=True)
class GalleryVersion:
    """What a reader pins: one version of the items and one of the vectors."""

    items: int
    vectors: int


class Lease:
    """A version that stays readable until `release`. Safe to use from several threads.

    A lease that nobody refers to any more is given back.
    """

    def __init__(self, location: str, newest: Callable[[], GalleryVersion], lifetime_s: float) -> None:
        """Pin the newest version; see `Leases.take`."""
        self._location = location
        self._newest = newest
        self._lifetime_s = lifetime_s
        self._lock = threading.RLock()
        self._lost = self._released = False
        self._versions: tuple[GalleryVersion, ...] = ()
        self._pin()
        self._stop = threading.Event()
        self._end = weakref.finalize(self, _give_back, self._stop, location, os.getpid())
        renewer = threading.Thread(
            target=_renew, args=(weakref.ref(self), self._stop, lifetime_s / 3), daemon=True, name="lease"
        )
        renewer.start()

    @property
    def lost(self) -> bool:
        """Whether the lease was not renewed in time: what is read from now on may be gone."""
        return self._lost or self._clock() - self._renewed > self._lifetime_s

    @property
    def version(self) -> GalleryVersion:
        """The version that is pinned.

        Raises:
            LeaseLostError: it is pinned no longer.
        """
        with self._lock:
            self._require()
            return self._versions[-1]

    def move_to(self, version: GalleryVersion | None = None) -> GalleryVersion:
        """Pin the newest version instead; what was pinned stays until the new one is. Returns what is pinned now.

        A version that is given is pinned if it is still the newest one; of an older one files may be gone, and the
        newest is pinned in its place. So move first, then read what is returned.

        Raises:
            LeaseLostError: the lease was lost before.
        """
        with self._lock:
            self._require()
            if self._versions[-1:] != (version,):
                self._pin()
            return self._versions[-1]

    def follow(self) -> GalleryVersion:
        """Pin the newest version even where the lease was lost: for a reader that keeps nothing of what it has read."""
        with self._lock:
            if self._released:
                self._require()
            if self.lost:
                self._versions, self._lost = (), False
            self._pin()
            return self._versions[-1]

    def check(self) -> None:
        """Raise LeaseLostError unless the version is pinned still."""
        with self._lock:
            self._require()

    def release(self) -> None:
        """Give the version back. Done twice it does nothing."""
        with self._lock:
            self._released = True
            self._end()

    def __enter__(self) -> "Lease":
        """Release at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()

    def renew(self) -> None:
        """Say that the reader lives. A lease that is lost, or whose file was removed, is not brought back."""
        with self._lock:
            if self._released or self.lost:
                self._lost = self._lost or not self._released
                return
            try:
                read_json(self._location)
            except FileNotFoundError:
                self._lost = True
                return
            self._write(self._versions, arriving=False)

    def _pin(self) -> None:
        self._write(self._versions, arriving=True)
        try:
            version = self._newest()
        except BaseException:
            if self._versions:
                self._write(self._versions, arriving=False)
            else:
                remove(self._location)
            raise
        self._write((version,), arriving=False)
        self._versions = (version,)

    def _write(self, versions: tuple[GalleryVersion, ...], *, arriving: bool) -> None:
        pid, before = os.getpid(), self._clock()
        record = {
            "format_version": FORMAT_VERSION,
            "versions": [[version.items, version.vectors] for version in versions],
            "arriving": arriving,
            "expires_at": time.time() + self._lifetime_s,
            "space": process_space(),
            "pid": pid,
            "started": process_start(pid),
        }
        write_json(self._location, record)
        self._renewed = before

    def _require(self) -> None:
        if self._released or self.lost:
            found = "one that was released" if self._released else "one that could not be renewed in time"
            raise LeaseLostError(
                f"reading a pinned version of the gallery: expected a lease that holds, found {found} "
                f"({self._location}); take another one and read again"
            )

    @staticmethod
    def _clock() -> float:
        """Seconds that pass while the machine sleeps, too, and that nobody sets back."""
        boot = getattr(time, "CLOCK_BOOTTIME", None)
        return time.monotonic() if boot is None else time.clock_gettime(boot)


class Leases:
    """The leases of one gallery."""

    def __init__(self, location: str) -> None:
        """Name the folder; it is created by the first lease."""
        self._folder = location

    def take(self, newest: Callable[[], GalleryVersion], lifetime_s: float = LIFETIME_S) -> Lease:
        """Pin the version that `newest` finds, for a reader that stays open."""
        return Lease(join(self._folder, f"{uuid.uuid4().hex}.json"), newest, lifetime_s)

    @contextmanager
    def hold(self, newest: Callable[[], GalleryVersion], lifetime_s: float = LIFETIME_S) -> Iterator[GalleryVersion]:
        """Pin the version that `newest` finds for as long as the block runs.

        Raises:
            LeaseLostError: at the end of the block, if the lease was lost in it: what was read may not be all.
        """
        with self.take(newest, lifetime_s) as lease:
            yield lease.version
            lease.check()

    def open_versions(self) -> list[GalleryVersion]:
        """Versions that open leases pin now. Waits for readers that are arriving; removes leases of dead ones.

        Raises:
            ReaderArrivingError: a reader arrives and arrives; nothing may be removed meanwhile.
        """
        deadline = time.monotonic() + _ARRIVAL_S
        while True:
            records = [record for record in map(_read, self._files()) if record is not None]
            if not any(record["arriving"] for record in records):
                return [GalleryVersion(*version) for record in records for version in record["versions"]]
            if time.monotonic() > deadline:
                raise ReaderArrivingError(
                    f"looking for open readers: expected each to name its version within {_ARRIVAL_S:.0f} s, found one "
                    f"that does not ({self._folder}); try again later"
                )
            time.sleep(_LOOK_AGAIN_S)

    def _files(self) -> list[str]:
        """Locations of the lease files; nothing below a folder is one."""
        prefix = len(self._folder.rstrip("/")) + 1
        return [file for file in list_files(self._folder) if file.endswith(".json") and "/" not in file[prefix:]]


def _read(location: str) -> dict[str, Any] | None:
    """A lease that is open; None for one that is not, whose file is removed."""
    try:
        record: dict[str, Any] = read_json(location)
    except FileNotFoundError:  # given back between the listing and the reading
        return None
    if record.get("format_version") != FORMAT_VERSION:
        raise UnknownFormatError(
            f"reading a lease: expected format version {FORMAT_VERSION}, found {record.get('format_version')} "
            f"({location}); use the program version that wrote it"
        )
    if record["space"] == process_space():
        alive = process_start(record["pid"]) == record["started"]
    else:
        alive = time.time() < record["expires_at"] + SLACK_S
    if alive:
        return record
    with suppress(FileNotFoundError):
        remove(location)
    return None


def _renew(lease_of: "weakref.ref[Lease]", stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        lease = lease_of()
        if lease is None:
            return
        with suppress(Exception):  # a store that does not answer now may answer before the lease runs out
            lease.renew()
        del lease


def _give_back(stop: threading.Event, location: str, pid: int) -> None:
    if os.getpid() != pid:  # a fork of the reader's process ends: the lease is not its own
        return
    stop.set()
    with suppress(Exception):  # what cannot be removed runs out
        remove(location)
