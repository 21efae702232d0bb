"""A small workspace with a generation that serves, and commands that work on it in processes of their own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 900.0
EPOCHS = 600
_CONFIG = """name = "world"
[training_data]
source = "digits"
path = "{digits}"
where = {{ label = {labels}, instance = {{ max = 29 }} }}
[evaluation]
protocol = "closed_set"
cluster = "instance"
[evaluation.queries]
source = "digits"
path = "{digits}"
where = {{ label = ["0", "1", "2", "3", "4"], instance = {{ min = 80, max = 99 }} }}
[training]
width = 16
epochs = {epochs}
batch_size = 64
backbone = {{ name = "small_cnn", kwargs = {{ block_widths = [8, 16] }} }}
preprocessing = {{ image_size = 8, channels = 1, mean = [0.3], std = [0.37] }}
[policy]
quality_margin_points = 90.0
max_nfr = 0.9
max_dip_points = 90.0
max_wave_zero_share = 1.0
num_resamples = 200
[cluster]
{cluster}
[schedule]
every_minutes = 1
"""
HERE_ALONE = "num_workers = 0\nembed_workers = 0"


class Trial:
    """A copy of a workspace with more to train, and commands in it."""

    def __init__(self, bootstrapped: Path, folder: Path, cluster: str, environment: dict[str, str]) -> None:
        self.root = folder / "workspace"
        shutil.copytree(bootstrapped, self.root)
        write_config(self.root, bootstrapped.parent / "digits.parquet", cluster, grown=True)
        self.log = folder / "log"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        """Start a command of the command line."""
        arguments = [sys.executable, "-m", "graceful.flows.cli", *(command or ("update",)), "--root", str(self.root)]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip


def write_config(root: Path, digits: Path, cluster: str, *, grown: bool) -> None:
    """Write the workspace's configuration; `grown` shows two more digits to the training."""
    labels = [str(digit) for digit in range(5 if grown else 3)]
    text = _CONFIG.format(digits=digits, labels=labels, epochs=EPOCHS if grown else 2, cluster=cluster)
    (root / "graceful.toml").write_text(text.replace("'", '"'))


def bootstrap(folder: Path) -> Path:
    """A workspace whose first generation serves."""
    from graceful.flows.runtime.session import open_session
    from graceful.flows.settings.config import load_workspace_config
    from graceful.flows.store.items import item_table
    from graceful.flows.store.workspace import Workspace
    from graceful.flows.update.order import update
    from graceful.flows.update.serving import ingest
    from graceful.training.datasets import load_images
    from graceful.training.materialise import materialise_digits

    digits = Path(materialise_digits(str(folder / "digits.parquet")))
    root = folder / "bootstrapped"
    Workspace(str(root)).create()
    write_config(root, digits, HERE_ALONE, grown=False)
    config = load_workspace_config(str(root))
    with open_session(str(root), config) as session:
        ingest(session.workspace, item_table(load_images(config.evaluation.queries)))
        update(session)
    return root


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_S:g} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
