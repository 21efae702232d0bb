"""What each option costs, from measured throughput, and when a backfill has paid for itself.

Every unknown term stays None ("unavailable") and makes every sum that needs it None: an unknown cost is never taken for
zero. Whoever knows that a term is nothing says 0. Embedding hours alone mislead: storage of the second vectors and the
work around them (index build, re-validation) are terms of their own. Times are hours or days as named; money is in one
currency of the caller's choice.

    cost(f) = r / rate x price per worker hour + fixed worker hours x price + storage of r rows until the next one
    T*(f)   = cost(f) / (value per point and day x lower bound of the gain in points)

r = max(f, share of wave 0) x rows: what has to be re-embedded before the move is paid for at every fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

GIB = 1024**3
DAYS_PER_MONTH = 365.25 / 12


class CostInputs(BaseModel):
    """What is known about the cost of re-embedding and about the worth of a better model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows_per_s: float = Field(gt=0, description="Rows that ONE worker re-embeds per second, measured end to end.")
    num_workers: int = Field(default=1, ge=1, description="Workers that re-embed at the same time.")
    num_rows: int = Field(ge=0, description="Rows of the gallery that a full backfill re-embeds.")
    bytes_per_row: int | None = Field(default=None, ge=0, description="Stored bytes of one vector of the candidate.")
    fixed_worker_hours: float | None = Field(
        default=None, ge=0, description="Worker hours of a re-index whatever its size: index build and re-validation."
    )
    price_per_worker_hour: float | None = Field(default=None, ge=0, description="Price of one worker for one hour.")
    price_per_gib_month: float | None = Field(default=None, ge=0, description="Price of one stored GiB for one month.")
    value_per_point_day: float | None = Field(
        default=None, ge=0, description="What one point of the metric is worth per day of service."
    )
    days_until_next_generation: float | None = Field(
        default=None, ge=0, description="Days until the next generation is due and this work is superseded."
    )


class OptionCost(BaseModel):
    """Cost of re-embedding one fraction. None means unavailable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(description="Fraction of the gallery that is re-embedded.")
    num_rows: int = Field(description="Rows that are re-embedded.")
    hours: float = Field(description="Hours of embedding with all workers.")
    embedding_price: float | None = Field(description="Price of the embedding; None when unavailable.")
    fixed_price: float | None = Field(description="Price of index build and re-validation; None when unavailable.")
    storage_price: float | None = Field(description="Price of the second vectors until the next generation, or None.")
    total_price: float | None = Field(description="Sum of the three; None when one of them is unavailable.")
    unavailable: tuple[str, ...] = Field(description="Names of the terms that are not known.")


def option_cost(inputs: CostInputs, fraction: float, *, first_share: float = 0.0) -> OptionCost:
    """Cost of re-embedding a fraction of the gallery, and at least the `first_share` that wave 0 takes anyway.

    >>> inputs = CostInputs(rows_per_s=100, num_workers=2, num_rows=720_000, price_per_worker_hour=3)
    >>> cost = option_cost(inputs, 0.5)  # 360,000 rows at 200 per second are half an hour of two workers
    >>> cost.hours, cost.embedding_price, cost.total_price, cost.unavailable
    (0.5, 3.0, None, ('fixed_price', 'storage_price'))
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"costing an option: expected a fraction in [0, 1], found {fraction}")
    num_rows = round(inputs.num_rows * max(fraction, first_share))
    hours = num_rows / (inputs.rows_per_s * inputs.num_workers) / 3600
    price = inputs.price_per_worker_hour
    embedding = _product(hours, inputs.num_workers, price)
    fixed = _product(inputs.fixed_worker_hours, price)
    months = _product(inputs.days_until_next_generation, 1 / DAYS_PER_MONTH)
    storage = _product(num_rows / GIB, inputs.bytes_per_row, inputs.price_per_gib_month, months)
    if num_rows == 0:
        embedding = fixed = storage = 0.0
    terms = {"embedding_price": embedding, "fixed_price": fixed, "storage_price": storage}
    known = [term for term in terms.values() if term is not None]
    return OptionCost(
        fraction=fraction,
        num_rows=num_rows,
        hours=hours,
        embedding_price=embedding,
        fixed_price=fixed,
        storage_price=storage,
        total_price=sum(known) if len(known) == len(terms) else None,
        unavailable=tuple(name for name, term in terms.items() if term is None),
    )


def option_costs(inputs: CostInputs, fractions: Sequence[float], *, first_share: float = 0.0) -> tuple[OptionCost, ...]:
    """`option_cost` of each fraction."""
    return tuple(option_cost(inputs, fraction, first_share=first_share) for fraction in fractions)


def break_even_days(total_price: float | None, value_per_point_day: float | None, gain_points: float) -> float | None:
    """Days of service after which a gain has paid for its cost: T* = cost / (value per point and day x gain).

    Use the lower bound of the gain. Infinite when the gain is not positive; None when a term is unavailable.

    >>> break_even_days(600.0, 20.0, 1.5), break_even_days(600.0, 20.0, -0.1), break_even_days(None, 20.0, 1.5)
    (20.0, inf, None)
    """
    if total_price is None or value_per_point_day is None:
        return None
    worth = value_per_point_day * gain_points
    if not worth > 0:
        return 0.0 if total_price == 0 and gain_points > 0 else math.inf
    return total_price / worth


def net_value(inputs: CostInputs, cost: OptionCost, gain_points: float) -> float | None:
    """Worth of a gain from the end of the re-embedding until the next generation, less its cost; None if unavailable.

    Use the lower bound of the gain. What is gained or lost while the re-embedding runs is not counted.
    """
    if (
        cost.total_price is None
        or inputs.value_per_point_day is None
        or inputs.days_until_next_generation is None
        or not math.isfinite(gain_points)
    ):
        return None
    days = max(inputs.days_until_next_generation - cost.hours / 24, 0.0)
    return inputs.value_per_point_day * gain_points * days - cost.total_price


def _product(*factors: float | None) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result
