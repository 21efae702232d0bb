"""Making variants of the generation that serves. It trains: PyTorch, and Ray where the configuration says so."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from graceful.flows.commands.status import variant_rows
from graceful.flows.runtime.environment import prepare_environment
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.workspace import require_workspace
from graceful.flows.update.architecture import search_architectures
from graceful.flows.update.order import give_variants


def make_named(root: str, names: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Make variants of the generation that serves; returns the row of each, as `graceful status` has it."""
    require_workspace(root)
    prepare_environment(root)
    with open_session(root, load_workspace_config(root), TerminalProgress(console)) as session:
        made = give_variants(session, names)
        rows = {row["variant"]: row for row in variant_rows(session.workspace)}
    return [rows[variant] for variant in made.values()]


def search_named(root: str, names: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Search architectures for variants of the generation that serves; returns for each what was measured and found."""
    require_workspace(root)
    prepare_environment(root)
    with open_session(root, load_workspace_config(root), TerminalProgress(console)) as session:
        records = search_architectures(session, names)
    return [
        {
            "name": record.name,
            "of": record.of,
            "backbone": record.best.architecture.backbone.model_dump(mode="json"),
            "image_size": record.best.architecture.image_size,
            "candidates": [
                {**candidate.model_dump(mode="json"), "reward": round(candidate.reward, 6)}
                for candidate in record.candidates
            ],
        }
        for record in records
    ]
