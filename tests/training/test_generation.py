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


def test_fingerprint_changes_with_every_value(preprocessing: Preprocessing) -> None:
    changed = [{"image_size": 9}, {"mean": (0.31,)}, {"std": (0.4,)}, {"decoding": "plain"}, {"background": 0}]
    prints = {preprocessing.model_copy(update=change).fingerprint() for change in changed}
    assert len(prints | {preprocessing.fingerprint()}) == 6


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


def test_weights_are_taken_over_another_decoding_and_over_no_other_change(preprocessing: Preprocessing) -> None:
    for change in ({"decoding": "plain"}, {"background": 0}, {}):
        assert preprocessing.takes_weights_of(preprocessing.model_copy(update=change))
    for change in ({"image_size": 9}, {"mean": (0.31,)}, {"std": (0.4,)}):
        assert not preprocessing.takes_weights_of(preprocessing.model_copy(update={**change, "decoding": "plain"}))


def test_preprocessing_needs_one_mean_per_channel() -> None:
    with pytest.raises(ValidationError, match="expected 3 values"):
        Preprocessing(image_size=8, channels=3, mean=(0.5,), std=(0.5, 0.5, 0.5))


def test_local_paths_become_absolute() -> None:
    assert resolve("somewhere")[1] == str(Path("somewhere").absolute())
    assert join("s3://bucket/root/", "g001-aaaaaa", "card.json") == "s3://bucket/root/g001-aaaaaa/card.json"
