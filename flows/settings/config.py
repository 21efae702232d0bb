"""The configuration of a pipeline: the stages' config models in one strict TOML file.

`$NAME` in a text value is taken from the environment and `{root}` is the workspace; relative paths count from the
folder of the file, which may lie in an object store. An unknown key is an error that names the nearest known one.
`digest` is part of an update's key.
"""

import difflib
import hashlib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from graceful.errors import GracefulError
from graceful.evaluation.policy import Consumer, RolloutPolicy
from graceful.files import is_remote, join, read_bytes
from graceful.flows.settings.canary import CanaryConfig
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.flows.settings.notify import NotifyConfig
from graceful.flows.settings.rollout import RolloutConfig
from graceful.flows.settings.schedule import ScheduleConfig
from graceful.flows.settings.template import TEMPLATE
from graceful.flows.settings.variants import VariantConfig, check_variants
from graceful.flows.store.evaluation_set import EvaluationConfig
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.index_choice import SearchConfig
from graceful.indexing.planner import ORDERS
from graceful.training.datasets import DatasetConfig
from graceful.training.job import TrainingConfig, check_shares
from graceful.training.trackers import TrackersConfig

CONFIG_FILE = "graceful.toml"
"""Name of a workspace's configuration, in the workspace."""

_PATH_KEYS = ("path", "set", "initial_weights")
_VARIABLE = re.compile(r"\$([A-Z][A-Z0-9_]*)")


M = TypeVar("M", bound=BaseModel)
Control = Literal["from_scratch", "fine_tuned", "fine_tuned_initialised"]
"""An unconstrained chain that others have."""


class ConfigError(GracefulError, ValueError):
    """A configuration that cannot be used; the message names key, problem and remedy."""

    exit_code = 2


class GalleryConfig(BaseModel):
    """How the gallery is re-indexed and served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["random", "oldest_generation", "class_distance"] = Field(
        default="random", description="Which items a partial re-index embeds first."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random order.")
    wave_rows: int = Field(default=16_384, ge=1, description="Items of one wave; a newer plan takes over between two.")
    unit_rows: int = Field(default=4_096, ge=1, description="Images that one worker embeds at a time.")
    probation_hours: float = Field(
        default=168.0, ge=0, description="How long after a promotion ingest writes for the previous generation too."
    )
    supported_query_generations: tuple[str, ...] = Field(
        default=(), description="Older generations whose clients still query."
    )
    collect_after_update: bool = Field(
        default=True,
        description="After an update drop vectors that nobody can read, as 'graceful collect'.",
    )
    max_mix_drift: float = Field(
        default=0.02, ge=0, le=1, description="Share of the gallery that may change owner between evidence and move."
    )
    max_hidden_items: int = Field(
        default=0, ge=0, description="Items that can be read now and may be unreadable after a promotion."
    )


class ClusterConfig(BaseModel):
    """Where Ray runs and how much of it an update takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(
        default="local",
        description="local: a cluster for this update alone; auto: the cluster that this machine belongs to; "
        "http://head:8265: submit the work as Ray jobs.",
    )
    num_workers: int = Field(default=1, ge=0, description="Training workers; 0 trains without Ray, in this process.")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Fewest training workers to go on with when nodes are lost; by default all are waited for.",
    )
    max_failures: int = Field(default=2, ge=1, description="Losses of training workers that a run recovers from.")
    checkpoint_minutes: float = Field(
        default=10.0, ge=0, description="Minutes between checkpoints within an epoch; there is one after every epoch."
    )
    cpus_per_worker: int = Field(default=1, ge=1, description="Cores, and threads, of a training worker.")
    decoding_processes: int | None = Field(
        default=None,
        ge=1,
        description="Processes of a training worker that decode images which do not fit in training.pixel_memory_mib; "
        "by default its cores but one.",
    )
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="GPUs of a training worker.")
    worker_resources: dict[str, float] = Field(
        default_factory=dict,
        description="Further Ray resources that a training worker takes of its node, such as { spot = 1 }.",
    )
    worker_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray labels of the nodes that training workers run on; '!value' is any other value.",
    )
    embed_workers: int = Field(default=2, ge=0, description="Embedding workers; 0 embeds in this process.")
    embed_gpus_per_worker: float = Field(default=0.0, ge=0, description="GPUs of an embedding worker.")
    embed_resources: dict[str, float] = Field(
        default_factory=dict, description="Further Ray resources that an embedding worker takes of its node."
    )
    embed_labels: dict[str, str] = Field(
        default_factory=dict, description="Ray labels of the nodes that embedding workers run on."
    )
    in_process_below: int = Field(
        default=1_000, ge=0, description="Fewer images than this are embedded without starting Ray."
    )
    object_store_mib: int = Field(default=300, ge=75, description="Ray's object store on a local cluster.")
    deadline_hours: float = Field(default=24.0, gt=0, description="No training or re-index runs longer than this.")


class PricesConfig(BaseModel):
    """What is known about money; throughput and sizes are measured. Unknown terms stay unavailable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed_worker_hours: float | None = Field(default=None, ge=0, description="Worker hours of a re-index of any size.")
    price_per_worker_hour: float | None = Field(default=None, ge=0, description="Price of one worker for one hour.")
    price_per_gib_month: float | None = Field(default=None, ge=0, description="Price of one stored GiB for one month.")
    value_per_point_day: float | None = Field(default=None, ge=0, description="Worth of one point per day of service.")
    days_until_next_generation: float | None = Field(default=None, ge=0, description="Days until the next generation.")


class ReportConfig(BaseModel):
    """What a report shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: bool = Field(
        default=True, description="Small pictures of searches that would be lost; false: names only, for privacy."
    )
    num_flips: int = Field(default=24, ge=0, le=500, description="Lost searches that are shown, the worst first.")
    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Address at which others reach 'graceful serve --http', such as http://search:8080: the flow UI "
        "and notifications link to the reports there.",
    )


class ReplayConfig(BaseModel):
    """A history of generations on growing data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grow_by: str = Field(description="Column of the training data whose values arrive over time.")
    counts: tuple[int, ...] = Field(min_length=1, description="Values visible to each generation, ascending.")
    seed: int | None = Field(default=None, description="Shuffle the values by this seed; by default sorted.")
    gallery: DatasetConfig | None = Field(
        default=None, description="Images of the production gallery; by default the evaluation gallery."
    )
    when_not_served: Literal["keep_champion", "order_backfill"] = Field(
        default="keep_champion",
        description="After HOLD or INCONCLUSIVE: keep the champion, or order a full backfill all the same, as "
        "published chains do, so that every generation becomes a predecessor. The decision is reported as it was made.",
    )
    controls: tuple[Control, ...] = Field(
        default=(), description="Unconstrained chains that are trained and measured beside the history."
    )


_WHERE_IT_RUNS = dict.fromkeys(
    (
        "cluster",
        "schedule",
        "search",
        "endpoint",
        "report",
        "trackers",
        "rollout",
        "canary",
        "notify",
        "replay",
        "name",
    ),
    True,
)


class PipelineConfig(BaseModel):
    """Everything an update of a workspace needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="graceful", pattern=r"^[a-z0-9-]+$", description="Name of the pipeline in the flow UI.")
    training_data: DatasetConfig = Field(description="Images to train on.")
    evaluation: EvaluationConfig = Field(description="Images to decide by.")
    training: TrainingConfig = Field(description="Recipe of a generation.")
    variants: dict[str, VariantConfig] = Field(
        default_factory=dict,
        description="Variants that only query, by name: a table [variants.edge] for each. Every generation that comes "
        "to serve gets them.",
    )
    train_paragon: bool = Field(
        default=False, description="Also train every generation without constraints, to measure gain and tax."
    )
    predecessors: Literal["all", "live"] = Field(
        default="all",
        description="Constrain against every generation that ever served, or live: those whose rows the champion "
        "reads, and those of gallery.supported_query_generations.",
    )
    clusters: ClusteringConfig = Field(default=ClusteringConfig(), description="How photos become people.")
    policy: RolloutPolicy = Field(default=RolloutPolicy(), description="Limits of the decision.")
    gallery: GalleryConfig = Field(default=GalleryConfig(), description="Gallery and re-index.")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="Who has the last word on a decision.")
    canary: CanaryConfig = Field(default=CanaryConfig(), description="How a candidate is watched beside what serves.")
    search: SearchConfig = Field(default=SearchConfig(), description="How searches are answered.")
    endpoint: EndpointConfig = Field(default=EndpointConfig(), description="What the HTTP search endpoint accepts.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="Ray.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="Scheduled retraining.")
    prices: PricesConfig = Field(default=PricesConfig(), description="Prices, where they are known.")
    report: ReportConfig = Field(default=ReportConfig(), description="The report of an update.")
    trackers: TrackersConfig = Field(default=TrackersConfig(), description="Where learning curves go besides.")
    notify: NotifyConfig = Field(default=NotifyConfig(), description="Whom to tell what happens.")
    replay: ReplayConfig | None = Field(default=None, description="A history to replay.")

    @field_validator("training")
    @classmethod
    def _choices_have_a_dev_part(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        evaluation = info.data.get("evaluation")
        if training.needs_dev and evaluation is not None and evaluation.dev is None:
            raise ValueError(
                "interpolation = 'dev', mixture = 'dev', predecessor_weights = 'dual' and patience need "
                "evaluation.dev, such as dev = { share = 0.1 }"
            )
        return training

    @field_validator("variants")
    @classmethod
    def _variants_can_search(cls, variants: dict[str, VariantConfig], info: ValidationInfo) -> dict[str, VariantConfig]:
        if "training" in info.data:
            check_variants(variants, info.data["training"])
        return variants

    @field_validator("policy")
    @classmethod
    def _clusters_can_be_judged(cls, policy: RolloutPolicy, info: ValidationInfo) -> RolloutPolicy:
        clusters = info.data.get("clusters")
        if policy.max_cluster_churn is not None and clusters is not None and not clusters.is_complete:
            raise ValueError("max_cluster_churn needs clusters.threshold, or clusters.method = 'hdbscan'")
        return policy

    @field_validator("cluster")
    @classmethod
    def _every_worker_has_images(cls, cluster: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        if "training" in info.data:
            check_shares(info.data["training"], cluster.num_workers)
        if cluster.min_workers is not None and cluster.min_workers > cluster.num_workers:
            raise ValueError(f"expected min_workers of at most num_workers = {cluster.num_workers}")
        return cluster

    def digest(self) -> str:
        """Digest of what shapes a generation and its decision; where it runs does not, nor what only queries it."""
        without: dict[str, Any] = {**_WHERE_IT_RUNS, "gallery": {"collect_after_update"}, "variants": True}
        if self.policy.max_cluster_churn is None:
            without["clusters"] = True
        shaping = self.model_dump(mode="json", exclude=without)
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path, root: str, overrides: dict[str, Any] | None = None) -> PipelineConfig:
    """Read a TOML file, local or at a URI, strictly. `overrides` maps dotted keys to values.

    Raises:
        ConfigError: naming key, problem and remedy.
    """
    location = str(path) if is_remote(str(path)) else os.path.abspath(path)
    try:
        raw = tomllib.loads(read_bytes(location).decode())
    except FileNotFoundError:
        raise ConfigError(
            f"reading the configuration: expected a file, found none ({path}); see 'graceful init'"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading the configuration: {error} ({path})") from None
    for dotted, value in (overrides or {}).items():
        _set(raw, dotted, value)
    expanded = _expand(raw, os.path.dirname(location), root)
    try:
        return PipelineConfig.model_validate(expanded)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from None


def load_workspace_config(root: str, overrides: dict[str, Any] | None = None) -> PipelineConfig:
    """Read the configuration that lies in a workspace. Raises ConfigError, also where it is the template unedited."""
    if is_unedited(root):
        raise ConfigError(
            f"reading the configuration: expected one about your pictures, found the unedited template (at "
            f"{join(root, CONFIG_FILE)}); run 'graceful init {root} --from <pictures>', or edit it"
        )
    return load_config(join(root, CONFIG_FILE), root, overrides)


def load_supported_clients(root: str) -> tuple[str, ...]:
    """Old generations that a workspace's configuration lets query, whatever else it says. Raises ConfigError."""
    named = _raw_config(root).get("gallery", {}).get("supported_query_generations", ())
    return tuple(str(name) for name in named)


def _raw_config(root: str) -> dict[str, Any]:
    path = join(root, CONFIG_FILE)
    try:
        return tomllib.loads(read_bytes(path).decode())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading the configuration: {error} ({path})") from None


def load_search_config(root: str) -> SearchConfig:
    """Read how a workspace's searches are answered, whatever else its configuration says; defaults where it has none.

    Raises:
        ConfigError: the file cannot be read, or its table `search` is wrong.
    """
    return _table_of(root, "search", SearchConfig)


def load_endpoint_config(root: str) -> EndpointConfig:
    """Read what a workspace's search endpoint accepts, whatever else its configuration says. Raises ConfigError."""
    return _table_of(root, "endpoint", EndpointConfig)


def load_canary_config(root: str) -> CanaryConfig:
    """Read how a workspace watches candidates, whatever else its configuration says. Raises ConfigError."""
    return _table_of(root, "canary", CanaryConfig)


def load_notify_config(root: str) -> tuple[str, NotifyConfig]:
    """The pipeline's name and whom to tell, whatever else a workspace's configuration says. Raises ConfigError."""
    raw = _raw_config(root)
    known = _validated(NotifyConfig, _expand(raw.get("notify", {}), "", root), "notify", join(root, CONFIG_FILE))
    return str(raw.get("name", PipelineConfig.model_fields["name"].default)), known


def load_clustering_config(root: str) -> ClusteringConfig:
    """Read how a workspace's gallery is clustered, whatever else its configuration says. Raises ConfigError."""
    return _table_of(root, "clusters", ClusteringConfig)


def load_consumers(root: str) -> dict[str, Consumer]:
    """Read the consumers of scores that a workspace's configuration names. Raises ConfigError."""
    policy = _raw_config(root).get("policy", {})
    known = {name: value for name, value in policy.items() if name == "thresholds"}
    return _validated(RolloutPolicy, known, "policy", join(root, CONFIG_FILE)).thresholds


def _table_of(root: str, name: str, model: type[M]) -> M:
    return _validated(model, _raw_config(root).get(name, {}), name, join(root, CONFIG_FILE))


def _validated(model: type[M], table: Any, name: str, path: str) -> M:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join([name, *(str(part) for part in problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"reading the configuration: {place}: {message}, found {problem.get('input')!r} ({path})"
        ) from None


def is_unedited(root: str) -> bool:
    """Whether a workspace's configuration is still what 'graceful init' without --from wrote."""
    try:
        return read_bytes(join(root, CONFIG_FILE)) == TEMPLATE.encode()
    except FileNotFoundError:
        return False


def _expand(value: Any, folder: str, root: str, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _expand(inner, folder, root, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, folder, root, key) for inner in value]
    if not isinstance(value, str):
        return value
    text = value.replace("{root}", root)
    for name in _VARIABLE.findall(text):
        if name not in os.environ:
            raise ConfigError(
                f"reading the configuration: {key} = {value!r} needs the environment variable {name}; set it"
            )
        text = text.replace(f"${name}", os.environ[name])
    if key in _PATH_KEYS and "://" not in text and not os.path.isabs(text):
        below = join(folder, text) if is_remote(folder) else os.path.normpath(os.path.join(folder, text))
        return below if key in ("path", "set") or os.path.exists(below) else text
    return text


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *tables, last = dotted.split(".")
    for name in tables:
        raw = raw.setdefault(name, {})
    raw[last] = value


def _explain(error: ValidationError, path: str) -> str:
    # A misspelt key that is required is both missing and unknown: the unknown one is what to correct.
    problem = next((found for found in error.errors() if found["type"] == "extra_forbidden"), error.errors()[0])
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(PipelineConfig, [part for part in problem["loc"][:-1] if isinstance(part, str)])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"reading the configuration: unknown key {place} ({path}); {remedy}"
    if problem["type"] == "missing":
        return f"reading the configuration: key {place} is missing ({path}); add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"reading the configuration: {place}: {message}, found {problem.get('input')!r} ({path})"


def _fields_at(model: type[BaseModel], place: list[str]) -> list[str]:
    """Known keys of the table at a place; parts that are no field (a union's branch) are passed over."""
    for part in place:
        field = model.model_fields.get(part)
        if field is None:
            continue
        inner = _model_of(field.annotation)
        if inner is not None:
            model = inner
    return sorted(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_of(inner)
        if found is not None:
            return found
    return None


assert set(ORDERS) == set(get_args(GalleryConfig.model_fields["order"].annotation))
