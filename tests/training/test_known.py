"""What is known of images: an unchanged one is not read again, a changed one always is, and a lost index only costs."""

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graceful.files import list_files
from graceful.training import known as known_module
from graceful.training.datasets import DatasetConfig, HoldOut, load_images
from graceful.training.images import encode_png
from graceful.training.known import KnownImages, examine

RNG = np.random.default_rng(3)
PNGS = [encode_png(RNG.integers(0, 255, (9, 9), dtype=np.uint8)) for _ in range(20)]


def everything(digest: str) -> bool:
    return True


def age(path: Path, seconds: float = 60.0) -> None:
    """Make a file look as if it had been written a while ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, payload in enumerate(PNGS):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload if index != 7 else payload[:40])
        age(path)
    return tmp_path / "photos"


@pytest.fixture
def known(tmp_path: Path) -> KnownImages:
    return KnownImages(str(tmp_path / "known"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources whose bytes were read, and those that were decoded as "decoded"."""
    seen: list[str] = []
    read, check = known_module.read_payloads, known_module.unreadable_reason
    monkeypatch.setattr(known_module, "read_payloads", lambda some, notes: [seen.extend(some), read(some, notes)][1])
    monkeypatch.setattr(known_module, "unreadable_reason", lambda data: [seen.append("decoded"), check(data)][1])
    return seen


def config_of(folder: Path, **changes: object) -> DatasetConfig:
    return DatasetConfig.model_validate(
        {"source": "folder", "path": str(folder), "max_unreadable_share": 0.5, **changes}
    )


def test_an_unchanged_set_is_not_read_and_loads_as_without_an_index(
    folder: Path, known: KnownImages, reads: list[str]
) -> None:
    plain = load_images(config_of(folder))
    load_images(config_of(folder), known)
    reads.clear()
    again = load_images(config_of(folder), known)
    assert reads == []
    assert (again.sources, again.content_sha256) == (plain.sources, plain.content_sha256)
    assert again.unreadable == plain.unreadable
    assert len(again.unreadable) == 1


def test_a_file_changed_in_place_is_noticed_by_its_time_alone_and_by_its_size_alone(
    folder: Path, known: KnownImages, reads: list[str]
) -> None:
    load_images(config_of(folder), known)
    first, second = folder / "a" / "00.png", folder / "a" / "02.png"
    swapped = bytearray(first.read_bytes())
    swapped[-1] ^= 1
    first.write_bytes(swapped)  # same size
    age(first, 30)
    stamp = second.stat()
    second.write_bytes(second.read_bytes() + b"more")
    os.utime(second, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same time
    reads.clear()
    found = load_images(config_of(folder), known)
    assert sorted(reads) == sorted([str(first), str(second), "decoded", "decoded"])
    assert found.content_sha256 == load_images(config_of(folder)).content_sha256


def test_only_new_images_are_read_and_known_content_under_a_new_name_is_not_decoded(
    folder: Path, known: KnownImages, reads: list[str]
) -> None:
    load_images(config_of(folder), known)
    (folder / "b" / "copy.png").write_bytes(PNGS[0])
    (folder / "b" / "new.png").write_bytes(encode_png(np.zeros((5, 5), np.uint8)))
    reads.clear()
    load_images(config_of(folder), known)
    assert sorted(reads) == sorted([str(folder / "b" / "copy.png"), "decoded", str(folder / "b" / "new.png")])


def test_a_file_written_just_now_is_hashed_again_until_its_time_can_be_trusted(
    folder: Path, known: KnownImages, reads: list[str]
) -> None:
    young = folder / "a" / "00.png"
    young.write_bytes(PNGS[0])
    load_images(config_of(folder), known)
    reads.clear()
    load_images(config_of(folder), known)
    assert str(young) in reads
    age(young)
    load_images(config_of(folder), known)
    reads.clear()
    load_images(config_of(folder), known)
    assert reads == []


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped", "foreign", "other_decoder"])
def test_a_damaged_index_is_made_again(
    damage: str, folder: Path, known: KnownImages, reads: list[str], tmp_path: Path
) -> None:
    plain = load_images(config_of(folder), known)
    (place,) = (Path(location) for location in list_files(str(tmp_path / "known")))
    content = place.read_bytes()
    if damage == "lost":
        place.unlink()
    elif damage == "cut":
        place.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = content.index(plain.content_sha256[3].encode())
        place.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), place)
    else:
        pq.write_table(pq.read_table(place).replace_schema_metadata({"decoder": "an earlier one"}), place)
    reads.clear()
    again = load_images(config_of(folder), known)
    assert len(reads) == 2 * len(PNGS)
    assert again.content_sha256 == plain.content_sha256
    reads.clear()
    load_images(config_of(folder), known)
    assert reads == []


def test_the_other_side_of_a_split_is_decoded_when_it_is_asked_for(
    folder: Path, known: KnownImages, reads: list[str]
) -> None:
    sides = [HoldOut(part=part, by="content", share=0.5) for part in ("kept", "held_out")]
    kept = load_images(config_of(folder, split=sides[0]), known)
    reads.clear()
    held_out = load_images(config_of(folder, split=sides[1]), known)
    assert reads.count("decoded") == len(PNGS) - len(kept) - len(kept.unreadable)
    assert held_out.content_sha256 == load_images(config_of(folder, split=sides[1])).content_sha256
    reads.clear()
    assert load_images(config_of(folder, split=sides[0]), known).sources == kept.sources
    assert reads == []


def test_rows_whose_bytes_lie_beside_the_parquet_file_are_read_each_time(tmp_path: Path, known: KnownImages) -> None:
    beside, table = tmp_path / "x.png", tmp_path / "set.parquet"
    beside.write_bytes(PNGS[0])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": PNGS[1], "path": None}, {"bytes": None, "path": "x.png"}], kind)
    pq.write_table(pa.table({"image": rows}), table)
    age(table)
    sources = [f"{table}#0", f"{table}#1"]
    before = examine(sources, everything, known)
    beside.write_bytes(PNGS[2])
    after = examine(sources, everything, known)
    assert before.digests[0] == after.digests[0]
    assert before.digests[1] != after.digests[1]


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path, known: KnownImages) -> None:
    path = tmp_path / "late.png"
    assert examine([str(path)], everything, known).reasons
    path.write_bytes(PNGS[0])
    age(path)
    assert not examine([str(path)], everything, known).reasons


def test_many_threads_find_what_one_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_module, "_BLOCK", 3)
    sources = sorted(str(path) for path in folder.rglob("*.png"))
    one, four = (examine(sources, everything, threads=count) for count in (1, 4))
    assert one == four
    assert one.num_decoded == len(PNGS)
    assert len(one.reasons) == 1


def test_many_files_of_the_index_are_merged_into_the_newest(folder: Path, known: KnownImages, tmp_path: Path) -> None:
    path = folder / "a" / "00.png"
    for round_number in range(known_module._MOST_FILES + 3):
        path.write_bytes(PNGS[round_number % len(PNGS)])
        age(path, 1000 - round_number)
        found = examine([str(path)], everything, known)
    assert len(list_files(str(tmp_path / "known"))) <= known_module._MOST_FILES
    assert examine([str(path)], everything, known) == known_module.Findings(found.digests)


def test_an_index_that_does_not_grow_is_left_as_it_is(folder: Path, tmp_path: Path, reads: list[str]) -> None:
    load_images(config_of(folder), KnownImages(str(tmp_path / "known"), grows=False))
    assert not (tmp_path / "known").exists()
    load_images(config_of(folder), KnownImages(str(tmp_path / "known")))
    reads.clear()
    load_images(config_of(folder), KnownImages(str(tmp_path / "known"), grows=False))
    assert reads == []
