"""Costs: unknown terms stay unknown, known ones add up."""

from __future__ import annotations

import math

import pytest

from graceful.evaluation.cost import CostInputs, break_even_days, net_value, option_cost, option_costs

KNOWN = CostInputs(
    rows_per_s=1000,
    num_workers=4,
    num_rows=14_400_000,
    bytes_per_row=1024**3 // 14_400_000 + 1,
    fixed_worker_hours=2,
    price_per_worker_hour=5,
    price_per_gib_month=0,
    value_per_point_day=10,
    days_until_next_generation=30,
)


def test_a_full_backfill_costs_embedding_and_fixed_work() -> None:
    cost = option_cost(KNOWN, 1.0)  # 14.4 M rows at 4,000 per second: one hour of four workers
    assert (cost.hours, cost.embedding_price, cost.fixed_price, cost.total_price) == (1.0, 20.0, 10.0, 30.0)
    assert cost.unavailable == ()


def test_storage_is_paid_until_the_next_generation() -> None:
    inputs = KNOWN.model_copy(update={"price_per_gib_month": 0.1, "bytes_per_row": 1024, "num_rows": 1024**2 * 10})
    assert option_cost(inputs, 0.5).storage_price == pytest.approx(5 * 0.1 * 30 / 30.4375)


@pytest.mark.parametrize(
    "term", ["price_per_worker_hour", "fixed_worker_hours", "price_per_gib_month", "bytes_per_row"]
)
def test_an_unknown_term_makes_the_total_unavailable(term: str) -> None:
    cost = option_cost(KNOWN.model_copy(update={term: None}), 0.5)
    assert cost.total_price is None
    assert cost.unavailable
    assert net_value(KNOWN, cost, 1.0) is None
    assert break_even_days(cost.total_price, 10, 1.0) is None


def test_re_embedding_nothing_costs_nothing_even_without_prices() -> None:
    cost = option_cost(CostInputs(rows_per_s=1, num_rows=10), 0.0)
    assert (cost.hours, cost.total_price, cost.unavailable) == (0.0, 0.0, ())


def test_break_even_is_never_reached_without_a_gain() -> None:
    assert break_even_days(30, 10, 1.5) == 2.0
    assert break_even_days(30, 10, 0.0) == math.inf
    assert break_even_days(30, 10, -1.0) == math.inf
    assert break_even_days(30, 0, 1.0) == math.inf
    assert break_even_days(0, 10, 1.0) == 0.0
    assert break_even_days(0, 10, -1.0) == math.inf


def test_net_value_counts_the_days_after_the_re_embedding() -> None:
    slow = KNOWN.model_copy(update={"rows_per_s": 1000 / 240})  # ten days
    cost = option_cost(slow, 1.0)
    assert net_value(slow, cost, 2.0) == pytest.approx(10 * 2.0 * 20 - (cost.total_price or 0))
    assert net_value(slow, cost, float("-inf")) is None


def test_cost_grows_with_the_fraction_and_bad_fractions_are_refused() -> None:
    prices = [cost.total_price or 0.0 for cost in option_costs(KNOWN, (0, 0.1, 0.5, 1))]
    assert prices == sorted(prices)
    with pytest.raises(ValueError, match="fraction"):
        option_cost(KNOWN, 1.5)


def test_wave_zero_is_paid_at_every_fraction() -> None:
    inputs = KNOWN.model_copy(update={"num_rows": 1_000_000})
    rows = [cost.num_rows for cost in option_costs(inputs, (0, 0.05, 0.5), first_share=0.08)]
    assert rows == [80_000, 80_000, 500_000]
    assert (option_cost(inputs, 0.0, first_share=0.08).total_price or 0) > 0
