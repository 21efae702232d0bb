"""One step: micro-batches add up to the batch, long gradients are shortened, compiling falls back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graceful.training import compiling
from graceful.training.compiling import compiled
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.loop import prepared
from graceful.training.material import Batch, load_material
from graceful.training.progress import TrailReporter
from graceful.training.starting import build_trainee
from graceful.training.step import Run, Stepper, steps_per_epoch

MakeJob = Callable[..., TrainingJob]
CPU = torch.device("cpu")


@pytest.fixture
def open_run(make_job: MakeJob, config: TrainingConfig, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that opens a run without augmentation, whose recipe has the given changes."""

    def open_one(**changes: Any) -> Run:
        still = {"augmentation": AugmentationConfig(kind="none"), "precision": "float32", "constraints": ()}
        job = make_job(config=config.model_copy(update={**still, "interpolation": 0.0, **changes}))
        report = TrailReporter(job.storage_uri, job.name)
        return Run(job, report, 0, 1, CPU, None, load_material(job, CPU, tmp_path))

    return open_one


def stepper_of(run: Run, without_norm: bool = True) -> Stepper:
    torch.manual_seed(0)
    trainee = build_trainee(run.job.config, len(run.material.classes), None)
    if without_norm:
        for name, module in list(trainee.network.blocks.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                trainee.network.blocks[int(name)] = nn.Identity()
    return Stepper(run, trainee, max_lr=0.01, total_steps=20)


def first_batch(run: Run) -> Batch:
    return next(run.material.batches(0, 0, steps_per_epoch(run), 0, 1))


@pytest.mark.parametrize(("total", "count", "num_ranks"), [(61, 3, 2), (64, 4, 4), (7, 3, 2), (5, 1, 4)])
def test_micro_batches_are_the_batch_and_no_rank_goes_without(total: int, count: int, num_ranks: int) -> None:
    rows = torch.arange(total)
    shares = [Batch(rows[r::num_ranks], rows[r::num_ranks], rows[r::num_ranks], total) for r in range(num_ranks)]
    cut = [share.micro_batches(count, num_ranks) for share in shares]
    for share, parts in zip(shares, cut, strict=True):
        assert len(parts) == count
        assert all(len(part.rows) for part in parts)
        assert torch.equal(torch.cat([part.rows for part in parts]), share.rows)
    for parts in zip(*cut, strict=True):
        assert len({part.total for part in parts}) == 1
        assert sum(len(part.rows) for part in parts) == parts[0].total


def test_micro_batches_give_the_gradient_of_the_batch(open_run: Callable[..., Run]) -> None:
    whole, parts = open_run(batch_size=61), open_run(batch_size=61, accumulation=3)
    steppers = [stepper_of(run) for run in (whole, parts)]
    for step in range(3):
        losses = [stepper.take(first_batch(whole), 0, step) for stepper in steppers]
        torch.testing.assert_close(losses[0]["loss"], losses[1]["loss"])
    for one, other in zip(*(stepper.trainee.parameters() for stepper in steppers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_long_gradients_are_shortened_to_the_limit_and_short_ones_left(open_run: Callable[..., Run]) -> None:
    norms = {}
    for limit in (None, 1e-3, 1e6):
        run = open_run(max_gradient_norm=limit)
        stepper = stepper_of(run)
        stepper.take(first_batch(run), 0, 0)
        gradients = [p.grad.flatten() for p in stepper.trainee.parameters() if p.grad is not None]
        norms[limit] = float(torch.cat(gradients).norm())
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e6] == pytest.approx(norms[None])
    assert norms[None] > 0.1


def test_a_rehearsal_leaves_nothing_behind(open_run: Callable[..., Run]) -> None:
    run = open_run()
    stepper = stepper_of(run, without_norm=False)
    before = {name: value.clone() for name, value in stepper.trainee.state_dict().items()}
    stepper.rehearse(first_batch(run))
    assert all(torch.equal(value, before[name]) for name, value in stepper.trainee.state_dict().items())
    assert all(parameter.grad is None for parameter in stepper.trainee.parameters())


# Compiling


@pytest.mark.parametrize(
    ("choice", "device", "num_steps", "expected"),
    [("off", "cuda", 10**6, False), ("auto", "cpu", 10**6, False), ("auto", "cuda", 999, False),
     ("auto", "cuda", 1000, True), ("on", "cpu", 1, True)],
)  # fmt: skip
def test_compiling_is_decided_by_choice_device_and_steps(
    monkeypatch: pytest.MonkeyPatch, choice: Any, device: str, num_steps: int, expected: bool
) -> None:
    monkeypatch.setattr(compiling, "_works", lambda *_: True)
    with compiled(nn.Linear(2, 2), choice, torch.device(device), num_steps, lambda: None) as is_compiled:
        assert is_compiled == expected


def test_what_cannot_be_compiled_is_trained_as_it_is_with_one_line(
    make_job: MakeJob, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: nn.Module) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("no compiler\nfound here")

        module._compiled_call_impl = fail

    plain = run_training(make_job(name="plain"))
    monkeypatch.setattr(nn.Module, "compile", broken)
    card = run_training(make_job(name="broken", config=config.model_copy(update={"compile": "on"})))
    lines = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert lines == ["torch.compile failed, training goes on without it: no compiler found here"]
    assert (card.training["compiled"], card.digest) == (False, plain.digest)


def test_a_compiled_network_trains_and_is_stored_as_the_plain_one(
    open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself is torch's; a backend that only captures the graph takes a second instead of a minute."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    run = open_run(compile="on")
    torch.manual_seed(0)
    trainee = build_trainee(run.job.config, len(run.material.classes), None)
    names = list(trainee.state_dict())
    with prepared(run, trainee, False, steps_per_epoch(run) * run.job.config.epochs) as (stepper, is_compiled):
        assert is_compiled
        assert trainee.network._compiled_call_impl is not None
        compiled_loss = stepper.take(first_batch(run), 0, 0)["loss"]
    assert trainee.network._compiled_call_impl is None
    assert list(trainee.state_dict()) == names
    torch.testing.assert_close(stepper_of(run, without_norm=False).take(first_batch(run), 0, 0)["loss"], compiled_loss)
