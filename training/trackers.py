"""Learning curves for TensorBoard and MLflow, where they are configured.

Written by whoever follows the training, from the lines of its trail: workers know nothing of it. A training that goes
on hands all its lines on again; what a tracker has is not written twice. Both libraries are loaded only when used.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from graceful.errors import UsageError
from graceful.files import is_remote, join

_NOT_A_CURVE = ("epoch", "epochs", "step", "steps", "workers", "workers_before")
Write = Callable[[Mapping[str, Any]], None]


class TrackersConfig(BaseModel):
    """Where learning curves go besides the report and the flow UI."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorboard: str | None = Field(
        default=None, description="Folder of TensorBoard's event files, one sub-folder per training."
    )
    mlflow: str | None = Field(
        default=None, description="Tracking URI of MLflow, such as http://mlflow:5000 (extra: mlflow)."
    )
    mlflow_experiment: str = Field(default="graceful", description="MLflow's experiment.")


@contextmanager
def open_trackers(config: TrackersConfig, name: str, parameters: Mapping[str, Any]) -> Iterator[Write]:
    """Yield what takes the lines of the training `name`, one per epoch; `parameters` describe it (MLflow).

    Raises: UsageError where a configured library is not installed.
    """
    with ExitStack() as stack:
        writers: list[Write] = []
        if config.tensorboard is not None:
            writers.append(stack.enter_context(_tensorboard(config.tensorboard, name)))
        if config.mlflow is not None:
            writers.append(stack.enter_context(_mlflow(config.mlflow, config.mlflow_experiment, name, parameters)))

        def write(line: Mapping[str, Any]) -> None:
            for writer in writers:
                writer(line)

        yield write


def curve_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what changes from epoch to epoch in a progress line: losses, seconds, speed.

    >>> curve_values({"epoch": 2, "epochs": 8, "loss": 0.5, "workers": 1})
    {'loss': 0.5}
    """
    return {name: float(value) for name, value in line.items() if name not in _NOT_A_CURVE}


@contextmanager
def _tensorboard(folder: str, name: str) -> Iterator[Write]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "tensorboardX") from None
    place = join(folder, name) if is_remote(folder) else os.path.join(os.path.abspath(folder), name)
    # All lines come again when a training goes on: what an earlier process wrote is void.
    with SummaryWriter(place, purge_step=0) as writer:

        def write(line: Mapping[str, Any]) -> None:
            for key, value in curve_values(line).items():
                writer.add_scalar(key, value, int(line["epoch"]) + 1)
            writer.flush()

        yield write


@contextmanager
def _mlflow(uri: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> Iterator[Write]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise _missing("mlflow", "mlflow-skinny") from None
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if known is None else known.experiment_id
    found = client.search_runs([experiment_id], f"tags.`graceful.run` = '{name}'", max_results=1)
    if found:
        run_id, last = found[0].info.run_id, _last_step(client, found[0].info.run_id)
    else:
        run_id = client.create_run(experiment_id, run_name=name, tags={"graceful.run": name}).info.run_id
        last = 0
        for key, value in parameters.items():
            client.log_param(run_id, key, str(value)[:500])

    def write(line: Mapping[str, Any]) -> None:
        step = int(line["epoch"]) + 1
        if step > last:
            for key, value in curve_values(line).items():
                client.log_metric(run_id, key, value, step=step)

    try:
        yield write
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def _last_step(client: Any, run_id: str) -> int:
    return max((point.step for point in client.get_metric_history(run_id, "loss")), default=0)


def _missing(extra: str, library: str) -> UsageError:
    return UsageError(
        f"tracking a training: expected {library} to be installed for trackers.{extra}, found it missing; run "
        f"'pip install graceful[{extra}]', or take trackers.{extra} out of the configuration"
    )
