"""`import graceful`: its names, and judgement of plain arrays, against the same judgement of a stored evaluation."""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import graceful
from graceful.evaluation.arrays import outcomes_from_ranks
from graceful.evaluation.decision import decide
from graceful.evaluation.evidence import Question
from graceful.evaluation.gathering import gather_evidence
from graceful.evaluation.outcomes import SERVED, fraction_state
from tests.evaluation.conftest import plant

HOME = Path(graceful.__file__)
NAMES = [name for name in graceful.__all__ if name != "__version__"]


def names_for_checkers() -> set[str]:
    """What mypy and editors see: the imports that are never carried out."""
    branch = next(node for node in ast.parse(HOME.read_text()).body if isinstance(node, ast.If))
    return {alias.name for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_explains_itself(name):
    found = getattr(graceful, name)
    assert found.__module__.startswith("graceful.")
    assert inspect.getdoc(found)


def test_checkers_see_the_names_that_are_there():
    assert names_for_checkers() == set(NAMES)
    assert set(NAMES) <= set(dir(graceful))


def test_version_is_that_of_the_distribution():
    assert graceful.__version__ == version("graceful")


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(AttributeError, match=r"'judge_outcome'; public names: .*judge_outcomes"):
        _ = graceful.judge_outcome


@pytest.mark.parametrize(("losses", "wins"), [(0, 200), ({0.0: 300, 0.05: 300, 0.1: 300}, 200), (300, 0), (60, 60)])
@pytest.mark.parametrize("metric", ["recall@k", "mAP"])
def test_plain_arrays_are_judged_as_stored_outcomes_are(losses, wins, metric):
    outcomes = plant(num_queries=4000, queries_per_cluster=4, losses=losses, wins=wins)
    policy = graceful.RolloutPolicy(num_resamples=300, metric=metric)
    served, full = outcomes.first_rank[SERVED], outcomes.first_rank[fraction_state(1)]
    states = {"live/champion/champion": served, "live/candidate/champion": outcomes.first_rank[fraction_state(0)]}
    states["pair/candidate/candidate"] = full
    named = outcomes_from_ranks(
        {
            **{name: (rank, 1 / rank) for name, rank in states.items()},
            **{name: (rank, 1 / rank) for name, rank in outcomes.first_rank.items() if "g1" not in name},
        },
        metric=metric,
        clusters=outcomes.clusters,
    )
    question = Question(
        candidate="candidate", champion="champion", order="random", live_owners={"champion": 1.0}, wave_zero=()
    )
    expected = decide(gather_evidence(named, policy, question), policy)

    backfilled = {f: outcomes.first_rank[fraction_state(f)] for f in policy.fractions}
    found = graceful.judge_outcomes(
        served,
        backfilled,
        policy=policy,
        clusters=outcomes.clusters,
        served_precision=1 / served,
        backfilled_precision={f: 1 / rank for f, rank in backfilled.items()},
    )
    assert found == expected
    assert found.candidate == "candidate"


def test_slices_are_guarded():
    served = np.ones(4000, int)
    after = served.copy()
    after[:60] = 9  # 1.5 % of all queries, all of them in one slice of 400
    camera = np.where(np.arange(4000) < 400, "left", "right")
    policy = graceful.RolloutPolicy(fractions=(0, 1), quality_margin_points=3.0, max_nfr=0.03, max_dip_points=3.0)
    sliced = policy.model_copy(update={"required_slices": ("camera",)})
    assert graceful.judge_outcomes(served, {0: after, 1: after}, policy=policy).outcome == "COMPATIBLE_ROLLOUT"
    held = graceful.judge_outcomes(served, {0: after, 1: after}, policy=sliced, slices={"camera": camera})
    assert held.outcome == "HOLD"
    assert "camera=left" in {reason.scope for reason in held.reasons}


def test_a_fraction_that_the_policy_names_and_nobody_measured_holds():
    decision = graceful.judge_outcomes([1] * 100, {0: [1] * 100, 1: [1] * 100}, policy=graceful.RolloutPolicy())
    assert decision.outcome == "HOLD"
    assert "fraction/0.5" in " ".join(reason.text for reason in decision.reasons)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 1], {0: [1, 1]}), "fraction 0 .* and 1"),
        (([1, 1], {0: [1, 1], 1: [1]}), r"shape \(2,\)"),
        (([1, 1], {0: [1, 1], 0.5: [1, 1], 7: [1, 1], 1: [1, 1]}), "fraction"),
        (([0.5, 1], {0: [1, 1], 1: [1, 1]}), "whole numbers"),
        (([1, -1], {0: [1, 1], 1: [1, 1]}), "served"),
    ],
)
def test_arrays_that_cannot_be_judged_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        graceful.judge_outcomes(*arguments)
    with pytest.raises(ValueError, match="average precision for the metric mAP"):
        graceful.backfill_curve([1], {0: [1]}, metric="mAP")


def test_a_matrix_from_embeddings_fails_the_criterion_in_a_rotated_space_and_meets_it_in_a_better_one():
    """The walk of a user without a workspace: embeddings, ranks, matrix, AC."""
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(40), 5)
    centre = rng.standard_normal((40, 16))

    def embed(noise: float) -> np.ndarray:
        vectors = centre[identity] + noise * rng.standard_normal((200, 16))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    rotation = np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)
    chains = {"better": (embed(1.2), embed(0.3)), "rotated": ((old := embed(1.2)), old @ rotation)}
    items = [str(row) for row in range(200)]
    met = {}
    for name, chain in chains.items():
        ranks = np.zeros((2, 2, 200), int)
        for t, g in [(0, 0), (1, 0), (1, 1)]:
            ranks[t, g] = graceful.relevant_ranks(
                chain[t], chain[g], identity.astype(str), identity.astype(str), items, items
            ).first()
        matrix = graceful.compatibility_matrix(ranks, ["old", "new"])
        assert np.isnan(matrix.values[0, 1])
        met[name] = graceful.average_compatibility(matrix)
    assert met == {"better": 1.0, "rotated": 0.0}


def test_shapes_of_a_matrix_are_checked():
    with pytest.raises(ValueError, match="generations, generations, queries"):
        graceful.compatibility_matrix(np.ones((2, 3, 4), int))
    with pytest.raises(ValueError, match="expected 2 names, found 1"):
        graceful.compatibility_matrix(np.ones((2, 2, 4), int), ["a"])


def test_bound_of_the_nfr_grows_with_clusters_and_refuses_other_queries():
    before, after = np.ones(1000, bool), np.arange(1000) >= 30
    alone, together = (graceful.nfr_bound(before, after, c) for c in (None, np.arange(1000) // 10))
    assert alone.value == together.value == 0.03
    assert alone.upper < together.upper
    with pytest.raises(ValueError, match="same queries"):
        graceful.nfr_bound(before, after[:-1])
