"""Commands about evaluation sets: create, grow, show, and the labels of changed answers."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graceful.files import exists, join, read_bytes
from graceful.flows.store.evalsets import (
    Evalset,
    EvalsetError,
    Row,
    drawn,
    evalset_names,
    evalset_uri,
    part_of,
    read_evalset,
    with_version,
    write_evalset,
)
from graceful.flows.store.labels import PAGE_FILE
from graceful.flows.store.leaks import training_manifests
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.flows.update import labelling
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.folders import find_source


@dataclass(frozen=True)
class Draw:
    """What is taken from the gallery: by default every identity with two images, and everything else as distractors."""

    identities: int | None = None
    queries_per_identity: int = 3
    distractors: int | None = None


def create_set(
    root: str, name: str, draw: Draw, *, logs: Sequence[str] = (), slices: Sequence[str] = (), dev_share: float = 0.3,
    parent: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make a set from the gallery of a workspace and from query logs; `parent` names a set to begin with.

    Raises: EvalsetError, also where there is a set of this name.
    """
    workspace = open_workspace(root)
    if exists(join(evalset_uri(root, name), "set.json")):
        raise EvalsetError(
            f"creating an evaluation set: expected no set of the name {name}, found one; add to it with 'graceful "
            f"evalset grow {name}', or choose another name"
        )
    begun = Evalset(name, tuple(slices), dev_share)
    if parent is not None:
        old = read_evalset(root, parent)
        begun = Evalset(
            name, old.slices, old.dev_share, f"{parent} version {len(old.versions)}", old.versions, old.rows
        )
    return _grow(workspace, begun, draw, logs, begins=True)


def grow_set(root: str, name: str, draw: Draw, *, logs: Sequence[str] = ()) -> dict[str, Any]:
    """Add identities of the gallery, distractors and logged queries to a set. Raises EvalsetError."""
    workspace = open_workspace(root)
    return _grow(workspace, read_evalset(root, name), draw, logs)


def show_sets(root: str, name: str | None) -> dict[str, Any]:
    """What every set holds and where it comes from, and how far the labels of the newest evaluation's log go."""
    workspace = open_workspace(root)
    names = evalset_names(root) if name is None else [name]
    found: dict[str, Any] = {"sets": [_told(read_evalset(root, each), root) for each in names], "log": None}
    try:
        found["log"] = asdict(labelling.standing(workspace, *labelling.newest_with_log(workspace)))
    except labelling.NoLogError as error:
        found["no_log"] = str(error)
    return found


def label_next(root: str, limit: int, into: str | None) -> dict[str, Any]:
    """Write what to label next; says where, and how far the labels go. Raises NoLogError."""
    workspace = open_workspace(root)
    name, evaluation = labelling.newest_with_log(workspace)
    questions = labelling.write_label_list(workspace, name, evaluation, limit=limit, into=into)
    folder = into or workspace.evaluation_uri(name)
    return {
        "to_label": len(questions),
        "queries": len({question.query for question in questions}),
        "csv": join(folder, labelling.CSV_FILE),
        "page": join(folder, PAGE_FILE),
        **asdict(labelling.standing(workspace, name, evaluation)),
    }


def label_file(root: str, file: str, *, correct: bool) -> dict[str, Any]:
    """Take labels back. Raises LabelFileError and ContradictoryLabelsError; nothing is taken then."""
    workspace = open_workspace(root)
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except FileNotFoundError:
        raise labelling.LabelFileError(f"taking labels: expected a file, found none (at {file})") from None
    except UnicodeDecodeError as error:
        raise labelling.LabelFileError(f"taking labels: expected UTF-8, found {error} (in {file})") from None
    taken = labelling.take_labels(workspace, text, file, correct=correct)
    return {**taken, **asdict(labelling.standing(workspace, *labelling.newest_with_log(workspace)))}


def _grow(
    workspace: Workspace, evalset: Evalset, draw: Draw, logs: Sequence[str], *, begins: bool = False
) -> dict[str, Any]:
    rows, told = ({}, {}) if draw is None else _from_gallery(workspace, evalset, draw)
    named = {
        row["file"] for part in ("queries", "gallery") for row in (*evalset.rows.get(part, ()), *rows.get(part, ()))
    }
    logged, num_unreadable = _from_logs(evalset, logs)
    rows = {**rows, "log": [row for row in logged if row["file"] not in named]}
    grown, version = with_version(evalset, rows, ["gallery", *logs], unreadable=num_unreadable, **told)
    if not grown.rows["queries"]:
        raise EvalsetError(
            "making an evaluation set: expected identities with two images in the gallery that no generation was "
            f"trained on, found none among {told.get('num_items', 0):,} items; ingest with --label, or "
            "keep a split out of the training data"
        )
    if not begins and not any(version[f"added_{part}"] for part in ("queries", "gallery", "log")):
        raise EvalsetError(
            f"growing the evaluation set {evalset.name}: expected something that it does not hold yet, found nothing; "
            "name another log, or ingest images of further identities first"
        )
    write_evalset(workspace.root, grown)
    return {**_told(grown, workspace.root), "added": version}


def _from_gallery(workspace: Workspace, evalset: Evalset, draw: Draw) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Queries, gallery and distractors from the items; what a generation was trained on is no query."""
    view = workspace.gallery.view([])
    items = view.items(["source", "label", "content_sha256", "attributes"]).to_pylist()
    trained = {digest for _, images in training_manifests(workspace) for digest in images.content_sha256}
    usable = [item for item in items if item["content_sha256"] not in trained]
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in usable:
        if item["label"]:
            by_label[item["label"]].append(item)
    candidates = [label for label, found in by_label.items() if len(found) > 1 and label not in evalset.identities]
    chosen = drawn(candidates)[: draw.identities]
    rows: dict[str, list[Row]] = {"queries": [], "gallery": []}
    queried: set[str] = evalset.known("queries")
    for label in chosen:
        order = drawn([item["source"] for item in by_label[label]])
        sources = set(order[: min(draw.queries_per_identity, len(order) - 1)])
        queried |= sources
        part = part_of(label, evalset.dev_share)
        for item in by_label[label]:
            row = {"file": item["source"], "identity": label, "part": part, **_sliced(evalset, item["attributes"])}
            rows["queries" if item["source"] in sources else "gallery"].append(row)
    there = evalset.known("gallery") | {row["file"] for row in rows["gallery"]} | queried
    others = {item["source"]: item for item in usable if item["source"] not in there}
    for source in drawn(list(others))[: draw.distractors]:
        item = others[source]
        # A distractor without a label is an identity of its own: right for no query, until somebody says so.
        identity = item["label"] or f"item:{item['content_sha256'][:16]}"
        rows["gallery"].append({"file": source, "identity": identity, **_sliced(evalset, item["attributes"])})
    return rows, {"num_items": len(items), "left_out_trained_on": len(items) - len(usable)}


def _from_logs(evalset: Evalset, logs: Sequence[str]) -> tuple[list[Row], int]:
    rows, num_unreadable = [], 0
    for place in logs:
        source, path = find_source(place)
        found = load_images(
            DatasetConfig(
                source=source, path=path, label_columns=(), attributes=evalset.slices, max_unreadable_share=1.0
            )
        )
        num_unreadable += len(found.unreadable)
        for position, file in enumerate(found.sources):
            rows.append({"file": file, **{name: str(found.attributes[name][position]) for name in evalset.slices}})
    return rows, num_unreadable


def _sliced(evalset: Evalset, attributes: str | None) -> Row:
    known = json.loads(attributes or "{}")
    return {name: str(known.get(name, "")) for name in evalset.slices}


def _told(evalset: Evalset, root: str) -> dict[str, Any]:
    queries = evalset.rows.get("queries", ())
    return {
        "name": evalset.name,
        "folder": evalset_uri(root, evalset.name),
        "parent": evalset.parent,
        "slices": list(evalset.slices),
        "identities": {
            part: len({row["identity"] for row in queries if row["part"] == part}) for part in ("dev", "test")
        },
        "queries": {part: sum(row["part"] == part for row in queries) for part in ("dev", "test")},
        "gallery": len(evalset.rows.get("gallery", ())),
        "distractors": sum(row["identity"] not in evalset.identities for row in evalset.rows.get("gallery", ())),
        "log": len(evalset.rows.get("log", ())),
        "versions": list(evalset.versions),
    }
