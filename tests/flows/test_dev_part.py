"""The dev part of an update: apart from what is trained on and what is reported, and chosen on by the real order."""

import copy
from pathlib import Path

import numpy as np
import pytest

from graceful.files import join
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import ConfigError, load_config
from graceful.flows.store.dev_set import DevConfig, set_aside
from graceful.flows.store.evalsets import part_of
from graceful.flows.store.evaluation_set import load_evaluation_set, with_dev
from graceful.flows.store.leaks import TrainedOnQueriesError
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.freeze import freeze
from graceful.training.choosing import Option, choose
from graceful.training.datasets import OverlapError, is_held_out
from graceful.training.generation import read_card
from graceful.training.manifest import LabelledImages, read_manifest
from graceful.training.progress import TrailReporter
from tests.flows import running, tiny

SHARE = {"evaluation.dev": {"share": 0.25}}


def images(num_identities: int = 40, each: int = 3) -> LabelledImages:
    names = [f"person {number}" for number in range(num_identities) for _ in range(each)]
    contents = [f"{(2654435761 * (number + 1)) % 2**32:08x}" + 56 * "0" for number in range(len(names))]
    return LabelledImages([f"file {place}" for place in range(len(names))], np.array(names), contents)


def test_open_set_parts_identities_and_they_stay_where_they_are_as_the_data_grows():
    config = DevConfig(share=0.3)
    kept, dev = set_aside(config, "open_set", images(20))
    assert not set(kept.labels.tolist()) & set(dev.labels.tolist())
    assert len(kept) + len(dev) == 60
    assert set(dev.labels.tolist()) == {name for name in images(20).labels.tolist() if part_of(name, 0.3) == "dev"}
    grown_kept, grown_dev = set_aside(config, "open_set", images(40))
    assert set(dev.labels.tolist()) <= set(grown_dev.labels.tolist())
    assert set(kept.labels.tolist()) <= set(grown_kept.labels.tolist())


def test_closed_set_parts_images_by_content_and_takes_each_content_once():
    everything = images(30)
    twice = LabelledImages(
        everything.sources * 2, np.concatenate([everything.labels] * 2), everything.content_sha256 * 2
    )
    kept, dev = set_aside(DevConfig(share=0.3), "closed_set", twice)
    assert all(is_held_out(content, 0.3) for content in dev.content_sha256)
    assert not set(kept.content_sha256) & set(dev.content_sha256)
    assert len(set(dev.content_sha256)) == len(dev) > 0
    assert len(kept) + 2 * len(dev) == len(twice)


def test_dev_images_of_their_own_may_share_nothing_with_training_or_queries(workspace_root, digits_file):
    own = copy.deepcopy(tiny.BASE["training_data"])
    own |= {"path": str(digits_file), "where": {"label": tiny.DIGITS[:5], "instance": {"min": 25, "max": 60}}}
    tiny.write_config(workspace_root, digits_file, {"evaluation.dev": {"images": own}})
    with (
        open_session(str(workspace_root), tiny.open_config(workspace_root)) as session,
        pytest.raises(OverlapError, match="expected no common images"),
    ):
        freeze(session)
    own["where"]["instance"] = {"min": 60, "max": 85}  # of the queries: 80 and more
    tiny.write_config(workspace_root, digits_file, {"evaluation.dev": {"images": own}})
    with (
        open_session(str(workspace_root), tiny.open_config(workspace_root)) as session,
        pytest.raises(OverlapError, match="expected no common images"),
    ):
        freeze(session)


def test_open_set_dev_identities_may_not_be_queries(workspace_root, digits_file):
    own = copy.deepcopy(tiny.BASE["training_data"])
    own |= {"path": str(digits_file), "where": {"label": ["4", "7"], "instance": {"max": 20}}}
    changes = {"evaluation.dev": {"images": own}, "evaluation.protocol": "open_set"}
    tiny.write_config(workspace_root, digits_file, changes)
    config = tiny.open_config(workspace_root)
    judged = load_evaluation_set(config.evaluation)
    with pytest.raises(OverlapError, match="such as 4"):
        with_dev(config.evaluation, images(), judged)


def test_a_choice_without_a_dev_part_is_refused_with_the_remedy(tmp_path, digits_file):
    for changes in ({"training.interpolation": "dev"}, {"training.patience": 2}):
        path = tiny.write_config(tmp_path, digits_file, changes)
        with pytest.raises(ConfigError, match=r"need evaluation\.dev"):
            load_config(path, str(tmp_path))
    path = tiny.write_config(tmp_path, digits_file, {"evaluation.dev": {}})
    with pytest.raises(ConfigError, match="either share or images"):
        load_config(path, str(tmp_path))
    path = tiny.write_config(tmp_path, digits_file, {**SHARE, "training.interpolation": "dev"})
    assert load_config(path, str(tmp_path)).training.interpolation == "dev"


def test_a_dev_part_that_a_generation_was_trained_on_is_refused(workspace_root, digits_file):
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), **SHARE})
    with (
        open_session(str(workspace_root), tiny.open_config(workspace_root)) as session,
        pytest.raises(TrainedOnQueriesError, match="nobody was trained on the dev part"),
    ):
        freeze(session)


def test_an_update_chooses_on_its_dev_part_and_says_so(tmp_path, digits_file):
    limits = {"policy.max_nfr": 0.08}
    chooses = {**SHARE, **limits, "training.interpolation": "dev"}
    root = tmp_path / "workspace"
    tiny.write_config(root, digits_file, chooses)
    config = tiny.open_config(root)
    Workspace(str(root)).create()
    with open_session(str(root), config) as session:
        tiny.fill_gallery(session.workspace, config)
    first = running.update(root)
    workspace = Workspace(str(root))
    tiny.write_config(root, digits_file, {**tiny.grown(5), **chooses})
    with open_session(str(root), tiny.open_config(root)) as session:
        inputs = freeze(session)
        key, training_key = inputs.frozen.update_key, inputs.frozen.training_key
        stricter = session.config.policy.model_copy(update={"max_nfr": 0.07})
        with open_session(str(root), session.config.model_copy(update={"policy": stricter})) as other:
            assert freeze(other).frozen.training_key != training_key, "another limit chooses anew"
    second = running.update(root)
    trained = read_manifest(workspace.manifest_uri(key))
    dev = read_manifest(workspace.dev_uri(key))
    assert inputs.frozen.num_dev_images == len(dev) > 10
    assert not set(trained.content_sha256) & set(dev.content_sha256)
    card = read_card(workspace.generation_uri(second.candidate))
    told = card.training["interpolation_on_dev"]
    assert told["max_flips"] == 0.08
    assert told["chosen"] == choose([Option(**option) for option in told["options"]], 0.08).value
    lines = TrailReporter(join(str(root), "runs"), card.training["name"]).metrics()
    assert f"dev on {first.candidate}" in lines[-1]
    page = Path(second.report).read_text()
    assert "What was chosen on the dev part" in page
    assert f"{100 * told['chosen']:.0f} %" in page
