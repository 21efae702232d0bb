"""Pixels of training images, block by block: held in memory, or decoded by processes while the network runs.

Both hand out the same bytes for the same rows and seeds. What is decoded ahead is bounded: `ahead` images or two
portions for each process, whichever is more, in shared memory.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset, Sampler

from graceful.errors import GracefulError
from graceful.training.augmentation import Transforms, source_look
from graceful.training.generation import Preprocessing
from graceful.training.images import UnreadableImageError, decode, read_payloads
from graceful.training.job import AugmentationConfig
from graceful.training.manifest import LabelledImages
from graceful.training.records import Records, check_content

PORTION = 64
"""Images that a process decodes at a time."""
STALL_S = 600.0
"""Seconds without a portion after which the processes count as stuck."""
OF_ONE_RANK = "of_one_rank"
"""Attribute of a refusal that one rank has met while it trained, and the others know nothing of."""
_LOOK_S = 5.0  # between two looks whether they live

Draw = tuple[int, int]  # seed and epoch


class DecodingStoppedError(GracefulError):
    """The processes that decode images are gone or stuck."""


class Images(Protocol):
    """The images of a set by row."""

    def blocks(self, rows: Iterable[Tensor], draw: Draw | None = None) -> Iterator[Tensor]:
        """Yield the pixels (n, channels, size, size) uint8 of each block of rows (n,), on the CPU.

        With `draw` they are changed by the recipe's transforms, where it has any. One iteration at a time.
        """

    def close(self) -> None:
        """Let go of processes and files."""


@dataclass(frozen=True)
class Look:
    """How images are decoded: as they are, and as transforms get them."""

    clean: Preprocessing
    drawn: Preprocessing
    transforms: Transforms | None

    @classmethod
    def of(cls, preprocessing: Preprocessing, augmentation: AugmentationConfig | None = None) -> "Look":
        """Return the look of a recipe, or without augmentation that of images that are never changed."""
        if augmentation is None or augmentation.kind != "transforms":
            return cls(preprocessing, preprocessing, None)
        return cls(preprocessing, source_look(augmentation, preprocessing), Transforms(augmentation, preprocessing))

    def size_bytes(self, num_images: int) -> int:
        """Return what so many decoded images take in memory."""
        looks = {self.clean.image_size, self.drawn.image_size}
        return num_images * self.clean.channels * sum(side**2 for side in looks)


class Held:
    """Decoded images in memory (N, channels, size, size), and a second time as transforms get them, if that differs."""

    def __init__(self, pixels: Tensor, transforms: Transforms | None = None, drawn: Tensor | None = None) -> None:
        self.pixels = pixels
        self._transforms, self._drawn = transforms, pixels if drawn is None else drawn

    def blocks(self, rows: Iterable[Tensor], draw: Draw | None = None) -> Iterator[Tensor]:
        """Yield the pixels of each block of rows."""
        for block in rows:
            if draw is None or self._transforms is None:
                yield self.pixels.index_select(0, block)
            else:
                yield self._transforms(self._drawn.index_select(0, block), block.tolist(), *draw)

    def close(self) -> None:
        """Nothing to let go of."""


class Streamed:
    """Images that a pool of processes decodes while they are asked for, some ahead."""

    def __init__(self, records: Records, look: Look, processes: int, ahead: int, pinned: bool = False) -> None:
        self._shape = (look.clean.channels, look.clean.image_size, look.clean.image_size)
        self._pinned = pinned
        self._asked = _Asked()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._loader: DataLoader[Any] | None = DataLoader(
            _Decoding(records, look),
            sampler=self._asked,
            batch_size=None,
            num_workers=processes,
            prefetch_factor=max(2, math.ceil(ahead / (PORTION * processes))),
            persistent_workers=True,
            multiprocessing_context=context,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # a training's own generator is drawn from by the training alone
            timeout=_LOOK_S,
            worker_init_fn=_end_with_parent,
        )
        self._decoded: Any = None
        self._turn = 0

    def blocks(self, rows: Iterable[Tensor], draw: Draw | None = None) -> Iterator[Tensor]:
        """Yield the pixels of each block of rows.

        Raises: UnreadableImageError, ChangedImagesError, UsageError of a transform, DecodingStoppedError.
        """
        assert self._loader is not None, "closed"
        blocks = [block.numpy() for block in rows]
        self._turn += 1
        turn = self._turn
        self._asked.portions = ((part, draw) for block in blocks for part in _portions(block))
        with _without_main():
            decoded = self._decoded = iter(self._loader)
        for block in blocks:
            pixels = torch.empty((len(block), *self._shape), dtype=torch.uint8, pin_memory=self._pinned)
            end = 0
            for part in _portions(block):
                assert self._turn == turn, "one iteration at a time"
                pixels[end : end + len(part)] = _next(decoded)
                end += len(part)
            yield pixels

    def close(self) -> None:
        """End the processes."""
        if self._decoded is not None:
            self._decoded._shutdown_workers()  # left to the garbage collector this took ten seconds
        self._loader = self._decoded = None


def held(images: LabelledImages, look: Look) -> Held:
    """Decode all images into memory.

    Raises: ChangedImagesError, UnreadableImageError.
    """
    drawn = None if look.drawn == look.clean else decode_all(images, look.drawn)
    return Held(decode_all(images, look.clean), look.transforms, drawn)


def decode_all(images: LabelledImages, preprocessing: Preprocessing) -> Tensor:
    """Return the pixels (N, channels, size, size) uint8 of all images.

    Raises: ChangedImagesError, UnreadableImageError.
    """
    side = preprocessing.image_size
    pixels = np.empty((len(images), preprocessing.channels, side, side), dtype=np.uint8)
    for start in range(0, len(images), 1024):
        sources = images.sources[start : start + 1024]
        for row, payload in enumerate(read_payloads(sources), start):
            check_content(payload, bytes.fromhex(images.content_sha256[row]), images.sources[row])
            try:
                pixels[row] = decode(payload, preprocessing)
            except UnreadableImageError as error:
                raise _named(error, images.sources[row]) from error
    return torch.from_numpy(pixels)


class _Asked(Sampler[Any]):
    """What the processes are to decode next."""

    def __init__(self) -> None:
        self.portions: Iterator[tuple[NDArray[np.int64], Draw | None]] = iter(())

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], Draw | None]]:
        return self.portions


class _Decoding(Dataset[Any]):
    """What a decoding process does: the pixels of some rows, or the refusal of one of them as a value."""

    def __init__(self, records: Records, look: Look) -> None:
        self._records, self._look = records, look

    def __getitem__(self, asked: tuple[NDArray[np.int64], Draw | None]) -> Tensor | GracefulError:
        rows, draw = asked
        transforms = None if draw is None else self._look.transforms
        preprocessing = self._look.clean if transforms is None else self._look.drawn
        side = preprocessing.image_size
        pixels = np.empty((len(rows), preprocessing.channels, side, side), dtype=np.uint8)
        try:
            for place, payload in enumerate(self._records.read(rows)):
                try:
                    pixels[place] = decode(payload, preprocessing)
                except UnreadableImageError as error:
                    return _named(error, self._records.source(int(rows[place])))
            found = torch.from_numpy(pixels)
            return found if draw is None or transforms is None else transforms(found, rows.tolist(), *draw)
        except GracefulError as error:
            return error


def _named(error: UnreadableImageError, source: str) -> UnreadableImageError:
    return UnreadableImageError(f"reading training images: {source} {error}; leave it out and write the manifest again")


def _portions(rows: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    return [rows[start : start + PORTION] for start in range(0, len(rows), PORTION)]


def _next(decoded: Iterator[Any]) -> Tensor:
    until = time.monotonic() + STALL_S
    found: Any = None
    while found is None:
        try:
            found = next(decoded)
        except (RuntimeError, OSError, EOFError) as error:  # processes that died (also while they sent) or are late
            if "timed out" in str(error) and time.monotonic() < until:
                continue
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise DecodingStoppedError(
                f"decoding training images: expected pixels within {STALL_S:.0f} s, found {cause}; "
                "is there room in memory and in /dev/shm? lower cluster.decoding_processes, then run it again to go on "
                "from the last checkpoint"
            ) from error
    if isinstance(found, GracefulError):
        setattr(found, OF_ONE_RANK, True)
        raise found
    assert isinstance(found, Tensor)
    return found


def _as_it_is(found: Any) -> Any:
    return found


def _end_with_parent(_number: int) -> None:
    """End this process when its training ends, however that was: the fork server between them stays while it runs."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="graceful-end-with-parent").start()


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the user's script again, as multiprocessing's do: nothing here comes from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
