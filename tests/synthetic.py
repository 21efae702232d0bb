"""The world without training of the demo, and its items, for tests that know what must come out."""

import pyarrow as pa

from graceful.flows.commands.demo_world import (
    WIDTH,
    SyntheticGeneration,
    SyntheticModels,
    item_row,
    labelled,
    open_synthetic,
)

__all__ = ["WIDTH", "SyntheticGeneration", "SyntheticModels", "item_row", "items", "labelled", "open_synthetic"]


def items(num_identities: int, images_each: int, *, start: int = 0, prefix: str = "item") -> pa.Table:
    """New items for an ingest, `images_each` of every identity."""
    rows = []
    for identity in range(start, start + num_identities):
        for image in range(images_each):
            rows.append(item_row(f"{prefix}-{identity:03d}-{image}", f"id{identity:03d}", f"g{image}"))
    return pa.Table.from_pylist(rows)
