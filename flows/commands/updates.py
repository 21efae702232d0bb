"""Commands that train and judge: update, adopt, replay. They load PyTorch, Ray and Prefect."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from graceful.errors import UsageError
from graceful.files import is_remote, join, write_bytes, write_json
from graceful.flows.commands.adopt import adopt_generation
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.settings.config import CONFIG_FILE, Control, load_config, load_workspace_config
from graceful.flows.store.workspace import open_workspace, require_workspace
from graceful.flows.update.act import plain
from graceful.flows.update.flow import BESIDE, replay, replay_plainly, run_flow, update, update_plainly
from graceful.flows.update.order import UpdateResult
from graceful.flows.update.replay import ReplayResult, replay_table
from graceful.training.backbones import WEIGHTS_FILES


def update_workspace(
    root: str, console: Console, *, again: bool = False, adopted: str | None = None, paragon: bool | None = None
) -> UpdateResult:
    """Run the update flow in this process; `adopted`: judge this generation instead of training one."""
    require_workspace(root)
    progress = TerminalProgress(console)
    BESIDE.set(progress)
    wanted = {"again": again, "train_paragon": paragon, "adopted": adopted, "wait_hours": 0.0}
    return run_flow(lambda: update(root, **wanted), lambda: update_plainly(root, progress, plain, **wanted))  # type: ignore[arg-type]


def adopt_encoder(
    root: str,
    name: str,
    factory: str,
    weights: str | None,
    kwargs: str,
    stated: Mapping[str, Any],
    preprocessing: str = "{}",
) -> str:
    """Try an encoder from elsewhere and store it; returns its id.

    `kwargs` and `preprocessing` are JSON objects; `stated` are values of the preprocessing that go before the latter.
    """
    arguments = _object_of(name, "--kwargs", kwargs)
    look = {**_object_of(name, "--preprocessing", preprocessing), **stated}
    file = os.path.abspath(weights) if weights is not None and weights.endswith(WEIGHTS_FILES) else weights
    return adopt_generation(
        open_workspace(root),
        load_workspace_config(root),
        name,
        factory,
        weights=file,
        kwargs=arguments,
        preprocessing=look,
    )


def _object_of(name: str, option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"adopting {name}: expected {option} as a JSON object, found {text!r} ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"adopting {name}: expected {option} as a JSON object, found {text!r}")
    return found


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
    progress = TerminalProgress(console)
    BESIDE.set(progress)
    wanted = (str(config_file), root, overrides)
    result = run_flow(lambda: replay(*wanted), lambda: replay_plainly(*wanted, progress, plain))
    write_json(join(root, "replay.json"), result.model_dump(mode="json"))
    return result
