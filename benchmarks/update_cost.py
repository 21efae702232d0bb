"""What ten predecessors add to an update whose training set has grown by a fifth, against an update with none.

Both are real updates in one process without Ray, of the same images, recipe and evaluation: one of a workspace in which
ten generations have served, whose caches hold the images of before (the champion has none: only predecessors do), and
the first update of a workspace without a generation. Alphabets that the code draws, at three sizes. Counted are
processor seconds of the one thread, which other work on the machine does not change.

The default recipe's mixture is measured beside it: two further epochs after eight, in which the parent's part of the
mixture is learned. A first update has no parent to mix with, so that they are no cost of predecessors.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Ratio, ratio_of
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import PipelineConfig, load_config
from graceful.flows.store.items import item_table
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import order
from graceful.flows.update.serving import ingest
from graceful.training.datasets import load_images

_NUM_PREDECESSORS = 10
_PER_ALPHABET = 360
_PLAIN = {"training.mixture": 0.0}
_EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "glyphs.toml"


def update_predecessors(alphabets: int, pairs: int = 2) -> list[Ratio]:
    """Seconds with 10 predecessors / with none: of caches and training, of the whole update, and with the mixture.

    `alphabets` of 360 images are there before a fifth of them is added.
    """
    torch.set_num_threads(1)
    measured = _measured(alphabets, pairs)
    num_images = _PER_ALPHABET * (alphabets + alphabets // 5)
    name = f"update_predecessors_{num_images}"
    note = f"glyphs at 28x28, {num_images:,} images of which a sixth is new, small CNN, 8 epochs, one thread, no Ray"
    told = {
        ("plain", 0): (name, "caches and training"),
        ("plain", 1): (f"{name}_whole", "the whole update, its judgement included"),
        ("mixed", 0): (f"{name}_mixed", "caches and training, the default's two epochs of mixture included"),
    }
    return [
        ratio_of(
            short,
            [(seconds["none"][part], seconds[which][part]) for seconds in measured],
            at_most=1.25,
            note=f"{note}; {what}",
        )
        for (which, part), (short, what) in told.items()
    ]


def _measured(alphabets: int, pairs: int) -> list[dict[str, tuple[float, float]]]:
    """Seconds of caches and training, and of everything: of no predecessor, of ten, of ten with the mixture."""
    with tempfile.TemporaryDirectory() as folder:
        empty, chain = Path(folder, "empty"), Path(folder, "chain")
        _workspace(empty, alphabets)
        shutil.copytree(empty, chain)
        for number in range(_NUM_PREDECESSORS):
            changes = {"training.epochs": 1, "training.seed": number, "policy.num_resamples": 200}
            _update(chain, alphabets, {**changes, **_PLAIN}, serve_anyway=True)
        kinds = [("none", empty, _PLAIN), ("plain", chain, _PLAIN), ("mixed", chain, {})]
        measured = []
        for number in range(pairs):
            seconds = {}
            for name, base, changes in kinds if number % 2 == 0 else reversed(kinds):
                copy = Path(folder, f"{name}-{number}")
                shutil.copytree(base, copy)
                seconds[name] = _update(copy, alphabets + alphabets // 5, {"training.seed": 100, **changes})
                shutil.rmtree(copy)
            measured.append(seconds)
    return measured


def _config(root: Path, alphabets: int, changes: dict[str, Any]) -> PipelineConfig:
    overrides: dict[str, Any] = {
        "training_data.where": {"alphabet": {"max": alphabets - 1}},
        "evaluation.queries.where": {"alphabet": {"min": 24, "max": 25}, "instance": {"max": 5}},
        "evaluation.gallery.where": {"alphabet": {"min": 24, "max": 25}, "instance": {"min": 6}},
        "training.backbone.kwargs": {},
        "training.preprocessing.image_size": 28,
        "cluster.num_workers": 0,
        "cluster.embed_workers": 0,
        **changes,
    }
    for key in ("training_data.path", "evaluation.queries.path", "evaluation.gallery.path"):
        overrides[key] = str(root.parent / "glyphs.parquet")
    return load_config(_EXAMPLE, str(root), overrides)


def _workspace(root: Path, alphabets: int) -> None:
    config = _config(root, alphabets, {})
    Workspace(str(root)).create()
    assert config.evaluation.gallery is not None
    with open_session(str(root), config) as session:
        ingest(session.workspace, item_table(load_images(config.evaluation.gallery)))


def _update(root: Path, alphabets: int, changes: dict[str, Any], serve_anyway: bool = False) -> tuple[float, float]:
    """Processor seconds of caches and training, and of the whole update."""
    spent: dict[str, float] = {}

    def timing(name: str, act: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = act()
        spent[name] = time.process_time() - started
        return result

    started = time.process_time()
    with open_session(str(root), _config(root, alphabets, changes)) as session:
        order.update(session, serve_anyway=serve_anyway, step=timing)
    whole = time.process_time() - started
    return sum(s for name, s in spent.items() if name.startswith(("extend cache", "train candidate"))), whole
