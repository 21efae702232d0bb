"""Maps, merges and mixtures against slow loops and cases whose answer is known."""

import math

import numpy as np
import pytest

from graceful.errors import UsageError
from graceful.training.mapping import (
    blend,
    centroid_queries,
    lambda_orthogonal,
    match_quantiles,
    procrustes,
    reciprocal_ranks,
    simplex,
    slerp,
    unit,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def test_procrustes_recovers_a_rotation_and_beats_every_other_one(rng: np.random.Generator) -> None:
    points, turn = unit(rng.normal(size=(60, 8))), rotation(rng, 8)
    target = unit(points @ turn)
    np.testing.assert_allclose(procrustes(points, target)(points), target, atol=1e-5)
    noisy = unit(target + 0.3 * rng.normal(size=target.shape))
    found = procrustes(points, noisy, centred=False)
    np.testing.assert_allclose(found.matrix @ found.matrix.T, np.eye(8), atol=1e-8)
    least = ((points @ found.matrix - noisy) ** 2).sum()
    for _ in range(200):
        other = rotation(rng, 8)
        assert ((points @ other - noisy) ** 2).sum() >= least
        near = np.linalg.qr(found.matrix + 0.01 * rng.normal(size=(8, 8)))
        signed = near[0] * np.sign(np.diag(near[1]))
        assert ((points @ signed - noisy) ** 2).sum() >= least - 1e-6


def test_centring_takes_off_what_all_vectors_share(rng: np.random.Generator) -> None:
    points, turn = rng.normal(size=(80, 6)), rotation(rng, 6)
    shift = 3 * rng.normal(size=6)
    source, target = unit(points + 2.0), (points + 2.0) @ turn
    lengths = np.linalg.norm(points + 2.0, axis=1, keepdims=True)
    moved = target / lengths + shift  # no unit rows, and far away: the map has to find turn and shift
    found = procrustes(source, moved)
    np.testing.assert_allclose(found(source), unit(moved), atol=1e-4)
    assert np.abs(procrustes(source, moved, centred=False)(source) - unit(moved)).max() > 1e-2


def test_lambda_orthogonal_leaves_orthogonality_only_where_it_may(rng: np.random.Generator) -> None:
    points = unit(rng.normal(size=(100, 6)))
    stretched = unit(points @ (np.diag([3.0, 3.0, 1.0, 1.0, 0.3, 0.3]) @ rotation(rng, 6)))
    rigid = procrustes(points, stretched, centred=False)
    loose = lambda_orthogonal(points, stretched)
    strict = lambda_orthogonal(points, stretched, strictness=-50.0)

    def error(found: object) -> float:
        return float(((points @ found.matrix - stretched) ** 2).sum())  # type: ignore[attr-defined]

    def distance(found: object) -> float:
        return float(np.linalg.norm(found.matrix @ found.matrix.T - np.eye(6)))  # type: ignore[attr-defined]

    assert error(loose) < 0.8 * error(rigid)
    assert distance(loose) > 0.3
    assert distance(strict) < 0.25 * distance(loose)


def test_slerp_goes_along_the_great_circle(rng: np.random.Generator) -> None:
    first, second = unit(rng.normal(size=(20, 5))), unit(rng.normal(size=(20, 5)))
    for share in (0.0, 0.3, 1.0):
        found = slerp(first, second, share)
        for u, v, w in zip(first, second, found, strict=True):
            angle = math.acos(float(u @ v))
            slow = (math.sin((1 - share) * angle) * u + math.sin(share * angle) * v) / math.sin(angle)
            np.testing.assert_allclose(w, slow, atol=1e-5)
            assert math.acos(min(1.0, float(u @ w))) == pytest.approx(share * angle, abs=2e-3)
    np.testing.assert_allclose(slerp(first, first, 0.4), first, atol=1e-6)
    assert np.isfinite(slerp(first, -first, 0.5)).all()


def test_a_mixture_is_the_direction_of_the_weighted_sum(rng: np.random.Generator) -> None:
    first, second = unit(rng.normal(size=(7, 4))), unit(rng.normal(size=(7, 4)))
    for u, v, w in zip(first, second, blend(first, second, 0.25), strict=True):
        slow = 0.75 * u + 0.25 * v
        np.testing.assert_allclose(w, slow / np.sqrt((slow**2).sum()), atol=1e-6)
    with pytest.raises(UsageError, match="same images, found 7 and 6"):
        blend(first, second[:6], 0.5)


def test_matched_quantiles_say_old_scores_in_the_new_space_and_keep_their_order(rng: np.random.Generator) -> None:
    old = rng.uniform(-1, 1, 2_000).astype(np.float32)
    new = (0.2 * old + 0.7).astype(np.float32)  # the same pairs, in a space of high cosines
    scores = rng.uniform(-1, 1, (5, 40)).astype(np.float32)
    found = match_quantiles(scores, old, new)
    np.testing.assert_allclose(found, 0.2 * scores + 0.7, atol=2e-3)
    assert (np.argsort(found, axis=1) == np.argsort(scores, axis=1)).all()
    beyond = match_quantiles(np.array([[2.0, 3.0]], np.float32), old, new)
    assert beyond[0, 1] > beyond[0, 0], "scores beyond all that were fitted keep their order"


def test_reciprocal_ranks_count_among_the_given_rows_alone() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.7], [0.2, 0.9, 0.3, 0.1]])
    found = reciprocal_ranks(scores, np.array([True, False, True, True]))
    expected = [[1 / 61, 0, 1 / 63, 1 / 62], [1 / 62, 0, 1 / 61, 1 / 63]]
    np.testing.assert_allclose(found, expected)


def test_simplex_rows_are_roots_of_class_shares(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(6, 3))
    found = simplex(logits, 5, temperature=0.5)
    for row, point in zip(logits, found, strict=True):
        powers = [math.exp(value / 0.5) for value in row]
        expected = [math.sqrt(value / sum(powers)) for value in powers] + [0.0, 0.0]
        np.testing.assert_allclose(point, expected, atol=1e-6)
        assert float(point @ point) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(UsageError, match="at most 2 classes, found 3"):
        simplex(logits, 2)


def test_the_best_point_of_a_query_leaves_its_own_row_out(rng: np.random.Generator) -> None:
    gallery, identities = unit(rng.normal(size=(6, 4))), np.array(["a", "a", "b", "a", "b", "c"])
    found = centroid_queries(gallery, identities, np.array(["a", "b", "d"]), np.array([1, -1, -1]))
    np.testing.assert_allclose(found[0], unit((gallery[0] + gallery[3])[None])[0], atol=1e-6)
    np.testing.assert_allclose(found[1], unit((gallery[2] + gallery[4])[None])[0], atol=1e-6)
    assert not found[2].any()
