"""Where a training is, and when its workers meet on the way."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEETING_INTERVAL_S = 5.0


@dataclass
class Course:
    """How far a training has come; part of a checkpoint."""

    epoch: int = 0  # that it is in
    step: int = 0  # steps done in that epoch
    seconds: float = 0.0  # spent in all steps
    epoch_seconds: float = 0.0  # spent in this epoch's steps
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's losses; the mean over the ranks
    dev: list[float] = field(default_factory=list)  # self-test on the dev part after every epoch
    mixing_from: int | None = None  # epoch at which the mixture's epochs begin, once the others are made
    workers: int = 1
    worker_changes: list[list[int]] = field(default_factory=list)  # epoch, step, workers before, workers from there on

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None, workers: int) -> "Course":
        """Return where a checkpoint stands, or the beginning."""
        return cls(workers=workers) if saved is None else cls(**{name: saved[name] for name in vars(cls())})

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        changes = [list(change) for change in self.worker_changes]
        return {**vars(self), "sums": dict(self.sums), "dev": list(self.dev), "worker_changes": changes}

    def add(self, seconds: float) -> None:
        """Count time spent in steps."""
        self.seconds += seconds
        self.epoch_seconds += seconds

    def begin_epoch(self) -> None:
        """Leave the epoch that is done for the next one."""
        self.epoch, self.step, self.epoch_seconds, self.sums = self.epoch + 1, 0, 0.0, {}


class Meetings:
    """The steps at which all ranks exchange what they know: about every `interval_s`, and the same on every rank.

    How many steps lie between two meetings comes from the mean time of a step over all ranks, so that no clock has to
    agree with another.
    """

    def __init__(self, device: torch.device, world_size: int, interval_s: float = MEETING_INTERVAL_S) -> None:
        self._device, self._world_size, self._interval_s = device, world_size, interval_s
        self._steps_between = self._left = 1
        self._last = time.perf_counter()

    def is_due(self) -> bool:
        """Count a step; say whether the ranks meet after it."""
        self._left -= 1
        return self._left <= 0

    def meet(self, values: dict[str, Tensor], num_steps: int, is_late: bool) -> tuple[dict[str, float], bool, float]:
        """Return the values' means over the ranks, whether any rank is late, and this rank's seconds since the last.

        num_steps: steps since the last meeting.
        """
        stacked = torch.stack([*values.values()]).double() if values else torch.zeros(0, device=self._device).double()
        stacked = stacked.cpu()  # waits for the steps to end, so that the clock below counts them
        seconds = time.perf_counter() - self._last
        self._last = time.perf_counter()
        shared = torch.cat([stacked, torch.tensor([float(is_late), seconds], dtype=torch.float64)])
        if self._world_size > 1:
            shared = shared.to(self._device)
            dist.all_reduce(shared)
        numbers = (shared / self._world_size).tolist()
        wanted = int(self._interval_s * max(num_steps, 1) / max(numbers[-1], 1e-9))
        self._steps_between = self._left = max(1, min(wanted, 4 * self._steps_between))
        return dict(zip(values, numbers, strict=False)), numbers[-2] > 0, seconds

    def restart_clock(self) -> None:
        """Do not count what lies between the last meeting and now."""
        self._last = time.perf_counter()
