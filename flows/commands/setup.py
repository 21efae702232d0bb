"""Makes a workspace: the folder, its empty tables, and the configuration."""

from pathlib import Path

from graceful.files import exists, join, write_bytes
from graceful.flows.settings.config import CONFIG_FILE, ConfigError, load_config
from graceful.flows.settings.template import TEMPLATE
from graceful.flows.store.workspace import Workspace


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
    _create_tables(root)
    return target


def _create_tables(root: str) -> None:
    def no_encoder(generation: str) -> None:
        raise RuntimeError(f"embedding with {generation}: this command does not embed")

    workspace = Workspace(root, no_encoder)
    workspace.gallery.version()
    workspace.registry.serving()
