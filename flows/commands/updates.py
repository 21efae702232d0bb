"""Commands that train and judge: update, replay, adopt. They load PyTorch, Ray and Prefect."""

import os
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from graceful.files import is_remote, join, write_bytes, write_json
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.settings.config import CONFIG_FILE, Control, PipelineConfig, load_config, load_workspace_config
from graceful.flows.store.events import Adopted
from graceful.flows.store.workspace import Workspace, open_workspace, require_workspace
from graceful.flows.update.flow import BESIDE, replay, update
from graceful.flows.update.order import UpdateResult
from graceful.flows.update.replay import ReplayResult, replay_table
from graceful.training.encoder import adopt as adopt_encoder
from graceful.training.generation import ordinal_of


def update_workspace(
    root: str, console: Console, *, again: bool = False, adopt: str | None = None, paragon: bool | None = None
) -> UpdateResult:
    """Run the update flow in this process."""
    require_workspace(root)
    config = load_workspace_config(root)
    adopted = None if adopt is None else adopt_generation(open_workspace(root), config, adopt)
    BESIDE.set(TerminalProgress(console))
    return update(root, again=again, train_paragon=paragon, adopted=adopted, wait_hours=0.0)


def adopt_generation(workspace: Workspace, config: PipelineConfig, factory: str) -> str:
    """Store an encoder from elsewhere as a generation; the same encoder is stored once."""
    registry = workspace.registry
    for event in registry.events(Adopted):
        if event.payload.factory == factory:
            return event.generation
    ordinal = max([ordinal_of(name) for name in registry.generations()], default=0) + 1
    card = adopt_encoder(
        factory,
        preprocessing=config.training.preprocessing,
        out_uri=join(workspace.root, "generations"),
        ordinal=ordinal,
    )
    registry.record(Adopted(name=factory, factory=factory), generation=card.generation_id)
    return card.generation_id


def replay_history(
    config_file: Path, root: str | None, console: Console, *, paragon: bool | None = None, controls: bool = False
) -> ReplayResult:
    """Run the replay flow in this process; by default in workspaces/<name of the pipeline>."""
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
    BESIDE.set(TerminalProgress(console))
    result = replay(str(config_file), root, overrides)
    write_json(join(root, "replay.json"), result.model_dump(mode="json"))
    return result
