"""Learning curves in TensorBoard's files and in MLflow: every epoch once, also when a training goes on."""

import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from graceful.errors import UsageError
from graceful.training.trackers import TrackersConfig, open_trackers

LINES = [{"epoch": epoch, "epochs": 3, "loss": 1.0 / (epoch + 1), "workers": 1} for epoch in range(3)]


def track(config: TrackersConfig, lines: Sequence[Mapping[str, Any]]) -> None:
    with open_trackers(config, "g002-run", {"epochs": 3}) as write:
        for line in lines:
            write(line)


def events(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of what is not void, read from the files' own records."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[int, str], float] = {}
    for path in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == 1:  # START: what was written from this step on is void
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    yield from ((step, name, value) for (step, name), value in sorted(found.items()))


def test_tensorboard_gets_every_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra 'tensorboard' is not installed")
    config = TrackersConfig(tensorboard=str(tmp_path))
    for num_lines in (2, 3):  # the second time the training goes on: all its lines come again
        track(config, LINES[:num_lines])
    assert list(events(tmp_path / "g002-run")) == [
        (1, "loss", 1.0), (2, "loss", 0.5), (3, "loss", pytest.approx(1 / 3)),
    ]  # fmt: skip


def test_mlflow_gets_every_epoch_once_and_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    config = TrackersConfig(mlflow=uri, mlflow_experiment="faces")
    with pytest.raises(KeyError):
        track(config, [*LINES[:2], {}])  # a line without an epoch ends it
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("faces").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]
    track(config, LINES)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "g002-run", {"epochs": "3"})
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


@pytest.mark.parametrize(("tracker", "library"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow")])
def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tracker: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with (
        pytest.raises(UsageError, match=rf"pip install graceful\[{tracker}\]"),
        open_trackers(TrackersConfig(**{tracker: "x"}), "run", {}),
    ):
        pass
