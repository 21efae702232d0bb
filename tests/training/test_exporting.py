"""An exported encoder gives the vectors of the encoder, says what it costs, and is refused where it cannot."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from graceful.training import exporting
from graceful.training.backbones import build_backbone
from graceful.training.encoder import embed, open_network, save_generation
from graceful.training.exporting import MIN_COSINE, ExportError, export_encoder, multiply_adds, steps_outside
from graceful.training.generation import BackboneSpec, Preprocessing, VariantOf

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
FORMATS = ["torch", pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="pip install 'graceful[onnx]'"))]
LOOK = Preprocessing(image_size=16, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize="shorter_side")


def stored(folder, spec: BackboneSpec, look: Preprocessing = LOOK, width: int = 12) -> str:
    torch.manual_seed(0)
    network = build_backbone(spec, width, look.channels, look.image_size, offer_width=False)
    with torch.no_grad():  # statistics of real images, not those of a network that has seen none
        network.train()(torch.randn(64, look.channels, look.image_size, look.image_size))
    return save_generation(
        str(folder), network.eval(), ordinal=2, backbone=spec, preprocessing=look, width=width,
        variant=VariantOf(name="edge", of="g002-aaaaaa"),
    )[0]  # fmt: skip


def other_runtime(file, output_format):
    """Run a file as somebody does who has nothing of this package."""
    if output_format == "torch":
        module = torch.export.load(file).module()
        return lambda pixels: module(torch.from_numpy(pixels)).detach().numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("name", ["small_cnn"])
def test_the_file_gives_the_vectors_of_the_encoder_for_any_number_of_images(tmp_path, name, output_format):
    look = LOOK if name == "small_cnn" else LOOK.model_copy(update={"image_size": 32})
    uri = stored(tmp_path, BackboneSpec(name=name), look)
    report = export_encoder(uri, str(tmp_path / "model"), output_format)
    card, network = open_network(uri, torch.device("cpu"))
    run = other_runtime(str(tmp_path / "model"), output_format)
    rng = np.random.default_rng(0)
    for number in (1, 2, 7):
        pixels = rng.integers(0, 256, (number, 3, look.image_size, look.image_size), np.uint8)
        expected = embed(network, torch.from_numpy(pixels), card.preprocessing, torch.device("cpu"), None).numpy()
        found = run(pixels)
        assert found.shape == (number, 12)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
        assert (found * expected).sum(axis=1).min() >= MIN_COSINE
    assert report.min_cosine >= MIN_COSINE
    assert report.size_bytes == (tmp_path / "model").stat().st_size
    assert report.latency_ms > 0
    assert report.generation == card.generation_id


@pytest.mark.skipif(not HAS_ONNX, reason="pip install 'graceful[onnx]'")
def test_a_file_of_8_bit_weights_is_a_quarter_of_the_size_and_says_how_far_its_vectors_agree(tmp_path, capfd):
    uri = stored(tmp_path, BackboneSpec(name="small_cnn"))
    exact = export_encoder(uri, str(tmp_path / "exact"), "onnx")
    report = export_encoder(uri, str(tmp_path / "model"), "onnx-int8")
    assert report.size_bytes < 0.3 * exact.size_bytes
    assert 0.99 < report.min_cosine < exact.min_cosine
    assert not (tmp_path / "model.float32").exists()
    assert capfd.readouterr().err == ""
    card, network = open_network(uri, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    expected = embed(network, torch.from_numpy(pixels), card.preprocessing, torch.device("cpu"), None).numpy()
    found = other_runtime(str(tmp_path / "model"), "onnx")(pixels)
    assert 0.99 < float((found * expected).sum()) < 1 - 1e-7


def test_multiply_adds_are_those_counted_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 3, 3, padding=1, bias=False)
            self.head = nn.Linear(3 * 8 * 8, 5, bias=False)

        def forward(self, images):
            return self.head(self.convolution(images).flatten(1))

    look = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
    assert multiply_adds(Two(), look) == 8 * 8 * 3 * 3 * 3 + 3 * 8 * 8 * 5


class Branching(nn.Module):
    """What it does depends on what it sees: no graph of it can be written."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 12)

    def forward(self, images):
        means = images.mean(dim=(2, 3))
        return self.head(means) if float(means.sum()) > 0 else self.head(-means)


class Bessel(Branching):
    """Its operator is one of torch's and none of ONNX's."""

    def forward(self, images):
        return self.head(torch.special.bessel_j1(images.mean(dim=(2, 3))))


@pytest.fixture
def factory(monkeypatch):
    """Make a class of this file a network that a card can name."""
    module = type(sys)("exported_networks")
    module.branching, module.bessel = Branching, Bessel
    monkeypatch.setitem(sys.modules, "exported_networks", module)
    return lambda name: BackboneSpec(name=f"exported_networks:{name}")


def test_a_network_that_is_no_graph_is_refused_with_the_reason_and_another_way(tmp_path, factory):
    uri = stored(tmp_path, factory("branching"))
    with pytest.raises(ExportError) as refused:
        export_encoder(uri, str(tmp_path / "model"), "torch")
    assert "exported_networks:branching" in str(refused.value)
    assert "export another backbone" in str(refused.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(not HAS_ONNX, reason="pip install 'graceful[onnx]'")
def test_an_operator_that_onnx_lacks_is_named_and_the_other_format_takes_it(tmp_path, factory):
    uri = stored(tmp_path, factory("bessel"))
    with pytest.raises(ExportError, match=r"bessel_j1.*take --format torch"):
        export_encoder(uri, str(tmp_path / "model"), "onnx")
    assert not (tmp_path / "model").exists()
    assert export_encoder(uri, str(tmp_path / "model"), "torch").min_cosine >= MIN_COSINE


def test_a_missing_runtime_is_named(tmp_path, monkeypatch):
    uri = stored(tmp_path, BackboneSpec(name="small_cnn"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"graceful\[onnx\]"):
        export_encoder(uri, str(tmp_path / "model"), "onnx")


def test_a_file_that_gives_other_vectors_is_not_kept(tmp_path, monkeypatch):
    uri = stored(tmp_path, BackboneSpec(name="small_cnn"))

    class Wrong(exporting.PixelsToVectors):
        def forward(self, pixels):
            return super().forward(255 - pixels)

    monkeypatch.setattr(exporting, "PixelsToVectors", Wrong)
    with pytest.raises(ExportError, match="expected the vectors of the encoder"):
        export_encoder(uri, str(tmp_path / "model"), "torch")
    assert not (tmp_path / "model").exists()


def test_what_must_be_done_before_the_graph_is_said_in_order():
    look = LOOK.model_copy(update={"resize_size": 20, "background": 0})
    assert steps_outside(look) == (
        "decode to 8 bits per channel",
        "turn upright by the EXIF orientation",
        "put transparent pixels on grey 0",
        "convert to RGB",
        "resize the shorter side to 20, the shape kept (bilinear, antialiased as Pillow does)",
        "cut the middle 16 x 16 out, padded with [0, 0, 0]",
        "bytes as (3, 16, 16), channels first",
    )
    plain = look.model_copy(update={"decoding": "plain", "resize": "squash", "resize_size": None})
    assert steps_outside(plain)[1:3] == ("convert to RGB", "resize to 16 x 16 (bilinear, antialiased as Pillow does)")
