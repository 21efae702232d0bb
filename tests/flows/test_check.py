"""`graceful check`: every mistake that would end an update is found before anything heavy starts, with its remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.commands import check
from graceful.flows.commands.check import CheckFailedError, check_workspace, require_checked
from graceful.flows.commands.networks import problem_with_factory, problem_with_network, torchvision_models
from graceful.flows.settings.template import TEMPLATE
from graceful.training.images import encode_png
from tests.flows import tiny
from tests.flows.test_items import RNG

WIDE_RANGE = {"label": tiny.DIGITS[:5], "instance": {"max": 29}}


@pytest.fixture
def checked(workspace_root, digits_file):
    """Check a bootstrapped workspace under a changed configuration; returns {level: lines}."""

    def run(adopt=None, **changes):
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), **dotted})
        return by_level(check_workspace(str(workspace_root), adopt))

    return run


def by_level(findings):
    return {
        level: [finding.line for finding in findings if finding.level == level] for level in ("error", "warning", "ok")
    }


def folder_of(tmp_path: Path, **counts: int) -> str:
    for label, count in counts.items():
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(count):
            pixels = RNG.integers(0, 255, (8, 8), dtype="uint8")
            (tmp_path / "set" / label / f"{number}.png").write_bytes(encode_png(pixels))
    return str(tmp_path / "set")


def test_right_workspace_has_no_error(checked):
    found = checked()
    assert found["error"] == []
    assert len(found["warning"]) == 1
    assert "too few to show that flips" in found["warning"][0] or "Evidence" in found["warning"][0]
    assert any("training_data: 150 images of 5 labels" in line for line in found["ok"])


def test_no_workspace_and_an_unedited_template(tmp_path):
    assert "create it with 'graceful init'" in by_level(check_workspace(str(tmp_path)))["error"][0]
    CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    (tmp_path / "new" / "graceful.toml").write_text(TEMPLATE)
    assert "--from" in by_level(check_workspace(str(tmp_path / "new")))["error"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training_data__source": "parquet", "training_data__path": "no.parquet"},
            ("training_data", "check the path"),
        ),
        ({"training_data__label_columns": ["species"]}, ("species", "correct label_columns")),
        ({"training_data__where": {"label": ["eleven"]}}, ("training_data: expected images, found none",)),
        ({"training_data__where": {"label": ["1"]}}, ("at least 2 labels, found 1",)),
        ({"training_data__split": {"count": 3000, "part": "kept"}}, ("found none that pass where and split",)),
        (
            {"training_data__where": {"label": tiny.DIGITS[:5], "instance": {"max": 0}}},
            ("found 5 labels with one (such as 0, 1, 2)", "min_per_label = 2"),
        ),
        (
            {"training_data__where": {"label": tiny.DIGITS[:5], "instance": {"max": 81}}},
            ("expected no images of the training, found 10", 'by = "content"'),
        ),
        ({"evaluation__protocol": "open_set"}, ("expected no identities of the training, found 5", "closed_set")),
        (
            {"evaluation__queries__where": {"label": ["0", "1"], "instance": {"min": 5, "max": 6}}},
            ("expected none that a generation was trained on, found 4 in g001",),
        ),
        ({"evaluation__slices": ["alphabet"]}, ("evaluation.queries", "alphabet")),
        (
            {"evaluation__queries__max_per_label": 1},
            ("queries with an image of their label in the gallery, found none",),
        ),
        ({"training__preprocessing__mean": [127.0]}, ("0 to 255 scale",)),
        ({"schedule__cron": "every day"}, ("cron",)),
        ({"schedule__timezone": "Vienna"}, ("Europe/Vienna",)),
        ({"cluster__address": "my cluster"}, ("cluster.address", "http://head:8265")),
        ({"training__backbone": "resnet51"}, ("resnet51", "did you mean 'resnet50'?")),
        ({"training__backbone": "no_such_module:build"}, ("no_such_module", "PYTHONPATH")),
        ({"training__initial_weights": "gone.safetensors"}, ("initial_weights", "gone.safetensors")),
        ({"training__width": 8}, ("expected a width of at least 16, that of g001", "raise width")),
        ({"training__head": {"name": "simplex"}}, ("the fixed simplex from the first generation on", "another head")),
        ({"training__epoch": 1}, ("unknown key training.epoch", "did you mean 'epochs'?")),
    ],
)
def test_mistake_is_an_error_with_a_remedy(checked, changes, words):
    errors = checked(**changes)["error"]
    assert len(errors) >= 1
    for word in words:
        assert any(word in line for line in errors), (word, errors)
    assert all("\n" not in line for line in errors)


def test_several_mistakes_are_found_at_once(checked):
    errors = checked(training__backbone="resnet51", evaluation__protocol="open_set", cluster__address="?")["error"]
    assert len(errors) == 3


def test_addresses_that_are_right(checked):
    for address in ("local", "auto", "http://head:8265", "https://ray.example.org", "10.0.0.1:6379"):
        assert checked(cluster__address=address)["error"] == []


def test_split_by_content_is_followed_without_decoding(checked, tmp_path, monkeypatch):
    from graceful.training import images

    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded"))
    place = folder_of(tmp_path, a=30, b=30, c=1)
    split = {"share": 0.3, "by": "content"}
    data = {"source": "folder", "path": place, "min_per_label": 2}
    found = checked(
        training_data={**data, "split": {**split, "part": "kept"}},
        evaluation__queries={**data, "split": {**split, "part": "held_out"}},
        evaluation__cluster=None,
    )
    assert found["error"] == []
    kept = next(line for line in found["ok"] if line.startswith("training_data"))
    assert " images of 2 labels" in kept
    shared = checked(
        training_data={**data, "split": {**split, "part": "kept"}}, evaluation__queries=data, evaluation__cluster=None
    )
    assert "expected no images of the training" in shared["error"][0]


def test_what_is_not_cheap_is_said_to_be_before_the_split(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_HASHED_IMAGES", 10)
    place = folder_of(tmp_path, a=30, b=30)
    data = {"source": "folder", "path": place, "split": {"share": 0.3, "by": "content", "part": "kept"}}
    found = checked(training_data=data)
    assert any("training_data: before the split by content, 60 images" in line for line in found["ok"])


def test_missing_file_of_a_csv_is_named(checked, tmp_path):
    place = folder_of(tmp_path, a=3, b=3)
    rows = [f"{label}/{number}.png,{label}" for label in "ab" for number in range(4)]
    Path(place, "labels.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    errors = checked(training_data={"source": "csv", "path": f"{place}/labels.csv"})["error"]
    assert "found 2 missing" in errors[0]
    assert "a/3.png" in errors[0]


def test_full_disk_is_an_error(checked, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert any("disk" in line and "free some space" in line for line in checked()["error"])


# Networks -------------------------------------------------------------------------------------------------------------


def test_factory_is_found_in_this_folder_without_being_run(tmp_path, monkeypatch, checked):
    (tmp_path / "mine.py").write_text("raise RuntimeError('ran')\ndef build(): ...\nother = build\n")
    (tmp_path / "stars.py").write_text("from os.path import *\n")
    (tmp_path / "half.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine:build", "mine:other", "stars:join", "json:load"):
        assert problem_with_factory(name) is None, name
    assert problem_with_factory("mine:biuld")[1] == "did you mean 'build'?"
    assert "line 1" in problem_with_factory("half:build")[0]
    assert "found none" in problem_with_factory("nobody_has_this:build")[0]
    assert "package.module:factory" in problem_with_factory("mine")[0]
    assert checked(adopt="mine:build")["error"] == []
    assert "encoder mine:biuld" in checked(adopt="mine:biuld")["error"][0]


def test_names_of_torchvision_are_read_as_torchvision_lists_them():
    import torchvision

    assert torchvision_models() == set(torchvision.models.list_models())
    assert problem_with_network("vit_b_16") is None
    assert problem_with_network("small_cnn") is None


def test_checking_loads_nothing_heavy(checked, workspace_root):
    checked(training__backbone="resnet18", training__head={"name": "arcface"})
    program = (
        "import sys; from graceful.flows.commands.check import check_workspace; "
        f"found = check_workspace({str(workspace_root)!r}); assert len(found) > 4, found; "
        "print([name for name in ('torch', 'torchvision', 'ray', 'prefect', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "[]"


# Command line ---------------------------------------------------------------------------------------------------------


def test_command_exits_with_2_on_errors_and_prints_them_as_json_too(checked, workspace_root):
    checked()
    assert CliRunner().invoke(app, ["check", "--root", str(workspace_root)]).exit_code == 0
    checked(cluster__address="my cluster")
    said = CliRunner().invoke(app, ["check", "--root", str(workspace_root)])
    assert said.exit_code == 2
    assert "1 errors" in said.stdout
    document = CliRunner().invoke(app, ["check", "--root", str(workspace_root), "--json"])
    assert document.exit_code == 2
    errors = [entry for entry in json.loads(document.stdout)["findings"] if entry["level"] == "error"]
    assert [set(entry) for entry in errors] == [{"level", "what", "remedy"}]


def test_update_is_refused_before_anything_starts(checked, workspace_root):
    checked(cluster__address="my cluster", training__backbone="resnet51")
    before = tiny.end_state(workspace_root)
    refused = CliRunner().invoke(app, ["update", "--root", str(workspace_root)])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "resnet50" in refused.stderr
    assert "(and 1 more: run 'graceful check')" in refused.stderr
    assert "Starting" not in refused.stdout
    assert tiny.end_state(workspace_root) == before
    with pytest.raises(CheckFailedError):
        require_checked(str(workspace_root))
