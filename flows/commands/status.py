"""Commands that read or move pointers: status, rollback, delete, collect. Nothing here loads Ray or Prefect, and torch
only a status where the libraries are not those that made the encoder.
"""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from graceful.errors import GracefulError
from graceful.evaluation.spending import next_share
from graceful.files import crash_point, join, list_files, remove
from graceful.flows.commands.encoders import examine_encoders
from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.runtime.under_way import record_of
from graceful.flows.store.approvals import answer, awaited
from graceful.flows.store.claim import holder
from graceful.flows.store.clusterings import forget_in_clusterings
from graceful.flows.store.evaluation_set import evaluation_set_uri, named_in_set
from graceful.flows.store.events import Decided, Looked, Trained, UpdateStarted
from graceful.flows.store.labels import forget_label_page
from graceful.flows.store.registry import Registry
from graceful.flows.store.reports import forget_pictures
from graceful.flows.store.variants import answering, judged, live_variants
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.flows.update.serving import delete, go_forward, operator, reject, retire, revoke, rollback
from graceful.indexing.maintenance import collect, forget, survey
from graceful.indexing.tables import ORPHAN_AGE_S
from graceful.training.manifest import read_manifest

_SHOWN_UPDATES = 5


class UnknownItemError(GracefulError):
    """The gallery has no item of this id."""


def workspace_status(root: str) -> dict[str, Any]:
    """Who serves, who owns rows, what is unreadable, what is under way."""
    workspace = open_workspace(root)
    registry = workspace.registry
    serving = registry.serving()
    decided = registry.events(Decided)
    found: dict[str, Any] = {
        "champion": serving.champion,
        "previous": serving.previous,
        "moved_by": serving.moved_by or None,
        "active_plan": serving.active_plan,
        "generations": registry.generations(),
        "variants": variant_rows(workspace),
        "items": None,
        "unreadable": None,
        "rows_by_generation": {},
        "newest_decision": decided[-1].payload.outcome if decided else None,
        "pending": registry.pending_generation(),
        "awaiting_approval": _awaiting_approval(registry),
        "under_way": under_way(root),
        "last_updates": [
            {"when": _when(event.at), "generation": event.generation, "summary": event.payload.summary}
            for event in reversed(decided[-_SHOWN_UPDATES:])
        ],
        "error_level": _error_level(registry),
        "encoders": {found.generation: found.said for found in examine_encoders(workspace) if found.has_probes},
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


def list_variants(root: str) -> list[dict[str, Any]]:
    """A row for every variant of a workspace that was judged."""
    return variant_rows(open_workspace(root))


def variant_rows(workspace: Workspace) -> list[dict[str, Any]]:
    """A row for every variant that was judged: what it was found to be, whether it answers, what it cannot read."""
    from graceful.flows.settings.config import load_supported_clients

    registry = workspace.registry
    supported = load_supported_clients(workspace.root)
    live, answers = live_variants(registry, workspace.kept(supported), supported), set(answering(registry).values())
    return [
        {
            "variant": variant,
            "name": verdict.name,
            "of": verdict.of,
            "takes": verdict.takes,
            "approved": verdict.approved,
            "answers": variant in answers,
            "may_query": variant in live,
            "may_read": registry.readable(variant) if variant in live else [],
            "unreadable": len(workspace.view(variant).unreadable()) if variant in live else None,
            "metric_on": verdict.row,
            "reason": verdict.reason,
        }
        for variant, verdict in judged(registry).items()
    ]


def _awaiting_approval(registry: Registry) -> dict[str, Any] | None:
    """The decision that waits for a person; `stale` says why it can no longer be accepted."""
    asked = awaited(registry)
    if asked is None:
        return None
    return {
        "generation": asked.generation,
        "outcome": asked.outcome,
        "evaluation": asked.evaluation,
        "since": _when(asked.asked_at),
        "until": _when(asked.until),
        "stale": asked.stale_with(registry.serving().champion),
    }


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def under_way(root: str) -> dict[str, Any] | None:
    """The work that holds the workspace's claim, as far as it says how far it is; None where there is none."""
    found, is_held = holder(root)
    if not is_held:
        return None
    host, pid = str(found["host"]), int(str(found["pid"]))
    said = record_of(root, host, pid, str(found["started"])) or {}
    return {"purpose": found["purpose"], "host": host, "process": pid, **said}


def _error_level(registry: Registry) -> dict[str, Any] | None:
    """What the judgements so far have spent on the newest evaluation set, and what the next one may use."""
    looks = registry.events(Looked)
    if not looks:
        return None
    newest = looks[-1].payload.look
    spent = min(newest.spent + newest.share, 1.0)
    return {
        "evaluation_set": newest.evaluation_set,
        "judgements": newest.number,
        "spent": round(spent, 4),
        "next_share": round(next_share(spent, newest.planned_updates), 4),
        "restored_by": "fresh evaluation identities",
    }


def delete_items(root: str, item_ids: list[str], *, forget: bool) -> dict[str, Any]:
    """Delete items; with `forget` remove what is stored of them, and list what cannot be removed.

    Raises:
        UnknownItemError: an id that was never there; nothing is deleted then, and a typo does not look like success.
    """
    workspace = open_workspace(root)
    known = workspace.gallery.items.find(item_ids)["revision"].is_valid().to_pylist()
    unknown = [item_id for item_id, is_known in zip(item_ids, known, strict=True) if not is_known]
    if unknown and forget:  # one that was killed when the rows had gone and their files had not
        for table in (workspace.gallery.vectors_table, workspace.gallery.items_table):
            if not workspace.gallery.leased_versions():
                table.vacuum()
    if unknown:
        raise UnknownItemError(
            f"deleting items: expected ids of the gallery, found {len(unknown)} that are not (first "
            f"{unknown[0][:80]!r}); nothing was deleted, correct the ids"
        )
    found: dict[str, Any] = {"deleted": delete(workspace, item_ids)}
    if forget:
        found |= forget_items(workspace, item_ids)
    return found


def forget_items(workspace: Workspace, item_ids: list[str]) -> dict[str, Any]:
    """Remove items physically from gallery, caches and index; weights trained on them cannot be changed."""
    stored = workspace.gallery.items_table.snapshot().rows(["item_id", "content_sha256"])
    stored = stored.filter(pc.is_in(stored["item_id"], value_set=pa.array(item_ids, pa.string())))
    hashes = sorted(set(stored["content_sha256"].to_pylist()) - {""})  # of every revision
    # The gallery last: killed before, the same command finds the items, and with them their hashes, again.
    for generation in _caches(workspace):
        workspace.cache(generation).forget(hashes)
    forget_in_clusterings(workspace, item_ids)
    remove(workspace.index_location())
    remove(workspace.known_images_uri)  # made anew: it names paths and hashes
    for event in workspace.registry.events(Decided):
        forget_label_page(workspace.evaluation_uri(event.payload.evaluation), hashes)
        forget_pictures(workspace.evaluation_uri(event.payload.evaluation), hashes)
    crash_point("forget-before-gallery")
    revisions = forget(workspace.gallery, item_ids)
    trained_on, named_in = _where_named(workspace, set(hashes))
    return {"revisions_removed": revisions, "cannot_remove_from_weights_of": trained_on, "still_named_in": named_in}


def _where_named(workspace: Workspace, hashes: set[str]) -> tuple[list[str], list[str]]:
    """Generations that were trained on one of the images, and records that name one, without its vectors or pixels."""
    updates = {event.update_key: event.payload for event in workspace.registry.events(UpdateStarted)}
    manifests = {
        key: uri for key in updates if hashes & set(read_manifest(uri := workspace.manifest_uri(key)).content_sha256)
    }
    trained_on = [event.generation for event in workspace.registry.events(Trained) if event.update_key in manifests]
    sets = {evaluation_set_uri(workspace.root, frozen.evaluation_set) for frozen in updates.values()}
    return trained_on, [*manifests.values(), *sorted(uri for uri in sets if hashes & named_in_set(uri))]


def roll_back(root: str, reason: str, *, yes: bool = False) -> dict[str, Any]:
    """Move the serving state back."""
    workspace = open_workspace(root)
    left = workspace.registry.serving().champion
    state = rollback(workspace, reason=reason, yes=yes)
    details = {"champion": state.champion, "reason": reason, "by": operator()}
    summary = f"rolled back from {left} to {state.champion}: {reason}"
    tell_of(root, Notice("rollback", summary, f"move {state.sequence}", left, details))
    return state.model_dump(mode="json")


def promote_again(root: str, generation: str, reason: str, *, yes: bool = False) -> dict[str, Any]:
    """Go forward again to a generation that has served before."""
    workspace = open_workspace(root)
    state = go_forward(workspace, workspace.registry.resolve(generation), reason=reason, yes=yes)
    return state.model_dump(mode="json")


def reject_candidate(root: str, generation: str, reason: str, by: str = "") -> dict[str, Any]:
    """Turn a candidate down, or a decision about it that waits for a person."""
    workspace = open_workspace(root)
    name = workspace.registry.resolve(generation)
    asked = awaited(workspace.registry)
    if asked is not None and asked.generation == name:
        answer(workspace.registry, asked, "rejected", by=by or operator(), reason=reason)
    else:
        reject(workspace, name, reason=reason, by=by)
    return {"rejected": name, "serving": workspace.registry.serving().champion}


def retire_generation(root: str, generation: str, reason: str) -> dict[str, Any]:
    """Take a generation out of every later comparison and constraint."""
    workspace = open_workspace(root)
    name = workspace.registry.resolve(generation)
    retire(workspace, name, reason=reason)
    return {"retired": name, "serving": workspace.registry.serving().champion}


def revoke_certificate(root: str, query: str, gallery: str, reason: str, *, yes: bool = False) -> dict[str, Any]:
    """Revoke a certificate by the names of its two generations."""
    workspace = open_workspace(root)
    pair = workspace.registry.resolve(query), workspace.registry.resolve(gallery)
    return {"revoked": list(pair), "hidden": revoke(workspace, *pair, reason=reason, yes=yes)}


def collect_garbage(root: str, *, dry_run: bool = False, orphan_age_s: float = ORPHAN_AGE_S) -> dict[str, Any]:
    """Drop vectors that nobody can read, and files that nothing names; `dry_run` only counts them."""
    from graceful.flows.settings.config import load_workspace_config

    workspace = open_workspace(root)
    supported = load_workspace_config(root).gallery.supported_query_generations

    def protected() -> list[list[str]]:
        return workspace.protected(supported)

    if dry_run:
        return {"dry_run": True, **asdict(survey(workspace.gallery, protected(), orphan_age_s=orphan_age_s))}
    found = collect(workspace.gallery, protected, orphan_age_s=orphan_age_s)
    in_caches = sum(workspace.cache(name).remove_orphans(orphan_age_s) for name in _caches(workspace))
    return {"dry_run": False, **asdict(found), "files_of_caches": in_caches}


def _caches(workspace: Workspace) -> list[str]:
    """Generations that have a cache, whether the lineage knows them or not."""
    folder = join(workspace.root, "caches")
    return sorted({path.removeprefix(folder).strip("/").split("/")[0] for path in list_files(folder)})
