"""Images by name: where one image's bytes are, how to read many of them, and how they become pixels.

A source names one image: "/abs/file.png" (or any URI) or "/abs/file.parquet#123", row 123 of a Parquet file with a
Hugging Face image column (struct of bytes and path, or plain binary). "#123@photo" names the column where a file has
several; without it the column is `image`, or else the only one that holds images.

Training, embedding, search and the checks of ingest all decode with `decode`. What it holds in memory is bounded: the
header is looked at first, an image above MAX_PIXELS is refused undecoded, and a format outside FORMATS is not opened.
"""

import io
import threading
import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from graceful.errors import GracefulError, UsageError
from graceful.files import join, read_bytes, resolve
from graceful.training.generation import Preprocessing

MAX_PIXELS = 2**26
"""Width times height of the largest image that is decoded: 67 megapixels, above the 61 of today's largest full frame
sensors. A pixel takes 4 bytes once decoded, and as many again while it is turned or put on a background."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
"""Formats that are opened, by PIL's names; a phone's MPO counts as JPEG. Among the others are some that decode before
their size is known (ICO) and some that start programs (EPS)."""

GroupCache = LRUCache[tuple[object, ...], pa.ChunkedArray]
_CACHED_GROUPS_BYTES = 256 * 2**20
_DRAFT = 2  # a JPEG is read at a fraction of its size that is this often the wanted size or more
_BLOCK = 2**20
_PNG_START = b"\x89PNG\r\n\x1a\n"
# What turns an image upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# What is checked before a generation exists: the same decoding, at a size that costs nothing.
_CHECK = Preprocessing(image_size=32, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)


class UnreadableImageError(GracefulError):
    """The bytes of one image cannot be read or decoded."""


def split_source(source: str) -> tuple[str, int | None, str | None]:
    """Return file, row and column of a source; row and column are None for a plain file.

    >>> split_source("/a/b.parquet#7")
    ('/a/b.parquet', 7, None)
    """
    place, mark, tail = source.rpartition("#")
    row, _, column = tail.partition("@")
    if not mark or not row.isdigit():
        return source, None, None
    return place, int(row), column or None


def image_column(schema: pa.Schema, place: str) -> str:
    """Return the name of the column that holds images: `image`, or else the only one of a fitting type."""
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if "image" in fitting:
        return "image"
    if len(fitting) != 1:
        raise UsageError(
            f"reading images: expected one image column (struct with bytes, or binary), found {fitting} among "
            f"{schema.names} (in {place}); name it in image_column"
        )
    return fitting[0]


def payloads_of(column: pa.ChunkedArray | pa.Array, place: str) -> list[bytes | None]:
    """Return the encoded bytes of each row of an image column; None where a row has none.

    A row without bytes but with a path is read from the file of that name beside the Parquet file.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not pa.types.is_struct(column.type):
        return list(column.to_pylist())
    payloads: list[bytes | None] = column.field("bytes").to_pylist()
    if "path" in [field.name for field in column.type] and any(payload is None for payload in payloads):
        folder = place.rpartition("/")[0]
        paths = column.field("path").to_pylist()
        for row, (payload, path) in enumerate(zip(payloads, paths, strict=True)):
            if payload is None and path:
                try:
                    payloads[row] = read_bytes(path if path.startswith("/") or "://" in path else join(folder, path))
                except OSError:
                    payloads[row] = None
    return payloads


def read_payloads(
    sources: Sequence[str], failures: dict[int, str] | None = None, groups: GroupCache | None = None
) -> list[bytes]:
    """Return the encoded bytes of every source, in order.

    Reads only the row groups that are needed and keeps the most recent ones, in `groups` where it is given. With
    `failures` given, an unreadable image is noted there as {index: reason} and its bytes are empty; without it,
    UnreadableImageError is raised.
    """
    payloads = [b""] * len(sources)
    notes: dict[int, str] = {}
    wanted: dict[tuple[str, str | None], list[tuple[int, int]]] = defaultdict(list)
    for index, source in enumerate(sources):
        place, row, column = split_source(source)
        if row is not None:
            wanted[place, column].append((index, row))
            continue
        try:
            payloads[index] = read_bytes(place)
        except OSError as error:
            notes[index] = f"cannot be read: {_one_line(error)}"
    for (place, column), rows in wanted.items():
        try:
            _read_rows(place, column, rows, payloads, notes, _GROUPS if groups is None else groups)
        except (OSError, pa.ArrowInvalid) as error:
            notes.update({index: f"cannot be read: {_one_line(error)}" for index, _ in rows})
    if failures is None and notes:
        index = min(notes)
        raise UnreadableImageError(
            f"reading images: expected {len(sources)} readable ones, found {len(notes)} that are not (first "
            f"{sources[index]}: {notes[index]})"
        )
    if failures is not None:
        failures.update(notes)
    return payloads


def decode(payload: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return the pixels (channels, size, size) of one encoded image; of several frames the first.

    With `decoding = "photo"` the image is turned upright by its EXIF orientation (damaged tags say nothing),
    transparent pixels show the background, and deep grey becomes 8 bits. 16-bit values are divided by 257. For 32-bit
    integers and floats no header tells the range: 0 to 65535 where a value is above 255, 0 to 1 for floats where none
    is above 1, else 0 to 255; values outside are clipped, NaN is black. A JPEG under `jpeg = "reduced"` is read at an
    eighth, a quarter or half of its size where that is a whole number of pixels and at least twice the wanted size; it
    is always the same for the same bytes and size.

    With "plain" none of that is done: transparency is ignored, deep grey clipped at 255, and no format but TIFF turned,
    which PIL does by itself. All other images have the same pixels under both.

    Then the image is resized and its middle cut out, in the order and with the rounding of torchvision (`Resize`,
    `CenterCrop` on a PIL image) and, for `resize = "fit"`, of timm (`ResizeKeepRatio(longest=1)`, `CenterCropOrPad`).

    Raises: UnreadableImageError on empty, truncated or foreign bytes, and on more than MAX_PIXELS, also once resized.
    """
    mode = "L" if preprocessing.channels == 1 else "RGB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is checked by itself; EXIF warnings say nothing about pixels
            image = _as_seen(payload, preprocessing) if preprocessing.decoding == "photo" else _open(payload)
            if image.mode != mode:
                image = image.convert(mode)
            pixels = np.array(_cropped(_resized(image, preprocessing), preprocessing))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:  # its message names a buffer in memory
        raise UnreadableImageError(f"cannot be decoded: expected one of {', '.join(FORMATS)}, found none") from None
    except Image.DecompressionBombError:  # PIL refuses some sizes itself
        raise UnreadableImageError(f"is too large: expected at most {MAX_PIXELS:,} pixels, found more") from None
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise UnreadableImageError(f"cannot be decoded: {_one_line(error)}") from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_size(payload: bytes, max_pixels: int) -> None:
    """Look at an image's header, and decode nothing.

    Raises: UnreadableImageError on more than `max_pixels`. What cannot be opened passes: `decode` says what it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = _open(payload).size
    except UnreadableImageError:
        raise
    except Exception:  # decode says what it is
        return
    if width * height > max_pixels:
        raise UnreadableImageError(f"is too large: expected at most {max_pixels:,} pixels, found {width}x{height}")


def unreadable_reason(payload: bytes | None) -> str | None:
    """Return why an image cannot be decoded, or None when it can: it is decoded in full, as a photo."""
    if payload is None:
        return "no bytes"
    try:
        decode(payload, _CHECK)
        return None
    except UnreadableImageError as error:
        return str(error)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG of pixels (h, w) or (h, w, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def codec_versions() -> dict[str, str]:
    """Return the versions of the codecs of photos that Pillow was built with; without those that it lacks."""
    found = {"libjpeg-turbo": features.version_feature("libjpeg_turbo"), "libwebp": features.version("webp")}
    return {name: version for name, version in found.items() if version}


def thumbnail(payload: bytes, side: int = 128) -> bytes:
    """Return an image as a small JPEG, upright and whole, its longer side at most `side`; the same bytes every time.

    Raises: UnreadableImageError, as `decode` does.
    """
    decode(payload, _CHECK)  # refuses what is too large, torn or foreign, and says why
    look = _CHECK.model_copy(update={"image_size": side, "decoding": "photo"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _as_seen(payload, look).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=70)
    return buffer.getvalue()


def _open(payload: bytes) -> Image.Image:
    """Return an image whose header is read and whose pixels are not."""
    if not payload:
        raise UnreadableImageError("empty")
    if payload.startswith(_PNG_START) and b"IEND" not in payload:  # PIL accepts a file that lost only its end
        raise UnreadableImageError("truncated: the file has no end")
    image = Image.open(io.BytesIO(payload), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(
            f"is too large: expected at most {MAX_PIXELS:,} pixels, found {image.width}x{image.height}"
        )
    return image


def _as_seen(payload: bytes, preprocessing: Preprocessing) -> Image.Image:
    """Return an image as a viewer shows it: 8 bits, on a background, upright."""
    image = _open(payload)
    enough = _DRAFT * preprocessing.resized
    parts = (8, 4, 2) if preprocessing.jpeg == "reduced" else ()
    for part in parts:  # a part that leaves a rest would shift the edges
        if min(image.size) // part >= enough and not (image.width % part or image.height % part):
            image.draft(None, (image.width // part, image.height // part))  # other formats than JPEG ignore it
            break
    image.load()
    try:
        # Not ImageOps.exif_transpose: it writes all tags back, and fails on damaged ones that matter to nobody here.
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL raises SyntaxError, struct.error, ... for damaged tags
        turn = None
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, preprocessing.background)
    elif image.has_transparency_data:
        image = _on_background(image, preprocessing.background)
    return image if turn is None else image.transpose(turn)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Return an image at the size from which the middle is cut out."""
    width, height = image.size
    side = preprocessing.resized
    if preprocessing.resize == "squash":
        size = (side, side)
    elif preprocessing.resize == "fit":
        ratio = max(width, height) / side
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    else:
        short = min(width, height)
        size = (side, int(side * height / short)) if width == short else (int(side * width / short), side)
    if preprocessing.resize == "shorter_side" and size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImageError(
            f"is too long: expected at most {MAX_PIXELS:,} pixels once the shorter side is {side}, found "
            f"{size[0]}x{size[1]}"
        )
    return image if image.size == size else image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


def _cropped(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Return the middle of an image as a square of the network's size, with padded borders where it is too small."""
    side = preprocessing.image_size
    if image.width < side or image.height < side:
        size = (max(image.width, side), max(image.height, side))
        color = preprocessing.padding
        padded = Image.new(image.mode, size, color if len(color) > 1 else color[0])
        padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        image = padded
    if image.size == (side, side):
        return image
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _eight_bits(image: Image.Image, background: int) -> Image.Image:
    """Return deep grey as 8 bits, block by block; see `decode`."""
    values = np.asarray(image).reshape(-1)
    top = 65535.0
    if values.dtype.itemsize > 2:
        largest = np.fmax.reduce(values)
        top = 65535.0 if largest > 255 else 255.0 if largest > 1 or values.dtype.kind != "f" else 1.0
    key = image.info.get("transparency")  # the one value that is transparent
    levels = np.empty(len(values), np.uint8)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        shares = np.minimum(np.fmax(block.astype(np.float32), 0), top)  # fmax takes 0 rather than NaN
        levels[start : start + _BLOCK] = np.rint(shares * np.float32(255 / top))
        if key is not None:
            levels[start : start + _BLOCK][block == key] = background
    return Image.fromarray(levels.reshape(image.height, image.width))


def _on_background(image: Image.Image, background: int) -> Image.Image:
    """Return an image with transparency as RGB over an even grey, block by block."""
    flat = Image.new("RGB", image.size, (background,) * 3)
    rows = max(1, _BLOCK // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        block = image.crop(box).convert("RGBA")
        flat.paste(block, box, mask=block.getchannel("A"))
    return flat


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_rows(
    place: str,
    column: str | None,
    rows: list[tuple[int, int]],
    payloads: list[bytes],
    notes: dict[int, str],
    groups: GroupCache,
) -> None:
    reader = _GroupReader(place, column, groups)
    by_group: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, row in rows:
        if row >= reader.starts[-1]:
            notes[index] = f"cannot be read: the file has {reader.starts[-1]} rows"
            continue
        by_group[int(np.searchsorted(reader.starts, row, side="right")) - 1].append((index, row))
    for group, members in by_group.items():
        offset = int(reader.starts[group])
        taken = reader.read(group).take(pa.array([row - offset for _, row in members]))
        for (index, _), payload in zip(members, payloads_of(taken, place), strict=True):
            if payload is None:
                notes[index] = "no bytes"
            else:
                payloads[index] = payload


def group_cache(limit_bytes: int) -> GroupCache:
    """Return a cache of image columns of row groups. One above the limit is kept alone, not read for every batch."""
    return LRUCache(limit_bytes, getsizeof=lambda column: min(column.nbytes, limit_bytes))


_GROUPS = group_cache(_CACHED_GROUPS_BYTES)  # shared by the threads
_GROUPS_LOCK = threading.Lock()


class _GroupReader:
    """One Parquet file's image column, a row group at a time. A changed file is not taken from the cache."""

    def __init__(self, place: str, column: str | None, groups: GroupCache) -> None:
        self._groups = groups
        file_system, path = resolve(place)
        info = file_system.get_file_info(path)
        self._file = pq.ParquetFile(file_system.open_input_file(path))
        self._column = column or image_column(self._file.schema_arrow, place)
        self._key = (place, self._column, info.size, info.mtime_ns)
        metadata = self._file.metadata
        self.starts = np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def read(self, group: int) -> pa.ChunkedArray:
        key = (*self._key, group)
        with _GROUPS_LOCK:
            column = self._groups.get(key)
        if column is None:
            column = self._file.read_row_group(group, columns=[self._column]).column(0)
            with _GROUPS_LOCK:
                self._groups[key] = column
        return column


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
