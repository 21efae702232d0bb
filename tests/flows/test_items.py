"""Items' ids: they name their collection, follow the source, and never put one image in another's place silently."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.store.items import ItemClashError, ids_below, item_id_of, item_table, settle_ids
from graceful.indexing.gallery import Gallery
from graceful.training.images import encode_png
from graceful.training.manifest import LabelledImages
from tests.flows import tiny

RNG = np.random.default_rng(0)


def images(*sources: str, content: str = "") -> LabelledImages:
    digests = [content or f"sha of {source}" for source in sources]
    return LabelledImages(list(sources), np.array([""] * len(sources)), digests)


def table(*sources: str, place: str = "/data/photos", content: str = ""):
    found = images(*sources, content=content)
    return item_table(found, ids_below(place, found.sources))


@pytest.fixture
def gallery(tmp_path):
    return Gallery(str(tmp_path / "gallery"), create=True)


def ingest(gallery: Gallery, items, unit: str, **options):
    return gallery.ingest(settle_ids(items, gallery.items, **options))


def test_id_names_the_collection():
    assert ids_below("/data/photos", ["/data/photos/a/1.png"]) == ["photos/a/1.png"]
    assert ids_below("/data/photos/", ["/data/photos/a/1.png"], "shop") == ["shop/a/1.png"]
    assert ids_below("/data/one.png", ["/data/one.png"]) == ["data/one.png"]
    assert ids_below("/d/train.parquet", ["/d/train.parquet#0", "/d/train.parquet#12"]) == ["train#0", "train#12"]
    assert ids_below("/d/train.parquet", ["/d/train.parquet#0@photo"], "birds") == ["birds#0"]
    parts = ["/d/set/data/train-0.parquet#3", "/d/set/data/train-1.parquet#3"]
    assert ids_below("/d/set", parts) == ["set/data/train-0#3", "set/data/train-1#3"]
    assert ids_below("/d/set", parts, "birds") == ["birds/data/train-0#3", "birds/data/train-1#3"]
    assert ids_below("s3://bucket/photos", ["s3://bucket/photos/new/q.png"]) == ["photos/new/q.png"]
    assert ids_below("/d/photos/labels.csv", ["/d/photos/1.png"]) == ["photos/1.png"]


def test_default_ids_of_a_table_are_as_they_were():
    ids = item_table(images("/d/evaluation.parquet#3", "/d/cat.jpg"))["item_id"].to_pylist()
    assert ids == ["evaluation#3", "cat.jpg"]


def test_hash_sign_in_a_name_is_part_of_the_name():
    assert item_id_of("/a/cat#1.png", "/a") == "cat#1.png"
    assert ids_below("/p#2", ["/p#2/a/cat#1.png", "/p#2/b/cat#1.png"]) == ["p#2/a/cat#1.png", "p#2/b/cat#1.png"]
    assert ids_below("/p#2/t.parquet", ["/p#2/t.parquet#5"]) == ["t#5"]


def test_same_names_in_another_folder_are_refused_with_both_names_and_change_nothing(gallery):
    ingest(gallery, table("/monday/drop/1.png", place="/monday/drop"), "one")
    with pytest.raises(ItemClashError, match=r"found 1 .*\(drop/1.png is /monday/drop/1.png and /tuesday/drop/1.png\)"):
        ingest(gallery, table("/tuesday/drop/1.png", place="/tuesday/drop"), "two")
    with pytest.raises(ItemClashError, match=r"--prefix, or say --replace"):
        ingest(gallery, table("/tuesday/drop/1.png", place="/tuesday/drop"), "two")
    assert gallery.view([]).num_items == 1
    replaced = ingest(gallery, table("/tuesday/drop/1.png", place="/tuesday/drop"), "three", replace=True)
    assert (replaced.added, replaced.changed) == (0, 1)


def test_changed_image_of_the_same_source_is_a_change(gallery):
    ingest(gallery, table("/data/photos/1.png", content="before"), "one")
    result = ingest(gallery, table("/data/photos/1.png", content="after"), "two")
    assert (result.added, result.changed) == (0, 1)


def test_same_photo_from_the_class_folder_and_from_its_parent_is_one_item(gallery):
    ingest(gallery, table("/data/photos/cats/1.png", place="/data/photos/cats"), "one")
    result = ingest(gallery, table("/data/photos/cats/1.png", "/data/photos/dogs/1.png"), "two")
    assert (result.added, result.unchanged) == (1, 1)
    assert sorted(gallery.view([]).item_ids) == ["cats/1.png", "photos/dogs/1.png"]


def test_source_named_twice_in_a_batch_comes_once(gallery):
    settled = settle_ids(table("/data/photos/1.png", "/data/photos/1.png"), gallery.items)
    assert settled["item_id"].to_pylist() == ["photos/1.png"]


def test_two_images_of_one_id_in_a_batch_are_refused(gallery):
    batch = item_table(images("/a/t.parquet#0", "/b/t.parquet#0"))
    with pytest.raises(ItemClashError, match=r"within the batch \(t#0 is /a/t.parquet#0 and /b/t.parquet#0\)"):
        settle_ids(batch, gallery.items, replace=True)


def test_moved_but_equal_images_are_no_clash_and_an_id_of_a_deleted_item_is_free(gallery):
    ingest(gallery, table("/old/photos/1.png", place="/old/photos", content="same"), "one")
    assert ingest(gallery, table("/new/photos/1.png", place="/new/photos", content="same"), "two").unchanged == 1
    gallery.delete(["photos/1.png"])
    assert ingest(gallery, table("/x/photos/1.png", place="/x/photos", content="other"), "three").added == 1


@pytest.fixture
def workspace(tmp_path, digits_file):
    """An empty workspace with a configuration."""
    root = tmp_path / "workspace"
    config = tiny.write_config(tmp_path / "config", digits_file)
    assert CliRunner().invoke(app, ["init", str(root), "--config", str(config)]).exit_code == 0
    return root


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(RNG.integers(0, 255, (8, 8), dtype=np.uint8)))


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_several_places_are_ingested_at_once_and_unreadable_images_are_named(workspace, tmp_path):
    for name in ("a/x/1.png", "b/x/1.png", "b/x/c#1.png"):
        picture(tmp_path / name)
    (tmp_path / "b" / "x" / "broken.png").write_bytes(b"no image")
    said = json.loads(command("ingest", tmp_path / "a", tmp_path / "b", "-r", workspace, "--json").stdout)
    assert (said["added"], said["unreadable_images"]) == (3, 1)
    assert said["unreadable"][0]["source"] == str(tmp_path / "b/x/broken.png")
    text = command("ingest", tmp_path / "a", tmp_path / "b", "-r", workspace)
    assert "Items: 0 added, 0 changed, 3 unchanged." in text.stdout
    assert "b/x/broken.png: cannot be decoded" in text.stdout.replace("\n", "")
    assert "{" not in text.stdout


def test_clash_on_the_command_line_is_one_line_and_prefix_solves_it(workspace, tmp_path):
    for day in ("monday", "tuesday"):
        picture(tmp_path / day / "drop" / "1.png")
    assert command("ingest", tmp_path / "monday" / "drop", "-r", workspace).exit_code == 0
    refused = command("ingest", tmp_path / "tuesday" / "drop", "-r", workspace)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "--prefix" in refused.stderr
    done = command("ingest", tmp_path / "tuesday" / "drop", "-r", workspace, "--prefix", "tuesday", "--json")
    assert json.loads(done.stdout)["added"] == 1
