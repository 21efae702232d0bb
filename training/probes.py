"""Probes: a few pictures whose vectors lie beside a generation, by which it is known whether it still embeds alike.

A vector depends on more than the weights: on the libraries that decode, resize and multiply. Another version of one of
them may move every query away from the gallery, and nothing else would say so. The pictures are drawn by the code, so
that no image of anybody is kept; their *bytes* are stored, so that a library which encodes otherwise changes nothing.
No torch here: whoever has the encoder gives the vectors. Shapes: P pictures, D width.

    probes.json    format_version, sha256 of the rest, pictures, vectors, versions of the libraries that made them
"""

import base64
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graceful.errors import GracefulError, UnknownFormatError
from graceful.files import exists, join, read_bytes, write_json
from graceful.training.images import codec_versions, encode_png, thumbnail

PROBES_FILE = "probes.json"
FORMAT_VERSION = 1
NUM_PROBES = 8
MIN_COSINE = 0.999
"""A vector further from the stored one than this is refused."""
NOTED_COSINE = 0.9999
"""One between the two is worth a word."""

_LIBRARIES = ("torch", "torchvision", "Pillow", "numpy")
_SIZES = ((96, 64), (64, 96), (128, 128), (40, 28), (176, 132), (132, 176), (64, 64), (200, 150))  # width, height
_GRID = 7  # values along the longer side, between which a picture is drawn

Encode = Callable[[Sequence[bytes]], NDArray[np.float32]]
"""Encoded pictures -> vectors (P, D) of unit length."""


class EncoderChangedError(GracefulError):
    """A generation gives other vectors here than where it was made: what it answers does not fit what is stored."""


class DamagedProbesError(GracefulError):
    """The stored probes are not those that were written."""


@dataclass(frozen=True)
class Probes:
    """Pictures as bytes, their vectors (P, D), and what made these; `digest` is of all that."""

    pictures: tuple[bytes, ...]
    vectors: NDArray[np.float32]
    libraries: Mapping[str, str]
    digest: str


@dataclass(frozen=True)
class Agreement:
    """How well an encoder agrees with its probes. `changed`: library -> version then and here, of those that differ."""

    worst_cosine: float
    changed: Mapping[str, tuple[str, str]]

    @property
    def is_refused(self) -> bool:
        """Whether vectors of this encoder do not fit the stored ones."""
        return not self.worst_cosine >= MIN_COSINE

    @property
    def is_noted(self) -> bool:
        """Whether they fit, and not quite."""
        return MIN_COSINE <= self.worst_cosine < NOTED_COSINE

    @property
    def said(self) -> str:
        """Which libraries changed, in words."""
        return said_of(self.changed) or "no library whose version is known changed: another processor, build or codec?"


def draw_pictures() -> tuple[bytes, ...]:
    """Draw the pictures: smooth colours and a bright block, PNG and JPEG in turn, higher and wider than they are long.

    The same on every machine with the same versions of NumPy and Pillow; what is compared are the stored bytes.
    """
    pictures = []
    for number, (width, height) in enumerate(_SIZES):
        draw = np.random.default_rng(number)
        grid = draw.uniform(0, 255, (_GRID, _GRID, 3))
        across, down = (np.linspace(0, _GRID - 1, side) for side in (width, height))
        low_x, low_y = (np.minimum(at.astype(int), _GRID - 2) for at in (across, down))
        share_x, share_y = (across - low_x)[None, :, None], (down - low_y)[:, None, None]
        rows = [grid[low_y + step][:, low_x] * (1 - share_x) + grid[low_y + step][:, low_x + 1] * share_x
                for step in (0, 1)]  # fmt: skip
        pixels = np.rint(rows[0] * (1 - share_y) + rows[1] * share_y).astype(np.uint8)
        left, top = int(draw.integers(width // 2)), int(draw.integers(height // 2))
        pixels[top : top + height // 3, left : left + width // 3] = draw.integers(0, 256, 3)
        payload = encode_png(pixels)
        pictures.append(payload if number % 2 == 0 else thumbnail(payload, max(width, height)))
    return tuple(pictures)


def write_probes(generation_uri: str, encode: Encode, backbone: str, pictures: Sequence[bytes] | None = None) -> None:
    """Store pictures with the vectors that `encode` gives them; what is there already is left as it is.

    `pictures`: by default those drawn here; of a text tower its texts, as UTF-8. A picture without a finite vector is
    left out; where none has one, nothing is written.
    """
    place = join(generation_uri, PROBES_FILE)
    if exists(place):
        return
    pictures = draw_pictures() if pictures is None else pictures
    vectors = np.asarray(encode(pictures), np.float32)
    usable = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if not len(usable):
        return
    record = {
        "pictures": [base64.b64encode(pictures[row]).decode() for row in usable.tolist()],
        "vectors": [base64.b64encode(vectors[row].astype("<f4").tobytes()).decode() for row in usable.tolist()],
        "libraries": library_versions(backbone),
    }
    write_json(place, {"format_version": FORMAT_VERSION, "sha256": _digest(record), **record})


def read_probes(generation_uri: str) -> Probes | None:
    """Read the probes of a generation; None where it was made before there were any.

    Raises: DamagedProbesError, UnknownFormatError.
    """
    place = join(generation_uri, PROBES_FILE)
    try:
        found = json.loads(read_bytes(place))
    except FileNotFoundError:
        return None
    except ValueError:
        raise _damaged(place, "no JSON") from None
    version = found.pop("format_version", None) if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise UnknownFormatError(
            f"reading probes: expected format {FORMAT_VERSION}, found {version} (at {place}); use the program version "
            "that wrote it"
        )
    digest = found.pop("sha256", None)
    if digest != _digest(found):
        raise _damaged(place, "other content")
    vectors = [np.frombuffer(base64.b64decode(text), "<f4") for text in found["vectors"]]
    pictures = tuple(base64.b64decode(text) for text in found["pictures"])
    return Probes(pictures, np.stack(vectors).astype(np.float32), found["libraries"], digest)


def compare(probes: Probes, encode: Encode, backbone: str) -> Agreement:
    """Embed the pictures of the probes again, and compare."""
    here = np.asarray(encode(probes.pictures), np.float64)
    stored = probes.vectors.astype(np.float64)
    norms = np.linalg.norm(here, axis=1) * np.linalg.norm(stored, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (here * stored).sum(axis=1) / norms
    return Agreement(float(np.nan_to_num(cosines, nan=-1.0).min()), changed_libraries(probes, backbone))


def refuse_changed(generation_uri: str, found: Agreement) -> None:
    """Raise EncoderChangedError where an encoder does not give the vectors again that lie beside it."""
    if not found.is_refused:
        return
    generation = generation_uri.rstrip("/").rpartition("/")[2]
    pins = " ".join(f"{name}=={then}" for name, (then, _) in found.changed.items() if name in _installable())
    restore = f"install what made it ({pins})" if pins else "run it where it was made, or mend this installation"
    raise EncoderChangedError(
        f"opening {generation}: expected the vectors that it gave when it was made, found a cosine of "
        f"{found.worst_cosine:.4f} to them, below {MIN_COSINE} ({found.said}); what it embeds here does not fit the "
        f"gallery. {restore[0].upper()}{restore[1:]}; to use it as it is all the same, remove "
        f"{join(generation_uri, PROBES_FILE)}"
    )


def changed_libraries(probes: Probes, backbone: str) -> dict[str, tuple[str, str]]:
    """Libraries whose version here is not that of the probes: name -> (then, here)."""
    here = library_versions(backbone)
    names = dict.fromkeys([*probes.libraries, *here])
    versions = {name: (probes.libraries.get(name, "none"), here.get(name, "none")) for name in names}
    return {name: pair for name, pair in versions.items() if pair[0] != pair[1]}


def library_versions(backbone: str) -> dict[str, str]:
    """Versions of what a vector depends on, beside the weights; of timm where the network is one of its."""
    versions = dict(codec_versions())
    for name in _installable(backbone):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return {**versions, "processor": platform.machine()}


def said_of(changed: Mapping[str, tuple[str, str]]) -> str:
    """Changed libraries in words: "Pillow 11.0.0 then, 12.0.0 here"."""
    return ", ".join(f"{name} {then} then, {here} here" for name, (then, here) in changed.items())


def _installable(backbone: str = "timm/") -> tuple[str, ...]:
    return (*_LIBRARIES, "timm") if backbone.startswith("timm/") else _LIBRARIES


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _damaged(place: str, found: str) -> DamagedProbesError:
    return DamagedProbesError(
        f"reading probes: expected what was written, found {found} (at {place}); restore the file from a copy, or "
        "remove it: then nothing says whether the encoder embeds as it did"
    )
