"""Encoders of torchvision and timm: vectors as their own library gives them, from the picture on. Random weights."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from graceful.errors import UsageError
from graceful.files import join
from graceful.training.backbones import ProjectedBackbone, build_backbone, load_initial_weights
from graceful.training.encoder import adopt, open_encoder
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.images import decode
from graceful.training.libraries import library_encoder, own_preprocessing
from tests.training.test_preprocessing import picture

# Square and not, smaller and larger than the crop, and large enough for a JPEG to be read at a half or a quarter.
SIZES = ((224, 224), (64, 64), (500, 500), (640, 427), (333, 500), (1300, 1000), (90, 400))
MIN_COSINE = 0.9999


def pictures(folder: Path) -> list[str]:
    """The pictures as files, JPEG and PNG in turn."""
    sources = []
    for number, (width, height) in enumerate(SIZES):
        place = folder / f"{number}.{('jpg', 'png')[number % 2]}"
        picture(width, height).save(place, quality=92)
        sources.append(str(place))
    return sources


def centred(vectors: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of a random network all but agree; what differs between pictures is what is left of their mean."""
    rest = vectors - mean
    return rest / np.linalg.norm(rest, axis=1, keepdims=True)


def assert_same_vectors(ours: NDArray[np.float32], theirs: torch.Tensor) -> None:
    expected = nn.functional.normalize(theirs, dim=1).numpy()
    assert float((ours * expected).sum(axis=1).min()) >= MIN_COSINE
    mean = expected.mean(axis=0)
    assert float((centred(ours, mean) * centred(expected, mean)).sum(axis=1).min()) >= MIN_COSINE
    assert float((centred(expected, mean)[:-1] * centred(expected, mean)[1:]).sum(axis=1).max()) < 0.9, "all alike"


def adopted(name: str, weights: Path, folder: Path, sources: list[str], **kwargs: Any) -> NDArray[np.float32]:
    card = adopt(
        name,
        preprocessing=own_preprocessing(name),
        out_uri=str(folder),
        ordinal=1,
        weights=str(weights),
        kwargs=kwargs,
    )
    vectors, failures = open_encoder(join(str(folder), card.generation_id), precision="float32")(sources)
    assert failures == {}
    return vectors


def seen(sources: list[str], transform: Callable[[Image.Image], Any]) -> torch.Tensor:
    return torch.stack([transform(Image.open(source).convert("RGB")) for source in sources])


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "IMAGENET1K_V1"), ("mobilenet_v3_small", "IMAGENET1K_V1")])
def test_vectors_of_an_adopted_torchvision_network_are_those_of_torchvision(
    tmp_path: Path, name: str, weights: str
) -> None:
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")  # as torchvision's own files: classifier and all
    sources = pictures(tmp_path)
    ours = adopted(f"torchvision/{name}.{weights}", tmp_path / "whole.pth", tmp_path, sources)
    if name == "resnet18":
        whole.fc = nn.Identity()
    else:
        whole.classifier[3] = nn.Identity()
    transform = torchvision.models.get_model_weights(name)[weights].transforms()
    with torch.inference_mode():
        assert_same_vectors(ours, whole(seen(sources, transform)))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_vectors_of_an_adopted_timm_network_are_those_of_timm(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'graceful[timm]'")
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    sources = pictures(tmp_path)
    ours = adopted(f"timm/{name}", tmp_path / "whole.pth", tmp_path, sources)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(whole), is_training=False)
    with torch.inference_mode():
        theirs = whole.forward_head(whole.forward_features(seen(sources, transform)), pre_logits=True)
    assert_same_vectors(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "image_size"),
    [
        ({}, None),
        ({"crop_mode": "border"}, None),
        ({"crop_mode": "squash", "crop_pct": 0.9}, None),
        ({"crop_mode": "border", "crop_pct": 0.8, "interpolation": "lanczos"}, None),
        ({"crop_pct": 1.25, "interpolation": "bilinear"}, None),
        ({}, 100),
    ],
)
def test_pixels_are_those_of_timm_whatever_its_configuration_says(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], image_size: int | None
) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'graceful[timm]'")
    config = timm.get_pretrained_cfg("resnet18").to_dict() | changes
    arguments = {} if image_size is None else {"img_size": image_size}
    wanted = timm.data.resolve_data_config(arguments, pretrained_cfg=config)
    transform = timm.data.create_transform(**wanted, is_training=False)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, **_: timm.models.PretrainedCfg(**config))
    look = own_preprocessing("timm/resnet18", image_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (look.mean, look.std))
    for width, height in SIZES:
        buffer = io.BytesIO()
        picture(width, height).save(buffer, "JPEG", quality=92)
        theirs = (transform(Image.open(buffer).convert("RGB")) * std + mean) * 255
        np.testing.assert_array_equal(decode(buffer.getvalue(), look), theirs.round().to(torch.uint8).numpy())


def test_a_network_for_one_size_of_picture_is_made_for_the_wanted_one() -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'graceful[timm]'")
    spec = BackboneSpec(name="timm/vit_tiny_patch16_224")
    network = build_backbone(spec, 12, 1, 64)
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 12)
    assert build_backbone(BackboneSpec(name="timm/mobilenetv3_small_050"), 12, 3, 32).eval()(
        torch.zeros(2, 3, 32, 32)
    ).shape == (2, 12)


def test_weights_of_a_library_go_to_the_features_and_leave_the_projection(tmp_path: Path) -> None:
    spec = BackboneSpec(name="resnet18")
    whole = torchvision.models.resnet18()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    network = build_backbone(spec, 12, 3, 32)
    assert isinstance(network, ProjectedBackbone)
    projection = network.projection.weight.clone()
    load_initial_weights(network, spec, str(tmp_path / "whole.pth"))
    assert torch.equal(network.features.conv1.weight, whole.conv1.weight)
    assert torch.equal(network.projection.weight, projection)
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"expected a file of resnet18, found 0 tensors missing .* it has not"):
        load_initial_weights(network, spec, str(tmp_path / "other.pth"))


def test_weights_that_cannot_be_fetched_are_named_with_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    encoder = library_encoder("torchvision/resnet18", {})
    network = build_backbone(encoder.spec, 0, 3, 224)
    assert encoder.weights == "DEFAULT"
    with pytest.raises(UsageError, match="expected to fetch them, found no network; give a file of weights"):
        load_initial_weights(network, encoder.spec, encoder.weights)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/resnet19", "resnet19"),
        ("torchvision/resnet18.IMAGENET1K_V7", r"expected weights among \['IMAGENET1K_V1'\]"),
        ("torchvision/raft_small", "expected a network for single pictures"),
        ("timm/resnet19", "expected a network of timm"),
        ("timm/resnet18.nobody_in1k", "Invalid pretrained tag"),
    ],
)
def test_a_name_that_no_library_has_is_refused(name: str, words: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs timm: pip install 'graceful[timm]'")
    with pytest.raises(UsageError, match=words):
        own_preprocessing(name)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'graceful\[timm\]'"):
        own_preprocessing("timm/resnet18")


def test_preprocessing_of_a_network_is_printed_as_a_line_that_a_configuration_reads() -> None:
    tomllib = pytest.importorskip("tomllib")
    done = subprocess.run(
        [sys.executable, "-m", "graceful.training.libraries", "torchvision/resnet50"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    read = Preprocessing.model_validate(tomllib.loads(done.stdout)["preprocessing"])
    assert read == own_preprocessing("torchvision/resnet50")
    assert (read.image_size, read.resized, read.interpolation) == (224, 232, "bilinear")
