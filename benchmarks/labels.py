"""Labels that a verdict takes: of the answers that changed, against every query. `python -m benchmarks.labels ROOT...`

Each ROOT is a workspace that `graceful replay` has made; its evaluation queries are taken as a query log in random
order, of which the labels are known. For every two neighbouring generations: the verdicts of the flip and quality
guards on all queries, the fewest queries with which labelling everything gives them in 80 % of the random orders, and
the fewest with which labels of changed answers do. Writes benchmarks/results-labels.json.

`--estimators` compares two bounds of the flip rate on made-up logs: the one that is used, and the product of a bound on
the changed share with one on the flip rate among labelled changed queries.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import processor
from graceful.evaluation.changed import RIGHT, WRONG, LogAnswers, changed, in_any, log_differences
from graceful.evaluation.intervals import difference_bands, share_bounds
from graceful.evaluation.outcomes import SERVED, fraction_state
from graceful.evaluation.policy import RolloutPolicy, verdict_not_above, verdict_not_below
from graceful.flows.settings.config import load_config
from graceful.flows.store.evaluation_set import EvaluationSet, load_evaluation_set
from graceful.flows.store.labels import IDENTITY, AnswerLabels
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update.query_log import QueryLog
from graceful.indexing.planner import num_chosen, random_key
from graceful.training.generation import ordinal_of

RESULTS = Path(__file__).parent / "results-labels.json"
NOTE = (
    "Chains of the two examples with 12, 18, 24 alphabets (6 epochs) and 60, 80 classes (8 epochs), no paragons, "
    "trained in process; `python -m benchmarks.labels WORKSPACE=CONFIGURATION`."
)
NUM_ORDERS, NUM_RESAMPLES, POWER, GROWTH = 40, 400, 0.8, 1.2
Bools = NDArray[np.bool_]


def measure(root: str, config_file: str) -> list[dict[str, Any]]:
    """One row per update and option: no re-index, the whole gallery, and all fractions of the policy at once."""
    workspace, config = open_workspace(root), load_config(config_file, root)
    chosen = load_evaluation_set(config.evaluation)
    as_log = replace(chosen, log=chosen.queries)
    names = sorted(workspace.registry.generations(), key=ordinal_of)
    vectors = {
        name: (
            workspace.cache(name).read(chosen.queries.content_sha256),
            workspace.cache(name).read(chosen.gallery.content_sha256),
        )
        for name in names
    }
    rows = []
    for champion, candidate in itertools.pairwise(names):
        pair = {name: vectors[name] for name in (champion, candidate)}
        log = answered(as_log, champion, candidate, pair, config.policy)
        for way, fractions in (("0 %", (0.0,)), ("100 %", (1.0,)), ("all at once", config.policy.fractions)):
            states = [fraction_state(fraction) for fraction in fractions]
            found = labels_for(log, states, chosen, config.policy)
            rows.append({"data": config.name, "champion": champion, "candidate": candidate, "way": way, **found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def answered(
    as_log: EvaluationSet, champion: str, candidate: str, vectors: dict[str, Any], policy: RolloutPolicy
) -> LogAnswers:
    """What every query is answered now, and at each fraction of a random re-index."""
    log = QueryLog(
        as_log,
        {name: queries for name, (queries, _) in vectors.items()},
        {name: gallery for name, (_, gallery) in vectors.items()},
        {},
        k=policy.k,
        labels=AnswerLabels(),
    )
    num = len(as_log.gallery)
    ranking = np.argsort(random_key(as_log.gallery.content_sha256, 0))
    log.show(SERVED, champion, np.full(num, champion))
    for fraction in policy.fractions:
        owners = np.full(num, champion, object)
        owners[ranking[: num_chosen(num, 0, fraction)]] = candidate
        log.show(fraction_state(fraction), candidate, owners.astype(np.str_))
    return log.answers()


def labels_for(log: LogAnswers, states: Sequence[str], chosen: EvaluationSet, policy: RolloutPolicy) -> dict[str, Any]:
    """Queries and labels with which the verdicts of all queries are reached in POWER of the orders."""
    identity = dict(zip(chosen.queries.content_sha256, chosen.queries.labels.tolist(), strict=True))
    really = np.array([identity[query] for query in log.query_ids.tolist()])
    right = {state: log.answers[state] == np.char.add(IDENTITY, really) for state in (SERVED, *states)}
    told = replace(log, verdicts={s: np.where(right[s], RIGHT, WRONG).astype(np.int8) for s in right},
                   answers={s: log.answers[s] for s in right}, items={})  # fmt: skip
    pairs = [(SERVED, state) for state in states]
    moved = in_any(told, pairs, changed)
    # As the gate has it: the identity that a label found, else the one that is shown now.
    found = np.logical_or.reduce([moved & right[state] for state in (SERVED, *states)])
    alike = np.where(found, really, np.char.replace(log.answers[SERVED].astype(np.str_), IDENTITY, ""))
    everything = np.stack([right[s].astype(float) - right[SERVED] for s in states], axis=1)
    by_change = np.stack([log_differences(told, pair, metric="recall@k", k=policy.k) for pair in pairs], axis=1)
    wanted = verdicts(everything, really, policy)
    settled = [guard for guard, verdict in wanted.items() if verdict != "UNKNOWN"]
    orders = [np.random.default_rng(seed).permutation(len(log)) for seed in range(NUM_ORDERS)]

    def needed(differences: NDArray[np.float64], clusters: NDArray[Any]) -> int | None:
        def reached(num: int) -> bool:
            hits = 0
            for order in orders:
                said = verdicts(differences[order[:num]], clusters[order[:num]], policy)
                hits += all(said[guard] == wanted[guard] for guard in settled)
            return hits >= POWER * len(orders)

        return next((num for num in _sizes(len(log)) if reached(num)), None)

    all_of_them, of_changed = needed(everything, really), needed(by_change, alike)
    labels = None if of_changed is None else float(np.mean([moved[order[:of_changed]].sum() for order in orders]))
    items = np.mean([(log.items[SERVED] != log.items[state]).mean() for state in states])
    return {
        "queries": len(log),
        "identities": len(set(really.tolist())),
        "changed": round(float(moved.mean()), 4),
        "changed_items": round(float(items), 4),
        "nfr": round(float(np.mean(everything[:, 0] < 0)), 4),
        "pfr": round(float(np.mean(everything[:, 0] > 0)), 4),
        "verdicts": wanted,
        "labels_of_everything": all_of_them if settled else None,
        "queries_of_changed": of_changed if settled else None,
        "labels_of_changed": None if labels is None or not settled else round(labels),
        "ratio": None if labels is None or not all_of_them or not settled else round(labels / all_of_them, 3),
    }


def verdicts(differences: NDArray[np.float64], clusters: NDArray[Any], policy: RolloutPolicy) -> dict[str, str]:
    """Flip guard in the worst state and quality guard in the lowest, as the gate judges them."""
    alpha, limit = policy.alpha / 2, policy.max_nfr or 1.0
    flips = [share_bounds(column < 0, clusters, alpha) for column in differences.T]
    margin = (policy.quality_margin_points or 0.0) / 100
    bands = difference_bands(differences, clusters, alpha=policy.alpha, num_resamples=NUM_RESAMPLES)
    return {
        "NFR": _worst([verdict_not_above(bound.lower, bound.upper, limit) for bound in flips]),
        "quality": _worst(
            [verdict_not_below(low, up, -margin) for low, up in zip(bands.lower, bands.upper, strict=True)]
        ),
    }


def estimators(num_runs: int = 400, limit: float = 0.02, alpha: float = 0.05, num_labels: int = 300) -> list[Any]:
    """How often an update passes a flip limit, whose rate is at the limit or half of it, by two bounds."""
    rows = []
    for shape, num, size in (("alone", 10_000, 1), ("alike (ICC 0.3)", 10_000, 10), ("lost whole", 10_000, 50)):
        for rate in (limit, limit / 2):
            passed = {"beginning": 0, "product": 0}
            rng = np.random.default_rng(5)
            for _ in range(num_runs):
                cluster = rng.permutation(num) // size
                lost = _lost(rng, rate, num // size)[cluster] if size > 1 else rng.random(num) < rate
                if shape.startswith("alike"):
                    lost = rng.random(num) < rng.beta(rate / 0.3 * 0.7, (1 - rate) / 0.3 * 0.7, num // size)[cluster]
                moved = lost | (rng.random(num) < 0.3 - rate)
                end = int(np.searchsorted(np.cumsum(moved), num_labels + 1)) if moved.sum() > num_labels else num
                passed["beginning"] += share_bounds(lost[:end], cluster[:end], alpha).upper <= limit
                picked = np.flatnonzero(moved)[:num_labels]
                share = share_bounds(moved, cluster, alpha / 2).upper
                passed["product"] += share * share_bounds(lost[picked], cluster[picked], alpha / 2).upper <= limit
            rows.append({"shape": shape, "rate": rate, **{n: round(v / num_runs, 3) for n, v in passed.items()}})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _lost(rng: np.random.Generator, rate: float, num_clusters: int) -> Bools:
    return rng.random(num_clusters) < rate


def _worst(found: Sequence[str]) -> str:
    return "FAIL" if "FAIL" in found else "UNKNOWN" if "UNKNOWN" in found else "PASS"


def _sizes(largest: int) -> list[int]:
    sizes = [100.0]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * GROWTH, largest))
    return [int(size) for size in sizes]


def main(arguments: Sequence[str]) -> None:
    """Measure the named workspaces, or compare the bounds, and store what was found beside what is there."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored |= {
        "note": NOTE,
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if "--estimators" in arguments:
        stored["estimators"] = estimators()
    for given in (argument for argument in arguments if not argument.startswith("-")):
        root, _, config = given.partition("=")
        rows = measure(os.path.abspath(root), config)
        stored["updates"] = [r for r in stored.get("updates", []) if r["data"] != rows[0]["data"]] + rows
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
