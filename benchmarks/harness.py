"""Paired timing: baseline and candidate alternate in one process, and the median of the pairs' ratios counts."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Ratio:
    """One benchmark's result. `meets_target` compares the median with the target."""

    name: str
    ratio: float
    lowest: float
    highest: float
    num_pairs: int
    target: str
    meets_target: bool
    baseline_s: float
    candidate_s: float
    note: str

    def as_dict(self) -> dict[str, object]:
        """With hardware and date, as it is stored."""
        return {
            **asdict(self),
            "hardware": f"{os.cpu_count()} x {processor()}",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }


def paired(
    name: str,
    baseline: Callable[[], float | None],
    candidate: Callable[[], float | None],
    *,
    pairs: int,
    at_most: float | None = None,
    at_least: float | None = None,
    invert: bool = False,
    note: str = "",
) -> Ratio:
    """Time baseline and candidate in turn; each returns its own seconds, or None to be timed from outside.

    The ratio is candidate / baseline, or baseline / candidate with `invert` (throughputs).
    """
    measured: list[tuple[float, float]] = []
    for number in range(pairs):
        runs = [baseline, candidate] if number % 2 == 0 else [candidate, baseline]
        seconds = {run: timed(run) for run in runs}
        measured.append((seconds[baseline], seconds[candidate]))
    return ratio_of(name, measured, at_most=at_most, at_least=at_least, invert=invert, note=note)


def ratio_of(
    name: str,
    measured: Sequence[tuple[float, float]],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    invert: bool = False,
    note: str = "",
) -> Ratio:
    """The result of pairs of seconds (baseline, candidate) that were measured in turn."""
    ratios = [(b / c if invert else c / b) for b, c in measured]
    ratio = statistics.median(ratios)
    meets = (at_most is None or ratio <= at_most) and (at_least is None or ratio >= at_least)
    return Ratio(
        name=name,
        ratio=round(ratio, 3),
        lowest=round(min(ratios), 3),
        highest=round(max(ratios), 3),
        num_pairs=len(measured),
        target=f"<= {at_most}" if at_most is not None else f">= {at_least}",
        meets_target=meets,
        baseline_s=round(statistics.median(b for b, _ in measured), 4),
        candidate_s=round(statistics.median(c for _, c in measured), 4),
        note=note,
    )


def processor() -> str:
    """Name of the processor, as the kernel gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def timed(run: Callable[[], float | None]) -> float:
    """Seconds that a run says it took, or took."""
    started = time.perf_counter()
    own = run()
    return time.perf_counter() - started if own is None else own
