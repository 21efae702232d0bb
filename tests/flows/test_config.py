"""The configuration: strict, relative to its file, complete in the template, and stable in its digest."""

import inspect
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graceful.flows.settings.config import ConfigError, PipelineConfig, load_config, load_workspace_config
from graceful.flows.settings.template import TEMPLATE
from graceful.training.choices import CONSTRAINT_PARAMETERS, HEAD_NAMES, PER_IMAGE
from graceful.training.generation import BackboneSpec
from tests.flows import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    """A configuration that is right."""
    return tiny.write_config(tmp_path, tmp_path / "digits.parquet")


def load(path: Path, **changes) -> PipelineConfig:
    return load_config(path, str(path.parent), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainng", "training"),
        ("training.epoch", "epochs"),
        ("training.backbone.nam", "name"),
        ("evaluation.queries.label_column", "label_columns"),
        ("evaluation.protocl", "protocol"),
        ("policy.max_nfrr", "max_nfr"),
        ("cluster.num_worker", "num_workers"),
        ("gallery.probation_hour", "probation_hours"),
        ("schedule.cronn", "cron"),
        ("training.augmentation.rotation", "rotation_degrees"),
    ],
)
def test_unknown_key_names_the_nearest(path, key, nearest):
    with pytest.raises(ConfigError, match=rf"unknown key {key} .*; did you mean '{nearest}'\?"):
        load(path, **{key: 1})


def test_unknown_key_that_is_like_nothing_lists_those_that_exist(path):
    with pytest.raises(
        ConfigError,
        match=r"unknown key schedule\.zzzzqq .*; known keys: cron, every_minutes, overlap, quiet_minutes, "
        "timezone, watch_minutes",
    ):
        load(path, schedule__zzzzqq=1)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.epochs", 0, "training.epochs: .*greater than or equal to 1, found 0"),
        ("training.epochs", "many", "training.epochs: .*valid integer.*'many'"),
        ("training.head", {"name": "softmaxx"}, "additive_margin"),
        ("training.constraints", [{"name": "bctt"}], "bct"),
        ("gallery.order", "newest", "'random', 'oldest_generation' or 'class_distance'"),
        ("policy.fractions", [0.5, 1.0], "rise from 0 to 1"),
        ("name", "No Spaces", "name: "),
        ("cluster.object_store_mib", 1, "cluster.object_store_mib"),
        ("cluster", {"num_workers": 500}, "cluster: training on 500 workers: .*raise batch_size, or use fewer workers"),
        ("cluster", {"num_workers": 2, "min_workers": 3}, "cluster: expected min_workers of at most num_workers = 2"),
        ("schedule.cron", "every day", "schedule.cron: cron: expected five fields .*'every day'"),
        ("schedule.cron", "0 24 * * *", "expected hour from 0 to 23, found '24'"),
        ("schedule.cron", "0 3 * * 8", "day of the week"),
        ("schedule.cron", "0 3 * * 1 0", "five fields"),
        ("schedule.cron", "*/0 3 * * *", "minute"),
        ("schedule.timezone", "Vienna", "schedule.timezone: .*did you mean 'Europe/Vienna'"),
        ("schedule.timezone", "../etc/passwd", "timezone: expected a name"),
        ("training.preprocessing.mean", [127.0], "0 to 255 scale.*divide mean and std by 255"),
        ("training.constraints", [{"name": "ract", "parameters": {"scale": 1.0}}], r"\['tau', 'hardest'\]"),
    ],
)
def test_wrong_value_names_key_rule_and_value(path, key, value, words):
    with pytest.raises(ConfigError, match=words) as raised:
        load(path, **{key: value})
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "cron", ["0 3 * * 1", "*/15 22-2/2 1,15 jan-mar MON", "@daily", "0 0 L * 7", "0 0 ? * 5#2", "0 0 * * L5"]
)
def test_cron_expressions_that_are_right(path, cron):
    assert load(path, schedule__cron=cron, schedule__timezone="Europe/Vienna").schedule.cron == cron


def test_backbone_may_be_a_name_alone(path):
    assert load(path, training__backbone="resnet18").training.backbone == BackboneSpec(name="resnet18")


def test_choices_are_the_heads_and_constraints_that_exist():
    from graceful.training.constraints import CONSTRAINTS, TASK_CHANGES, takes
    from graceful.training.heads import HEADS

    assert sorted(HEAD_NAMES) == sorted(HEADS)
    parameters = {
        name: list(inspect.signature(build).parameters) for name, build in {**CONSTRAINTS, **TASK_CHANGES}.items()
    }
    assert parameters == {name: list(known) for name, known in CONSTRAINT_PARAMETERS.items()}
    assert sorted(PER_IMAGE) == sorted(name for name, build in CONSTRAINTS.items() if takes(build(), "weights"))


def test_unedited_template_of_a_workspace_says_what_to_do(tmp_path):
    (tmp_path / "graceful.toml").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match=r"unedited template .*; run 'graceful init .* --from"):
        load_workspace_config(str(tmp_path))
    (tmp_path / "graceful.toml").write_text(TEMPLATE.replace("epochs = 6", "epochs = 7"))
    assert load_workspace_config(str(tmp_path)).training.epochs == 7


def test_missing_key_is_named(path):
    tables = tiny.settings(Path("digits.parquet"), {"evaluation.protocol": None})
    path.write_text("".join(f"{name} = {tiny.inline(value)}\n" for name, value in tables.items()))
    with pytest.raises(ConfigError, match=r"key evaluation.protocol is missing .*add it"):
        load(path)


def test_file_that_is_no_toml(path):
    path.write_text("[training\nepochs = 3")
    with pytest.raises(ConfigError, match=rf"reading the configuration: .*\({path}\)"):
        load(path)


def test_relative_paths_count_from_the_file_and_the_root_is_filled_in(path, monkeypatch):
    assert load(path, training_data__path="data/a.parquet").training_data.path == str(path.parent / "data/a.parquet")
    assert load(path, training_data__path="../a.parquet").training_data.path == str(path.parent.parent / "a.parquet")
    assert load(path, training_data__path="{root}/a").training_data.path == str(path.parent / "a")
    assert load(path, training_data__path="s3://bucket/a").training_data.path == "s3://bucket/a"
    several = load(path, training_data__path=["a", "/b"])
    assert several.training_data.path == (str(path.parent / "a"), "/b")


def test_variables_are_taken_from_the_environment(path, monkeypatch):
    monkeypatch.setenv("GRACEFUL_DATA", "/somewhere")
    assert load(path, training_data__path="$GRACEFUL_DATA/train").training_data.path == "/somewhere/train"
    monkeypatch.delenv("GRACEFUL_DATA")
    with pytest.raises(ConfigError, match=r"path = '\$GRACEFUL_DATA/train' needs .* GRACEFUL_DATA; set it"):
        load(path, training_data__path="$GRACEFUL_DATA/train")


def test_name_of_initial_weights_stays_a_name_unless_it_is_a_file(path):
    assert load(path, training__initial_weights="DEFAULT").training.initial_weights == "DEFAULT"
    (path.parent / "w.safetensors").touch()
    assert load(path, training__initial_weights="w.safetensors").training.initial_weights == str(
        path.parent / "w.safetensors"
    )


def test_digest_covers_what_shapes_a_generation_and_its_decision_and_nothing_else(path):
    digest = load(path).digest()
    assert load(path).digest() == digest
    for name, value in {
        "cluster__num_workers": 4, "schedule__cron": "0 1 * * *", "name": "other", "cluster__address": "auto",
    }.items():  # fmt: skip
        assert load(path, **{name: value}).digest() == digest, name
    for name, value in {
        "training__epochs": 9, "policy__max_nfr": 0.5, "gallery__order": "oldest_generation", "train_paragon": True,
        "prices__value_per_point_day": 2.0, "training_data__seed": 3,
    }.items():  # fmt: skip
        assert load(path, **{name: value}).digest() != digest, name


@given(st.integers(1, 50), st.sampled_from(["random", "oldest_generation", "class_distance"]), st.floats(0, 1))
def test_configuration_survives_being_written_and_read(tmp_path_factory, epochs, order, margin):
    path = tiny.write_config(
        tmp_path_factory.mktemp("config"), Path("/d.parquet"),
        {"training.epochs": epochs, "gallery.order": order, "policy.quality_margin_points": margin},
    )  # fmt: skip
    config = load_config(path, "/root")
    again = PipelineConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert again.digest() == config.digest()


def test_template_is_a_valid_configuration_with_the_defaults_it_claims(tmp_path):
    path = tmp_path / "graceful.toml"
    path.write_text(TEMPLATE)
    config = load_config(path, str(tmp_path))
    assert config.policy == PipelineConfig.model_fields["policy"].default
    assert config.gallery == PipelineConfig.model_fields["gallery"].default
    assert config.schedule.cron == PipelineConfig.model_fields["schedule"].default.cron
    assert {"training_data", "evaluation", "training", "policy", "gallery", "cluster"} <= set(tomllib.loads(TEMPLATE))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_valid_and_replay_a_history(example, tmp_path, monkeypatch):
    monkeypatch.setenv("GRACEFUL_DATA", str(tmp_path))
    config = load_config(example, str(tmp_path))
    assert config.replay is not None
    assert list(config.replay.counts) == sorted(set(config.replay.counts))


def test_every_key_says_what_it_means():
    def undescribed(model, place):
        from graceful.flows.settings.config import _model_of

        for name, field in model.model_fields.items():
            inner = _model_of(field.annotation)
            if not field.description and inner is None:
                yield f"{place}{name}"
            if inner is not None:
                yield from undescribed(inner, f"{place}{name}.")

    assert list(undescribed(PipelineConfig, "")) == []
