"""The compatibility matrix: golden chains and scores, holes, order."""

from __future__ import annotations

import numpy as np
import pytest

from graceful.evaluation.matrix import (
    CompatibilityMatrix,
    advbct_scores,
    average_compatibility,
    average_multimodel,
    backward_compatibility,
    compatibility_tax,
    criterion,
    forward_compatibility,
    matrix_from_outcomes,
    update_gain,
)

NAMES = ("alex", "vgg", "r50", "vit")


def chain(lower: list[list[float]]) -> CompatibilityMatrix:
    values = np.full((4, 4), np.nan)
    for t, row in enumerate(lower):
        values[t, : len(row)] = row
    return CompatibilityMatrix(NAMES, values)


BCT = chain([[46.6], [54.4, 58.4], [46.0, 48.9, 64.3], [54.9, 57.5, 70.3, 73.9]])
BT2 = chain([[46.6], [56.5, 61.0], [56.7, 61.5, 66.6], [57.9, 62.5, 72.0, 75.6]])


@pytest.mark.parametrize(("matrix", "ac", "am"), [(BCT, 3 / 6, 57.5), (BT2, 6 / 6, 61.7)])
def test_chain_table_golden_numbers(matrix: CompatibilityMatrix, ac: float, am: float) -> None:
    assert average_compatibility(matrix) == ac
    assert average_multimodel(matrix) == pytest.approx(am, abs=0.05)


def test_advbct_golden_numbers() -> None:
    scores = advbct_scores([82.78, 62.13, 15.71], [81.15, 63.85, 16.48], [78.55, 52.31, 11.49], [75.45, 49.15, 10.03])
    assert [100 * score for score in scores] == pytest.approx([49.55, 58.09, 53.45], abs=0.01)
    assert np.isnan(advbct_scores([], [], [], [])).all()


def test_a_tie_does_not_meet_the_criterion() -> None:
    matrix = CompatibilityMatrix(("a", "b"), np.array([[0.5, np.nan], [0.5, 0.7]]))
    assert criterion(matrix)[1, 0] == 0
    assert average_compatibility(matrix) == 0


def test_a_hole_is_never_a_pass_and_chosen_pairs_can_leave_it_out() -> None:
    values = BT2.values.copy()
    values[3, 0] = np.nan
    holed = CompatibilityMatrix(NAMES, values)
    assert np.isnan(criterion(holed)[3, 0])
    assert np.isnan(average_compatibility(holed))
    assert average_compatibility(holed, [("vgg", "alex"), ("vit", "r50")]) == 1.0
    assert not np.isnan(average_multimodel(holed))
    with pytest.raises(ValueError, match="later, earlier"):
        average_compatibility(holed, [("alex", "vgg")])


def test_one_generation_has_no_compatibility() -> None:
    one = CompatibilityMatrix(("a",), np.array([[0.5]]))
    for undefined in (average_compatibility(one), backward_compatibility(one), forward_compatibility(one)):
        assert np.isnan(undefined)
    assert average_multimodel(one) == 0.5
    assert np.isnan(average_multimodel(CompatibilityMatrix((), np.zeros((0, 0)))))


def test_cl2r_scores_by_hand() -> None:
    assert backward_compatibility(BT2) == pytest.approx(((57.9 - 46.6) + (62.5 - 61.0) + (72.0 - 66.6)) / 3)
    assert forward_compatibility(BT2) == pytest.approx(((56.5 - 61.0) + (61.5 - 66.6) + (72.0 - 75.6)) / 3)


def test_gain_and_tax_against_a_paragon() -> None:
    assert update_gain(56.5, 46.6, 63.2) == pytest.approx(9.9 / 16.6)
    assert np.isnan(update_gain(0.6, 0.7, 0.7))
    assert compatibility_tax(61.0, 63.2) == pytest.approx(2.2)


def test_a_matrix_is_collected_from_the_pairs_that_were_measured(planted) -> None:
    matrix = matrix_from_outcomes(planted(num_queries=10), ["g1", "g2"])
    np.testing.assert_array_equal(matrix.values, [[np.nan, np.nan], [np.nan, 0.7]])


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct generations"):
        CompatibilityMatrix(("a", "b"), np.zeros((3, 3)))
