"""What one encoded image is, without a configuration: its size, and whether it has colour."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from graceful.training.images import unreadable_reason

_THUMB = 32  # pixels a side: enough to tell colour from grey
_COLOUR_LEVELS = 8  # channels of a grey JPEG differ by a few levels


@dataclass(frozen=True)
class Measured:
    """Width and height in pixels as stored; `reason` says why it cannot be decoded, or is None."""

    width: int
    height: int
    is_grey: bool
    reason: str | None


def measure(payload: bytes) -> Measured:
    """Decode an image in full and describe it."""
    reason = unreadable_reason(payload)
    if reason is not None:
        return Measured(0, 0, False, reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(payload))
        width, height = image.size
        if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")):
            return Measured(width, height, True, None)
        image.draft("RGB", (_THUMB, _THUMB))
        thumb = np.asarray(image.convert("RGB").resize((_THUMB, _THUMB)), np.int16)
    spread = thumb.max(axis=2) - thumb.min(axis=2)
    return Measured(width, height, bool(spread.max() <= _COLOUR_LEVELS), None)
