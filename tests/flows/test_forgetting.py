"""Images withdrawn from training by the real command: what serves is judged without them, later training lacks them."""

import hashlib
import json

import pytest
from rich.console import Console

from graceful.flows.commands.forgetting import NotTrainedOnError, forget_training
from graceful.flows.store.events import Trained, UpdateStarted, Withdrawn
from graceful.flows.store.withdrawn import trained_on
from graceful.flows.store.workspace import Workspace
from graceful.training.generation import read_card
from graceful.training.images import read_payloads
from tests.flows import running, tiny
from tests.flows.running import command, document

pytestmark = pytest.mark.timeout(300)


def champion_of(root):
    workspace = Workspace(str(root))
    return workspace, workspace.registry.serving().champion


@pytest.fixture(scope="module")
def untouched(flow_server, bootstrapped, digits_file, tmp_path_factory):
    """A workspace whose champion was made of what its configuration shows."""
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("untouched") / "workspace")
    tiny.write_config(root, digits_file)
    return root


@pytest.fixture(scope="module")
def forgotten(untouched, tmp_path_factory):
    """The same after three images were withdrawn: one by its source, one by its hash, one by a file of its bytes."""
    root = tiny.copy_workspace(untouched, tmp_path_factory.mktemp("forgotten") / "workspace")
    workspace, champion = champion_of(root)
    images = trained_on(workspace, champion)
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    file.write_bytes(read_payloads([images.sources[2]])[0])
    named = [images.sources[0], images.content_sha256[1], str(file), images.sources[0]]
    said = command("forget-training", *named, "--root", root, "--reason", "asked for", "--by", "anna")
    return root, champion, images, said


def test_an_update_leaves_them_out_of_the_champion_without_training(forgotten):
    root, before, images, said = forgotten
    workspace, champion = champion_of(root)
    card = read_card(workspace.generation_uri(champion))
    assert champion != before
    assert (card.parent, card.training["forgotten"], card.training["images"]) == (before, 3, len(images) - 3)
    assert "epochs" not in card.training
    assert set(trained_on(workspace, champion).content_sha256) == set(images.content_sha256[3:])
    (event,) = workspace.registry.events(Withdrawn)
    assert event.payload == Withdrawn(content_sha256=tuple(images.content_sha256[:3]), reason="asked for", by="anna")
    (start,) = [event.payload for event in workspace.registry.events(UpdateStarted) if event.payload.num_forgotten]
    assert start.num_forgotten == 3
    assert "3 training images are left out" in said.output
    history = document("history", "--root", root)
    assert [event["reason"] for event in history["events"] if event["what"] == "withdrawn"] == ["asked for"]


def test_their_vectors_are_gone(forgotten):
    root, before, images, _ = forgotten
    workspace, champion = champion_of(root)
    for generation in (before, champion):
        assert set(workspace.cache(generation).missing(images.content_sha256[:3])) == set(images.content_sha256[:3])


def test_named_again_nothing_happens(forgotten, tmp_path):
    root, _, images, _ = forgotten
    root = tiny.copy_workspace(root, tmp_path / "workspace")
    workspace, champion = champion_of(root)
    done = document("forget-training", images.sources[0], "--root", root, "--reason", "again")
    assert done["repeated"]
    assert champion_of(root)[1] == champion
    assert len(workspace.registry.events(Withdrawn)) == 1
    assert document("update", "--root", root)["repeated"]


def test_no_later_training_sees_them(forgotten, digits_file, tmp_path):
    root, _, images, _ = forgotten
    root = tiny.copy_workspace(root, tmp_path / "workspace")
    tiny.write_config(root, digits_file, tiny.grown(4))
    running.update(root)
    workspace, champion = champion_of(root)
    card = read_card(workspace.generation_uri(champion))
    assert "epochs" in card.training  # new images besides: it was trained
    assert not set(trained_on(workspace, champion).content_sha256) & set(images.content_sha256[:3])


def test_another_recipe_is_trained_and_not_computed(untouched, digits_file, tmp_path):
    """The champion without the images is no answer to who asks for another network."""
    root = tiny.copy_workspace(untouched, tmp_path / "workspace")
    workspace, champion = champion_of(root)
    images = trained_on(workspace, champion)
    tiny.write_config(root, digits_file, {"training.epochs": 3})
    done = document("forget-training", images.content_sha256[0], "--root", root, "--reason", "asked for")
    assert "forgotten" not in done
    assert read_card(workspace.generation_uri(done["candidate"])).training["epochs"] > 3
    assert images.content_sha256[0] not in trained_on(workspace, done["candidate"]).content_sha256


def test_a_killed_one_goes_on(untouched, tmp_path):
    """Withdrawn, and killed before anything was made of it: the next update does what the command would have done."""
    root = tiny.copy_workspace(untouched, tmp_path / "workspace")
    workspace, champion = champion_of(root)
    images = trained_on(workspace, champion)
    workspace.registry.record(
        Withdrawn(content_sha256=(images.content_sha256[0],), reason="asked for"), generation=champion
    )
    result = running.update(root)
    assert read_card(workspace.generation_uri(result.candidate)).training["forgotten"] == 1


def test_what_the_champion_was_not_trained_on_is_refused_and_nothing_recorded(untouched, tmp_path):
    root = tiny.copy_workspace(untouched, tmp_path / "workspace")
    other = tmp_path / "other.png"
    other.write_bytes(b"another picture")
    workspace, champion = champion_of(root)
    known = trained_on(workspace, champion).content_sha256[0]
    for named in (["nowhere.png"], [known, str(other)], [hashlib.sha256(b"x").hexdigest()]):
        said = command("forget-training", *named, "--root", root, "--reason", "asked for", code=1)
        assert "found 1 others" in said.output
    assert not workspace.registry.events(Withdrawn)
    assert len(workspace.registry.events(Trained)) == 1


def test_a_workspace_where_nothing_serves_is_refused(tmp_path, digits_file):
    root = tiny.new_workspace(tmp_path / "workspace")
    with pytest.raises(NotTrainedOnError, match="no generation"):
        forget_training(str(root), ["a"], Console(quiet=True), reason="asked for")


def test_the_document_says_what_is_left(untouched, tmp_path):
    root = tiny.copy_workspace(untouched, tmp_path / "workspace")
    workspace, champion = champion_of(root)
    images = trained_on(workspace, champion)
    of_one = [digest for digest, label in zip(images.content_sha256, images.labels, strict=True) if label == "0"]
    said = command("forget-training", *of_one, "--root", root, "--reason", "asked for", "--json")
    done = json.loads(said.stdout)
    assert done["forgotten"] == len(of_one)
    assert set(done["traces"]) == {"before", "after", "kept", "cosine"}
    assert all(0 <= share <= 1 for share in done["traces"].values())
    assert read_card(workspace.generation_uri(done["candidate"])).classes == ("1", "2")
