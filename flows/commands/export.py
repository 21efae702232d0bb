"""Writing an encoder for another runtime. It loads PyTorch."""

import json
import os
from typing import Any

from graceful.errors import UsageError
from graceful.files import write_bytes
from graceful.flows.store.variants import resolve_query
from graceful.flows.store.workspace import open_workspace
from graceful.training.exporting import FORMATS, export_encoder


def export_generation(root: str, name: str, output_format: str, file: str) -> dict[str, Any]:
    """Export the encoder of a generation, or of the variant that answers for a name; what was measured lies beside it.

    Raises:
        UsageError: another format, or a place that no file can be written to.
        ExportError: it cannot be exported so.
    """
    if output_format not in FORMATS:
        raise UsageError(f"exporting {name}: expected --format {' or '.join(FORMATS)}, found {output_format!r}")
    if not os.path.isdir(os.path.dirname(file)) or os.path.isdir(file):
        raise UsageError(f"exporting {name}: expected a file in a folder that is there, found {file}; correct --out")
    workspace = open_workspace(root)
    generation = resolve_query(workspace.registry, name)
    found = export_encoder(workspace.generation_uri(generation), file, output_format)
    document = found.model_dump(mode="json")
    write_bytes(f"{file}.json", (json.dumps(document, indent=2) + "\n").encode())
    return document
