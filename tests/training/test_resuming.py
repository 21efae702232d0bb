"""A training that stops anywhere goes on as if it had not: after every step, with other workers, and not by mistake."""

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graceful.training import progress
from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.loop import TrainingDeadlineError, train_worker
from graceful.training.pace import Meetings
from graceful.training.progress import TrailReporter
from graceful.training.resuming import ChangedTrainingError
from tests.training.mortal import Killed, MortalReporter, trained_with_kills

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks meet after every step."""
    monkeypatch.setattr(Meetings, "is_due", lambda self: True)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("before", [False, True])
def test_a_training_killed_at_every_single_step_ends_with_the_same_weights(
    make_job: MakeJob, config: TrainingConfig, before: bool
) -> None:
    recipe = config.model_copy(update={"epochs": 2, "batch_size": 200})
    whole = run_training(make_job(name="whole", config=recipe))
    job = make_job(name="killed", config=recipe, checkpoint_minutes=0.0)
    card, left = trained_with_kills(job, 20, lives=1, before=before)
    places = [(state["epoch"], state["step"]) for state in left]
    assert places == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)][: 5 if before else 6]
    assert card.digest == whole.digest
    lines = [TrailReporter(job.storage_uri, name).metrics() for name in ("whole", "killed")]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-6)
    left = {path.name for path in (Path(job.storage_uri) / job.name).iterdir()}
    assert left == {"checkpoints.json", "metrics.jsonl", "result.json"}


def test_a_training_killed_before_any_of_its_writes_loses_no_line_and_no_weight(
    make_job: MakeJob, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.model_copy(update={"epochs": 2, "batch_size": 200})
    digest = run_training(make_job(name="whole", config=recipe)).digest
    write = progress.write_bytes
    for lives in range(100):
        job = make_job(name=f"killed-{lives}", config=recipe)
        left = [lives]

        def mortal(uri: str, payload: bytes, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            write(uri, payload)

        monkeypatch.setattr(progress, "write_bytes", mortal)
        with contextlib.suppress(Killed):
            run_training(job)
        monkeypatch.setattr(progress, "write_bytes", write)
        assert run_training(job).digest == digest
        assert [line["epoch"] for line in TrailReporter(job.storage_uri, job.name).metrics()] == [0, 1]
        if left[0] >= 0:
            break
    assert lives > 7  # three writes an epoch, two at the end, and the glance of a slow machine


@pytest.mark.usefixtures("often")
def test_a_late_training_stops_in_the_midst_of_an_epoch_and_goes_on(make_job: MakeJob) -> None:
    job = make_job(name="late")
    with pytest.raises(TrainingDeadlineError, match="epoch 1 of 4, step 1 of 10"):
        run_training(job, deadline_s=0.0)
    with pytest.raises(TrainingDeadlineError, match="epoch 1 of 4, step 2 of 10"):
        run_training(job, deadline_s=0.0)
    assert run_training(job).digest == run_training(make_job(name="whole")).digest


@pytest.mark.usefixtures("often")
def test_an_epoch_under_way_is_looked_at_and_saved_only_now_and_then(make_job: MakeJob) -> None:
    job = make_job(checkpoint_minutes=1e6)
    with pytest.raises(Killed):
        train_worker(job, MortalReporter(job, lives=14, lines=True))
    trail = TrailReporter(job.storage_uri, job.name)
    glanced = trail.last_glance()
    assert glanced is not None
    assert (glanced["epoch"], glanced["step"], glanced["steps"]) == (1, 4, 10)
    assert glanced["eta_s"] > 0
    assert {"loss", "task", "images_per_s"} <= set(glanced)
    state = trail.latest()
    assert (state["epoch"], state["step"]) == (0, 10)


@pytest.mark.usefixtures("often")
def test_glances_are_handed_on_in_order_and_never_after_their_epoch(make_job: MakeJob) -> None:
    places: list[tuple[int, int]] = []
    run_training(
        make_job(),
        lambda line: places.append((line["epoch"], 99)),
        on_glance=lambda line: places.append((line["epoch"], line["step"])),
    )
    assert places == [(epoch, step) for epoch in range(4) for step in [*range(1, 10), 99]]


@pytest.mark.parametrize(
    ("changes", "said"), [({"epochs": 8}, "epochs = 4"), ({"batch_size": 32, "seed": 1}, "batch_size = 64, seed = 0")]
)
def test_a_changed_recipe_under_the_same_name_is_refused(
    make_job: MakeJob, config: TrainingConfig, changes: dict[str, Any], said: str
) -> None:
    job = make_job()
    with pytest.raises(Killed):
        train_worker(job, MortalReporter(job))
    with pytest.raises(ChangedTrainingError, match=f"found one with {said}.*give the changed training a name"):
        run_training(job.model_copy(update={"config": config.model_copy(update=changes)}))
    run_training(job)


def test_other_images_under_the_same_name_are_refused(make_job: MakeJob, digits: Any) -> None:
    job = make_job()
    with pytest.raises(Killed):
        train_worker(job, MortalReporter(job))
    fewer = make_job(images=digits.take([row for row in range(len(digits)) if row % 2]))
    with pytest.raises(ChangedTrainingError, match="10 steps per epoch instead of 5"):
        run_training(fewer)


def test_other_workers_go_on_and_it_is_on_the_card(make_job: MakeJob, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job()
    with pytest.raises(Killed):
        train_worker(job, MortalReporter(job, lives=2))
    trail = TrailReporter(job.storage_uri, job.name)
    state = trail.latest()
    state["workers"] = 2  # as two workers would have left it: they hold the same weights
    trail.report(trail.metrics()[-1], state)
    card = run_training(job)
    assert card.training["worker_changes"] == [[2, 0, 2, 1]]
    assert (card.training["workers"], "worker_changes" in run_training(make_job(name="calm")).training) == (1, False)
    assert "goes on with 1 workers instead of 2, from epoch 2, step 0" in caplog.text


def test_ranks_meet_at_the_same_steps_about_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("graceful.training.pace.time.perf_counter", lambda: now[0])
    meetings = Meetings(torch.device("cpu"), 1, interval_s=5.0)
    met, since = [], 0
    for step in range(400):
        now[0] += 0.1
        since += 1
        if meetings.is_due():
            meetings.meet({"loss": torch.tensor(1.0)}, since, False)
            met.append(step)
            since = 0
    gaps = [after - before for before, after in itertools.pairwise(met)]
    assert met[0] == 0
    assert gaps[:2] == [4, 16]
    assert set(gaps[2:]) <= {49, 50}


def test_what_is_written_of_a_checkpoint_is_plain(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(Killed):
        train_worker(job, MortalReporter(job))
    state = TrailReporter(job.storage_uri, job.name).latest()
    json.dumps({name: value for name, value in state.items() if name not in ("trainee", "optimizer", "schedule")})
