"""Near copies: pictures that are the same to the eye although their bytes differ (re-encoded, resized).

The difference hash of a picture is 16 x 16 bits: whether each cell of its grey 17 x 16 reduction is brighter than its
left neighbour (D. Hattingh and N. Krawetz, "Kind of like that", 2013, at four times its bits). Pictures that are small
or nearly flat say too little in so few bits (strokes on paper, 8 x 8 digits): they have no hash.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graceful.training.images import read_payloads

CELLS = 16
SMALLEST_SIDE = 32  # pixels
FEWEST_BITS = 64  # of 256 must be set, and as many not
# Distances over 1,500 pictures of 32 x 32 (CIFAR-100): re-encoded as JPEG at quality 90, 60: 95 % within 31, 47; made
# half as large again: 36. No two of 2,000 different ones were within 24. Larger pictures differ less.
MAX_DISTANCE = 24
_BLOCK = 1024


def picture_hash(payload: bytes) -> NDArray[np.bool_] | None:
    """The difference hash (256,) of an encoded picture; None where it says too little or cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(payload))
            if min(image.size) < SMALLEST_SIDE:
                return None
            image.draft("L", (4 * CELLS, 4 * CELLS))
            grey = np.asarray(image.convert("L").resize((CELLS + 1, CELLS), Image.Resampling.BOX), np.int16)
    except Exception:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        return None
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return bits if FEWEST_BITS <= bits.sum() <= bits.size - FEWEST_BITS else None


def hash_pictures(sources: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Hashes (n, 256) of pictures by their sources, and which of them (n,) have one."""
    bits, known = np.zeros((len(sources), CELLS**2), np.bool_), np.zeros(len(sources), np.bool_)
    for start in range(0, len(sources), _BLOCK):
        for row, payload in enumerate(read_payloads(sources[start : start + _BLOCK], {}), start):
            found = picture_hash(payload) if payload else None
            if found is not None:
                bits[row], known[row] = found, True
    return bits, known


def has_near_copy(
    query_bits: NDArray[np.bool_],
    gallery_bits: NDArray[np.bool_],
    query_contents: Sequence[str],
    gallery_contents: Sequence[str],
    max_distance: int = MAX_DISTANCE,
) -> NDArray[np.bool_]:
    """Which queries (Q,) have a row of other content in the gallery that differs in at most `max_distance` bits."""
    found = np.zeros(len(query_bits), np.bool_)
    rows = gallery_bits.astype(np.float32)
    ones = rows.sum(axis=1)
    names = np.asarray(gallery_contents)
    for start in range(0, len(query_bits), _BLOCK):
        block = query_bits[start : start + _BLOCK].astype(np.float32)
        distance = block.sum(axis=1)[:, None] + ones - 2 * block @ rows.T
        near = distance <= max_distance
        for row in np.flatnonzero(near.any(axis=1)):
            found[start + row] = (names[near[row]] != query_contents[start + int(row)]).any()
    return found
