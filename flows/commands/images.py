"""Commands about pictures: ingest and search. They load encoders."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.search.searcher import GallerySearcher, WrongQueryError
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.items import ids_below, item_table, settle_ids
from graceful.flows.store.variants import names_variant
from graceful.flows.store.workspace import open_workspace, require_workspace
from graceful.flows.update.conclude import release_when_due
from graceful.flows.update.serving import ingest
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.folders import find_source
from graceful.training.images import split_source
from graceful.training.manifest import LabelledImages


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
    with open_session(root, config, TerminalProgress(console)) as session:
        items = settle_ids(pa.concat_tables(tables), session.workspace.gallery.items, replace=may_replace)
        release_when_due(session)
        with session.progress.track("embedding", items.num_rows) as advance:
            result, reports = ingest(
                session.workspace,
                items,
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


def search_gallery(root: str, query: str, k: int, generation: str | None) -> dict[str, Any]:
    """Search with an image, by its path or URI; with a text, where who asks takes texts.

    Raises: WrongQueryError, where a text is given for an image or the other way round.
    """
    workspace = open_workspace(root)
    if generation is not None and not names_variant(generation):
        generation = workspace.registry.resolve(generation)
    searcher = GallerySearcher(workspace, generation)
    image = query if "://" in query else os.path.abspath(query)
    is_file = "://" in query or os.path.isfile(split_source(image)[0])
    if searcher.served.takes == "text":
        if is_file:
            raise WrongQueryError(
                f"searching as {searcher.generation}: expected a text, found the file {image}; say in words what to "
                "search for, or leave --as out"
            )
        hits = searcher.search_texts([query], k)[0]
    else:
        if not is_file:
            raise WrongQueryError(
                f"searching as {searcher.generation}: expected an image, found no file at {image}; correct the path, "
                "or search with words as a variant that takes texts (--as, see 'graceful variant')"
            )
        hits = searcher.search_images([image], k)[0]
    return {
        "query_generation": searcher.generation,
        "unreadable": searcher.served.num_unreadable,
        "thresholds": {name: dict(values) for name, values in searcher.served.thresholds.items()},
        "hits": [asdict(hit) for hit in hits],
    }


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
