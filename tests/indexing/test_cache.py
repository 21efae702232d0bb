"""The embedding cache: keyed by content, extended and never recomputed, exactly once however often it is killed."""

import functools

import numpy as np
import pytest

from graceful.files import list_files, read_bytes, set_crash_hook
from graceful.indexing.cache import EmbeddingCache
from graceful.indexing.embed import embed_units
from graceful.indexing.tables import VersionedTable
from tests.synthetic import SyntheticGeneration, open_synthetic

GENERATION = SyntheticGeneration("g001-aaaaaa", unreadable=frozenset({"synthetic:id9/9"}))


class Embedder:
    """Counts what it embeds."""

    def __init__(self) -> None:
        self.sources = []

    def __call__(self, units, on_unit):
        for unit in units:
            self.sources += unit.sources
        embed_units(units, functools.partial(open_synthetic, GENERATION), on_unit=on_unit)


def images(*numbers):
    return [f"hash-{number}" for number in numbers], [f"synthetic:id{number}/0" for number in numbers]


@pytest.fixture
def location(tmp_path):
    return str(tmp_path / "cache")


def test_only_new_images_are_embedded_each_once(location):
    embed = Embedder()
    cache = EmbeddingCache(location)
    assert cache.extend(*images(1, 2, 2, 1), embed) == (2, {})
    assert EmbeddingCache(location).extend(*images(2, 3), embed) == (1, {})
    assert embed.sources == ["synthetic:id1/0", "synthetic:id2/0", "synthetic:id3/0"]
    assert cache.missing(images(1, 2, 3, 4)[0]) == ["hash-4"]


def test_embeddings_come_in_the_order_asked(location):
    cache = EmbeddingCache(location)
    cache.extend(*images(*range(7)), Embedder(), unit_rows=2)
    hashes, sources = images(6, 0, 3, 3)
    np.testing.assert_allclose(cache.read(hashes), GENERATION.encode(sources)[0], atol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_embeddings_in_blocks_are_those_of_one_reading(location, block_rows):
    cache = EmbeddingCache(location)
    cache.extend(*images(*range(7)), Embedder(), unit_rows=2)
    hashes, _ = images(6, 0, 3, 3, 99, 5, 1)
    for found in (list(cache.read_blocks(hashes[:4], block_rows)), list(cache.read_blocks(hashes, 7))):
        assert all(len(block) <= max(block_rows, 7) for block in found)
        blocks = np.concatenate(found)
        np.testing.assert_array_equal(blocks, cache.read(hashes)[: len(blocks)])


def test_image_that_failed_is_reported_missing_and_nan(location):
    cache = EmbeddingCache(location)
    count, failures = cache.extend(["good", "bad"], ["synthetic:id1/0", "synthetic:id9/9"], Embedder())
    assert (count, failures) == (1, {"synthetic:id9/9": "cannot be read"})
    assert cache.missing(["good", "bad"]) == ["bad"]
    found = cache.read(["bad", "good", "never asked for"])
    assert np.isnan(found[[0, 2]]).all()
    assert np.isfinite(found[1]).all()


def test_empty_cache_says_what_to_do(location):
    with pytest.raises(KeyError, match="extend the cache first"):
        EmbeddingCache(location).read(["hash-1"])
    assert EmbeddingCache(location).extend([], [], Embedder()) == (0, {})


def test_progress_counts_every_image_once(location):
    counts = []
    EmbeddingCache(location).extend(*images(*range(5)), Embedder(), unit_rows=2, on_rows=counts.append)
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("hit", range(3))
def test_killed_extension_goes_on_where_it_stopped(location, hit):
    class CrashError(BaseException):
        pass

    left = [hit]

    def crash(name):
        if name == "table-committed":
            left[0] -= 1
            if left[0] < 0:
                raise CrashError

    set_crash_hook(crash)
    try:
        with pytest.raises(CrashError):
            EmbeddingCache(location).extend(*images(*range(6)), Embedder(), unit_rows=2)
    finally:
        set_crash_hook(None)
    again = Embedder()
    cache = EmbeddingCache(location)
    cache.extend(*images(*range(6)), again, unit_rows=2)
    assert len(again.sources) == 6 - 2 * (hit + 1), "finished units were embedded again"
    hashes, sources = images(*range(6))
    np.testing.assert_allclose(cache.read(hashes), GENERATION.encode(sources)[0], atol=1e-6)


def test_two_updates_that_extend_by_the_same_images_store_them_once(location):
    """The second handle learns only at its commit that the first one was faster."""
    first, second = EmbeddingCache(location), EmbeddingCache(location)

    def embed_slowly(units, on_unit):
        first.extend(*images(1, 2), Embedder())
        embed_units(units, functools.partial(open_synthetic, GENERATION), on_unit=on_unit)

    second.extend(*images(1, 2), embed_slowly)
    assert sum(file.num_rows for file in second._table.snapshot().files) == 2
    hashes, sources = images(2, 1)
    np.testing.assert_allclose(second.read(hashes), GENERATION.encode(sources)[0], atol=1e-6)


def test_forgotten_image_is_gone_and_the_others_stay(location):
    cache = EmbeddingCache(location)
    cache.extend(*images(1, 2, 3), Embedder())
    cache.forget(["hash-2", "never there"])
    assert cache.missing(images(1, 2, 3)[0]) == ["hash-2"]
    assert not [file for file in list_files(location) if b"hash-2" in read_bytes(file)]
    hashes, sources = images(3, 1)
    np.testing.assert_allclose(cache.read(hashes), GENERATION.encode(sources)[0], atol=1e-6)
    cache.forget([])
    assert cache.missing(images(1, 3)[0]) == []


def test_forgotten_image_can_be_embedded_again(location):
    cache = EmbeddingCache(location)
    cache.extend(*images(1, 2), Embedder())
    cache.forget(["hash-1", "hash-2"])
    assert cache.extend(*images(1, 2), Embedder())[0] == 2
    assert cache.missing(images(1, 2)[0]) == []


def test_same_images_embedded_by_two_at_once_are_stored_once_and_stay(location, monkeypatch):
    """The slower one discards its file; it must not be the file that the faster one has committed."""
    take_in, done = VersionedTable.take_in, []

    def overtaken(*given, **named):
        file = take_in(*given, **named)
        if not done:
            done.append(file)
            EmbeddingCache(location).extend(*images(1, 2), Embedder())
        return file

    cache = EmbeddingCache(location)
    monkeypatch.setattr(VersionedTable, "take_in", overtaken)
    cache.extend(*images(1, 2), Embedder())
    assert done
    assert not np.isnan(EmbeddingCache(location).read(images(1, 2)[0])).any()
