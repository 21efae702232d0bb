"""A workspace of the bundled digits that trains in a second or two, for tests of what stands around an update."""

from pathlib import Path
from typing import Any

from flows.config import CONFIG_FILE, load_config
from flows.session import open_session
from flows.steps import UpdateRun

CONFIG = """\
name = "{name}"

[training_data]
source = "digits"
path = "{{root}}/digits.parquet"
label_columns = ["label"]
where = {{ instance = {{ max = 29 }} }}

[evaluation]
protocol = "closed_set"

[evaluation.queries]
source = "digits"
path = "{{root}}/digits.parquet"
label_columns = ["label"]
where = {{ instance = {{ min = 30, max = 59 }} }}

[training]
width = 16
epochs = {epochs}
batch_size = 64
backbone = {{ name = "small_cnn", kwargs = {{ block_widths = [8, 16] }} }}
preprocessing = {{ image_size = 8, channels = 1, mean = [0.3], std = [0.37] }}

[cluster]
num_workers = 0
embed_workers = 0

[schedule]
cron = "{cron}"
timezone = "{timezone}"
"""


def write_workspace(root: Path, **values: Any) -> Path:
    """Create a workspace and its configuration; it holds no generation yet."""
    from flows.operations import create_workspace

    root.mkdir(parents=True, exist_ok=True)
    defaults = {"name": "tiny", "epochs": 1, "cron": "0 3 * * 1", "timezone": "UTC"}
    (root / CONFIG_FILE).write_text(CONFIG.format(**{**defaults, **values}))
    create_workspace(str(root), None)
    return root


def fill_gallery(root: Path) -> int:
    """Ingest the evaluation images as the gallery."""
    from flows.items import item_table
    from flows.rollout import ingest
    from training.datasets import load_images

    config = load_config(root / CONFIG_FILE, str(root))
    images = load_images(config.evaluation.queries)
    with open_session(str(root), config) as session:
        ingest(session.workspace, item_table(images), unit="digits")
    return len(images)


def update_without_prefect(root: Path, *, order_backfill: bool = False, **overrides: Any) -> str:
    """Take the steps of an update in this process; returns the candidate. Overrides are dotted configuration keys."""
    config = load_config(root / CONFIG_FILE, str(root), overrides)
    with open_session(str(root), config) as session:
        run = UpdateRun(session)
        for predecessor in run.frozen.predecessors:
            run.extend_cache(predecessor)
        candidate = run.train()
        for generation in (*run.frozen.generations, candidate):
            run.embed_evaluation(generation)
        evaluation = run.judge(candidate)
        if run.acts_on(evaluation) or order_backfill:
            rollout = run.rollout(evaluation) if run.acts_on(evaluation) else run.ordered_backfill(evaluation)
            run.embed_before_move(rollout)
            run.move(rollout)
        run.carry_on()
        run.conclude(evaluation)
        return candidate
