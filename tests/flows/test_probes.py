"""An encoder that embeds otherwise than where it was made is refused wherever it is opened, and told about."""

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from graceful.files import join
from graceful.flows.commands.doctor import examine_workspace
from graceful.flows.commands.status import workspace_status
from graceful.flows.search import looking
from graceful.flows.search.http import make_app
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update import order
from graceful.training import encoder, images, probes
from graceful.training.images import decode
from graceful.training.probes import DamagedProbesError, EncoderChangedError, draw_pictures, read_probes
from tests.flows import running, tiny


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits, embedded by one generation."""
    root = tiny.new_workspace(tmp_path_factory.mktemp("probes") / "ws")
    running.update(root)
    return root


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has opened nothing yet."""
    monkeypatch.setattr(encoder, "_AGREEMENTS", {})


@pytest.fixture
def other_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pillow that resizes otherwise, and says another version."""
    resized = images._resized

    def coarse(image: Image.Image, preprocessing: images.Preprocessing) -> Image.Image:
        small = image.resize((5, 5), Image.Resampling.NEAREST)
        return resized(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), preprocessing)

    version = probes.metadata.version
    monkeypatch.setattr(images, "_resized", coarse)
    monkeypatch.setattr(probes.metadata, "version", lambda name: "0.1" if name == "Pillow" else version(name))


def champion(root: Path) -> tuple[str, str]:
    opened = open_workspace(str(root))
    name = str(opened.registry.serving().champion)
    return name, opened.generation_uri(name)


def payload(root: Path) -> bytes:
    return bytes(pq.read_table(root / "digits.parquet")["image"][0].as_py()["bytes"])


def test_the_probes_are_drawn_pictures_whose_vectors_the_encoder_gives_again(workspace: Path) -> None:
    name, uri = champion(workspace)
    stored = read_probes(uri)
    assert stored is not None
    assert stored.pictures == draw_pictures()
    assert set(stored.libraries) >= {"torch", "torchvision", "Pillow", "numpy"}
    opened = encoder.open_encoder(uri, precision="float32")
    pixels = np.stack([decode(picture, opened.card.preprocessing) for picture in stored.pictures])
    np.testing.assert_allclose(opened.encode_pixels(pixels), stored.vectors, atol=1e-5)
    assert Path(uri, "probes.json").stat().st_size < 200_000
    assert workspace_status(str(workspace))["encoders"] == {name: "made with these libraries"}
    assert not [found for found in examine_workspace(str(workspace), deep=True) if "encoder" in found.what]


@pytest.mark.usefixtures("other_resizing")
def test_a_search_endpoint_answers_nothing_by_a_changed_encoder_and_tells_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[looking.Notice] = []
    monkeypatch.setattr(looking, "tell_of", lambda _, notice: told.append(notice))
    opened = []
    load = encoder.open_network
    monkeypatch.setattr(encoder, "open_network", lambda *given: opened.append(given) or load(*given))
    with TestClient(make_app(str(workspace), refresh_s=0.05)) as client:
        answer = client.post("/search", content=payload(workspace))
        assert answer.status_code == 503
        assert "below 0.999 (Pillow" in answer.json()["detail"]
        assert "then, 0.1 here" in answer.json()["detail"]
        assert "Install what made it (Pillow==" in answer.json()["detail"]
        looked = client.get("/status").json()["last_look"]["at"]
        while client.get("/status").json()["last_look"]["at"] < looked + 0.2:
            pass
    assert [notice.kind for notice in told] == ["encoder"]
    assert len(opened) == 1, "a look that is refused loads no weights"


@pytest.mark.usefixtures("other_resizing")
def test_an_update_and_a_search_are_refused_before_anything_is_embedded_and_others_are_told(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny.copy_workspace(workspace, tmp_path / "ws")
    tiny.write_config(root, workspace / "digits.parquet", tiny.grown(5))
    told: list[order.Notice] = []
    monkeypatch.setattr(order, "tell", lambda *given: told.append(given[-1]) or [])
    before = open_workspace(str(root)).gallery.version()
    name, _ = champion(root)
    with pytest.raises(EncoderChangedError, match=rf"opening {name}: .* found a cosine of -?\d\.\d+ to them.*Pillow"):
        running.update(root)
    assert [notice.kind for notice in told] == ["encoder"]
    assert open_workspace(str(root)).gallery.version() == before
    assert open_workspace(str(root)).registry.generations() == [name]
    picture = tmp_path / "query.png"
    picture.write_bytes(payload(workspace))
    assert "Pillow" in running.command("search", picture, "-r", root, code=1).output


@pytest.mark.usefixtures("other_resizing")
def test_status_and_doctor_embed_again_where_a_library_changed(workspace: Path) -> None:
    name, _ = champion(workspace)
    assert workspace_status(str(workspace))["encoders"][name].startswith("REFUSED: cosine")
    wrong = [found for found in examine_workspace(str(workspace)) if found.severity == "error"]
    assert [name in found.what and "Pillow" in found.what for found in wrong] == [True]
    assert running.command("doctor", "-r", workspace, code=1)


def test_an_encoder_that_is_a_little_off_serves_with_a_word(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.copy_workspace(workspace, tmp_path / "ws")
    name, uri = champion(root)
    as_made = Path(uri, "probes.json").read_text()
    turn(Path(uri, "probes.json"), cosine=0.9995)
    encoder.open_encoder(uri)
    encoder.open_encoder(uri)
    assert caplog.text.count(f"{name} gives almost the vectors") == 1
    said = [found.severity for found in examine_workspace(str(root), deep=True) if name in found.what]
    assert said == ["note"]
    Path(uri, "probes.json").write_text(as_made)
    turn(Path(uri, "probes.json"), cosine=0.9985)
    with pytest.raises(EncoderChangedError, match="no library whose version is known changed"):
        encoder.open_encoder(uri)


def test_a_generation_of_before_is_used_without_a_word_but_in_doctor(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.copy_workspace(workspace, tmp_path / "ws")
    name, uri = champion(root)
    Path(uri, "probes.json").unlink()
    encoder.open_encoder(uri)
    assert caplog.text == ""
    assert workspace_status(str(root))["encoders"] == {}
    assert [f.severity for f in examine_workspace(str(root)) if f.what.startswith(f"{name} has no probes")] == ["note"]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_probes_are_named_and_never_believed(workspace: Path, tmp_path: Path, damage: str) -> None:
    root = tiny.copy_workspace(workspace, tmp_path / "ws")
    uri = champion(root)[1]
    file = Path(join(uri, "probes.json"))
    text = file.read_text()
    place = text.index('"vectors"') + 30
    other = "B" if text[place] != "B" else "C"
    file.write_text(text[:-9] if damage == "cut" else text[:place] + other + text[place + 1 :])
    with pytest.raises(DamagedProbesError, match=r"probes\.json\); restore the file"):
        encoder.open_encoder(uri)


def turn(file: Path, cosine: float) -> None:
    """Store the first vector so far from what the encoder gives."""
    record = json.loads(file.read_text())
    vector = np.frombuffer(base64.b64decode(record["vectors"][0]), "<f4").astype(np.float64)
    other = np.random.default_rng(0).standard_normal(len(vector))
    other -= (other @ vector) / (vector @ vector) * vector
    other *= np.linalg.norm(vector) / np.linalg.norm(other)
    turned = cosine * vector + np.sqrt(1 - cosine**2) * other
    record["vectors"][0] = base64.b64encode(turned.astype("<f4").tobytes()).decode()
    rest = {key: value for key, value in record.items() if key not in ("format_version", "sha256")}
    record["sha256"] = probes._digest(rest)
    file.write_text(json.dumps(record))
