"""What orchestration costs: (wall time of an update - its compute) / its compute.

Compute is what the stages themselves spent: epochs of training and the calibration after them, encoding, judging.
Everything else (the flow, Ray's start, the tables, checkpoints, reading and writing) is orchestration. The first update
of a workspace on the bundled digits, enlarged to 64 x 64 so that an epoch takes seconds, as it does where updates take
minutes; as many epochs as make ten minutes on this machine, by a short update in another workspace before it.
"""

import math
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Ratio
from graceful.flows.runtime.environment import prepare_environment

COMPUTE_S = 600.0
TRIAL_EPOCHS = 24


def orchestration(wanted_s: float = COMPUTE_S) -> Ratio:
    """Overhead of one update flow under Prefect on a local Ray cluster; ten minutes of compute on one core."""
    with tempfile.TemporaryDirectory() as trial, tempfile.TemporaryDirectory() as folder:
        prepare_environment(folder)
        from prefect import flow

        from graceful.flows.runtime.session import open_session
        from graceful.flows.settings.config import load_config
        from graceful.flows.store.events import UpdateCompleted
        from graceful.flows.store.workspace import Workspace
        from graceful.flows.update import order
        from graceful.flows.update.flow import as_task

        example = Path(__file__).resolve().parent.parent / "examples" / "digits.toml"

        @flow(persist_result=False)
        def update(root: str, epochs: int) -> tuple[float, float]:
            overrides = {
                "training.epochs": epochs,
                "training.backbone.kwargs": {},
                "training.preprocessing.image_size": 64,
                "train_paragon": False,
            }
            config = load_config(example, root, overrides)
            Workspace(root).create()
            started = time.monotonic()
            with open_session(root, config) as session:
                result = order.update(session, step=as_task)
                compute = session.workspace.registry.events(UpdateCompleted, result.update_key)[0].payload.compute_s
            return time.monotonic() - started, float(compute)

        _, short = update(trial, TRIAL_EPOCHS)  # brings the flow server up, too: a scheduled update finds it running
        epochs = math.ceil(wanted_s / short * TRIAL_EPOCHS)
        wall, compute = update(folder, epochs)
    ratio = (wall - compute) / compute
    return Ratio(
        name="orchestration",
        ratio=round(ratio, 3),
        lowest=round(ratio, 3),
        highest=round(ratio, 3),
        num_pairs=1,
        target="<= 0.05",
        meets_target=ratio <= 0.05,
        baseline_s=round(compute, 1),
        candidate_s=round(wall, 1),
        note=f"{epochs} epochs, {compute:.0f} s of compute as the stages report it; own Ray cluster, flow server up",
    )
