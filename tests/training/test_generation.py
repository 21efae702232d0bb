"""Cards: ids, round trips, refusal of what is unknown or inconsistent."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from graceful.errors import UnknownFormatError
from graceful.files import join, resolve
from graceful.training.generation import (
    BackboneSpec,
    GenerationCard,
    GenerationNotFoundError,
    Preprocessing,
    make_generation_id,
    ordinal_of,
    read_card,
    write_card,
)

DIGEST = "9f2c1a" + "0" * 58
# Written by the version before `decoding` and `background` existed.
EARLIER_CARD = """{
  "format_version": 1,
  "generation_id": "g003-9f2c1a",
  "ordinal": 3,
  "origin": "trained",
  "parent": "g002-aaaaaa",
  "predecessors": ["g001-bbbbbb", "g002-aaaaaa"],
  "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [8, 16]}},
  "preprocessing": {"image_size": 8, "channels": 1, "mean": [0.3], "std": [0.37]},
  "preprocessing_fingerprint": "9f059c8fa12b5647",
  "width": 16,
  "prefix_widths": [],
  "classes": ["a", "b"],
  "digest": "9f2c1a0000000000000000000000000000000000000000000000000000000000",
  "has_classifier": true,
  "classifier_digest": null,
  "normalized": true,
  "calibrated_images": 40,
  "training": {"epochs": 2}
}
"""


def make_card(preprocessing: Preprocessing) -> GenerationCard:
    return GenerationCard(
        generation_id=make_generation_id(3, DIGEST),
        ordinal=3,
        origin="trained",
        parent="g002-aaaaaa",
        predecessors=("g001-bbbbbb", "g002-aaaaaa"),
        backbone=BackboneSpec(name="small_cnn", kwargs={"block_widths": [8, 16]}),
        preprocessing=preprocessing,
        preprocessing_fingerprint=preprocessing.fingerprint(),
        width=16,
        classes=("a", "b"),
        digest=DIGEST,
        has_classifier=True,
        calibrated_images=40,
        training={"epochs": 2},
    )


@pytest.mark.parametrize("as_uri", [False, True])
def test_card_survives_the_disk(tmp_path: Path, preprocessing: Preprocessing, as_uri: bool) -> None:
    place = (tmp_path / "generation").as_uri() if as_uri else str(tmp_path / "generation")
    card = make_card(preprocessing)
    write_card(place, card)
    assert read_card(place) == card
    assert [path.name for path in (tmp_path / "generation").iterdir()] == ["card.json"]


def test_ids_order_by_ordinal_not_by_text() -> None:
    ordered = ["g002-bbbbbb", "g010-cccccc", "g1000-aaaaaa"]
    shuffled = ordered[::-1]
    assert sorted(shuffled, key=ordinal_of) == ordered
    assert ordinal_of("g1000-aaaaaa") == 1000
    with pytest.raises(ValueError, match="found 'model-3'"):
        ordinal_of("model-3")


def test_folder_without_card_is_no_generation(tmp_path: Path) -> None:
    with pytest.raises(GenerationNotFoundError, match="found none"):
        read_card(str(tmp_path))


def test_unknown_format_version_is_refused(tmp_path: Path, preprocessing: Preprocessing) -> None:
    write_card(str(tmp_path), make_card(preprocessing))
    record = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**record, "format_version": 99}))
    with pytest.raises(UnknownFormatError, match="expected card format 1, found 99"):
        read_card(str(tmp_path))


@pytest.mark.parametrize("change", [{"ordinal": 4}, {"digest": "0" * 64}, {"preprocessing_fingerprint": "x"}])
def test_card_that_contradicts_itself_is_refused(
    tmp_path: Path, preprocessing: Preprocessing, change: dict[str, object]
) -> None:
    record = make_card(preprocessing).model_dump(mode="json")
    with pytest.raises(ValidationError, match="expected"):
        GenerationCard.model_validate({**record, **change})


CHANGES = (
    {"image_size": 9},
    {"mean": (0.31,)},
    {"std": (0.4,)},
    {"decoding": "plain"},
    {"background": 0},
    {"resize": "shorter_side"},
    {"resize": "fit"},
    {"resize_size": 10},
    {"interpolation": "bicubic"},
    {"padding_color": (7,)},
    {"jpeg": "full"},
)


def test_fingerprint_changes_with_every_value(preprocessing: Preprocessing) -> None:
    prints = {preprocessing.model_copy(update=change).fingerprint() for change in CHANGES}
    assert len(prints | {preprocessing.fingerprint()}) == len(CHANGES) + 1
    # What a plain decoding pads with is a part of what it means.
    padded = [Preprocessing(**EARLIER, decoding="plain", resize="fit", background=level) for level in (0, 255)]
    assert padded[0].fingerprint() != padded[1].fingerprint()


EARLIER = {"image_size": 8, "channels": 1, "mean": (0.3,), "std": (0.37,)}
IMAGENET = {"image_size": 224, "channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    ("values", "digest"),
    [
        (EARLIER, "036b5fb85bf685c3"),
        (EARLIER | {"decoding": "plain"}, "9f059c8fa12b5647"),
        (EARLIER | {"decoding": "plain", "background": 3}, "9f059c8fa12b5647"),
        (IMAGENET | {"background": 0}, "9c034e0663630456"),
    ],
)
def test_what_was_written_before_there_was_another_resizing_keeps_its_digest(
    values: dict[str, object], digest: str
) -> None:
    """Digests as the version before `resize` gave them; a recipe, a card and a weights file carry the same record."""
    found = Preprocessing.model_validate(values)
    assert found.fingerprint() == digest
    assert found.model_dump() == {"decoding": "photo", "background": 255} | values
    assert (found.resize, found.interpolation, found.jpeg, found.resized) == (
        "squash", "bilinear", "reduced", found.image_size
    )  # fmt: skip


def test_card_keeps_every_value_of_a_preprocessing(tmp_path: Path, preprocessing: Preprocessing) -> None:
    for change in CHANGES:
        card = make_card(Preprocessing(**{**preprocessing.model_dump(), **change}))
        write_card(str(tmp_path), card)
        assert read_card(str(tmp_path)) == card
        (key,) = change
        assert json.loads((tmp_path / "card.json").read_text())["preprocessing"][key] is not None


@pytest.mark.parametrize(("share", "size"), [(0.875, 256), (0.95, 235), (0.9, 248), (1.0, 224)])
def test_a_crop_share_is_kept_as_the_size_that_it_means(share: float, size: int) -> None:
    """The sizes are those of timm: floor(224 / crop_pct)."""
    given = Preprocessing(**IMAGENET, resize="shorter_side", crop_share=share)
    assert given.resized == size
    assert given == Preprocessing(**IMAGENET, resize="shorter_side", resize_size=size)
    assert given == Preprocessing.model_validate_json(given.model_dump_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_share": 0.9, "resize_size": 256}, "found both"),
        ({"crop_share": 1.1}, "less than or equal to 1"),
        ({"crop_share": 0}, "greater than 0"),
        ({"padding_color": (1, 2)}, "expected 3 whole numbers from 0 to 255 in padding_color"),
        ({"padding_color": (1, 2, 256)}, "expected 3 whole numbers from 0 to 255 in padding_color"),
        ({"resize": "crop"}, "'squash', 'shorter_side' or 'fit'"),
        ({"interpolation": "cubic"}, "'bilinear', 'bicubic', 'lanczos' or 'nearest'"),
        ({"resize_size": 3}, "greater than or equal to 4"),
    ],
)
def test_a_resizing_that_cannot_be_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Preprocessing(**{**IMAGENET, **change})


def test_earlier_card_keeps_its_fingerprint_and_decodes_as_it_always_did(
    tmp_path: Path, preprocessing: Preprocessing
) -> None:
    (tmp_path / "card.json").write_text(EARLIER_CARD)
    card = read_card(str(tmp_path))
    assert card.preprocessing.decoding == "plain"
    assert card.preprocessing_fingerprint == card.preprocessing.fingerprint() == "9f059c8fa12b5647"
    assert preprocessing.decoding == "photo"  # what a configuration that does not name it means
    assert preprocessing.fingerprint() != "9f059c8fa12b5647"
    write_card(str(tmp_path / "copy"), card)
    assert read_card(str(tmp_path / "copy")) == card
    assert GenerationCard.model_validate_json(EARLIER_CARD) == card


def test_card_of_today_says_how_it_decodes(tmp_path: Path, preprocessing: Preprocessing) -> None:
    for decoding in ("photo", "plain"):
        card = make_card(preprocessing.model_copy(update={"decoding": decoding, "background": 0}))
        write_card(str(tmp_path), card)
        assert json.loads((tmp_path / "card.json").read_text())["preprocessing"]["decoding"] == decoding
        assert read_card(str(tmp_path)) == card


def test_weights_are_taken_over_another_reading_of_the_image_and_over_no_other_shape_or_scale(
    preprocessing: Preprocessing,
) -> None:
    for change in ({}, *CHANGES):
        scale = not change.keys() & {"image_size", "mean", "std"}
        assert preprocessing.takes_weights_of(preprocessing.model_copy(update=change)) == scale


def test_preprocessing_needs_one_mean_per_channel() -> None:
    with pytest.raises(ValidationError, match="expected 3 values"):
        Preprocessing(image_size=8, channels=3, mean=(0.5,), std=(0.5, 0.5, 0.5))


def test_local_paths_become_absolute() -> None:
    assert resolve("somewhere")[1] == str(Path("somewhere").absolute())
    assert join("s3://bucket/root/", "g001-aaaaaa", "card.json") == "s3://bucket/root/g001-aaaaaa/card.json"


def test_a_text_tower_only_queries_and_a_card_of_images_says_nothing_of_it(preprocessing):
    values = make_card(preprocessing).model_dump()
    assert "takes" not in values
    with pytest.raises(ValidationError, match="expected the role query_only of a text tower, found full"):
        GenerationCard.model_validate({**values, "takes": "text"})
    variant = {"generation_id": make_generation_id(3, DIGEST, "words"), "role": "query_only", "of": "g003-aaaaaa"}
    card = GenerationCard.model_validate({**values, **variant, "takes": "text"})
    assert card.model_dump()["takes"] == "text"
