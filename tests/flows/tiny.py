"""A workspace on the bundled digits that trains in about a second, without Ray, for tests of whole updates.

Thirty images of each digit to train on, twenty of each to judge by; resampled by image, and with limits so wide that an
update is decided to roll out: these tests are about what is carried out, not about statistics.
"""

import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import PipelineConfig, load_config
from graceful.flows.store.events import Decided
from graceful.flows.store.items import item_table
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.serving import ingest
from graceful.training.datasets import load_images
from graceful.training.manifest import LabelledImages

ROOT = Path(__file__).parents[2]
DIGITS = [str(digit) for digit in range(10)]
WIDE = {"quality_margin_points": 90.0, "max_nfr": 0.9, "max_dip_points": 90.0, "max_wave_zero_share": 1.0}

BASE: dict[str, Any] = {
    "name": "tiny",
    "training_data": {"source": "digits", "where": {"label": DIGITS[:3], "instance": {"max": 29}}},
    "evaluation": {
        "protocol": "closed_set",
        "cluster": "instance",
        "queries": {"source": "digits", "where": {"label": DIGITS[:5], "instance": {"min": 80, "max": 99}}},
    },
    "training": {
        "width": 16,
        "epochs": 2,
        "batch_size": 64,
        "precision": "float32",  # auto measures, and a busy machine may choose otherwise
        "first_max_lr": 0.001,  # too low: what comes after it is better by far, and its re-index pays
        "max_lr": 0.005,
        "backbone": {"name": "small_cnn", "kwargs": {"block_widths": [8, 16]}},
        "preprocessing": {"image_size": 8, "channels": 1, "mean": [0.3], "std": [0.37]},
    },
    "policy": {**WIDE, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]},
    "gallery": {"wave_rows": 25, "unit_rows": 20},
    # A gain is worth all that a re-index costs: not the smallest fraction is decided, but the best.
    "prices": {
        "fixed_worker_hours": 0.0,
        "price_per_worker_hour": 0.0,
        "price_per_gib_month": 0.0,
        "value_per_point_day": 1.0,
        "days_until_next_generation": 100.0,
    },
    "cluster": {"num_workers": 0, "embed_workers": 0},
}


def settings(digits: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tables of a configuration; `changes` maps dotted keys to values, None removes a key."""
    tables = copy.deepcopy(BASE)
    tables["training_data"]["path"] = tables["evaluation"]["queries"]["path"] = str(digits)
    for dotted, value in (changes or {}).items():
        *outer, last = dotted.split(".")
        inner = tables
        for name in outer:
            inner = inner.setdefault(name, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return tables


def write_config(root: Path, digits: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write graceful.toml into a workspace's folder."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "graceful.toml"
    path.write_text(config_text(digits, changes))
    return path


def config_text(digits: Path, changes: Mapping[str, Any] | None = None) -> str:
    """The same configuration as TOML."""
    return "".join(f"{name} = {inline(value)}\n" for name, value in settings(digits, changes).items())


def grown(num_classes: int) -> dict[str, Any]:
    """Changes that show more digits to the next training."""
    return {"training_data.where.label": DIGITS[:num_classes]}


def fill_gallery(workspace: Workspace, config: PipelineConfig) -> LabelledImages:
    """Ingest the evaluation's images as the production gallery: 100 items."""
    images = load_images(config.evaluation.queries)
    ingest(workspace, item_table(images))
    return images


def new_workspace(root: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A workspace with data and gallery of its own, and no generation yet."""
    write_config(root, root / "digits.parquet", changes)
    config = open_config(root)
    Workspace(str(root)).create()
    with open_session(str(root), config) as session:
        fill_gallery(session.workspace, config)
    return root


def end_state(root: str | Path) -> dict[str, Any]:
    """What must not depend on how often an update was killed."""
    workspace = Workspace(str(root), no_encoder)
    registry, serving = workspace.registry, workspace.registry.serving()
    view = workspace.view(serving.champion)
    names = [view.readable[code] if code >= 0 else "" for code in view.owner]
    decided = registry.events(Decided)
    moves = [(s.champion, s.previous, s.active_plan, s.moved_by) for s in registry.serving_history()]
    return {
        "champion": serving.champion,
        "previous": serving.previous,
        "active_plan": serving.active_plan,
        # Without those that only say whose vectors are kept.
        "moves": [move for move, _ in itertools.groupby(moves)],
        "certificates": registry.certificates(),
        "generations": registry.generations(),
        "view": dict(zip(view.item_ids.tolist(), names, strict=True)),
        "rows": workspace.gallery.generations(),
        "decisions": [(event.update_key, event.generation, event.payload.outcome) for event in decided],
        "decision": json.loads(Path(root, "evaluations", decided[-1].payload.evaluation, "decision.json").read_text()),
        "events": sorted((e.kind, e.generation) for e in registry.history() if e.kind != "plan_completed"),
    }


def graceful(*arguments: str, env: Mapping[str, str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, and end whatever it left behind.

    Output goes to files: the flow server of a killed command lives on and would hold a pipe open.
    """
    command = [sys.executable, "-m", "graceful.flows.cli", *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, output.read(), errors.read())


def copy_workspace(source: Path, target: Path) -> Path:
    """A workspace of the same state elsewhere."""
    shutil.copytree(source, target)
    return target


def open_config(root: Path, changes: Mapping[str, Any] | None = None) -> PipelineConfig:
    """The workspace's configuration."""
    return load_config(root / "graceful.toml", str(root), dict(changes or {}))


def no_encoder(generation: str) -> Any:
    """The `embed_with` of a workspace that is only read."""
    raise AssertionError(f"nothing is to be embedded with {generation}")


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(inline(inner) for inner in value) + "]"
    return json.dumps(value)
