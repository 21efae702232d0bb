"""Encoders: unit vectors, failures per image, verified weights, adopted networks, 16 bit."""

import functools
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from graceful.files import join
from graceful.training.backbones import build_backbone
from graceful.training.encoder import (
    CorruptedWeightsError,
    SourceEncoder,
    adopt,
    open_encoder,
    open_network,
    read_classifier,
    save_generation,
)
from graceful.training.encoder import normalise as network_input
from graceful.training.generation import BackboneSpec, Preprocessing, read_card
from graceful.training.images import decode, encode_png, read_payloads
from graceful.training.manifest import LabelledImages

SMALL = BackboneSpec(name="small_cnn", kwargs={"block_widths": [8, 16]})


@pytest.fixture(autouse=True)
def own_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


@pytest.fixture
def generation_uri(tmp_path: Path, preprocessing: Preprocessing) -> str:
    torch.manual_seed(0)
    network = build_backbone(SMALL, 12, 1, 8)
    uri, _ = save_generation(
        str(tmp_path / "generations"),
        network,
        ordinal=1,
        backbone=SMALL,
        preprocessing=preprocessing,
        width=12,
        classifier=(["a", "b"], 3 * torch.randn(2, 12), torch.randn(2, 12)),
    )
    return uri


def test_encoder_gives_the_networks_unit_vectors_in_order(generation_uri: str, digits: LabelledImages) -> None:
    card, network = open_network(generation_uri, torch.device("cpu"))
    sources = digits.sources[:70][::-1]
    pixels = np.stack([decode(payload, card.preprocessing) for payload in read_payloads(sources)])
    expected = normalize(network(network_input(torch.from_numpy(pixels), card.preprocessing)), dim=1).numpy()
    vectors, failures = open_encoder(generation_uri, batch_size=16, precision="float32")(sources)
    assert failures == {}
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_encoder_of_nothing_gives_an_empty_array(generation_uri: str) -> None:
    vectors, failures = open_encoder(generation_uri)([])
    assert vectors.shape == (0, 12)
    assert failures == {}


def test_factory_survives_pickling(generation_uri: str, digits: LabelledImages) -> None:
    factory = pickle.loads(pickle.dumps(functools.partial(open_encoder, generation_uri)))
    assert isinstance(factory(), SourceEncoder)
    assert factory()(digits.sources[:3])[0].shape == (3, 12)


def test_failed_images_are_reported_and_the_others_encoded(
    generation_uri: str, digits: LabelledImages, tmp_path: Path
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    sources = [digits.sources[0], str(tmp_path / "empty.png"), digits.sources[1], str(tmp_path / "gone.png")]
    vectors, failures = open_encoder(generation_uri, batch_size=2)(sources)
    assert sorted(failures) == [1, 3]
    assert failures[1] == "empty"
    assert "cannot be read" in failures[3]
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False, True]


def test_vectors_without_direction_are_failures(tmp_path: Path) -> None:
    preprocessing = Preprocessing(image_size=8, channels=1, mean=(0.3,), std=(0.37,))
    card = adopt("factories:breaks_on_bright", preprocessing=preprocessing, out_uri=str(tmp_path), ordinal=1)
    sources = []
    for name, level in (("dark", 0), ("grey", 90), ("bright", 255)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(np.full((8, 8), level, dtype=np.uint8)))
        sources.append(str(tmp_path / f"{name}.png"))
    vectors, failures = open_encoder(join(str(tmp_path), card.generation_id))(sources)
    assert failures == {0: "non-finite embedding", 2: "non-finite embedding"}
    assert np.isnan(vectors).all(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("file", ["weights.safetensors", "classifier.safetensors"])
def test_changed_or_missing_file_is_refused(generation_uri: str, file: str) -> None:
    place = Path(generation_uri) / file
    payload = bytearray(place.read_bytes())
    payload[-1] ^= 1
    place.write_bytes(bytes(payload))
    read = open_encoder if file.startswith("weights") else read_classifier
    with pytest.raises(CorruptedWeightsError, match="expected sha256"):
        read(generation_uri)
    place.unlink()
    with pytest.raises(CorruptedWeightsError, match="found none"):
        read(generation_uri)


def test_same_network_gives_the_same_id_and_another_ordinal_another(
    tmp_path: Path, preprocessing: Preprocessing
) -> None:
    network = build_backbone(SMALL, 12, 1, 8)
    ids = []
    for root, ordinal in (("x", 1), ("y", 1), ("y", 2)):
        _, card = save_generation(
            str(tmp_path / root), network, ordinal=ordinal, backbone=SMALL, preprocessing=preprocessing, width=12
        )
        ids.append(card.generation_id)
    assert ids[0] == ids[1]
    assert ids[2].replace("g002", "g001") == ids[0]


def test_stored_classifier_has_unit_rows(generation_uri: str) -> None:
    stored = read_classifier(generation_uri)
    assert stored is not None
    card, rows, means = stored
    assert card.classes == ("a", "b")
    for tensor in (rows, means):
        assert tensor.shape == (2, 12)
        assert torch.allclose(tensor.norm(dim=1), torch.ones(2))


def test_adopted_encoder_is_a_generation_without_classifier(
    tmp_path: Path, preprocessing: Preprocessing, digits: LabelledImages
) -> None:
    card = adopt(
        "factories:flat",
        kwargs={"features": 20},
        preprocessing=preprocessing,
        out_uri=str(tmp_path),
        ordinal=0,
        prefix_widths=(8,),
    )
    uri = join(str(tmp_path), card.generation_id)
    assert (card.origin, card.width, card.prefix_widths, card.has_classifier) == ("adopted", 20, (8,), False)
    assert read_card(uri) == card
    assert read_classifier(uri) is None
    assert open_encoder(uri)(digits.sources[:5])[0].shape == (5, 20)
    with pytest.raises(ValueError, match="expected an importable"):
        adopt("factories:absent", preprocessing=preprocessing, out_uri=str(tmp_path), ordinal=0)


def test_sixteen_bit_agrees_with_float32(generation_uri: str, digits: LabelledImages) -> None:
    exact, _ = open_encoder(generation_uri, precision="float32")(digits.sources[:64])
    fast, _ = open_encoder(generation_uri, precision="bfloat16")(digits.sources[:64])
    assert fast.dtype == np.float32
    assert float((exact * fast).sum(axis=1).min()) > 0.999


@pytest.mark.parametrize(
    ("spec", "channels", "size"),
    [
        (SMALL, 3, 8),
        (BackboneSpec(name="small_cnn"), 1, 64),
        (BackboneSpec(name="resnet18", kwargs={"small_stem": True}), 1, 16),
        (BackboneSpec(name="mobilenet_v3_small"), 3, 32),
    ],
)
def test_backbones_give_embeddings_of_the_wanted_width(spec: BackboneSpec, channels: int, size: int) -> None:
    network = build_backbone(spec, 24, channels, size).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 24)


def test_unknown_backbone_and_argument_are_refused() -> None:
    with pytest.raises(ValueError, match="resnet18"):
        build_backbone(BackboneSpec(name="resnet19"), 8, 3, 32)
    with pytest.raises(ValueError, match=r"found \['depth'\]"):
        build_backbone(BackboneSpec(name="small_cnn", kwargs={"depth": 3}), 8, 3, 32)
    with pytest.raises(ValueError, match="need a ResNet"):
        build_backbone(BackboneSpec(name="mobilenet_v3_small"), 8, 1, 32)
