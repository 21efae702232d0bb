"""The forecast of a chain's cost: a straight line through what was measured, and nothing where too little was."""

import pytest

from graceful.evaluation.debt import MeasuredTraining, fitted_step_cost, forecast

CHAIN = [
    MeasuredTraining(num_predecessors=k, num_images=1000 + 500 * k, epochs=4, seconds=4 * (1000 + 500 * k) * cost)
    for k, cost in enumerate([0.010, 0.011, 0.012, 0.013])
]


def test_a_straight_line_is_found_and_goes_on():
    found = forecast(CHAIN, [0.0, 0.5, 1.0], next_ordinal=5, num_predecessors=4, bytes_per_image=512.0)
    assert [row.ordinal for row in found] == [5, 6, 7, 8, 9]
    assert [row.num_predecessors for row in found] == [4, 5, 6, 7, 8]
    assert [row.num_images for row in found] == [3000, 3500, 4000, 4500, 5000]
    assert [row.step_ratio for row in found] == pytest.approx([1.4, 1.5, 1.6, 1.7, 1.8])
    assert found[1].training_s == pytest.approx(3500 * 4 * 0.015)
    assert found[2].cache_bytes == 512 * 4000 * 6
    assert [row.tax_points for row in found] == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5])


@pytest.mark.parametrize("trainings", [[], CHAIN[:1], [CHAIN[1], CHAIN[1]]])
def test_what_was_not_measured_is_not_guessed(trainings):
    found = forecast(trainings, [1.0], next_ordinal=2, num_predecessors=1, bytes_per_image=None, num_generations=2)
    assert [(row.step_ratio, row.training_s, row.cache_bytes, row.tax_points) for row in found] == [(None,) * 4] * 2


def test_predecessors_that_seem_to_save_time_cost_nothing():
    cheaper = [
        MeasuredTraining(num_predecessors=k, num_images=100, epochs=1, seconds=seconds)
        for k, seconds in enumerate([3.0, 2.0, 1.0])
    ]
    cost = fitted_step_cost(cheaper)
    assert cost is not None
    assert (cost.base, cost.ratio(10)) == (pytest.approx(0.02), 1.0)
