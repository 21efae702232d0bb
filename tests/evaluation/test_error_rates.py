"""A thin slice of the grid of docs/error_rates.md: how often the gate lets pass what lies exactly on a limit."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.error_rates import SERIES, Cell, draw, null_series, pass_rate, standard_error
from graceful.evaluation import bands, intervals

RUNS = 200
SLICE = [
    Cell("NFR", 0.02, 1000, 50, icc=1.0),
    Cell("NFR", 0.02, 5000, 100, icc=1.0),
    Cell("NFR", 0.05, 5000, 20, losses="halves"),
    Cell("NFR", 0.01, 20_000, 500, icc=0.3),
    Cell("NFR", 0.02, 5000, 100, "lognormal", 1.0),
    Cell("quality", 0.01, 5000, 100, icc=0.1, num_states=3),
    Cell("quality", 0.005, 5000, 500, icc=0.1),
    Cell("quality", 0.01, 20_000, 100, "lognormal", 0.1),
    Cell("quality", 0.01, 5000, 100, "lognormal", 0.3, "balanced"),
    Cell("quality", 0.005, 5000, 500, "lognormal", 0.3, "skewed"),
]
SHAPES = [*SLICE, Cell("NFR", 0.02, 1000, 100), Cell("quality", 0.01, 5000, 500, icc=1.0, losses="balanced")]


@pytest.mark.parametrize("cell", SLICE, ids=str)
def test_what_lies_on_a_limit_passes_no_more_often_than_the_level(cell: Cell) -> None:
    assert pass_rate(cell, "limit", range(RUNS)) <= cell.level + 2 * standard_error(cell.level, RUNS)


def test_a_bound_that_gives_every_cluster_only_a_floor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "CLUSTERS_COUNT_ONCE", 0)
    assert pass_rate(SLICE[0], "limit", range(RUNS)) > 0.25


def test_a_symmetric_band_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def symmetric(self: bands._Column, alpha: float) -> tuple[float, float, float]:
        return self.value - 1.645 * self.error, self.value + 1.645 * self.error, 1.0

    monkeypatch.setattr(bands._Column, "bounds", symmetric)
    assert pass_rate(SLICE[7], "limit", range(RUNS)) > 0.1


@pytest.mark.parametrize("cell", SHAPES, ids=str)
def test_the_truth_of_a_drawn_cell_is_its_limit(cell: Cell) -> None:
    """Otherwise a rate says nothing: the mean of many draws, within four of its standard errors."""
    found = []
    for run in range(300):
        losses, wins, clusters = draw(cell, "limit", np.random.default_rng([5, run]))
        assert len(clusters) == cell.num_queries
        assert len(np.unique(clusters)) == cell.num_identities
        assert not (losses & wins).any()
        found.append(losses.mean() - wins.mean())
    assert np.mean(found) == pytest.approx(cell.limit, abs=4 * np.std(found) / np.sqrt(len(found)))


def test_one_of_five_null_candidates_passes_no_more_often_than_alpha_and_without_a_plan_it_does() -> None:
    cell = SERIES[0]
    without, with_plan = (
        np.mean([null_series(cell, plan, run, shared=False) for run in range(RUNS)]) for plan in (None, 4)
    )
    assert with_plan <= cell.level + 2 * standard_error(cell.level, RUNS)
    assert without > 2 * cell.level
