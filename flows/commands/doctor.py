"""`graceful doctor`: what of a workspace is damaged, in the way or waiting, and what to do; repairs what is derived.

Loads no Ray and no Prefect, and torch only to embed a few pictures, where libraries have changed or every byte is read.
Opens what it looks at without creating it.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import pyarrow as pa

from graceful.errors import GracefulError, UsageError, in_one_line
from graceful.files import exists, is_remote, join, list_files, read_json, remove
from graceful.flows.commands.encoders import examine_encoders
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.claim import CLAIM_SCHEMA, holder
from graceful.flows.store.registry import (
    CERTIFICATES_SCHEMA,
    LINEAGE_SCHEMA,
    PLANS_SCHEMA,
    SERVING_SCHEMA,
)
from graceful.flows.store.workspace import Workspace, require_workspace
from graceful.indexing.doctor import Finding, drop_damaged_vectors, examine_gallery, examine_table, unreadable_items
from graceful.indexing.gallery import VECTORS_SCHEMA, Gallery
from graceful.indexing.tables import ORPHAN_AGE_S, VersionedTable

_MIB = 2**20
_SCARCE = 200 * _MIB
_REGISTRY = {
    "lineage": (LINEAGE_SCHEMA, False),
    "certificates": (CERTIFICATES_SCHEMA, False),
    "plans": (PLANS_SCHEMA, False),
    "serving": (SERVING_SCHEMA, False),
    "claims": (CLAIM_SCHEMA, True),
}
_SAMPLE = 3


def examine_workspace(root: str, *, deep: bool = False, orphan_age_s: float = ORPHAN_AGE_S) -> list[Finding]:
    """Look a workspace over; the worst findings first. Changes nothing."""
    require_workspace(root)
    found: list[Finding] = []
    for name, (schema, derived) in _REGISTRY.items():
        if name == "claims" and not exists(join(root, "registry", name)):
            continue  # made by the first update
        place = join(root, "registry", name)
        findings = examine_table(place, schema, deep=deep, orphan_age_s=orphan_age_s, derived=derived)
        # Beside the table of plans lie files of their own, which its log does not name.
        found += [one for one in findings if not (name == "plans" and one.repair == "orphans")]
    registry_is_whole = not any(finding.severity == "error" for finding in found)
    workspace = Workspace(root)
    protected, known = (_protected(workspace), workspace.registry.generations()) if registry_is_whole else ([], None)
    found += examine_gallery(
        join(root, "gallery"), protected=protected, known=known, deep=deep, orphan_age_s=orphan_age_s
    )
    looks: list[Callable[[], Iterator[Finding]]] = [partial(_examine_index, workspace), partial(_examine_disk, root)]
    if registry_is_whole:
        looks += [partial(_examine_serving, workspace), partial(_examine_work, workspace)]
        looks.append(partial(_examine_encoders, workspace, deep))
    for look in looks:
        try:
            found += look()
        except GracefulError as error:
            if not any(finding.severity == "error" for finding in found):
                found.append(Finding("error", in_one_line(error, 500), "see the other findings"))
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def repair_workspace(root: str, findings: Sequence[Finding], *, yes: bool = False) -> list[str]:
    """Mend what is derived or safe to take away; returns what was done, a line each.

    Raises UsageError where a repair loses something and `yes` does not insist.
    """
    done: list[str] = []
    for finding in findings:
        if finding.repair == "create vectors":
            if not yes:
                raise UsageError(
                    "making an empty table of vectors: every image must be embedded again, and until then nothing can "
                    "be found; restore gallery/vectors from a backup, or give --yes"
                )
            VersionedTable(finding.place, VECTORS_SCHEMA, partition_by="generation", key="revision", create=True)
            done.append("made an empty table gallery/vectors: run 'graceful update' or ingest again to embed")
        elif finding.repair == "drop vectors":
            if not yes:
                raise UsageError(
                    "dropping damaged files of vectors: their images must be embedded again, and until then may not be "
                    "found; restore the files from a backup, or give --yes"
                )
            num_files, num_rows = drop_damaged_vectors(Gallery(join(root, "gallery")))
            done.append(f"dropped {num_files:,} files with {num_rows:,} vectors: run 'graceful update' to embed again")
        elif finding.repair == "create":
            VersionedTable(finding.place, CLAIM_SCHEMA, create=True)
            done.append(f"made {finding.place} anew")
        elif finding.repair == "checkpoints":
            for path in list_files(join(finding.place, "_delta_log")):
                if "checkpoint" in path.rsplit("/", 1)[1]:
                    remove(path)
            done.append(f"removed the checkpoints of {finding.place}; its entries are whole")
        elif finding.repair == "index":
            remove(finding.place)
            done.append("removed the index: the next search builds it")
    done += _tidy(root, [finding for finding in findings if finding.repair in ("orphans", "merge", "leases")])
    return done


def _tidy(root: str, findings: Sequence[Finding]) -> Iterator[str]:
    """Remove orphans, merge small files, and write the leases down without those that are over."""
    shapes = {
        **{join(root, "registry", name): (schema, None, None) for name, (schema, _) in _REGISTRY.items()},
    }
    for finding in findings:
        if finding.repair == "leases":
            Gallery(join(root, "gallery")).leased_versions()
            yield "removed leases that are over"
            continue
        if finding.place in shapes:
            table = VersionedTable(finding.place, shapes[finding.place][0])
        else:
            gallery = Gallery(join(root, "gallery"))
            table = gallery.items_table if finding.place == gallery.items_table.uri else gallery.vectors_table
        if finding.repair == "merge":
            table.compact()
            yield f"merged small files of {finding.place}"
            continue
        orphans = table.orphans(older_than_s=ORPHAN_AGE_S)
        superseded = {join(table.uri, path) for path in table.superseded()}
        gone = [path for path in orphans if path not in superseded]
        for path in gone:
            remove(path)
        yield f"removed {len(gone):,} files that no commit names from {finding.place}"


def _protected(workspace: Workspace) -> list[list[str]]:
    supported: Sequence[str] = ()
    with suppress(GracefulError):  # a configuration that is wrong protects nobody; `graceful check` says so
        supported = load_workspace_config(workspace.root).gallery.supported_query_generations
    return workspace.protected(supported)


def _examine_serving(workspace: Workspace) -> Iterator[Finding]:
    """Who serves, and what cannot be found."""
    registry = workspace.registry
    serving = registry.serving()
    if serving.champion is None:
        return
    if serving.champion not in registry.generations():
        yield Finding(
            "error", f"{serving.champion} serves, and the lineage does not know it",
            "restore registry/lineage from a backup",
        )  # fmt: skip
    readable = registry.readable(serving.champion)
    blind, others = unreadable_items(workspace.gallery, readable)
    if not len(blind):
        return
    sample = workspace.gallery.items.take(blind[:_SAMPLE], ["item_id", "source"])
    said = [
        f"{item_id}: {_state_of(source)}"
        for item_id, source in zip(sample["item_id"].to_pylist(), sample["source"].to_pylist(), strict=True)
    ]
    by_whom = "; ".join(f"{name} could read {num:,} of them" for name, num in sorted(others.items()))
    yield Finding(
        "error",
        f"{len(blind):,} items that {serving.champion} cannot read" + (f" ({by_whom})" if by_whom else ""),
        "run 'graceful update', which embeds what is missing; where the image is gone, ingest it again or delete it",
        len(blind),
        tuple(said),
    )


def _state_of(source: str) -> str:
    """Whether the place that a source names can be opened."""
    place = source.partition("#")[0]
    if place.startswith("synthetic:"):
        return source
    try:
        return source if exists(place) else f"the image is gone ({source})"
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"{source} cannot be opened: {in_one_line(error)}"


def _examine_work(workspace: Workspace) -> Iterator[Finding]:
    """Claims, plans and candidates."""
    registry = workspace.registry
    serving = registry.serving()
    claimed, alive = holder(workspace.root)
    if claimed and alive:
        yield Finding("note", f"{claimed.get('purpose')} is running (process {claimed.get('pid')} on "
                      f"{claimed.get('host')})", "nothing to do")  # fmt: skip
    elif claimed and float(str(claimed["expires_at"])) > 0:
        yield Finding("note", f"{claimed.get('purpose')} died (process {claimed.get('pid')} on {claimed.get('host')})",
                      "run the same command again to go on")  # fmt: skip
    if serving.active_plan is not None and not alive:
        plan, items = registry.plan(serving.active_plan)
        missing = workspace.gallery.missing_vectors(plan.generation, items["revision"].to_numpy().astype(np.int64))
        yield Finding(
            "warning", f"the re-index with {plan.generation} is not finished ({len(missing):,} of {plan.num_items:,} "
            "items to go)", "unless one runs, run 'graceful update' to go on", len(missing),
        )  # fmt: skip
    pending = workspace.registry.pending_generation()
    if pending is not None:
        yield Finding("note", f"{pending} waits for more evidence or your word", "see 'graceful status'")


def _examine_encoders(workspace: Workspace, deep: bool) -> Iterator[Finding]:
    """Whether the encoders give the vectors that they gave when they were made."""
    for found in examine_encoders(workspace, always=deep):
        what = f"the encoder of {found.generation} here: {found.said}"
        if found.error or (found.agreement is not None and found.agreement.is_refused):
            yield Finding("error", what, "searches and updates refuse it: install the versions that made it")
        elif not found.has_probes:
            what = f"{found.generation} has no probes: nothing says whether its encoder embeds as it did"
            yield Finding("note", what, "nothing to do: the next generation has some")
        elif found.agreement is not None and found.agreement.is_noted:
            yield Finding("note", what, "nothing to do; the next generation is made with these libraries")


def _examine_index(workspace: Workspace) -> Iterator[Finding]:
    """The index is derived: what of it cannot be read goes, and the next search builds it."""
    location = workspace.index_location()
    torn = []
    for path in list_files(location):
        if path.endswith(".json"):
            try:
                read_json(path)
            except (ValueError, OSError):
                torn.append(path)
    if torn:
        yield Finding("warning", f"{len(torn):,} files of the index are torn", "the next search builds it anew",
                      len(torn), tuple(torn[:3]), "index", location)  # fmt: skip


def _examine_disk(root: str) -> Iterator[Finding]:
    if is_remote(root):
        return
    free = shutil.disk_usage(root).free
    if free < _SCARCE:
        yield Finding("warning", f"{free // _MIB:,} MiB free on the disk of {root}", "free some space")
