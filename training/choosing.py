"""The one rule by which an update chooses on its dev part: quality, within the policy's limit of flips.

An interpolation share, a mixing share, a weight: whatever trades quality against flips is tried at several values, each
is measured on identities (closed set: images) that are neither trained on nor reported, and `choose` takes one.
"""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from graceful.errors import UsageError

RULE = "of the values whose flips stay within the limit the best self-test; where none does, the fewest flips"


class Option(BaseModel):
    """What one value came to on the dev part; all are shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    self_test: float
    flips: float


def choose(options: Sequence[Option], max_flips: float | None) -> Option:
    """Return the option to take.

    Of those with flips <= max_flips (None: all) the one of the best self-test; where none is within the limit, the one
    of the fewest flips. Ties go to fewer flips, then to the better self-test, then to the smaller value.

    >>> tried = [Option(value=0.0, self_test=0.9, flips=0.04), Option(value=0.2, self_test=0.88, flips=0.02)]
    >>> choose(tried, 0.03).value, choose(tried, None).value, choose(tried, 0.01).value
    (0.2, 0.0, 0.2)

    Raises: UsageError without options, or with one that was not measured.
    """
    if not options or any(math.isnan(option.self_test) or math.isnan(option.flips) for option in options):
        raise UsageError(f"choosing on the dev part: expected measured options, found {list(options)}")
    within = [option for option in options if max_flips is None or option.flips <= max_flips]
    if within:
        return min(within, key=lambda option: (-option.self_test, option.flips, option.value))
    return min(options, key=lambda option: (option.flips, -option.self_test, option.value))
