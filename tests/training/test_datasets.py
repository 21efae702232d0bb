"""Data sets: every source, every filter, every kind of bad input."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from graceful.errors import UnknownFormatError, UsageError
from graceful.training.datasets import (
    DatasetConfig,
    EmptyDatasetError,
    HoldOut,
    OverlapError,
    SingleImageClassError,
    UnreadableImagesError,
    assert_disjoint,
    check_trainable,
    list_images,
    load_images,
)
from graceful.training.folders import list_folder
from graceful.training.generation import Preprocessing
from graceful.training.images import UnreadableImageError, decode, encode_png, read_payloads
from graceful.training.manifest import DatasetNotFoundError, LabelledImages, read_manifest, write_manifest

RNG = np.random.default_rng(0)
PNGS = [encode_png(RNG.integers(0, 255, (9, 9), dtype=np.uint8)) for _ in range(12)]


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., str]:
    def write(
        name: str = "set", payloads: list[bytes | None] | None = None, column: str = "image", **columns: Any
    ) -> str:
        images = PNGS if payloads is None else payloads
        structs = pa.array([{"bytes": payload, "path": None} for payload in images], IMAGE_TYPE)
        defaults = {"label": ["ab"[i % 2] for i in range(len(images))], "drawer": list(range(len(images)))}
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({column: structs, **defaults, **columns}), path, row_group_size=5)
        return path

    return write


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_parquet_rows_become_sources_with_labels_hashes_and_attributes(write_parquet: Callable[..., str]) -> None:
    path = write_parquet()
    images = load_images(DatasetConfig(source="parquet", path=path, attributes=("drawer",)))
    assert images.sources == [f"{path}#{row}" for row in range(12)]
    assert images.labels.tolist() == ["a", "b"] * 6
    assert images.content_sha256 == [hashlib.sha256(payload).hexdigest() for payload in PNGS]
    assert images.attributes["drawer"].tolist() == [str(row) for row in range(12)]
    assert images.unreadable == []


def test_payloads_are_read_by_row_across_row_groups_and_files(
    write_parquet: Callable[..., str], tmp_path: Path
) -> None:
    first, second = write_parquet("first"), write_parquet("second", PNGS[::-1])
    (tmp_path / "one.png").write_bytes(PNGS[3])
    sources = [f"{second}#11", f"{first}#7", str(tmp_path / "one.png"), f"{first}#0", f"{first}#7"]
    assert read_payloads(sources) == [PNGS[0], PNGS[7], PNGS[3], PNGS[0], PNGS[7]]


def test_payload_failures_are_named_per_image(write_parquet: Callable[..., str], tmp_path: Path) -> None:
    path = write_parquet(payloads=[PNGS[0], None])
    sources = [f"{path}#0", f"{path}#1", f"{path}#2", str(tmp_path / "gone.png"), f"{tmp_path}/gone.parquet#0"]
    failures: dict[int, str] = {}
    assert read_payloads(sources, failures) == [PNGS[0], b"", b"", b"", b""]
    assert sorted(failures) == [1, 2, 3, 4]
    assert failures[2] == "cannot be read: the file has 2 rows"
    with pytest.raises(UnreadableImageError, match="found 4 that are not"):
        read_payloads(sources)


def test_a_rewritten_file_is_not_read_from_the_cache(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(payloads=PNGS[:2])
    assert read_payloads([f"{path}#0"]) == [PNGS[0]]
    write_parquet(payloads=[PNGS[5], PNGS[5], PNGS[5]])
    assert read_payloads([f"{path}#0"]) == [PNGS[5]]


def test_where_takes_values_and_ranges_and_labels_join_columns(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(alphabet=["x"] * 6 + ["y"] * 6)
    config = DatasetConfig.model_validate(
        {
            "source": "parquet",
            "path": path,
            "label_columns": ["alphabet", "label"],
            "where": {"label": ["a"], "drawer": {"min": 2, "max": 8}},
        }
    )
    images = load_images(config)
    assert images.labels.tolist() == ["x/a", "x/a", "y/a", "y/a"]
    assert images.sources == [f"{path}#{row}" for row in (2, 4, 6, 8)]


def test_other_image_column_is_named_in_the_source(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(column="photo", thumbnail=[b"x"] * 12)
    config = DatasetConfig(source="parquet", path=path, image_column="photo")
    images = load_images(config)
    assert images.sources[3] == f"{path}#3@photo"
    assert read_payloads(images.sources[3:4]) == [PNGS[3]]
    with pytest.raises(ValueError, match="expected one image column"):
        load_images(config.model_copy(update={"image_column": None}))


def test_split_sides_are_disjoint_complete_and_stable_when_other_labels_come(write_parquet: Callable[..., str]) -> None:
    path = write_parquet()
    sides = {}
    for part in ("kept", "held_out"):
        config = DatasetConfig.model_validate(
            {"source": "parquet", "path": path, "split": {"count": 2, "part": part, "seed": 5}}
        )
        sides[part] = load_images(config)
    assert sorted(sides["kept"].sources + sides["held_out"].sources) == sorted(f"{path}#{row}" for row in range(12))
    assert np.unique(sides["held_out"].labels, return_counts=True)[1].tolist() == [2, 2]
    only_a = load_images(
        DatasetConfig(
            source="parquet", path=path, where={"label": ("a",)}, split=HoldOut(count=2, part="held_out", seed=5)
        )
    )
    assert set(only_a.sources) < set(sides["held_out"].sources)


SHARE = 0.4


def by_content(path: str, part: str, source: str = "parquet", **changes: Any) -> DatasetConfig:
    return DatasetConfig.model_validate(
        {"source": source, "path": path, "split": {"share": SHARE, "by": "content", "part": part}, **changes}
    )


def test_image_is_held_out_by_its_content_alone(write_parquet: Callable[..., str]) -> None:
    path = write_parquet()
    held_out, kept = (load_images(by_content(path, part)) for part in ("held_out", "kept"))
    below = {hashlib.sha256(png).hexdigest() for png in PNGS if _fraction(png) < SHARE}
    assert set(held_out.content_sha256) == below
    assert 0 < len(held_out) < 12
    assert sorted(held_out.sources + kept.sources) == sorted(f"{path}#{row}" for row in range(12))


def _fraction(payload: bytes) -> float:
    return int(hashlib.sha256(payload).hexdigest()[:8], 16) / 2**32


def test_no_image_changes_sides_when_data_grow_and_copies_share_a_side(write_parquet: Callable[..., str]) -> None:
    first = write_parquet("first", PNGS[:6])
    grown = write_parquet("grown", [*PNGS[6:], *PNGS[:6], *PNGS[:6]], label=["abc"[i % 3] for i in range(18)])
    before = {part: set(load_images(by_content(first, part)).content_sha256) for part in ("held_out", "kept")}
    after = {part: set(load_images(by_content(grown, part)).content_sha256) for part in ("held_out", "kept")}
    assert before["held_out"] <= after["held_out"]
    assert before["kept"] <= after["kept"]
    assert not after["held_out"] & after["kept"]


def test_broken_image_of_the_other_side_is_not_counted(write_parquet: Callable[..., str]) -> None:
    assert _fraction(b"") > SHARE  # an unreadable row without bytes is kept
    path = write_parquet(payloads=[*PNGS[:11], b""])
    assert load_images(by_content(path, "held_out", max_unreadable_share=0)).unreadable == []
    with pytest.raises(UnreadableImagesError, match="#11: empty"):
        load_images(by_content(path, "kept", max_unreadable_share=0))


def test_attributes_labels_and_hashes_stay_aligned_after_a_split_by_content(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(payloads=[b"broken", *PNGS[1:]])
    for part in ("held_out", "kept"):
        images = load_images(by_content(path, part, attributes=("drawer",), max_unreadable_share=1.0))
        rows = [int(source.partition("#")[2]) for source in images.sources]
        assert images.attributes["drawer"].tolist() == [str(row) for row in rows]
        assert images.labels.tolist() == ["ab"[row % 2] for row in rows]
        assert images.content_sha256 == [hashlib.sha256(PNGS[row]).hexdigest() for row in rows]
        assert 0 not in rows


@pytest.mark.parametrize(
    "split",
    [{"share": 0.2}, {"by": "content", "count": 2}, {}, {"by": "content", "share": 0.2, "count": 1}, {"count": 2,
     "share": 0.1}, {"by": "content", "share": 1.0}],
)  # fmt: skip
def test_split_that_is_neither_form_is_refused(split: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"split: expected (share|count) and no|less than 1"):
        HoldOut.model_validate({"part": "kept", **split})


def test_labels_with_too_few_readable_images_are_left_out(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(payloads=[*PNGS[:11], b""], label=["a"] * 9 + ["once", "b", "b"])
    config = DatasetConfig(source="parquet", path=path, min_per_label=2, max_unreadable_share=0.5)
    assert set(load_images(config).labels.tolist()) == {"a"}
    with pytest.raises(EmptyDatasetError, match="min_per_label = 30"):
        load_images(config.model_copy(update={"min_per_label": 30}))


def test_listing_reads_no_image(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(payloads=[b""] * 12)
    sources, labels = list_images(DatasetConfig(source="parquet", path=path, split=HoldOut(count=4, part="kept")))
    assert (len(sources), sorted(labels.tolist())) == (4, ["a", "a", "b", "b"])


def test_split_larger_than_every_label_says_so(write_parquet: Callable[..., str]) -> None:
    with pytest.raises(EmptyDatasetError, match="split holds out 6 images of each label: lower its count"):
        load_images(DatasetConfig(source="parquet", path=write_parquet(), split=HoldOut(count=6, part="kept")))


def test_max_per_label_draws_by_seed(write_parquet: Callable[..., str]) -> None:
    path = write_parquet()
    draws = [load_images(DatasetConfig(source="parquet", path=path, max_per_label=3, seed=seed)) for seed in (0, 0, 1)]
    assert [len(draw) for draw in draws] == [6, 6, 6]
    assert draws[0].sources == draws[1].sources != draws[2].sources


def test_folder_labels_are_the_subfolders(tmp_path: Path) -> None:
    for name in ("cats/tabby/1.png", "cats/tabby/2.png", "dogs/1.PNG", "dogs/notes.txt", "loose.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(PNGS[0])
    images = load_images(DatasetConfig(source="folder", path=str(tmp_path / "set")))
    assert images.labels.tolist() == ["cats/tabby", "cats/tabby", "dogs"]
    assert images.sources[2] == str(tmp_path / "set" / "dogs" / "1.PNG")
    assert read_payloads(images.sources) == [PNGS[0]] * 3


def test_linked_folder_brings_no_image_twice(tmp_path: Path) -> None:
    for name in ("set/cats/1.png", "set/dogs/1.png", "elsewhere/birds/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNGS[0])
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set" / "cats")
    (tmp_path / "set" / "loop").symlink_to(tmp_path)
    (tmp_path / "set" / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "outside2").symlink_to(tmp_path / "elsewhere" / "birds")
    (tmp_path / "set" / "nothing").symlink_to(tmp_path / "gone")
    images = load_images(DatasetConfig(source="folder", path=str(tmp_path / "set")))
    assert images.labels.tolist() == ["cats", "dogs", "outside/birds"]
    left_out = list_folder(str(tmp_path / "set")).links_left_out
    assert [Path(link).name for link in left_out] == ["again", "loop", "outside2"]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/._1.png", ".thumbnails/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNGS[0])
    assert load_images(DatasetConfig(source="folder", path=str(tmp_path))).sources == [str(tmp_path / "cats/1.png")]


def test_empty_folder_and_loose_images_say_what_is_a_label(tmp_path: Path) -> None:
    (tmp_path / "loose.png").write_bytes(PNGS[0])
    with pytest.raises(EmptyDatasetError, match="the sub-folders of an image folder are the labels"):
        load_images(DatasetConfig(source="folder", path=str(tmp_path)))


def test_csv_names_images_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"no, {number}.png").write_bytes(PNGS[number])
    (tmp_path / "labels.csv").write_text(
        '\ufefffile,label,year\n"pictures/no, 0.png",cat,1999\n"pictures/no, 1.png",dög,2000\n'
        f'"{tmp_path}/pictures/no, 2.png",dög,2000\n'
    )
    config = DatasetConfig(source="csv", path=str(tmp_path / "labels.csv"), attributes=("year",))
    images = load_images(config)
    assert images.labels.tolist() == ["cat", "dög", "dög"]
    assert images.attributes["year"].tolist() == ["1999", "2000", "2000"]
    assert read_payloads(images.sources) == PNGS[:3]
    (tmp_path / "labels.csv").write_text("name,label\nx.png,cat\n")
    with pytest.raises(ValueError, match=r"a column that names the image .*found \['name', 'label'\]"):
        load_images(config)
    (tmp_path / "labels.csv").write_text("file,kind\nx.png,cat\n")
    with pytest.raises(ValueError, match=r"expected the columns \['label', 'year'\]"):
        load_images(config)


@pytest.mark.parametrize(("name", "source"), [("set.csv", "csv"), ("set.parquet", "parquet")])
def test_file_that_is_not_what_it_is_called_says_so(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / name).write_bytes("file,label\nä,b".encode("utf-16"))
    config = DatasetConfig.model_validate({"source": source, "path": str(tmp_path / name)})
    with pytest.raises(UsageError, match=rf"loading images: expected (UTF-8|a Parquet file), found .*{name}\); "):
        load_images(config)


def test_parquet_folder_is_all_its_files(write_parquet: Callable[..., str], tmp_path: Path) -> None:
    write_parquet("train-00001-of-00002")
    write_parquet("train-00000-of-00002")
    images = load_images(DatasetConfig(source="parquet", path=str(tmp_path)))
    assert [source.rpartition("/")[2] for source in images.sources[11:13]] == [
        "train-00000-of-00002.parquet#11",
        "train-00001-of-00002.parquet#0",
    ]


def test_digits_are_written_once_and_read_like_any_set(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "digits.parquet"
    config = DatasetConfig(source="digits", path=str(path), where={"label": ("3", "8")})
    images = load_images(config)
    written = path.stat().st_mtime_ns
    assert len(images) == 357
    assert load_images(config).content_sha256 == images.content_sha256
    assert path.stat().st_mtime_ns == written


# Bad input


@pytest.mark.parametrize("payload", [b"", b"not an image", PNGS[0][:-20], PNGS[0][:10], None])
def test_broken_image_is_left_out_and_listed(write_parquet: Callable[..., str], payload: bytes | None) -> None:
    path = write_parquet(payloads=[*PNGS[:5], payload, *PNGS[6:]])
    images = load_images(DatasetConfig(source="parquet", path=path, max_unreadable_share=0.1))
    assert len(images) == len(images.labels) == len(images.content_sha256) == 11
    assert [source for source, _ in images.unreadable] == [f"{path}#5"]
    assert images.unreadable[0][1]


def test_too_many_broken_images_are_refused_with_an_example(write_parquet: Callable[..., str]) -> None:
    path = write_parquet(payloads=[*PNGS[:10], b"", b"x"])
    with pytest.raises(UnreadableImagesError, match=r"found 2 of 12 \(first .*#10: empty; .*#11: cannot be decoded"):
        load_images(DatasetConfig(source="parquet", path=path, max_unreadable_share=0.1))


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_missing_place_is_named(tmp_path: Path, source: str) -> None:
    config = DatasetConfig.model_validate({"source": source, "path": str(tmp_path / "nowhere")})
    with pytest.raises(DatasetNotFoundError, match="nowhere"):
        load_images(config)


@pytest.mark.parametrize("field", ["label_columns", "attributes", "where", "image_column"])
def test_absent_column_is_answered_with_those_that_exist(write_parquet: Callable[..., str], field: str) -> None:
    value: Any = {"where": {"colour": ["red"]}, "image_column": "colour"}.get(field, ["colour"])
    config = DatasetConfig.model_validate({"source": "parquet", "path": write_parquet(), field: value})
    with pytest.raises(ValueError, match=r"expected the columns \['colour'\], found \['image', 'label', 'drawer'\]"):
        load_images(config)


def test_nothing_left_after_filtering_is_an_error(write_parquet: Callable[..., str]) -> None:
    with pytest.raises(EmptyDatasetError, match="12 rows"):
        load_images(DatasetConfig(source="parquet", path=write_parquet(), where={"label": ("z",)}))


def test_row_without_label_is_refused(write_parquet: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="found 1 without"):
        load_images(DatasetConfig(source="parquet", path=write_parquet(label=["a"] * 11 + [None])))


def test_class_with_one_image_is_refused(write_parquet: Callable[..., str]) -> None:
    images = load_images(DatasetConfig(source="parquet", path=write_parquet(label=["a"] * 6 + ["b"] * 5 + ["lonely"])))
    with pytest.raises(SingleImageClassError, match="lonely"):
        check_trainable(images)
    check_trainable(images.take(images.labels != "lonely"))
    with pytest.raises(EmptyDatasetError, match="at least 2 classes"):
        check_trainable(images.take(images.labels == "a"))


def test_unknown_key_and_misplaced_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="colour"):
        DatasetConfig.model_validate({"source": "digits", "path": "x", "colour": 1})
    with pytest.raises(ValidationError, match="torchvision_name"):
        DatasetConfig.model_validate({"source": "torchvision", "path": "x"})


# Growth, overlap, manifests, pixels


def images_named(labels: list[str], digests: list[str]) -> LabelledImages:
    return LabelledImages([f"/{digest}.png" for digest in digests], np.array(labels, dtype=np.str_), digests)


def test_test_identities_and_images_in_the_training_set_are_found() -> None:
    train = images_named(["a", "b"], ["1", "2"])
    assert_disjoint(train, images_named(["c"], ["3"]), by="identity")
    assert_disjoint(train, images_named(["a"], ["3"]), by="image")
    with pytest.raises(OverlapError, match=r"found 1 \(such as b\)"):
        assert_disjoint(train, images_named(["b", "c"], ["3", "4"]), by="identity")
    with pytest.raises(OverlapError, match=r"/2.png = /2.png"):
        assert_disjoint(train, images_named(["c"], ["2"]), by="image")


def test_manifest_survives_the_disk_and_an_unknown_format_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "deep" / "manifest.parquet")
    images = images_named(["a", "b"], ["1", "2"])
    write_manifest(place, images)
    loaded = read_manifest(place)
    assert (loaded.sources, loaded.content_sha256) == (images.sources, images.content_sha256)
    assert loaded.labels.tolist() == ["a", "b"]
    pq.write_table(pq.read_table(place).replace_schema_metadata({"format_version": "9"}), place)
    with pytest.raises(UnknownFormatError, match="found 9"):
        read_manifest(place)
    with pytest.raises(DatasetNotFoundError, match="gone"):
        read_manifest(str(tmp_path / "gone.parquet"))


def test_decoding_converts_resizes_and_refuses_broken_bytes() -> None:
    colour = encode_png(RNG.integers(0, 255, (20, 10, 3), dtype=np.uint8))
    grey = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
    rgb = Preprocessing(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert decode(colour, grey).shape == (1, 8, 8)
    assert decode(PNGS[0], rgb).shape == (3, 16, 16)
    with pytest.raises(UnreadableImageError, match="empty"):
        decode(b"", grey)


@pytest.mark.parametrize(
    "error",
    [DatasetNotFoundError, EmptyDatasetError, OverlapError, SingleImageClassError, UnreadableImagesError],
)
def test_errors_survive_pickling(error: type[Exception]) -> None:
    assert str(pickle.loads(pickle.dumps(error("what: why")))) == "what: why"
