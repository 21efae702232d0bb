"""The comparison of methods measures what a slow loop measures."""

import numpy as np
import pytest

from benchmarks.comparison import FRACTIONS, choose, clustered, flips, measure
from benchmarks.ways import Mixed, Part, Vectors, Way


@pytest.fixture
def vectors() -> Vectors:
    rng = np.random.default_rng(1)

    def unit(count: int) -> np.ndarray:
        rows = rng.normal(size=(count, 6)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    stored: dict[str, np.ndarray] = {}
    for t in (1, 2, 3):
        stored |= {f"queries/{t}": unit(12), f"seconds/{t}": np.array(2.0)}
    names = np.array([f"p{i % 4}" for i in range(12)])
    part = Part(np.arange(0, 12, 2), np.arange(12), names[::2], names, np.arange(0, 12, 2), names[::2])
    return Vectors(stored, part, one_set=True)


def right(vectors: Vectors, query: np.ndarray, rows: np.ndarray) -> list[bool]:
    part, found = vectors.part, []
    for place in range(len(part.queries)):
        scored = [
            (float(query[place] @ rows[row]), part.gallery_identities[row] == part.query_identities[place])
            for row in range(len(rows))
            if row != part.own[place]
        ]
        best_right = max(score for score, is_right in scored if is_right)
        found.append(best_right > max(score for score, is_right in scored if not is_right))
    return found


def test_states_and_flips_are_those_of_a_loop_over_owners(vectors: Vectors) -> None:
    way, part = Way(vectors), vectors.part
    curve = []
    for t in (2, 3):
        for fraction in FRACTIONS:
            fresh = part.place < fraction
            rows = np.stack([vectors.g(t)[i] if fresh[i] else vectors.g(t - 1)[i] for i in range(12)])
            expected = right(vectors, vectors.q(t), rows)
            assert part.right(way.state(t, fresh)).tolist() == expected
            curve.append(np.mean(expected))
        before = right(vectors, vectors.q(t - 1), vectors.g(t - 1))
        after = right(vectors, vectors.q(t), vectors.g(t - 1))
        assert flips(way, t, [0.0]) == [np.mean([a and not b for a, b in zip(before, after, strict=True)])]
    found = measure(way)
    assert found["backfill"] == pytest.approx(np.mean(curve))
    assert found["seconds"] == 6.0
    assert 0 <= found["ac"] <= 1


def test_a_mixture_is_asked_and_stored_as_a_mixture_and_the_first_generation_is_pure(vectors: Vectors) -> None:
    way = Mixed(vectors, {2: 0.5, 3: 0.0})
    np.testing.assert_array_equal(way.row(1), vectors.g(1))
    slow = 0.5 * vectors.g(2) + 0.5 * vectors.g(1)
    np.testing.assert_allclose(way.row(2), slow / np.linalg.norm(slow, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(way.query(3), vectors.q(3))
    assert measure(way)["chosen"] == {"2": 0.5, "3": 0.0}


def test_the_rule_takes_the_best_quality_within_the_limit() -> None:
    assert choose([0.06, 0.05, 0.01], [0.9, 0.8, 0.7], 0.05) == 1
    assert choose([0.06, 0.07], [0.8, 0.9], 0.05) == 0


def test_standard_errors_count_whole_identities() -> None:
    values = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    single, pairs = (clustered(values, np.array(list(names))) for names in ("abcdef", "aabbcd"))
    assert single[0] == pairs[0] == 0.5
    assert single[1] == pytest.approx(np.sqrt(6 * 0.25 * 6 / 5) / 6)
    assert pairs[1] == pytest.approx(np.sqrt((1 + 1 + 0.25 + 0.25) * 4 / 3) / 6)
