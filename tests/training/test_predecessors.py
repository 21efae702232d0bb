"""Predecessors: synthesised rows, class means, instances, stored formats, misaligned caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from graceful.training.backbones import build_backbone
from graceful.training.encoder import save_generation
from graceful.training.generation import BackboneSpec, PredecessorRef, Preprocessing
from graceful.training.predecessors import (
    MisalignedCacheError,
    Predecessors,
    class_means,
    load_predecessors,
    synthesise_rows,
)

NUM_IMAGES, CLASSES = 30, ["a", "b", "c"]
LABELS = np.arange(NUM_IMAGES) % 3
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path, preprocessing: Preprocessing, write_embeddings: Callable[..., str]) -> Callable[..., Any]:
    """Return a function that stores a generation and its cache; it gives the reference, the vectors and the rows."""

    def make(ordinal: int, width: int, classes: list[str] | None, dtype: str = "<f4") -> Any:
        torch.manual_seed(ordinal)
        spec = BackboneSpec(name="small_cnn", kwargs={"block_widths": [4]})
        rows = torch.randn(len(classes or []), width)
        uri, card = save_generation(
            str(tmp_path / "generations"),
            build_backbone(spec, width, 1, 8),
            ordinal=ordinal,
            backbone=spec,
            preprocessing=preprocessing,
            width=width,
            classifier=None if classes is None else (classes, rows, rows),
        )
        vectors = np.random.default_rng(ordinal).normal(size=(NUM_IMAGES, width)).astype(dtype)
        cache = write_embeddings(f"cache-{ordinal}", vectors)
        reference = PredecessorRef(
            generation_id=card.generation_id, generation_uri=uri, embeddings_uri=cache, weight=float(ordinal)
        )
        return reference, normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1), normalize(rows, dim=1)

    return make


def load(references: list[PredecessorRef], scratch: Path, memory_limit_mib: int = 2048) -> Predecessors:
    return load_predecessors(references, LABELS, CLASSES, CPU, scratch, memory_limit_mib)


def test_known_classes_keep_their_row_and_unseen_ones_get_the_class_mean(
    store: Callable[..., Any], tmp_path: Path
) -> None:
    reference, vectors, own_rows = store(1, 6, ["c", "a"])
    (group,) = load([reference], tmp_path).groups
    means = torch.stack([normalize(vectors[c == LABELS].mean(dim=0), dim=0) for c in range(3)])
    torch.testing.assert_close(group.class_means[0], means)
    torch.testing.assert_close(group.rows[0], torch.stack([own_rows[1], means[1], own_rows[0]]))


def test_adopted_predecessor_has_class_means_for_rows(store: Callable[..., Any], tmp_path: Path) -> None:
    reference, _, _ = store(1, 6, None)
    (group,) = load([reference], tmp_path).groups
    torch.testing.assert_close(group.rows, group.class_means)


def test_rows_are_stacked_by_width_with_their_weights(store: Callable[..., Any], tmp_path: Path) -> None:
    references = [store(1, 6, ["a"])[0], store(2, 8, ["a"])[0], store(3, 6, None)[0]]
    predecessors = load(references, tmp_path)
    assert [group.width for group in predecessors.groups] == [6, 8]
    assert [group.weights.tolist() for group in predecessors.groups] == [[1.0, 3.0], [2.0]]
    assert predecessors.generation_ids == tuple(references[i].generation_id for i in (0, 2, 1))
    assert predecessors.class_means_of(references[1].generation_id) is not None
    assert predecessors.class_means_of("g009-aaaaaa") is None


def test_instances_are_cached_embeddings_of_the_right_class_and_change(
    store: Callable[..., Any], tmp_path: Path
) -> None:
    reference, vectors, _ = store(1, 6, None)
    predecessors = load([reference], tmp_path)
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(200):
        (instances,) = predecessors.draw_instances(generator)
        matches = (instances[0] @ vectors.t() > 1 - 1e-5).nonzero()
        assert [int(LABELS[image]) for _, image in matches] == [0, 1, 2]
        seen |= {int(image) for _, image in matches}
    assert seen == set(range(NUM_IMAGES))


def test_batch_embeddings_follow_the_images(store: Callable[..., Any], tmp_path: Path) -> None:
    stored = [store(1, 6, None), store(2, 6, None)]
    predecessors = load([entry[0] for entry in stored], tmp_path)
    images = torch.tensor([5, 0, 17])
    (batch,) = predecessors.of_batch(images)
    torch.testing.assert_close(batch, torch.stack([vectors[images] for _, vectors, _ in stored]))


@pytest.mark.parametrize("limit_mib", [0, 1024])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_float16_files_and_memory_mapping_change_nothing_but_precision(
    store: Callable[..., Any], tmp_path: Path, dtype: str, limit_mib: int
) -> None:
    reference, vectors, _ = store(1, 6, None, dtype)
    (batch,) = load([reference], tmp_path, memory_limit_mib=limit_mib).of_batch(torch.arange(NUM_IMAGES))
    torch.testing.assert_close(batch[0], vectors, atol=2e-3, rtol=0)


def test_several_files_and_plain_binary_columns_are_read(store: Callable[..., Any], tmp_path: Path) -> None:
    reference, vectors, _ = store(1, 6, None)
    table = pq.read_table(reference.embeddings_uri)
    files = []
    for start, stop in ((0, 11), (11, NUM_IMAGES)):
        files.append(str(tmp_path / f"part-{start}.parquet"))
        part = table.slice(start, stop - start)
        pq.write_table(pa.table({"embedding": part["embedding"].cast(pa.binary())}), files[-1])
    split = reference.model_copy(update={"embeddings_uri": tuple(files)})
    (batch,) = load([split], tmp_path).of_batch(torch.arange(NUM_IMAGES))
    torch.testing.assert_close(batch[0], vectors)


@pytest.mark.parametrize("rows", [NUM_IMAGES - 1, NUM_IMAGES + 1])
def test_cache_of_another_length_is_refused(
    store: Callable[..., Any], tmp_path: Path, write_embeddings: Callable[..., str], rows: int
) -> None:
    reference, _, _ = store(1, 6, None)
    other = write_embeddings("other", np.ones((rows, 6), dtype=np.float32))
    with pytest.raises(MisalignedCacheError, match=f"expected 30 embeddings.*found {rows}"):
        load([reference.model_copy(update={"embeddings_uri": other})], tmp_path)


def test_cache_of_another_width_or_with_nan_is_refused(
    store: Callable[..., Any], tmp_path: Path, write_embeddings: Callable[..., str]
) -> None:
    reference, _, _ = store(1, 6, None)
    wide = write_embeddings("wide", np.ones((NUM_IMAGES, 7), dtype=np.float32))
    with pytest.raises(MisalignedCacheError, match="expected fixed-size binary of 24 or 12 bytes"):
        load([reference.model_copy(update={"embeddings_uri": wide})], tmp_path)
    vectors = np.ones((NUM_IMAGES, 6), dtype=np.float32)
    vectors[3] = np.nan
    broken = write_embeddings("broken", vectors)
    with pytest.raises(MisalignedCacheError, match="expected finite"):
        load([reference.model_copy(update={"embeddings_uri": broken})], tmp_path)


def test_class_means_are_the_same_in_blocks() -> None:
    vectors = np.random.default_rng(0).normal(size=(NUM_IMAGES, 5)).astype(np.float32)
    torch.testing.assert_close(class_means(vectors, LABELS, 3, block_rows=7), class_means(vectors, LABELS, 3))


def test_synthesised_rows_have_unit_length() -> None:
    rows = synthesise_rows(["b"], torch.tensor([[0.0, 5.0]]), ["a", "b"], torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
