"""Everything that can fail before a training, looked at in a few seconds: nothing heavy is imported, nothing changed.

No image is decoded. Files are hashed where that is cheap (few, local and small); where it is not, a split by content
cannot be followed and what depends on it is said to be unknown.
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError
from graceful.files import exists, is_remote
from graceful.flows.commands.networks import problem_with_encoder, problem_with_factory, problem_with_network
from graceful.flows.settings.config import ClusterConfig, ConfigError, PipelineConfig, load_workspace_config
from graceful.flows.settings.variants import VariantConfig
from graceful.flows.store.evaluation_set import EvaluationConfig
from graceful.flows.store.leaks import training_manifests
from graceful.flows.store.workspace import WorkspaceMissingError, open_workspace, require_workspace
from graceful.training.combinations import IncompatibleParentError, check_combination
from graceful.training.datasets import DatasetConfig, list_images
from graceful.training.generation import read_card
from graceful.training.images import read_payloads, split_source
from graceful.training.texts import load_texts

Level = Literal["error", "warning", "ok"]
_HASHED_BYTES = 256 * 2**20
_HASHED_IMAGES = 20_000
_MIB = 2**20
_SPARE = 200 * _MIB
_SPLIT = 'split = { share = 0.2, by = "content", part = "kept" } for training, part = "held_out" for the evaluation'


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` says what to do; empty when all is well."""

    level: Level
    what: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """As one line."""
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class CheckFailedError(ConfigError):
    """A check before an update found what would make it fail."""


@dataclass(frozen=True)
class _Set:
    """Images of one data set. `digests` are None where the files were not hashed; `exact`: after its whole split."""

    name: str
    config: DatasetConfig
    sources: list[str]
    labels: NDArray[np.str_]
    digests: list[str] | None
    exact: bool

    def identifiers(self) -> list[str]:
        """What tells images apart: content, or the place where that is not known."""
        return self.sources if self.digests is None else self.digests


def check_workspace(root: str, adopt: str | None = None) -> list[Finding]:
    """Look at configuration, data, evaluation, network, cluster and disk of a workspace; `adopt` names an encoder."""
    try:
        require_workspace(root)
        config = load_workspace_config(root)
    except (WorkspaceMissingError, ConfigError) as error:
        return [_failure(error)]
    found = [Finding("ok", "configuration: read, every key is known")]
    hashes: dict[str, str] = {}
    sets: dict[str, _Set] = {}
    for name, part in _data_sets(config).items():
        try:
            sets[name] = _look(name, part, hashes)
        except (GracefulError, ValueError, OSError) as error:
            found.append(_failure(error, f"{name}: "))
    complete = len(sets) == len(_data_sets(config))
    looks: list[Callable[[], Iterator[Finding]]] = [
        *[partial(_check_set, part) for part in sets.values()],
        *([partial(_check_evaluation, config, sets)] if complete else []),
        *(
            [partial(_check_earlier_trainings, root, sets["evaluation.queries"])]
            if "evaluation.queries" in sets
            else []
        ),
        partial(_check_network, root, config, adopt),
        partial(_check_variants, config),
        partial(_check_cluster, config.cluster),
        partial(_check_disk, root, config, sets),
    ]
    for look in looks:
        try:
            found += look()
        except (GracefulError, OSError) as error:
            found.append(_failure(error))
    return found


def require_checked(root: str, adopt: str | None = None) -> None:
    """Raise CheckFailedError, with the first error and how many there are, unless an update may start."""
    require_workspace(root)
    errors = [finding for finding in check_workspace(root, adopt) if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: run 'graceful check')" if len(errors) > 1 else ""
        raise CheckFailedError(f"{errors[0].line}{more}")


def _failure(error: Exception, before: str = "") -> Finding:
    what, semicolon, remedy = " ".join(str(error).split()).rpartition("; ")
    return Finding("error", f"{before}{what if semicolon else remedy}", remedy if semicolon else "")


# Data -----------------------------------------------------------------------------------------------------------------


def _data_sets(config: PipelineConfig) -> dict[str, DatasetConfig]:
    sets = {"training_data": config.training_data, "evaluation.queries": config.evaluation.queries}
    if config.evaluation.gallery is not None:
        sets["evaluation.gallery"] = config.evaluation.gallery
    wanted = {name for name in (*config.evaluation.slices, config.evaluation.cluster) if name}
    queries = config.evaluation.queries
    attributes = tuple(dict.fromkeys([*queries.attributes, *sorted(wanted)]))
    return sets | {"evaluation.queries": queries.model_copy(update={"attributes": attributes})}


def _look(name: str, config: DatasetConfig, hashes: dict[str, str]) -> _Set:
    """List a data set, and hash its images unless that takes long. `hashes` remembers those of other data sets."""
    if config.source in ("digits", "glyphs") and not all(map(exists, config.paths)):
        return _Set(name, config, [], np.array([], np.str_), None, False)  # it is written by the update
    sources, labels = list_images(config)
    by_content = config.split is not None and config.split.by == "content"
    unknown = [source for source in sources if source not in hashes]
    if not _is_cheap(sources):
        return _Set(name, config, sources, labels, None, not by_content)
    for source, payload in zip(unknown, read_payloads(unknown, {}), strict=True):
        hashes[source] = hashlib.sha256(payload).hexdigest()
    digests = [hashes[source] for source in sources]
    if by_content and config.split is not None:
        side = np.flatnonzero([config.split.takes(digest) for digest in digests])
        labels = labels[side]
        counts = Counter(labels.tolist())
        kept = np.array([counts[label] >= (config.min_per_label or 1) for label in labels], bool)
        side, labels = side[kept], labels[kept]
        sources, digests = [sources[i] for i in side], [digests[i] for i in side]
    return _Set(name, config, sources, labels, digests, config.max_per_label is None or not by_content)


def _is_cheap(sources: Sequence[str]) -> bool:
    if len(sources) > _HASHED_IMAGES or any(map(is_remote, sources[:1])):
        return False
    places = {split_source(source)[0] for source in sources}
    return sum(os.path.getsize(place) for place in places if os.path.isfile(place)) <= _HASHED_BYTES


def _check_set(images: _Set) -> Iterator[Finding]:
    name, labels = images.name, Counter(images.labels.tolist())
    if images.config.source in ("digits", "glyphs") and not all(map(exists, images.config.paths)):
        yield Finding("ok", f"{name}: {images.config.source}, written when they are first used")
        return
    if not images.sources:
        yield Finding("error", f"{name}: expected images, found none that pass where and split", _where_from(images))
        return
    gone = [source for source in images.sources if split_source(source)[1] is None and not exists(source)]
    if gone:
        share = len(gone) / len(images.sources)
        level: Level = "error" if share > images.config.max_unreadable_share else "warning"
        yield Finding(
            level, f"{name}: expected every image, found {len(gone)} missing (such as {gone[0]})", "restore them"
        )
    before = "" if images.exact else "before the split by content, "
    yield Finding("ok", f"{name}: {before}{len(images.sources):,} images of {len(labels):,} labels")
    if name != "training_data":
        return
    if len(labels) < 2:
        yield Finding(
            "error", f"{name}: expected at least 2 labels, found {len(labels)}", "add images of another label"
        )
    alone = sorted(label for label, count in labels.items() if count == 1)
    if alone:
        yield Finding(
            "error",
            f"{name}: expected at least 2 images of each label, found {len(alone)} labels with one (such as "
            f"{', '.join(alone[:3])})",
            "add images, or leave these labels out with min_per_label = 2",
        )


def _where_from(images: _Set) -> str:
    if images.config.source == "folder":
        return "the sub-folders of an image folder are the labels; check path, where and split"
    return "check path, where and split"


def _check_evaluation(config: PipelineConfig, sets: dict[str, _Set]) -> Iterator[Finding]:
    training, queries = sets["training_data"], sets["evaluation.queries"]
    gallery = sets.get("evaluation.gallery", queries)
    if not (training.sources and queries.sources and gallery.sources):
        return
    for part in {id(part): part for part in (queries, gallery)}.values():
        yield from _check_overlap(config, training, part)
    if not (queries.exact and gallery.exact):
        return
    found = Counter(gallery.labels.tolist())
    least = 1 if gallery is not queries else 2
    lost = sum(found[label] < least for label in queries.labels.tolist())
    if lost == len(queries.sources):
        yield Finding(
            "error", "evaluation: expected queries with an image of their label in the gallery, found none",
            "hold out at least two images of a label, or give it a gallery",
        )  # fmt: skip
        return
    if lost:
        yield Finding(
            "warning", f"evaluation: {lost:,} of {len(queries.sources):,} queries have no image of their label to find",
            "min_per_label = 2 leaves them out",
        )  # fmt: skip
    yield _evidence(config, len(queries.sources) - lost, len(set(queries.labels.tolist())))


def _check_overlap(config: PipelineConfig, training: _Set, part: _Set) -> Iterator[Finding]:
    if config.evaluation.protocol == "open_set":
        shared = sorted(set(training.labels.tolist()) & set(part.labels.tolist()))
        noun, examples = "identities", ", ".join(shared[:3])
        remedy = f'make them differ with where, or take protocol = "closed_set" and {_SPLIT}'
    else:
        if not (training.exact and part.exact) or config.evaluation.shared_images == "drop_from_training":
            return
        known = dict(zip(training.identifiers(), training.sources, strict=True))
        shared = [key for key in part.identifiers() if key in known] if _comparable(training, part) else []
        noun, examples = "images", ", ".join(known[key] for key in shared[:3])
        remedy = f'{_SPLIT}; or shared_images = "drop_from_training"'
    if shared:
        found = f"{part.name}: expected no {noun} of the training, found {len(shared):,} (such as {examples})"
        yield Finding("error", found, remedy)


def _comparable(one: _Set, other: _Set) -> bool:
    return (one.digests is None) == (other.digests is None)


def _evidence(config: PipelineConfig, num_queries: int, num_identities: int) -> Finding:
    from graceful.flows.settings.inspection import needed_queries
    from graceful.flows.settings.starter import evidence_line

    needed = needed_queries(config.policy, num_queries / max(num_identities, 1))
    enough = needed.for_flips is None or (num_queries >= needed.for_flips and num_identities >= needed.identities)
    line = evidence_line(num_queries, num_identities, needed)
    return Finding(
        "ok" if enough else "warning", line.rstrip("."), "" if enough else "add images, or set limits that can be shown"
    )


def _check_earlier_trainings(root: str, queries: _Set) -> Iterator[Finding]:
    """Queries that an earlier generation was trained on, by content, or by place where that is not known."""
    if not queries.exact:
        return
    for generation, manifest in training_manifests(open_workspace(root)):
        trained = set(manifest.sources if queries.digests is None else manifest.content_sha256)
        leaked = [source for key, source in zip(queries.identifiers(), queries.sources, strict=True) if key in trained]
        if leaked:
            yield Finding(
                "error",
                f"evaluation.queries: expected none that a generation was trained on, found {len(leaked):,} in "
                f"{generation} (such as {leaked[0]})",
                'split = { share = 0.2, by = "content", ... } keeps every image on its side when data grow',
            )


# Network, cluster, disk -----------------------------------------------------------------------------------------------


def _check_network(root: str, config: PipelineConfig, adopt: str | None) -> Iterator[Finding]:
    training = config.training
    if adopt is not None:
        problem = problem_with_encoder(adopt)
        name = f"encoder {adopt}"
    else:
        problem, name = problem_with_network(training.backbone.name), f"training.backbone {training.backbone.name}"
    if problem is not None:
        yield Finding("error", f"{name}: {problem[0]}", problem[1])
        return
    yield Finding("ok", f"{name}: there")
    weights = training.initial_weights
    if adopt is None and weights and weights.endswith((".safetensors", ".pt", ".pth", ".bin")) and not exists(weights):
        yield Finding(
            "error", f"training.initial_weights: expected a file, found none (at {weights})", "check the path"
        )
    if adopt is None:
        yield from _check_parent(root, config)


def _check_variants(config: PipelineConfig) -> Iterator[Finding]:
    for variant, described in config.variants.items():
        if described.backbone is None:
            yield from _check_text_tower(variant, described, config.evaluation)
            continue
        name = f"variants.{variant}.backbone {described.backbone.name}"
        problem = problem_with_network(described.backbone.name)
        yield (
            Finding("ok", f"{name}: there")
            if problem is None
            else Finding("error", f"{name}: {problem[0]}", problem[1])
        )


def _check_text_tower(name: str, described: VariantConfig, evaluation: EvaluationConfig) -> Iterator[Finding]:
    """Whether its factory is there, and its texts look for what the evaluation gallery has."""
    assert described.factory is not None
    assert described.queries is not None
    problem = problem_with_factory(described.factory)
    named = f"variants.{name}.factory {described.factory}"
    yield (
        Finding("ok", f"{named}: there") if problem is None else Finding("error", f"{named}: {problem[0]}", problem[1])
    )
    named = f"variants.{name}.queries"
    try:
        texts = load_texts(described.queries)
    except (GracefulError, ValueError, OSError) as error:
        yield _failure(error, f"{named}: ")
        return
    gallery = evaluation.gallery or evaluation.queries
    if gallery.source in ("digits", "glyphs") and not all(map(exists, gallery.paths)):
        yield Finding("ok", f"{named}: {len(texts):,} texts")
        return
    known = set(list_images(gallery)[1].tolist())
    lost = sum(label not in known for label in texts.labels.tolist())
    if lost == len(texts):
        first = ", ".join(repr(label) for label in sorted(known)[:3])
        yield Finding(
            "error", f"{named}: expected labels of the evaluation gallery, such as {first}, found none",
            "correct label_columns",
        )  # fmt: skip
    elif lost:
        line = f"{named}: {lost:,} of {len(texts):,} texts have no image of their label to find"
        yield Finding("warning", line, "leave them out with where")
    else:
        yield Finding("ok", f"{named}: {len(texts):,} texts of {len(set(texts.labels.tolist())):,} labels")


def _check_parent(root: str, config: PipelineConfig) -> Iterator[Finding]:
    workspace = open_workspace(root)
    champion = workspace.registry.serving().champion
    if champion is None:
        return
    card, training = read_card(workspace.generation_uri(champion)), config.training
    if training.start == "parent" and card.origin == "trained":
        for noun, same in (
            ("backbone", card.backbone == training.backbone),
            ("preprocessing", training.preprocessing.takes_weights_of(card.preprocessing)),
        ):
            if not same:
                yield Finding(
                    "error",
                    f"training.{noun}: expected that of {champion}, from which the training starts, found another",
                    'set start = "scratch" and interpolation = 0, or take the old one',
                )
                return
    try:
        check_combination("the next generation", training, card if card.origin == "trained" else None, [card])
    except IncompatibleParentError as error:
        problem, _, remedy = str(error).partition("; ")
        yield Finding("error", problem, remedy)


def _check_cluster(cluster: ClusterConfig) -> Iterator[Finding]:
    address = cluster.address
    if address not in ("local", "auto") and not re.fullmatch(
        r"(https?://)?[\w.\[\]:-]+:\d{1,5}/?|https?://[\w.-]+/?", address
    ):
        yield Finding(
            "error", f"cluster.address: expected local, auto, host:port or http://head:8265, found {address!r}",
            "correct it",
        )  # fmt: skip
        return
    cores, wanted = os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker
    if address == "local" and wanted > cores:
        yield Finding("warning", f"cluster: {wanted} cores for training on a machine with {cores}", "lower num_workers")
    yield Finding("ok", f"cluster.address: {address}")


def _check_disk(root: str, config: PipelineConfig, sets: dict[str, _Set]) -> Iterator[Finding]:
    """Room for decoded images, vectors and weights of one update, roughly."""
    if is_remote(root):
        return
    num_images = sum(len(part.sources) for part in sets.values())
    p, width = config.training.preprocessing, config.training.width
    needed = num_images * (p.channels * p.image_size**2 + 8 * width)
    free = shutil.disk_usage(root).free
    room = f"disk: {free // _MIB:,} MiB free (at {root}), at least {-(-needed // _MIB):,} needed for an update"
    if free < needed:
        yield Finding("error", room, "free some space, or put the workspace elsewhere")
    elif free < needed + _SPARE:
        yield Finding("warning", room, "weights, logs and indexes come on top; free some space")
    else:
        yield Finding("ok", room)
