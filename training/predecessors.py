"""What training needs to know of its predecessors, read from what they left behind: no network of theirs is run.

For each predecessor k: its embeddings of the current training images (a cache aligned with the manifest), its class
means over them, and its classifier rows. A class that k never saw gets a synthesised row, k's mean embedding of that
class (backward-compatible training, Shen et al., CVPR 2020, 2003.11942); so does every class of an adopted encoder.
Everything has unit length. Predecessors of one width are stacked, so that one matrix product serves all of them.

Shapes: N training images, C classes, K predecessors of one width d, B images of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from graceful.errors import GracefulError
from graceful.files import resolve
from graceful.training.distributed import once_per_machine
from graceful.training.encoder import read_classifier
from graceful.training.generation import PredecessorRef, read_card

EMBEDDING_COLUMN = "embedding"


class MisalignedCacheError(GracefulError):
    """A predecessor's stored embeddings do not fit the training manifest."""


@dataclass(frozen=True)
class PredecessorGroup:
    """Predecessors of one width d, stacked."""

    generation_ids: tuple[str, ...]
    weights: Tensor  # (K,)
    embeddings: Tensor  # (N, K, d) float32, on the CPU, memory-mapped when large
    rows: Tensor  # (K, C, d): own classifier rows, synthesised ones for unseen classes
    class_means: Tensor  # (K, C, d)
    is_known: Tensor  # (K, C) bool: which rows are its own

    @property
    def width(self) -> int:
        return self.rows.shape[2]


class Predecessors:
    """All predecessors of a training, by width."""

    def __init__(self, groups: Sequence[PredecessorGroup], labels: NDArray[np.int64], device: torch.device) -> None:
        self.groups = tuple(groups)
        self._device = device
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        self._labels = torch.from_numpy(labels)
        self._by_class = torch.from_numpy(order)
        self._counts = torch.from_numpy(counts)
        self._starts = torch.from_numpy(np.cumsum(counts) - counts)

    def __len__(self) -> int:
        return sum(len(group.generation_ids) for group in self.groups)

    @property
    def generation_ids(self) -> tuple[str, ...]:
        """Ids in the order of the groups: the order of every per-predecessor value."""
        return tuple(name for group in self.groups for name in group.generation_ids)

    def draw_instances(self, generator: torch.Generator, classes: Tensor | None = None) -> list[Tensor]:
        """Return one random cached embedding of each of `classes` (S,), all by default: (K, S, d) per group.

        One image serves all predecessors; nothing is read for other classes.
        """
        counts, starts = self._counts, self._starts
        if classes is not None:
            counts, starts = counts[classes.cpu()], starts[classes.cpu()]
        draw = torch.rand(len(counts), generator=generator)
        images = self._by_class[starts + (draw * counts).long().clamp_(max=counts - 1)]
        return [self._gather(group, images) for group in self.groups]

    def similarities_to_mean(self, position: int, block_rows: int = 65536) -> Tensor:
        """Return the cosine of every training image's stored embedding to its class mean (N,).

        position: place of the predecessor in `generation_ids`.
        """
        for group in self.groups:
            if position < len(group.generation_ids):
                means, found = group.class_means[position].cpu(), []
                for start in range(0, len(self._labels), block_rows):
                    block = group.embeddings[start : start + block_rows, position].float()
                    found.append((block * means[self._labels[start : start + block_rows]]).sum(dim=1))
                return torch.cat(found)
            position -= len(group.generation_ids)
        raise IndexError(position)

    def of_batch(self, images: Tensor) -> list[Tensor]:
        """Return the cached embeddings of the given training images (B,), (K, B, d) per group."""
        return [self._gather(group, images) for group in self.groups]

    def vectors_of(self, generation_id: str, images: Tensor) -> Tensor:
        """Return one predecessor's cached embeddings of the given training images (B,): (B, d)."""
        group = next(group for group in self.groups if generation_id in group.generation_ids)
        place = group.generation_ids.index(generation_id)
        return group.embeddings[images, place].to(self._device, torch.float32)

    def class_means_of(self, generation_id: str) -> Tensor | None:
        """Return a predecessor's class means (C, d), or None for one that is not here."""
        for group in self.groups:
            if generation_id in group.generation_ids:
                return group.class_means[group.generation_ids.index(generation_id)]
        return None

    def _gather(self, group: PredecessorGroup, images: Tensor) -> Tensor:
        stacked = group.embeddings.index_select(0, images).to(self._device, torch.float32)
        return stacked.transpose(0, 1).contiguous()


def load_predecessors(
    references: Sequence[PredecessorRef],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    device: torch.device,
    scratch: Path,
    memory_limit_mib: int,
) -> Predecessors:
    """Load all predecessors. `labels` (N,) index `classes`.

    Embeddings above the limit are laid in files, one for all ranks of a machine, of which a step reads its rows.

    Raises: MisalignedCacheError.
    """
    widths = {reference.generation_id: read_card(reference.generation_uri).width for reference in references}
    total_bytes = 4 * len(labels) * sum(widths.values())
    groups = []
    for width in sorted(set(widths.values())):
        members = [reference for reference in references if widths[reference.generation_id] == width]
        shape = (len(labels), len(members), width)
        stacked: NDArray[np.float32]
        if total_bytes > memory_limit_mib * 2**20:
            place = once_per_machine(partial(_lay, members, scratch / f"predecessors-{width}.f32", shape))
            stacked = np.memmap(place, dtype=np.float32, mode="r+", shape=shape)
        else:
            stacked = np.empty(shape, dtype=np.float32)
            _read_all(members, stacked)
        means = torch.stack([class_means(stacked[:, i], labels, len(classes)) for i in range(len(members))])
        rows, is_known = means.clone(), torch.zeros(len(members), len(classes), dtype=torch.bool)
        for position, reference in enumerate(members):
            stored = read_classifier(reference.generation_uri)
            if stored is not None:
                card, own_rows, _ = stored
                rows[position] = synthesise_rows(card.classes, own_rows, classes, means[position])
                is_known[position] = torch.from_numpy(np.isin(classes, card.classes))
        groups.append(
            PredecessorGroup(
                generation_ids=tuple(reference.generation_id for reference in members),
                weights=torch.tensor([reference.weight for reference in members], device=device),
                embeddings=torch.from_numpy(stacked),
                rows=rows.to(device),
                class_means=means.to(device),
                is_known=is_known.to(device),
            )
        )
    return Predecessors(groups, labels, device)


def class_means(
    embeddings: NDArray[np.floating], labels: NDArray[np.int64], num_classes: int, block_rows: int = 65536
) -> Tensor:
    """Return the normalised mean of the unit embeddings (N, d) of every class: (C, d) float32."""
    sums = torch.zeros(num_classes, embeddings.shape[1], dtype=torch.float64)
    for start in range(0, len(labels), block_rows):
        block = torch.from_numpy(np.ascontiguousarray(embeddings[start : start + block_rows], dtype=np.float32))
        sums.index_add_(0, torch.from_numpy(labels[start : start + block_rows]), block.double())
    return functional.normalize(sums, dim=1).float()


def synthesise_rows(own_classes: Sequence[str], own_rows: Tensor, classes: Sequence[str], means: Tensor) -> Tensor:
    """Return rows (C, d) for `classes`: the predecessor's own row for a class it knows, else its class mean."""
    rows = functional.normalize(means.float(), dim=1)
    position = {name: index for index, name in enumerate(own_classes)}
    for index, name in enumerate(classes):
        if name in position:
            rows[index] = functional.normalize(own_rows[position[name]].float(), dim=0)
    return rows


def _lay(members: Sequence[PredecessorRef], place: Path, shape: tuple[int, int, int]) -> str:
    """Write the embeddings of predecessors of one width to a file; returns its name."""
    _read_all(members, np.memmap(place, dtype=np.float32, mode="w+", shape=shape))
    return str(place)


def _read_all(members: Sequence[PredecessorRef], target: NDArray[np.float32]) -> None:
    for position, reference in enumerate(members):
        _read_embeddings(reference, target.shape[2], target[:, position])


def _read_embeddings(reference: PredecessorRef, width: int, target: NDArray[np.floating]) -> None:
    """Fill `target` (N, d) with unit rows."""
    uris = (reference.embeddings_uri,) if isinstance(reference.embeddings_uri, str) else reference.embeddings_uri
    filled = 0
    for uri in uris:
        file_system, path = resolve(uri)
        with pq.ParquetFile(file_system.open_input_file(path)) as reader:
            for batch in reader.iter_batches(batch_size=65536, columns=[EMBEDDING_COLUMN]):
                block = _rows_of(batch.column(0), width, uri)
                if filled + len(block) <= len(target):
                    norms = np.linalg.norm(block, axis=1, keepdims=True)
                    if not (np.isfinite(norms).all() and (norms > 0).all()):
                        raise MisalignedCacheError(
                            f"loading predecessor {reference.generation_id}: expected finite embeddings, found a row "
                            f"that is not (in {uri}); embed that image again or drop it from the manifest"
                        )
                    target[filled : filled + len(block)] = block / norms
                filled += len(block)
    if filled != len(target):
        raise MisalignedCacheError(
            f"loading predecessor {reference.generation_id}: expected {len(target)} embeddings, one per training "
            f"image, found {filled} (in {', '.join(uris)}); extend the cache over the current manifest"
        )


def _rows_of(column: pa.Array, width: int, uri: str) -> NDArray[np.float32]:
    if column.null_count:
        raise MisalignedCacheError(f"loading embeddings: expected none missing, found {column.null_count} (in {uri})")
    for dtype in (np.dtype("<f4"), np.dtype("<f2")):
        size = width * dtype.itemsize
        if pa.types.is_binary(column.type) and len(column) and len(column[0].as_py()) == size:
            column = column.cast(pa.binary(size))  # table maintenance turns fixed-size binary into binary
        if pa.types.is_fixed_size_binary(column.type) and column.type.byte_width == size:
            raw = np.frombuffer(column.buffers()[1], dtype=np.uint8)
            raw = raw[column.offset * size : (column.offset + len(column)) * size]
            return raw.view(dtype).reshape(len(column), width).astype(np.float32)
    raise MisalignedCacheError(
        f"loading embeddings: expected fixed-size binary of {4 * width} or {2 * width} bytes for width {width}, found "
        f"{column.type} (in {uri})"
    )
