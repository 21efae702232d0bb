"""What each command does, as a function from plain values to plain values: the command line and tests call these."""

import hashlib
import os
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from rich.console import Console

from graceful.evaluation.decision import Decision
from graceful.evaluation.policy import RolloutPolicy
from graceful.files import exists, is_remote, join, remove, write_bytes, write_json
from graceful.flows.runtime.flow_ui import FlowProgress
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.search.searcher import GallerySearcher
from graceful.flows.settings.config import (
    CONFIG_FILE,
    ConfigError,
    Control,
    PipelineConfig,
    load_config,
    load_workspace_config,
)
from graceful.flows.store.evaluation_set import evaluation_set_uri, named_in_set
from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation, recompute
from graceful.flows.store.items import ids_below, item_table, settle_ids
from graceful.flows.store.workspace import Workspace, require_workspace
from graceful.flows.update.flow import UpdateResult, run_update
from graceful.flows.update.freeze import FrozenUpdate
from graceful.flows.update.replay import ReplayResult, replay_table, run_replay
from graceful.flows.update.rollout import delete, ingest, rollback
from graceful.flows.update.steps import release_when_due
from graceful.indexing.maintenance import collect, forget
from graceful.training.datasets import DatasetConfig, LabelledImages, load_images, read_manifest
from graceful.training.encoder import adopt as adopt_encoder
from graceful.training.folders import find_source
from graceful.training.generation import ordinal_of


def run_update_flow(
    root: str, console: Console, *, again: bool, adopt: str | None, paragon: bool | None
) -> UpdateResult:
    """Run the update flow in this process."""
    from prefect import flow

    require_workspace(root)
    overrides = {} if paragon is None else {"train_paragon": paragon}
    config = load_workspace_config(root, overrides)

    @flow(name="graceful-update", persist_result=False)
    def update() -> UpdateResult:
        with open_session(root, config, FlowProgress(TerminalProgress(console))) as session:
            adopted = None if adopt is None else adopt_generation(session.workspace, config, adopt)
            return run_update(session, again=again, adopted=adopted)

    return update()


def adopt_generation(workspace: Workspace, config: PipelineConfig, factory: str) -> str:
    """Store an encoder from elsewhere as a generation; the same encoder is stored once."""
    registry = workspace.registry
    for event in registry.events("adopted"):
        if event.payload.get("factory") == factory:
            return event.generation
    ordinal = max([ordinal_of(name) for name in registry.generations()], default=0) + 1
    card = adopt_encoder(
        factory,
        preprocessing=config.training.preprocessing,
        out_uri=join(workspace.root, "generations"),
        ordinal=ordinal,
    )
    registry.record("adopted", generation=card.generation_id, payload={"factory": factory})
    return card.generation_id


def run_replay_flow(
    config_file: Path, root: str | None, console: Console, *, paragon: bool | None = None, controls: bool = False
) -> ReplayResult:
    """Run the replay flow in this process; by default in workspaces/<name of the pipeline>."""
    from prefect import flow

    if root is None:
        named = load_config(config_file, os.path.abspath("workspaces/unnamed"))
        root = os.path.abspath(f"workspaces/{named.name}")
    elif not is_remote(root):
        root = os.path.abspath(root)
    overrides: dict[str, Any] = {} if paragon is None else {"train_paragon": paragon}
    if controls:
        overrides["replay.controls"] = get_args(Control)
    config = load_config(config_file, root, overrides)
    replay_table(config)
    write_bytes(join(root, CONFIG_FILE), config_file.read_bytes())
    final_root = root

    @flow(name="graceful-replay", persist_result=False)
    def replay() -> ReplayResult:
        return run_replay(config, final_root, FlowProgress(TerminalProgress(console)))

    result = replay()
    write_json(join(root, "replay.json"), result.model_dump(mode="json"))
    return result


def workspace_status(root: str) -> dict[str, Any]:
    """Who serves, who owns rows, what is unreadable, what is under way."""
    require_workspace(root)
    workspace = _open(root)
    registry = workspace.registry
    serving = registry.serving()
    decided = registry.events("decided")
    found: dict[str, Any] = {
        "champion": serving.champion,
        "previous": serving.previous,
        "moved_by": serving.moved_by or None,
        "active_plan": serving.active_plan,
        "generations": registry.generations(),
        "items": None,
        "unreadable": None,
        "rows_by_generation": {},
        "newest_decision": decided[-1].payload["outcome"] if decided else None,
        "pending": pending_generation(workspace),
    }
    if serving.champion is not None:
        view = workspace.view(serving.champion)
        found["items"] = view.num_items
        found["unreadable"] = len(view.unreadable())
        found["rows_by_generation"] = view.rows_by_generation()
    else:
        found["items"] = workspace.gallery.view([]).num_items
        found["unreadable"] = found["items"]
    if serving.active_plan is not None:
        plan = registry.plan(serving.active_plan)[0]
        found["plan"] = {"generation": plan.generation, "fraction": plan.fraction, "items": plan.num_items}
    return found


def pending_generation(workspace: Workspace) -> str | None:
    """The candidate that waits for more evidence; the next candidate supersedes it."""
    trained = workspace.registry.generations()
    pending = [event.generation for event in workspace.registry.events("pending")]
    return trained[-1] if trained and trained[-1] in pending else None


def ingest_images(
    root: str,
    images: Sequence[str],
    label: str | None,
    console: Console,
    *,
    prefix: str | None = None,
    may_replace: bool = False,
) -> dict[str, Any]:
    """Ingest images, folders and Parquet files, each an absolute path or a URI. Unreadable images are named.

    Raises: ItemClashError, where an id would belong to two images; nothing is ingested then.
    """
    require_workspace(root)
    config = load_workspace_config(root)
    found = [_find_images(place, label, config.training_data) for place in images]
    tables = [
        item_table(part, ids_below(place, part.sources, prefix)) for place, part in zip(images, found, strict=True)
    ]
    unit = hashlib.sha256(f"{time.time_ns()}/{images}".encode()).hexdigest()[:16]
    with open_session(root, config, TerminalProgress(console)) as session:
        items = settle_ids(pa.concat_tables(tables), session.workspace.gallery.latest_items(), replace=may_replace)
        release_when_due(session)
        with session.progress.track("embedding", items.num_rows) as advance:
            result, reports = ingest(
                session.workspace,
                items,
                unit=unit,
                supported=config.gallery.supported_query_generations,
                unit_rows=config.gallery.unit_rows,
                on_rows=advance,
            )
    unreadable = [entry for part in found for entry in part.unreadable]
    return {
        "added": result.added,
        "changed": result.changed,
        "unchanged": result.unchanged,
        "unreadable_images": len(unreadable),
        "unreadable": [{"source": source, "reason": reason} for source, reason in unreadable],
        "vectors": {generation: report.embedded for generation, report in reports.items()},
        "failures": {generation: len(report.failures) for generation, report in reports.items() if report.failures},
    }


def delete_items(root: str, item_ids: list[str], *, forget: bool) -> dict[str, Any]:
    """Delete items; with `forget` remove what is stored of them, and list what cannot be removed."""
    require_workspace(root)
    workspace = _open(root)
    found: dict[str, Any] = {"deleted": delete(workspace, item_ids)}
    if forget:
        found |= forget_items(workspace, item_ids)
    return found


def forget_items(workspace: Workspace, item_ids: list[str]) -> dict[str, Any]:
    """Remove items physically from gallery, caches and index; weights trained on them cannot be changed."""
    wanted = set(item_ids)
    stored = workspace.gallery.items_table.snapshot().rows(["item_id", "content_sha256"]).to_pylist()
    hashes = sorted({row["content_sha256"] for row in stored if row["item_id"] in wanted})  # of every revision
    revisions = forget(workspace.gallery, item_ids)
    for generation in workspace.registry.generations():
        if exists(join(workspace.root, "caches", generation)):
            workspace.cache(generation).forget(hashes)
    remove(workspace.index_location())
    trained_on, named_in = _where_named(workspace, set(hashes))
    return {"revisions_removed": revisions, "cannot_remove_from_weights_of": trained_on, "still_named_in": named_in}


def _where_named(workspace: Workspace, hashes: set[str]) -> tuple[list[str], list[str]]:
    """Generations that were trained on one of the images, and records that name one, without its vectors or pixels."""
    updates = {
        event.update_key: FrozenUpdate.model_validate(event.payload)
        for event in workspace.registry.events("update_started")
    }
    manifests = {
        key: uri for key in updates if hashes & set(read_manifest(uri := workspace.manifest_uri(key)).content_sha256)
    }
    trained_on = [event.generation for event in workspace.registry.events("trained") if event.update_key in manifests]
    sets = {evaluation_set_uri(workspace.root, frozen.evaluation_set) for frozen in updates.values()}
    return trained_on, [*manifests.values(), *sorted(uri for uri in sets if hashes & named_in_set(uri))]


def search_image(root: str, image: str, k: int, generation: str | None) -> dict[str, Any]:
    """Search with one image."""
    require_workspace(root)
    searcher = GallerySearcher(_open(root), generation)
    hits = searcher.search_images([image], k)[0]
    return {"query_generation": searcher.generation, "hits": [asdict(hit) for hit in hits]}


def decide_again(evaluation: str, policy_file: Path | None) -> tuple[Decision, bool]:
    """Judge stored outcomes again: the decision, and whether it is the recorded one."""
    policy = None
    if policy_file is not None:
        try:
            policy = RolloutPolicy.model_validate(tomllib.loads(policy_file.read_text()).get("policy", {}))
        except (OSError, ValueError) as error:
            raise ConfigError(f"reading a policy: {error} ({policy_file})") from None
    stored, again = recompute(evaluation, policy)
    return again.decision, stored.decision == again.decision


def roll_back(root: str, reason: str) -> dict[str, Any]:
    """Move the serving state back."""
    require_workspace(root)
    return rollback(_open(root), reason=reason).model_dump(mode="json")


def read_report(root: str, evaluation: str | None) -> tuple[str, Decision]:
    """Location of an evaluation's report, and its decision."""
    require_workspace(root)
    workspace = _open(root)
    if evaluation is None:
        decided = workspace.registry.events("decided")
        if not decided:
            raise EvaluationMissingError("reading the newest report: no update has decided yet; run 'graceful update'")
        evaluation = str(decided[-1].payload["evaluation"])
    location = workspace.evaluation_uri(evaluation)
    return join(location, "report.html"), read_evaluation(location).decision


def collect_garbage(root: str) -> dict[str, Any]:
    """Drop vectors that nobody can read."""
    require_workspace(root)
    workspace = _open(root)
    config = load_workspace_config(root)
    pending = pending_generation(workspace)
    protected = workspace.protected(config.gallery.supported_query_generations, [pending] if pending else [])
    return asdict(collect(workspace.gallery, protected))


def _open(root: str) -> Workspace:
    def no_encoder(generation: str) -> Any:
        raise RuntimeError(f"embedding with {generation}: this command does not embed")

    return Workspace(root, no_encoder)


def _find_images(images: str, label: str | None, training_data: DatasetConfig) -> LabelledImages:
    """All images at a place. What cannot be decoded is left out and named, however much it is.

    Labels come from the column that is named; at a place that is trained on, as training takes them.
    """
    source, place = find_source(images)
    is_trained_on = source == training_data.source and place in training_data.paths
    columns = (label,) if label else training_data.label_columns if is_trained_on and source != "folder" else ()
    found = load_images(DatasetConfig(source=source, path=place, label_columns=columns, max_unreadable_share=1.0))
    if source != "folder" or training_data.source != "folder":
        return found
    return replace(found, labels=np.array(list(map(_label_in(training_data.paths), found.sources, found.labels))))


def _label_in(folders: Sequence[str]) -> Callable[[str, str], str]:
    """The label that training gives to an image below one of its folders; elsewhere the label that it has."""

    def label_of(source: str, label: str) -> str:
        below = [source.removeprefix(f"{folder.rstrip('/')}/") for folder in folders]
        inside = min(below, key=len)
        return label if inside == source else inside.rpartition("/")[0]

    return label_of
