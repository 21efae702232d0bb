"""A first day with one's own pictures, as messy as they are: looked at, checked, ingested, updated, searched."""

import json
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.settings.inspection import InspectionError, inspect_images, needed_queries
from graceful.training.datasets import check_trainable, load_images
from tests.flows import tiny

NUM_LABELS, PER_LABEL, SIDE = 12, 12, 24


def picture(label: int, number: int, channels: int = 3) -> Image.Image:
    """A pattern of the label's own with noise."""
    pattern = np.random.default_rng(label).integers(0, 255, (4, 4, channels))
    noise = np.random.default_rng([label, number]).normal(0, 25, (SIDE, SIDE, channels))
    pixels = np.clip(np.kron(pattern, np.ones((SIDE // 4, SIDE // 4, 1))) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def label_name(label: int) -> str:
    return {0: "Füchse und Bären", 1: "größer/deep/nested", 2: "日本", 3: "no #1"}.get(label, f"label{label:02d}")


def write_photos(folder: Path, num_labels: int = NUM_LABELS, channels: int = 3) -> Path:
    """Clean pictures, a folder per label."""
    for label in range(num_labels):
        place = folder / label_name(label)
        place.mkdir(parents=True, exist_ok=True)
        for number in range(PER_LABEL):
            picture(label, number, channels).save(place / f"img#{number}.png")
    return folder


def make_a_mess(folder: Path) -> Path:
    """What a disk holds beside clean pictures."""
    upright = Image.Exif()
    upright[0x0112] = 6
    picture(4, 90).save(folder / "label04" / "turned.jpg", exif=upright)
    transparent = picture(4, 91).convert("RGBA")
    transparent.putalpha(Image.new("L", transparent.size, 90))
    transparent.save(folder / "label04" / "transparent.png")
    deep = np.random.default_rng(7).integers(0, 2**16, (SIDE, SIDE)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "label05" / "16 bit.png")
    (folder / "label05" / "broken.png").write_bytes(b"no image at all")
    whole = (folder / "label06" / "img#0.png").read_bytes()
    (folder / "label06" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "label06" / "copy of 0.png").write_bytes(whole)
    (folder / "label07" / "copy of 0.png").write_bytes(whole)  # under another label
    (folder / "label07" / "notes.txt").write_text("not an image")
    (folder / "label07" / "._img#1.png").write_bytes(b"resource fork")
    picture(8, 92).resize((300, 200)).save(folder / "loose.png")
    (folder / "linked").symlink_to(folder / "label08")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The messy folder. Read only."""
    return make_a_mess(write_photos(tmp_path_factory.mktemp("own") / "photos"))


@pytest.fixture
def shop(photos, tmp_path):
    """A workspace made from it."""
    made = command("init", tmp_path / "shop", "--from", photos)
    assert made.exit_code == 0, made.stderr
    return tmp_path / "shop"


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Looking --------------------------------------------------------------------------------------------------------------


def test_mess_is_counted_and_named(photos):
    found = inspect_images(str(photos))
    clean = NUM_LABELS * PER_LABEL
    assert (found.source, len(found.labels), found.num_images) == ("folder", NUM_LABELS, clean + 5)
    assert "größer/deep/nested" in found.labels
    assert sorted(Path(source).name for source, _ in found.unreadable) == ["broken.png", "truncated.png"]
    assert (found.num_copies, found.num_contradictions) == (2, 1)
    assert [Path(image).name for image in found.loose] == ["loose.png"]
    assert [Path(link).name for link in found.links_left_out] == ["linked"]
    assert found.other_files == {".txt": 1}
    assert (min(found.smallest), found.median_side, min(found.largest)) == (SIDE, SIDE, SIDE)
    assert found.num_grey == 1


def test_proposal_suits_the_pictures(photos):
    p = inspect_images(str(photos)).proposal
    assert (p.image_size, p.channels, p.augmentation) == (24, 3, "crop_flip")
    assert all(0.3 < value < 0.7 for value in p.mean)
    assert all(0.1 < value < 0.4 for value in p.std)
    assert p.num_training > 2 * p.num_queries > 20
    assert p.needed.for_flips is not None
    assert p.needed.for_flips > p.num_queries


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(20):
            pixels = np.full((16, 16), 51 if number % 2 else 153, np.uint8)
            pixels[0, 0] = 2 * number + (label == "a")  # no two alike
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    p = inspect_images(str(tmp_path)).proposal
    assert (p.channels, p.augmentation, p.image_size) == (1, "affine", 16)
    assert p.mean == pytest.approx((0.4,), abs=0.05)
    assert p.std == pytest.approx((0.2,), abs=0.02)


def test_needed_queries_grow_with_a_tighter_limit_and_with_queries_that_are_alike():
    from graceful.evaluation.policy import RolloutPolicy

    loose, tight = needed_queries(RolloutPolicy(max_nfr=0.05), 1), needed_queries(RolloutPolicy(max_nfr=0.01), 1)
    assert loose.for_flips < tight.for_flips
    assert needed_queries(RolloutPolicy(), 6).for_flips == pytest.approx(
        2 * needed_queries(RolloutPolicy(), 1).for_flips, rel=0.01
    )
    assert needed_queries(RolloutPolicy(max_nfr=None, quality_margin_points=None), 1).for_flips is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "expected images, found none"),
        (lambda folder: picture(0, 0).save(folder / "1.png"), "one sub-folder per label, found 1 images beside"),
        (lambda folder: (folder / "data-00000.arrow").touch(), "found Arrow files .*to_parquet"),
        (lambda folder: (folder / "a").mkdir() or picture(0, 0).save(folder / "a" / "1.png"), "at least two labels"),
    ],
)
def test_folder_that_cannot_be_used_says_why(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(InspectionError, match=words):
        inspect_images(str(tmp_path))
    refused = command("init", tmp_path / "shop", "--from", tmp_path)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "shop" / "graceful.toml").exists()


def test_flat_folder_with_a_csv_file(tmp_path):
    lines = ["file,label"]
    for label in range(4):
        for number in range(PER_LABEL):
            picture(label, number).save(tmp_path / f"{label}-{number}.png")
            lines.append(f"{label}-{number}.png,{label_name(label)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    found = inspect_images(str(tmp_path))
    assert (found.source, found.label_columns, len(found.labels)) == ("csv", ("label",), 4)
    assert found.loose == ()
    assert command("init", tmp_path / "shop", "--from", tmp_path).exit_code == 0
    check_trainable(load_images(load_workspace_config(str(tmp_path / "shop")).training_data))


def write_parquet(path: Path, labels: range, column: str = "label") -> None:
    rows = []
    for label in labels:
        for number in range(PER_LABEL):
            picture(label, number).save(path.parent / "one.png")
            rows.append({"image": {"bytes": (path.parent / "one.png").read_bytes(), "path": None}, column: label})
    (path.parent / "one.png").unlink()
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_hugging_face_data_set_on_disk(tmp_path):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    write_parquet(data / "train-00000-of-00002.parquet", range(3), "species")
    write_parquet(data / "train-00001-of-00002.parquet", range(3, 6), "species")
    found = inspect_images(str(tmp_path / "set"))
    assert (found.source, found.label_columns, sorted(found.labels)) == ("parquet", ("species",), list("012345"))
    assert command("init", tmp_path / "shop", "--from", tmp_path / "set").exit_code == 0
    assert json.loads(command("check", "-r", tmp_path / "shop", "--json").stdout)["errors"] == 0
    said = json.loads(command("ingest", tmp_path / "set", "-r", tmp_path / "shop", "--json").stdout)
    assert said["added"] == 6 * PER_LABEL


def test_image_folder_with_train_and_test_is_one_set(tmp_path):
    write_photos(tmp_path / "set" / "train", 4)
    write_photos(tmp_path / "set" / "test", 5)
    found = inspect_images(str(tmp_path / "set"))
    assert [Path(path).name for path in found.paths] == ["test", "train"]
    assert set(found.labels) == {label_name(label) for label in range(5)}


# A whole day ----------------------------------------------------------------------------------------------------------


def test_init_says_what_it_saw_and_lists_the_unreadable(photos, tmp_path):
    text = command("init", tmp_path / "shop", "--from", photos).stdout
    for words in (
        f"Read {NUM_LABELS * PER_LABEL + 7} images",
        "Unreadable: 2",
        "Copies: 2",
        "1 of them under another label",
        "Loose: 1 image lies in no folder of a label",
        "Links: 1 linked folder not followed",
        "Other files, not read: 1 .txt",
        "image_size 24",
        "by content hash",
        "queries of at least 50 identities are needed",
    ):
        assert words in text, words
    listed = (tmp_path / "shop" / "unreadable.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in listed] == ["broken.png", "truncated.png"]
    assert all(line.split("\t")[1] for line in listed)


def test_written_configuration_needs_no_edit(shop):
    config = load_workspace_config(str(shop))
    training, queries = load_images(config.training_data), load_images(config.evaluation.queries)
    check_trainable(training)
    assert not set(training.content_sha256) & set(queries.content_sha256)
    assert min(np.unique(queries.labels, return_counts=True)[1]) >= 2
    assert config.evaluation.protocol == "closed_set"
    text = (shop / "graceful.toml").read_text()
    assert tomllib.loads(text)["name"] == "shop"
    assert max(map(len, text.splitlines())) <= 120


def test_no_image_changes_sides_when_photos_come_in(tmp_path):
    folder = write_photos(tmp_path / "photos", 6)
    assert command("init", tmp_path / "shop", "--from", folder).exit_code == 0
    config = load_workspace_config(str(tmp_path / "shop"))

    def sides():
        return [set(load_images(part).content_sha256) for part in (config.training_data, config.evaluation.queries)]

    training, queries = sides()
    write_photos(folder, 9)
    for number in range(50, 60):
        picture(0, number).save(folder / label_name(0) / f"{number}.png")
    grown_training, grown_queries = sides()
    assert training < grown_training
    assert queries < grown_queries
    assert not grown_training & grown_queries


def test_init_replaces_an_unedited_template_and_nothing_else(photos, tmp_path):
    shop = tmp_path / "shop"
    assert command("init", shop).exit_code == 0
    for arguments in (("update",), ("ingest", photos), ("check",), ("collect",)):
        refused = command(*arguments, "-r", shop)
        assert refused.exit_code == 2, arguments
        said = refused.stderr or refused.stdout
        assert f"graceful init {shop} --from" in said.replace("\n", "")
    assert "unedited template" in command("status", "-r", shop).stdout
    assert command("init", shop, "--from", photos).exit_code == 0
    assert "unedited template" not in command("status", "-r", shop).stdout
    written = (shop / "graceful.toml").read_text()
    assert 'by = "content"' in written
    again = command("init", shop, "--from", photos)
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert "left alone" in command("init", shop).stdout
    assert (shop / "graceful.toml").read_text() == written


def test_check_finds_nothing_wrong_with_what_init_wrote(shop):
    said = command("check", "-r", shop)
    assert said.exit_code == 0, said.stdout
    document = json.loads(command("check", "-r", shop, "--json").stdout)
    assert document["errors"] == 0
    warnings = [finding for finding in document["findings"] if finding["level"] == "warning"]
    assert ["too few" in finding["what"] for finding in warnings] == [True]


def test_ingest_takes_all_that_can_be_read_and_names_the_rest(shop, photos):
    said = json.loads(command("ingest", photos, "-r", shop, "--json").stdout)
    assert (said["added"], said["unreadable_images"]) == (NUM_LABELS * PER_LABEL + 6, 2)  # the loose one too
    assert {Path(entry["source"]).name for entry in said["unreadable"]} == {"broken.png", "truncated.png"}
    again = command("ingest", photos / "label06", photos / "no #1", "-r", shop)
    assert "Items: 0 added, 0 changed, 25 unchanged." in again.stdout
    assert "{" not in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_pictures_from_nothing_to_an_answer(photos, tmp_path, command_environment):
    shop = tmp_path / "shop"

    def graceful(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = tiny.graceful(*arguments, env=command_environment, timeout=300)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    assert "Wrote" in graceful("init", str(shop), "--from", str(photos)).stdout
    config = shop / "graceful.toml"
    text = config.read_text()
    faster = text.replace("num_workers = 1", "num_workers = 0").replace("embed_workers = 2", "embed_workers = 0")
    assert faster.count("workers = 0") == 2
    config.write_text(faster)
    graceful("check", "--root", str(shop))
    graceful("ingest", str(photos), "--root", str(shop))
    updated = json.loads(graceful("update", "--root", str(shop), "--json").stdout)
    assert updated["outcome"] == "BOOTSTRAP"
    query = photos / "label10" / "img#3.png"
    hits = json.loads(graceful("search", str(query), "--root", str(shop), "-k", "5", "--json").stdout)["hits"]
    assert hits[0]["item_id"] == "photos/label10/img#3.png"
    assert sum(hit["label"] == "label10" for hit in hits) >= 3
    status = json.loads(graceful("status", "--root", str(shop), "--json").stdout)
    assert (status["champion"], status["unreadable"]) == (updated["candidate"], 0)
    assert status["items"] == NUM_LABELS * PER_LABEL + 6
