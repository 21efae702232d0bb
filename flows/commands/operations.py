"""What each command does, as a function from plain values to plain values: the command line and tests call these."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from graceful.files import exists, join, write_bytes
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.search.searcher import GallerySearcher
from graceful.flows.settings.config import (
    CONFIG_FILE,
    ConfigError,
    load_config,
    load_workspace_config,
)
from graceful.flows.settings.template import TEMPLATE
from graceful.flows.store.items import item_id_of, item_table
from graceful.flows.store.workspace import Workspace, open_workspace, require_workspace
from graceful.flows.update.conclude import release_when_due
from graceful.flows.update.serving import ingest
from graceful.training.datasets import DatasetConfig, load_images
from graceful.training.manifest import LabelledImages


def create_workspace(root: str, config: Path | None) -> str:
    """Create the folder, its empty tables and the configuration; what is there is left alone."""
    target = join(root, CONFIG_FILE)
    if config is not None and exists(target):
        raise ConfigError(f"creating a workspace: {target} is there already; edit it, or choose another folder")
    if config is not None:
        load_config(config, root)
        write_bytes(target, config.read_bytes())
    elif not exists(target):
        write_bytes(target, TEMPLATE.encode())
    workspace = Workspace(root)
    workspace.gallery.version()
    workspace.registry.serving()
    return target


def ingest_images(root: str, images: str, label: str | None, console: Console) -> dict[str, Any]:
    """Ingest an image, a folder or a Parquet file: an absolute path, or a URI."""
    require_workspace(root)
    config = load_workspace_config(root)
    found = _find_images(images, label, config.training_data.max_unreadable_share)
    is_folder = not images.endswith(".parquet") and found.sources != [images]
    items = item_table(found, [item_id_of(source, images if is_folder else None) for source in found.sources])
    unit = hashlib.sha256(f"{time.time_ns()}/{images}".encode()).hexdigest()[:16]
    with open_session(root, config, TerminalProgress(console)) as session:
        release_when_due(session)
        with session.progress.track("embedding", len(found)) as advance:
            result, reports = ingest(
                session.workspace,
                items,
                unit=unit,
                supported=config.gallery.supported_query_generations,
                unit_rows=config.gallery.unit_rows,
                on_rows=advance,
            )
    return {
        "added": result.added,
        "changed": result.changed,
        "unchanged": result.unchanged,
        "unreadable_images": len(found.unreadable),
        "vectors": {generation: report.embedded for generation, report in reports.items()},
        "failures": {generation: len(report.failures) for generation, report in reports.items() if report.failures},
    }


def search_image(root: str, image: str, k: int, generation: str | None) -> dict[str, Any]:
    """Search with one image."""
    require_workspace(root)
    searcher = GallerySearcher(open_workspace(root), generation)
    hits = searcher.search_images([image], k)[0]
    return {"query_generation": searcher.generation, "hits": [asdict(hit) for hit in hits]}


def _find_images(images: str, label: str | None, max_unreadable_share: float) -> LabelledImages:
    return load_images(
        DatasetConfig(
            source="parquet" if images.endswith(".parquet") else "folder",
            path=images,
            label_columns=(label,) if label else (),
            max_unreadable_share=max_unreadable_share,
        )
    )
