"""Recall@k and mAP are those of ranx, which is itself tested against trec_eval.

ranx compiles itself with numba for minutes; with NUMBA_DISABLE_JIT it is plain Python, in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import graceful

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ranx") is None, reason="ranx is not installed"),
    pytest.mark.timeout(300),
]

DEPTHS = (1, 3, 10)
PROGRAM = """
import json, sys
from ranx import Qrels, Run, evaluate
given = json.load(sys.stdin)
found = evaluate(Qrels(given["relevant"]), Run(given["scores"]), given["metrics"], return_mean=False)
print(json.dumps({name: list(map(float, values)) for name, values in found.items()}))
"""


@pytest.fixture(scope="module")
def runs():
    """60 of 200 items as queries: each has 1 to 12 relevant ones beside itself, which is not counted."""
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(40), rng.integers(2, 14, 40))[:200].astype(str)
    items = np.array([f"d{row}" for row in range(len(identities))])
    vectors = rng.standard_normal((40, 24))[identities.astype(int)] + 1.5 * rng.standard_normal((len(identities), 24))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = rng.permutation(np.flatnonzero(np.isin(identities, identities[:-1])))[:60]
    return vectors, identities, items, queries


@pytest.fixture(scope="module")
def theirs(runs):
    vectors, identities, items, queries = runs
    scores = vectors[queries] @ vectors.T
    relevant, run = {}, {}
    for row, query in enumerate(queries):
        others = np.flatnonzero(items != items[query])
        relevant[f"q{row:02}"] = {items[o]: 1 for o in others if identities[o] == identities[query]}
        run[f"q{row:02}"] = {items[o]: float(scores[row, o]) for o in others}
    metrics = ["map", *(f"hit_rate@{k}" for k in DEPTHS)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps({"relevant": relevant, "scores": run, "metrics": metrics}),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    return {name: np.array(values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def ours(runs):
    vectors, identities, items, queries = runs
    ranks = graceful.relevant_ranks(vectors[queries], vectors, identities[queries], identities, items[queries], items)
    return graceful.outcome_from_ranks(ranks.offsets, ranks.ranks)


def test_average_precision_of_every_query_is_that_of_ranx(ours, theirs):
    np.testing.assert_allclose(ours[1], theirs["map"], rtol=1e-6)
    assert graceful.mean_average_precision(ours[1]) == pytest.approx(theirs["map"].mean(), rel=1e-6)


@pytest.mark.parametrize("k", DEPTHS)
def test_recall_at_k_is_the_hit_rate_of_ranx(ours, theirs, k):
    """In retrieval of images recall@k is the share of queries with a relevant item among the first k."""
    np.testing.assert_array_equal((ours[0] > 0) & (ours[0] <= k), theirs[f"hit_rate@{k}"] == 1)
    assert 0 < graceful.recall_at_k(ours[0], k) == pytest.approx(theirs[f"hit_rate@{k}"].mean())
