"""Makes a workspace: folder, empty tables, and a configuration; shown pictures, one that fits them."""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graceful.files import exists, join, remove, write_bytes
from graceful.flows.settings.config import CONFIG_FILE, ConfigError, is_unedited, load_config
from graceful.flows.settings.template import TEMPLATE
from graceful.flows.store.workspace import Workspace

UNREADABLE_FILE = "unreadable.txt"


@dataclass(frozen=True)
class Created:
    """Where the configuration lies, whether it was written now, and what there is to say about it."""

    config: str
    written: bool
    lines: tuple[str, ...] = ()


def create_workspace(
    root: str,
    config: Path | None = None,
    pictures: str | None = None,
    label: str | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Created:
    """Create the folder, its empty tables and the configuration; what is there is left alone.

    `pictures` are looked at, and a configuration that fits them is written; an unedited template gives way to it.
    Raises ConfigError and InspectionError.
    """
    target = join(root, CONFIG_FILE)
    if config is not None and pictures is not None:
        raise ConfigError("creating a workspace: expected --config or --from, found both; give one of them")
    if (config is not None or pictures is not None) and exists(target) and not (pictures and is_unedited(root)):
        raise ConfigError(f"creating a workspace: {target} is there already; edit it, or choose another folder")
    lines: tuple[str, ...] = ()
    written = True
    if config is not None:
        load_config(config, root)
        write_bytes(target, config.read_bytes())
    elif pictures is not None:
        lines = _from_pictures(root, pictures, label, on_images)
    elif not exists(target):
        write_bytes(target, TEMPLATE.encode())
    else:
        written = False
    Workspace(root).create()
    return Created(target, written, lines)


def _from_pictures(
    root: str, pictures: str, label: str | None, on_images: Callable[[int], None] | None
) -> tuple[str, ...]:
    """Look, then write the configuration and the list of what cannot be read; returns what to say."""
    from graceful.flows.settings.inspection import inspect_images
    from graceful.flows.settings.starter import filled_in, inspection_lines

    found = inspect_images(pictures, label=label, on_images=on_images)
    text = filled_in(_name_of(root), found)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, CONFIG_FILE)
        draft.write_text(text)
        load_config(draft, root)  # what cannot be read back is not written
    listing = join(root, UNREADABLE_FILE)
    if found.unreadable:
        write_bytes(listing, "".join(f"{source}\t{reason}\n" for source, reason in found.unreadable).encode())
    else:
        remove(listing)
    write_bytes(join(root, CONFIG_FILE), text.encode())
    return tuple(inspection_lines(found, listing))


def _name_of(root: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", os.path.basename(root.rstrip("/")).lower()).strip("-") or "image-search"
