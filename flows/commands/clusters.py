"""Clusters the gallery as a generation sees it, keeps people's names, and says what a person would see change."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError, UsageError
from graceful.evaluation.clustering import (
    NOBODY,
    b_cubed,
    churn,
    keep_names,
    pairwise_agreement,
    renamed,
    variation_of_information,
)
from graceful.flows.settings.config import load_clustering_config
from graceful.flows.store.clusterings import Clustering, Made, newest, next_number, write_clustering
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.indexing.cluster_choice import ClusteringConfig
from graceful.indexing.clusters import cluster_rows
from graceful.indexing.gallery import View
from graceful.training.generation import read_card

MAX_LISTED = 20


class NothingClusteredError(GracefulError):
    """There is no clustering, or nothing that could be clustered."""


def cluster_workspace(
    root: str, *, generation: str | None = None, threshold: float | None = None, min_photos: int | None = None
) -> dict[str, Any]:
    """Cluster what the champion sees, or as a preview what another generation sees, and store it with names.

    Names are kept from the newest clustering that is no preview; who has none yet is called 'person <number>'.
    """
    workspace, config = open_workspace(root), _config(root, threshold, min_photos)
    champion = workspace.registry.serving().champion
    name = champion if generation is None else workspace.registry.resolve(generation)
    if name is None:
        raise NothingClusteredError("clustering: expected a serving generation, found none; run 'graceful update'")
    item_ids, cluster, apart, num_unreadable = _cluster(workspace, name, config)
    before = newest(workspace)
    then = np.full(len(item_ids), NOBODY, np.str_) if before is None else before.names_of(item_ids)
    first = 1 if before is None else before.made.next_person
    fresh = _fresh_names(first, cluster, set() if before is None else set(before.name.tolist()))
    names = renamed(cluster, keep_names(then, cluster, fresh))
    used = [int(person.rpartition(" ")[2]) for person in {*fresh} & {*names.tolist()}]
    made = Made(
        number=next_number(workspace),
        generation=name,
        preview=name != champion,
        config=config,
        next_person=max([first - 1, *used]) + 1,
    )
    uri = write_clustering(workspace, Clustering(made, item_ids, cluster, names))
    people = sorted(set(names.tolist()) - {NOBODY})
    return {
        "generation": name,
        "preview": made.preview,
        "photos": len(item_ids),
        "people": len(people),
        "of_nobody": int((names == NOBODY).sum()),
        "unreadable": num_unreadable,
        "not_comparable": [list(pair) for pair in apart],
        "since": None if before is None else before.uri,
        "churn": None if before is None else _churn(then, names),
        "file": uri,
    }


def compare_clusters(
    root: str, before: str, after: str, *, threshold: float | None = None, min_photos: int | None = None
) -> dict[str, Any]:
    """Cluster what two generations see at one version of the gallery; stores nothing."""
    workspace, config = open_workspace(root), _config(root, threshold, min_photos)
    one, other = workspace.registry.resolve(before), workspace.registry.resolve(after)
    with workspace.gallery.lease() as version:
        item_ids, first, apart, _ = _cluster(workspace, one, config, version)
        _, second, also_apart, _ = _cluster(workspace, other, config, version)
    stored = newest(workspace)
    known = np.full(len(item_ids), NOBODY, np.str_) if stored is None else stored.names_of(item_ids)
    taken = set(known.tolist())
    then = renamed(first, keep_names(known, first, _fresh_names(1, first, taken)))
    now = renamed(second, keep_names(then, second, _fresh_names(1, second, taken | set(then.tolist()))))
    return {
        "before": one,
        "after": other,
        "photos": len(item_ids),
        "people": [len(set(names.tolist()) - {NOBODY}) for names in (then, now)],
        "not_comparable": sorted({(*pair,) for pair in (*apart, *also_apart)}),
        "pairwise_f": pairwise_agreement(then, now).f,
        "b_cubed_f": b_cubed(then, now).f,
        "variation_of_information": variation_of_information(then, now),
        "churn": _churn(then, now),
    }


def rename_people(root: str, renames: Mapping[str, str]) -> dict[str, Any]:
    """Call people of the newest clustering by other names; every later clustering keeps them.

    Raises: UsageError, for a name that nobody bears, that somebody else bears, or that is empty.
    """
    workspace = open_workspace(root)
    found = newest(workspace)
    if found is None:
        raise NothingClusteredError("naming people: expected a clustering, found none; run 'graceful cluster' first")
    bearing = set(found.name.tolist()) - {NOBODY}
    for old, new in renames.items():
        if old not in bearing:
            raise UsageError(f"naming people: expected a name of the newest clustering, found {old!r}; see {found.uri}")
        if not new.strip():
            raise UsageError(f"naming people: expected a new name for {old!r}, found an empty one")
    after = [renames.get(name, name) for name in bearing]
    doubled = sorted({name for name in after if after.count(name) > 1})
    if doubled:
        raise UsageError(
            f"naming people: expected every name once, found {doubled[0]!r} for two people; names do not merge people"
        )
    made = found.made.model_copy(update={"number": next_number(workspace)})
    names = np.array([renames.get(str(name), str(name)) for name in found.name.tolist()], np.str_)
    uri = write_clustering(workspace, Clustering(made, found.item_ids, found.cluster, names))
    return {"renamed": dict(renames), "file": uri}


def parse_names(given: Sequence[str]) -> dict[str, str]:
    """Take 'person 3=Ann' apart. Raises UsageError."""
    found: dict[str, str] = {}
    for text in given:
        old, sign, new = text.partition("=")
        if not sign or old.strip() in found:
            raise UsageError(f"naming people: expected each as 'person 3=Ann', found {text!r}; give every name once")
        found[old.strip()] = new.strip()
    return found


def _config(root: str, threshold: float | None, min_photos: int | None) -> ClusteringConfig:
    given = {"threshold": threshold, "min_photos": min_photos}
    stated = {key: value for key, value in given.items() if value is not None}
    return ClusteringConfig.model_validate({**load_clustering_config(root).model_dump(), **stated})


def _cluster(
    workspace: Workspace, generation: str, config: ClusteringConfig, version: Any = None
) -> tuple[NDArray[np.str_], NDArray[np.str_], tuple[tuple[str, str], ...], int]:
    """Item ids (N,) sorted, cluster (N,) of each, pairs of generations that cannot be compared, unreadable items."""
    if version is None:
        with workspace.gallery.lease() as pinned:
            return _cluster(workspace, generation, config, pinned)
    view = workspace.view(generation, version)
    rows = {name: view.owned_by(name) for name in view.readable}
    vectors = {name: view.vectors(places) for name, places in rows.items() if len(places)}
    rows = {name: rows[name] for name in vectors}
    found = cluster_rows(vectors, rows, view.num_items, config, _prefixes(workspace, view, vectors))
    label = np.array([str(number) if number >= 0 else NOBODY for number in found.label.tolist()], np.str_)
    item_ids = view.item_ids.astype(np.str_)
    order = np.argsort(item_ids, kind="stable")
    return item_ids[order], label[order], found.apart, len(view.unreadable())


def _prefixes(
    workspace: Workspace, view: View, vectors: Mapping[str, NDArray[np.float32]]
) -> dict[str, tuple[int, ...]]:
    """Declared prefixes, which matter only where widths differ."""
    if len({part.shape[1] for part in vectors.values()}) < 2:
        return {}
    return {name: tuple(read_card(workspace.generation_uri(name)).prefix_widths) for name in view.readable}


def _fresh_names(first: int, cluster: NDArray[np.str_], taken: set[str]) -> list[str]:
    """'person <number>' from `first` on, one for each cluster, leaving out those that somebody bears."""
    names: list[str] = []
    number = first
    wanted = len(set(cluster.tolist()))
    while len(names) < wanted:
        if f"person {number}" not in taken:
            names.append(f"person {number}")
        number += 1
    return names


def _churn(before: NDArray[np.str_], after: NDArray[np.str_]) -> dict[str, Any]:
    """What a person would see; long lists are cut and counted."""
    seen = churn(before, after)
    numbers = asdict(seen)
    lists = {key: numbers.pop(key) for key in ("split", "merged", "gone", "new")}
    return {
        **numbers,
        "share": seen.share if seen.num_items else None,
        **{f"num_{key}": len(names) for key, names in lists.items()},
        **{key: list(names[:MAX_LISTED]) for key, names in lists.items()},
    }
