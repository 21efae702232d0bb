"""Embedding files and the engine that writes them, in process and on a Ray pool with a killed actor."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from graceful.indexing.embed import (
    EMBEDDING_COLUMN,
    EmbeddedUnit,
    EmbeddingFailedError,
    EmbeddingFileError,
    EmbeddingInterruptedError,
    EmbedUnit,
    EncodeSources,
    embed_units,
    read_embeddings,
    write_embedding_file,
)
from graceful.indexing.embedding_pool import EmbeddingPool

WIDTH = 8


def vector_of(source: str) -> NDArray[np.float32]:
    values = np.random.default_rng(abs(int(source.rsplit("#", 1)[1]))).standard_normal(WIDTH)
    return (values / np.linalg.norm(values)).astype(np.float32)


def encode(sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Sources look like "kind#number"; kind "bad" cannot be read, "raise" raises, "nan" and "long" misbehave."""
    vectors = np.full((len(sources), WIDTH), np.nan, dtype=np.float32)
    failures: dict[int, str] = {}
    for row, source in enumerate(sources):
        kind = source.split("#")[0]
        if kind == "bad":
            failures[row] = "not an image"
        elif kind == "raise":
            raise RuntimeError("cannot decode")
        elif kind != "nan":
            vectors[row] = vector_of(source) * (3.0 if kind == "long" else 1.0)
    return vectors, failures


def open_encoder() -> EncodeSources:
    return encode


def make_units(folder: Path, num_units: int, rows: int = 5, kind: str = "ok") -> list[EmbedUnit]:
    return [
        EmbedUnit(
            unit_id=f"u{unit}",
            sources=tuple(f"{kind}#{unit * rows + row}" for row in range(rows)),
            keys={"item_id": tuple(f"i{unit * rows + row}" for row in range(rows)), "revision": tuple(range(rows))},
            path=str(folder / f"part-{unit:05d}.parquet"),
        )
        for unit in range(num_units)
    ]


def random_unit_vectors(num: int, width: int = WIDTH) -> NDArray[np.float32]:
    values = np.random.default_rng(num).standard_normal((num, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


class TestFiles:
    @pytest.mark.parametrize("sizes", [(7,), (3, 0, 4), (0,), (70_000, 2)])
    def test_what_is_written_is_read_back_bit_for_bit(self, tmp_path: Path, sizes: tuple[int, ...]) -> None:
        paths, vectors = [], []
        for position, size in enumerate(sizes):
            paths.append(tmp_path / f"{position}.parquet")
            vectors.append(random_unit_vectors(size))
            keys = pa.table({"item_id": pa.array([f"{position}/{row}" for row in range(size)], pa.string())})
            assert write_embedding_file(paths[-1], keys, vectors[-1]) == paths[-1].stat().st_size
        keys, found = read_embeddings(paths)
        assert found.tobytes() == np.concatenate(vectors).tobytes()
        assert found.shape == (sum(sizes), WIDTH)
        assert keys.column_names == ["item_id"]
        assert keys["item_id"].to_pylist() == [f"{p}/{row}" for p, size in enumerate(sizes) for row in range(size)]

    def test_column_is_plain_fixed_size_binary_and_states_its_width(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        write_embedding_file(path, pa.table({"item_id": ["a", "b"]}), random_unit_vectors(2))
        schema = pq.read_schema(path)
        assert schema.field(EMBEDDING_COLUMN).type == pa.binary(4 * WIDTH)
        assert schema.metadata[b"embedding_width"] == b"8"
        assert schema.metadata[b"embedding_dtype"] == b"float32"
        column = pq.read_metadata(path).row_group(0).column(1)
        assert column.compression == "UNCOMPRESSED"
        assert not column.has_dictionary_page

    @pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
    def test_compacted_files_are_read_too(self, tmp_path: Path, kind: pa.DataType) -> None:
        vectors = random_unit_vectors(6)
        values = [row.tobytes() for row in vectors]
        for name, part in (("a", slice(0, 4)), ("b", slice(4, 6))):
            table = pa.table({"item_id": list(range(6))[part], EMBEDDING_COLUMN: pa.array(values[part], kind)})
            pq.write_table(table, tmp_path / f"{name}.parquet")
        keys, found = read_embeddings([tmp_path / "a.parquet", tmp_path / "b.parquet"], ["item_id"])
        assert found.tobytes() == vectors.tobytes()
        assert keys["item_id"].to_pylist() == list(range(6))

    def test_columns_can_be_chosen(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        write_embedding_file(path, pa.table({"item_id": ["a", "b"], "revision": [1, 2]}), random_unit_vectors(2))
        assert read_embeddings([path], ["revision"])[0].to_pydict() == {"revision": [1, 2]}
        assert read_embeddings([path], [])[0].num_columns == 0
        with pytest.raises(EmbeddingFileError, match="expected columns"):
            read_embeddings([path], ["label"])

    def test_widths_that_differ_are_refused_by_name(self, tmp_path: Path) -> None:
        write_embedding_file(tmp_path / "a.parquet", pa.table({"k": [1]}), random_unit_vectors(1, 8))
        write_embedding_file(tmp_path / "b.parquet", pa.table({"k": [1]}), random_unit_vectors(1, 6))
        with pytest.raises(EmbeddingFileError, match="expected width 8, found 6"):
            read_embeddings([tmp_path / "a.parquet", tmp_path / "b.parquet"])
        with pytest.raises(EmbeddingFileError, match="expected width 4, found 8"):
            read_embeddings([tmp_path / "a.parquet"], width=4)

    def test_nulls_and_uneven_rows_are_refused(self, tmp_path: Path) -> None:
        for values, found in (([b"0000", None], "1 nulls"), ([b"0000", b"00000000"], "rows of one width")):
            pq.write_table(pa.table({EMBEDDING_COLUMN: pa.array(values, pa.binary())}), tmp_path / "x.parquet")
            with pytest.raises(EmbeddingFileError, match=found):
                read_embeddings([tmp_path / "x.parquet"])

    def test_uri_and_file_system_name_the_same_file(self, tmp_path: Path) -> None:
        vectors = random_unit_vectors(3)
        write_embedding_file(f"file://{tmp_path}/a.parquet", pa.table({"k": [1, 2, 3]}), vectors)
        remote = pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())
        assert read_embeddings(["a.parquet"], filesystem=remote)[1].tobytes() == vectors.tobytes()
        write_embedding_file("b.parquet", pa.table({"k": [1, 2, 3]}), vectors, filesystem=remote)
        assert read_embeddings([tmp_path / "b.parquet"])[1].tobytes() == vectors.tobytes()

    def test_failed_write_leaves_the_earlier_file_and_no_litter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.parquet"
        write_embedding_file(path, pa.table({"k": [1]}), random_unit_vectors(1))
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            write_embedding_file(path, pa.table({"k": [1, 2]}), random_unit_vectors(2))
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


class TestInProcess:
    def test_every_unit_becomes_one_file_with_its_keys(self, tmp_path: Path) -> None:
        units = make_units(tmp_path, 3)
        seen: list[EmbeddedUnit] = []
        results = embed_units(units, open_encoder, on_unit=seen.append)
        assert results == seen
        assert [result.unit_id for result in results] == ["u0", "u1", "u2"]
        keys, vectors = read_embeddings([result.path for result in results])
        assert keys["item_id"].to_pylist() == [f"i{row}" for row in range(15)]
        assert vectors.tobytes() == np.stack([vector_of(f"#{row}") for row in range(15)]).tobytes()
        assert all(Path(result.path).stat().st_size == result.size_bytes for result in results)

    def test_failed_rows_are_left_out_and_reported(self, tmp_path: Path) -> None:
        keys = pa.table({"item_id": ["a", "b", "c"]})
        unit = EmbedUnit("u", ("ok#1", "bad#2", "ok#3"), keys, str(tmp_path / "u.parquet"))
        (result,) = embed_units([unit], open_encoder)
        assert result.failures == ((1, "not an image"),)
        assert (result.num_rows, result.width) == (2, WIDTH)
        read, vectors = read_embeddings([unit.path])
        assert read["item_id"].to_pylist() == ["a", "c"]
        assert np.isfinite(vectors).all()

    def test_a_unit_of_failures_only_is_an_empty_file(self, tmp_path: Path) -> None:
        (result,) = embed_units(make_units(tmp_path, 1, kind="bad"), open_encoder)
        assert (result.num_rows, len(result.failures)) == (0, 5)
        keys, vectors = read_embeddings([result.path])
        assert keys.num_rows == 0
        assert vectors.shape == (0, WIDTH)

    def test_vectors_are_normalised(self, tmp_path: Path) -> None:
        (result,) = embed_units(make_units(tmp_path, 1, kind="long"), open_encoder)
        vectors = read_embeddings([result.path])[1]
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)

    @pytest.mark.parametrize(("kind", "match"), [("raise", "u0.*cannot decode"), ("nan", "u0.*found norm nan")])
    def test_encoder_errors_name_the_unit(self, tmp_path: Path, kind: str, match: str) -> None:
        with pytest.raises(EmbeddingFailedError, match=match):
            embed_units(make_units(tmp_path, 1, kind=kind), open_encoder)
        assert list(tmp_path.iterdir()) == []

    def test_deadline_stops_between_units_and_keeps_finished_files(self, tmp_path: Path) -> None:
        with pytest.raises(EmbeddingInterruptedError, match="0 done"):
            embed_units(make_units(tmp_path, 2), open_encoder, deadline_s=-1)

    def test_units_that_contradict_each_other_are_refused(self, tmp_path: Path) -> None:
        first, second = make_units(tmp_path, 2)
        twin = EmbedUnit("other", second.sources, second.keys, first.path)
        with pytest.raises(ValueError, match="different path"):
            embed_units([first, twin], open_encoder)
        short = EmbedUnit("short", first.sources, {"item_id": ("a",)}, first.path)
        with pytest.raises(ValueError, match="short: expected key columns of 5 values"):
            embed_units([short], open_encoder)

    def test_no_units_open_no_encoder(self) -> None:
        def never() -> EncodeSources:
            raise AssertionError

        assert embed_units([], never) == []
        assert EmbeddingPool(2).embed([], never) == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        import ray

        ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()


class DyingEncoder:
    """Kills its process the first `times` times that it sees the source `victim`; opened anew in every worker."""

    def __init__(self, folder: Path, victim: str, times: int) -> None:
        self.folder, self.victim, self.times = folder, victim, times

    def __call__(self) -> EncodeSources:
        return self.encode

    def encode(self, sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        with (self.folder / "runs").open("a") as log:
            log.write(f"{sources[0]}\n")
        if self.victim in sources:
            deaths = len(list(self.folder.glob("death*")))
            if deaths < self.times:
                (self.folder / f"death{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return encode(sources)


class ProcessEncoder:
    """Its vectors say which process embeds, and by which of its openings: (process, opening, 1, 0 ...)."""

    openings = 0

    def __call__(self) -> EncodeSources:
        ProcessEncoder.openings += 1
        return self.encode

    def encode(self, sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        vectors = np.zeros((len(sources), WIDTH), np.float32)
        vectors[:, :3] = os.getpid(), ProcessEncoder.openings, 1
        return vectors, {}


def who(results: Sequence[EmbeddedUnit]) -> set[tuple[int, int]]:
    """Process and opening that embedded each unit."""
    _, vectors = read_embeddings([result.path for result in results])
    return {(round(float(row[0] / row[2])), round(float(row[1] / row[2]))) for row in vectors.astype(np.float64)}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestEmbeddingPool:
    @pytest.mark.timeout(180)
    def test_results_equal_those_in_process(self, tmp_path: Path) -> None:
        alone = embed_units(make_units(tmp_path / "alone", 6), open_encoder)
        seen: list[str] = []
        with EmbeddingPool(2) as pool:
            pooled = pool.embed(
                make_units(tmp_path / "pooled", 6),
                open_encoder,
                deadline_s=150,
                on_unit=lambda result: seen.append(result.unit_id),
            )
        assert [result.unit_id for result in pooled] == [result.unit_id for result in alone]
        assert sorted(seen) == [f"u{unit}" for unit in range(6)]
        for one, other in zip(alone, pooled, strict=True):
            assert Path(one.path).read_bytes() == Path(other.path).read_bytes()

    @pytest.mark.timeout(180)
    def test_killed_worker_loses_no_unit_and_doubles_no_row(self, tmp_path: Path) -> None:
        encoder = DyingEncoder(tmp_path, "ok#27", times=1)
        seen: list[str] = []
        with EmbeddingPool(3) as pool:
            results = pool.embed(
                make_units(tmp_path / "out", 12),
                encoder,
                deadline_s=150,
                on_unit=lambda result: seen.append(result.unit_id),
            )
        assert len(list(tmp_path.glob("death*"))) == 1
        assert sorted(seen) == sorted(f"u{unit}" for unit in range(12))
        keys, vectors = read_embeddings([result.path for result in results])
        assert keys["item_id"].to_pylist() == [f"i{row}" for row in range(60)]
        assert len(vectors) == 60
        assert len(list((tmp_path / "out").iterdir())) == 12
        runs = (tmp_path / "runs").read_text().split()
        assert runs.count("ok#25") == 2

    @pytest.mark.timeout(180)
    def test_a_unit_that_always_kills_its_worker_is_given_up_by_name(self, tmp_path: Path) -> None:
        encoder = DyingEncoder(tmp_path, "ok#7", times=99)
        with (
            EmbeddingPool(1, max_attempts=2) as pool,
            pytest.raises(EmbeddingInterruptedError, match=r"unit u1: .* found 2 dead ones"),
        ):
            pool.embed(make_units(tmp_path / "out", 3), encoder, deadline_s=150)

    @pytest.mark.timeout(180)
    def test_encoder_errors_are_not_tried_again_and_the_pool_serves_the_next_call(self, tmp_path: Path) -> None:
        def broken() -> EncodeSources:
            raise FileNotFoundError("no weights")

        with EmbeddingPool(1) as pool:
            with pytest.raises(
                EmbeddingFailedError, match=r"^embedding unit u0: the encoder raised RuntimeError: cannot"
            ):
                pool.embed(make_units(tmp_path, 1, kind="raise"), open_encoder, deadline_s=150)
            with pytest.raises(
                EmbeddingFailedError, match=r"^embedding: opening the encoder in a worker raised FileNot"
            ):
                pool.embed(make_units(tmp_path, 1), broken, deadline_s=150)
            assert len(pool.embed(make_units(tmp_path, 1), open_encoder, deadline_s=150)) == 1

    @pytest.mark.timeout(180)
    def test_workers_stay_between_calls_and_open_an_encoder_once(self, tmp_path: Path) -> None:
        first, second = ProcessEncoder(), ProcessEncoder()
        with EmbeddingPool(1) as pool:
            ((process, opening),) = who(pool.embed(make_units(tmp_path / "1", 2), first, deadline_s=150))
            assert who(pool.embed(make_units(tmp_path / "2", 2), first, deadline_s=150)) == {(process, opening)}
            assert who(pool.embed(make_units(tmp_path / "3", 2), second, deadline_s=150)) == {(process, opening + 1)}
            os.kill(process, signal.SIGKILL)
            ((replacement, _),) = who(pool.embed(make_units(tmp_path / "4", 2), second, deadline_s=150))
            assert replacement != process
            pool.close()
            ((started, _),) = who(pool.embed(make_units(tmp_path / "5", 2), second, deadline_s=150))
            assert started not in (process, replacement)

    @pytest.mark.timeout(60)
    def test_deadline_ends_a_wait_for_workers_that_cannot_start(self, tmp_path: Path) -> None:
        with EmbeddingPool(1, cpus_per_worker=64) as pool, pytest.raises(EmbeddingInterruptedError, match="0 done"):
            pool.embed(make_units(tmp_path, 1), open_encoder, deadline_s=1)


def test_a_pool_without_workers_or_without_a_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="at least 1; found 0, 3"):
        EmbeddingPool(0)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected a Ray cluster, found none; call ray.init"):
        EmbeddingPool(1).embed(make_units(tmp_path, 1), open_encoder)
