"""How often the gate's bounds let pass what should not: false passes of candidates that lie exactly on a limit.

`python -m benchmarks.error_rates [PROCESSES]` draws outcomes for every cell of a grid and puts them to the functions
that the gate calls: `share_bounds` (NFR, at alpha / 2), `difference_bands` (quality, at alpha), and in some cells
`gather_evidence` and `decide`. A rate that is more than two standard errors above its level is simulated again with
fresh draws, and both numbers are kept. Results: benchmarks/results-error-rates.json, from which `benchmarks.tables`
makes the tables of docs/error_rates.md.

Q queries in C identities, S states. Every draw takes a seed made from its cell.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import processor
from graceful.evaluation.bands import difference_bands
from graceful.evaluation.decision import decide
from graceful.evaluation.evidence import NFR_FAMILIES, Question
from graceful.evaluation.gathering import gather_evidence
from graceful.evaluation.intervals import share_bounds
from graceful.evaluation.outcomes import SERVED, Outcomes, fraction_state, live_state, pair_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.spending import next_share

RESULTS = Path(__file__).parent / "results-error-rates.json"
ALPHA = 0.05
RUNS, RUNS_NAMED, RUNS_DECISION, RUNS_AGAIN, RUNS_POWER = 200, 400, 100, 1000, 50
# Queries of each number of identities.
SHAPES = [(300, 20), (300, 100), (1000, 20), (1000, 100), (1000, 500), (5000, 20), (5000, 100), (5000, 500),
          (5000, 2000), (20_000, 20), (20_000, 100), (20_000, 500), (20_000, 2000)]  # fmt: skip
WINS = {"rare": 0.0, "halves": 0.0, "balanced": 0.03, "skewed": 0.01}

Truth = Literal["limit", "half", "zero"]


@dataclass(frozen=True)
class Cell:
    """One situation. `limit` is a share: the NFR limit, or the margin of quality.

    losses: `rare` (losses alone), `halves` (few identities lose half of their queries), `balanced` (3 % are won and
    as much more lost as the margin says), `skewed` (1 % are won all over, losses sit in few identities).
    sizes: of the identities, `equal` or `lognormal`.
    icc: intra-cluster correlation of the losses; 1: identities are lost whole.
    """

    guard: Literal["NFR", "quality", "decision"]
    limit: float
    num_queries: int
    num_identities: int
    sizes: Literal["equal", "lognormal"] = "equal"
    icc: float = 0.0
    losses: Literal["rare", "halves", "balanced", "skewed"] = "rare"
    num_states: int = 1
    name: str = ""

    @property
    def level(self) -> float:
        """The error level that the guard promises."""
        return ALPHA / NFR_FAMILIES if self.guard == "NFR" else ALPHA

    def seed(self, run: int, truth: Truth) -> list[int]:
        """Seed of one draw."""
        text = json.dumps([{**asdict(self), "name": ""}, truth])
        return [int(hashlib.sha256(text.encode()).hexdigest()[:12], 16), run]


def grid() -> list[Cell]:
    """Every cell, the named ones first."""
    cells = list(NAMED)
    for queries, identities in SHAPES:
        for sizes in ("equal", "lognormal"):
            for icc in (0.0, 0.1, 0.3, 1.0):
                cells += [Cell("NFR", limit, queries, identities, sizes, icc) for limit in (0.01, 0.02, 0.05)]
                for margin in (0.005, 0.01):
                    for losses in ("rare", "balanced", "skewed"):
                        cells.append(Cell("quality", margin, queries, identities, sizes, icc, losses))
            cells += [Cell("NFR", limit, queries, identities, sizes, losses="halves") for limit in (0.01, 0.02, 0.05)]
    for queries, identities in ((5000, 100), (5000, 500), (20_000, 500)):
        for icc in (0.1, 1.0):
            for losses in ("rare", "balanced"):
                cells += [Cell("quality", 0.01, queries, identities, "equal", icc, losses, num) for num in (3, 7)]
    return list({replace(cell, name=""): cell for cell in reversed(cells)}.values())[::-1]


NAMED = [
    *(Cell("NFR", limit, queries, identities, icc=1.0, name="whole identities lost")
      for limit, queries, identities in (
          (0.02, 300, 100), (0.02, 1000, 50), (0.02, 1000, 100), (0.02, 5000, 50), (0.02, 5000, 100),
          (0.05, 1000, 20), (0.05, 5000, 20), (0.05, 1000, 50), (0.05, 5000, 50))),
    *(Cell("NFR", limit, queries, identities, losses="halves", name="identities lose half")
      for limit, queries, identities in ((0.02, 1000, 50), (0.02, 5000, 50), (0.05, 1000, 20), (0.05, 5000, 20))),
    Cell("NFR", 0.02, 5000, 100, icc=0.3, name="spread losses in few identities"),
    Cell("NFR", 0.02, 5000, 50, icc=0.1, name="spread losses in few identities"),
    Cell("NFR", 0.05, 5000, 50, icc=0.3, name="spread losses in few identities"),
    Cell("NFR", 0.02, 5000, 100, "lognormal", 1.0, name="whole identities of unequal size"),
    *(Cell("quality", margin, queries, identities, icc=icc, num_states=7, name="rare losses")
      for margin, queries, identities, icc in (
          (0.005, 5000, 500, 0.1), (0.01, 5000, 100, 0.1), (0.01, 5000, 500, 0.3), (0.01, 20_000, 500, 0.3),
          (0.01, 5000, 50, 0.0), (0.01, 5000, 100, 0.0))),
    *(Cell("decision", limit, queries, identities, icc=icc, num_states=7, name="rollout of whole identities lost")
      for limit, queries, identities, icc in (
          (0.02, 300, 100, 1.0), (0.02, 1000, 100, 1.0), (0.02, 1000, 500, 1.0), (0.02, 5000, 100, 0.3))),
    *(Cell("decision", margin, queries, identities, icc=icc, losses="skewed", name="rollout below the margin")
      for margin, queries, identities, icc in (
          (0.005, 5000, 500, 0.1), (0.01, 5000, 100, 0.1), (0.01, 5000, 500, 0.3))),
]  # fmt: skip


def draw(cell: Cell, truth: Truth, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Which queries are lost and which are won (Q, S), and the identity of each (Q,).

    The states share what is hard (each identity's chances) and nothing else.
    """
    clusters = np.repeat(np.arange(cell.num_identities), _sizes(cell, rng))
    wins = WINS[cell.losses]
    excess = {"limit": cell.limit, "half": cell.limit / 2, "zero": 0.0}[truth]
    lost, won = _chances(cell, excess + wins, wins, rng)
    uniform = rng.random((cell.num_queries, cell.num_states))
    losses = uniform < lost[clusters, None]
    return losses, ~losses & (uniform > 1 - won[clusters, None]), clusters


def _sizes(cell: Cell, rng: np.random.Generator) -> NDArray[np.int64]:
    """Queries of each identity (C,), each at least one."""
    queries, identities = cell.num_queries, cell.num_identities
    if cell.sizes == "equal":
        return np.full(identities, queries // identities) + (np.arange(identities) < queries % identities)
    weights = rng.lognormal(0, 1, identities)
    return 1 + rng.multinomial(queries - identities, weights / weights.sum())


def _chances(
    cell: Cell, lost: float, won: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Chance of each identity (C,) to lose and to win one of its queries; their means are `lost` and `won`."""
    num = cell.num_identities
    if cell.losses == "halves":
        return np.where(rng.random(num) < 2 * lost, 0.5, 0.0), np.zeros(num)
    if cell.losses == "skewed":  # an identity that is lost whole wins nothing: 1 % of all is a little more of the rest
        return _spread(lost, cell.icc, num, rng), np.full(num, won / (1 - lost) if cell.icc == 1 else won)
    if cell.icc == 0 or lost + won == 0:
        return np.full(num, lost), np.full(num, won)
    if cell.icc == 1:
        uniform = rng.random(num)
        return (uniform < lost).astype(float), (uniform > 1 - won).astype(float)
    scale = (1 - cell.icc) / cell.icc
    if won == 0:
        return _spread(lost, cell.icc, num, rng), np.zeros(num)
    both = rng.dirichlet(scale * np.array([lost, won, 1 - lost - won]), num)
    return both[:, 0], both[:, 1]


def _spread(rate: float, icc: float, num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if rate == 0 or icc == 0:
        return np.full(num, rate)
    if icc == 1:
        return (rng.random(num) < rate).astype(float)
    scale = (1 - icc) / icc
    return rng.beta(rate * scale, (1 - rate) * scale, num)


def passes(cell: Cell, truth: Truth, run: int) -> bool:
    """Whether one draw passes: any of its states where it must not, all of them where it should."""
    rng = np.random.default_rng(cell.seed(run, truth))
    losses, wins, clusters = draw(cell, truth, rng)
    if cell.guard == "NFR":
        return share_bounds(losses[:, 0], clusters, cell.level).upper <= cell.limit
    if cell.guard == "quality":
        bands = difference_bands(wins.astype(float) - losses, clusters, alpha=cell.level, seed=run)
        good = bands.lower >= -cell.limit
        return bool(good.any() if truth == "limit" else good.all())
    return serves(cell, losses, wins, clusters, run)


def pass_rate(cell: Cell, truth: Truth, runs: Iterable[int]) -> float:
    """Share of the runs that pass."""
    return float(np.mean([passes(cell, truth, run) for run in runs]))


def serves(cell: Cell, losses: NDArray[Any], wins: NDArray[Any], clusters: NDArray[np.int64], run: int) -> bool:
    """Whether the whole gate serves a candidate whose states lose and win these queries (Q, S).

    Losses alone are judged by the NFR limit, with as many wins elsewhere as leave quality alone; else by the margin.
    """
    fractions = RolloutPolicy().fractions
    nfr = cell.losses == "rare"
    # A loss is of a query that is right now, a win of one that is wrong.
    before = (losses.any(axis=1) | (np.arange(len(losses)) % 2 == 0)) & ~wins.any(axis=1)
    more = wins | (nfr & (np.arange(len(losses)) % 8 == 1)[:, None])
    after = np.where(losses, False, before[:, None] | more)
    states = {SERVED: before, pair_state("g2", "g2"): after[:, -1], live_state("g1", "g1"): before}
    states |= {fraction_state(f): after[:, min(place, after.shape[1] - 1)] for place, f in enumerate(fractions)}
    states[live_state("g2", "g1")] = after[:, 0]
    ids, names = np.arange(len(losses)).astype(str), clusters.astype(str)
    ranks = {name: np.where(right, 1, 2) for name, right in states.items()}
    outcomes = Outcomes(ids, names, names, {}, ranks, {name: 1 / rank for name, rank in ranks.items()})
    policy = (
        RolloutPolicy(max_nfr=cell.limit, seed=run)
        if nfr
        else RolloutPolicy(max_nfr=0.9, quality_margin_points=100 * cell.limit, max_dip_points=100, seed=run)
    )
    question = Question(candidate="g2", champion="g1", order="random", live_owners={"g1": 1.0}, wave_zero=())
    return decide(gather_evidence(outcomes, policy, question), policy).outcome in (
        "COMPATIBLE_ROLLOUT",
        "FULL_BACKFILL",
    )


def null_series(cell: Cell, planned_updates: int | None, run: int, *, num_candidates: int = 5, shared: bool) -> bool:
    """Whether one of several candidates, each exactly on the NFR limit, passes on one set of identities.

    `planned_updates`: of the plan by which they share the error level; None: each has all of it. `shared`: the same
    identities are hard for all of them.
    """
    rng = np.random.default_rng([*cell.seed(run, "limit"), num_candidates])
    clusters = np.repeat(np.arange(cell.num_identities), _sizes(cell, rng))
    spent, chances = 0.0, _chances(cell, cell.limit, 0.0, rng)[0]
    for _ in range(num_candidates):
        share = 1.0 if planned_updates is None else next_share(spent, planned_updates)
        spent += share
        if not shared:
            chances = _chances(cell, cell.limit, 0.0, rng)[0]
        losses = rng.random(cell.num_queries) < chances[clusters]
        if share_bounds(losses, clusters, cell.level * share).upper <= cell.limit:
            return True
    return False


SERIES = [Cell("NFR", 0.02, *shape, icc=icc) for shape, icc in (
    ((1000, 1000), 0.0), ((5000, 500), 0.1), ((5000, 500), 0.3), ((5000, 100), 0.3), ((5000, 100), 1.0),
    ((1000, 50), 1.0))]  # fmt: skip
LOOKS = (1, 2, 4, 8, 12, 52)
POWER = [
    Cell("NFR", 0.02, 5000, 500, icc=0.1), Cell("NFR", 0.02, 20_000, 2000, icc=0.1),
    Cell("NFR", 0.05, 3600, 600, icc=0.1),
    Cell("quality", 0.01, 20_000, 2000, icc=0.1), Cell("quality", 0.01, 20_000, 2000, icc=0.1, losses="balanced"),
]  # fmt: skip
"""Where the price of sharing the error level is measured."""


def power_at(cell: Cell, look: int, planned_updates: int | None, runs: int) -> float:
    """How often a candidate at half the limit (NFR) or without any difference (quality) passes at a look."""
    share = 1.0
    if planned_updates is not None:
        share = next_share((look - 1) / (look - 1 + planned_updates), planned_updates)
    truth: Truth = "half" if cell.guard == "NFR" else "zero"
    level, good = cell.level * share, 0
    for run in range(runs):
        losses, wins, clusters = draw(cell, truth, np.random.default_rng(cell.seed(run, truth)))
        if cell.guard == "NFR":
            good += share_bounds(losses[:, 0], clusters, level).upper <= cell.limit
        else:
            bands = difference_bands(wins.astype(float) - losses, clusters, alpha=level, seed=run)
            good += bool(bands.lower.min() >= -cell.limit)
    return good / runs


def measure(cell: Cell) -> dict[str, Any]:
    """One row of the results: false passes, once more with fresh draws where they are too many, and power."""
    runs = RUNS_DECISION if cell.guard == "decision" else RUNS_NAMED if cell.name else RUNS
    false = pass_rate(cell, "limit", range(runs))
    row: dict[str, Any] = {**asdict(cell), "level": cell.level, "runs": runs, "false": round(false, 4)}
    row["standard_error"] = round(standard_error(cell.level, runs), 4)
    if false > cell.level + 2 * standard_error(cell.level, runs):
        row["runs_again"] = RUNS_AGAIN
        row["false_again"] = round(pass_rate(cell, "limit", range(runs, runs + RUNS_AGAIN)), 4)
    if cell.num_states == 1 and cell.sizes == "equal" and cell.guard != "decision":
        row["power_half"] = pass_rate(cell, "half", range(RUNS_POWER))
        row["power_zero"] = pass_rate(cell, "zero", range(RUNS_POWER))
    return row


def standard_error(rate: float, runs: int) -> float:
    """Of a rate that was counted in so many runs."""
    return float(np.sqrt(rate * (1 - rate) / runs))


def exceeds(row: dict[str, Any]) -> bool:
    """Whether a cell is above its level by more than two standard errors, and was so again."""
    if "false_again" not in row:
        return False
    return bool(row["false_again"] > row["level"] + 2 * standard_error(row["level"], row["runs_again"]))


def series() -> list[dict[str, Any]]:
    """Five null candidates in a row, without a plan and with the default one."""
    planned = RolloutPolicy().planned_updates
    return [
        {
            **asdict(cell),
            "shared": shared,
            "runs": RUNS_NAMED,
            **{
                name: float(np.mean([null_series(cell, plan, run, shared=shared) for run in range(RUNS_NAMED)]))
                for name, plan in (("without", None), ("with", planned))
            },
        }
        for cell in SERIES
        for shared in (False, True)
    ]


def prices() -> list[dict[str, Any]]:
    """Power at each look under the default plan, and without one."""
    planned = RolloutPolicy().planned_updates
    return [
        {
            **asdict(cell),
            "runs": RUNS,
            "none": power_at(cell, 1, None, RUNS),
            "looks": {str(look): power_at(cell, look, planned, RUNS) for look in LOOKS},
        }
        for cell in POWER
    ]


def main(num_processes: int = 1) -> None:
    """Measure everything and write the results."""
    started, cells = time.perf_counter(), grid()
    rows = []
    with ProcessPoolExecutor(num_processes) as pool:
        for number, row in enumerate(pool.map(measure, cells, chunksize=8)):
            rows.append(row)
            if number % 50 == 0:
                print(f"{number} of {len(cells)} cells, {time.perf_counter() - started:.0f} s", flush=True)
    found = {
        "command": "python -m benchmarks.error_rates",
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cells": rows,
        "series": series(),
        "prices": prices(),
        "seconds": round(time.perf_counter() - started),
    }
    RESULTS.write_text(json.dumps(found).replace("}, {", "},\n{") + "\n")  # a line each
    print(f"{sum(map(exceeds, rows))} of {len(rows)} cells exceed their level; {found['seconds']} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
