"""A generation: one immutable embedding model, described by its card. No torch here.

A generation is a folder (local, or any URI that `pyarrow.fs` resolves):

    weights.safetensors      the encoder's state
    classifier.safetensors   rows (C, d) and class_means (C, d), both float32; absent for an adopted encoder
    probes.json              pictures with the vectors that it gave them, by which it is checked (`probes`)
    card.json                this module's `GenerationCard`, written last and atomically

A text tower (`text_tower`) has no weights here: its digest is of what builds it and of the
vectors that it gives to a few texts.

A folder without a card is not a generation: whoever finds one may overwrite it. The id carries the digest of the
weights file, so the same id always means the same weights.
"""

import hashlib
import json
import math
import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from graceful.errors import GracefulError, UnknownFormatError, UsageError
from graceful.files import join, read_bytes, write_bytes

FORMAT_VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
CARD_FILE = "card.json"
_ID_PATTERN = re.compile(r"g(\d{3,})(?:\.([a-z][a-z0-9_]*))?-([0-9a-f]{6})")


class GenerationNotFoundError(GracefulError, FileNotFoundError):
    """No card at the given place: there is no generation there, or its writing never ended."""


class Preprocessing(BaseModel):
    """How an image becomes the network's input: decode, resize, crop, divide by 255, subtract mean, over std.

    Resizing is Pillow's on 8-bit pixels, which always smooths while it makes smaller (what torchvision calls
    antialiasing); `images.decode` says how sizes and crops are rounded. What was written before a key existed reads as
    the key's default, and a value at that default is not written: records and digests of before stay as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(ge=4, description="Height and width in pixels of what the network sees.")
    channels: Literal[1, 3] = Field(description="1 converts to grey, 3 to RGB.")
    mean: tuple[float, ...] = Field(description="Mean per channel on the 0 to 1 scale.")
    std: tuple[float, ...] = Field(description="Standard deviation per channel on the 0 to 1 scale.")
    decoding: Literal["photo", "plain"] = Field(
        default="photo",
        description="photo: upright by the EXIF orientation, 16-bit grey scaled to 8 bits, transparent pixels on the "
        "background; plain: none of these, as generations of before this key decode.",
    )
    background: int = Field(
        default=255, ge=0, le=255, description="photo: grey level, 0 to 255, that shows through transparent pixels."
    )
    resize: Literal["squash", "shorter_side", "fit"] = Field(
        default="squash",
        description="squash: to a square, whatever the shape; shorter_side: the shorter side to resize_size, the shape "
        "kept; fit: the longer side, the shape kept. The middle is cut out, and missing borders are padded.",
    )
    resize_size: int | None = Field(
        default=None, ge=4, description="Pixels of the side that is resized, before the crop; by default image_size."
    )
    crop_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        exclude=True,
        description="Instead of resize_size: the share of the resized side that the crop keeps, as timm's crop_pct. "
        "Kept as resize_size = floor(image_size / crop_share).",
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = Field(
        default="bilinear", description="Pillow's filter of the resizing."
    )
    padding_color: tuple[int, ...] | None = Field(
        default=None, description="Level per channel, 0 to 255, of padded borders; by default the background's."
    )
    jpeg: Literal["reduced", "full"] = Field(
        default="reduced",
        description="reduced: a JPEG of more than twice the wanted size is read at a half, a quarter or an eighth, "
        "which is faster and changes pixels slightly; full: as the libraries of pretrained networks read it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _resize_size_of_a_share(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("crop_share") is None:
            return value
        share, size = value["crop_share"], value.get("image_size")
        if not isinstance(share, int | float) or not 0 < share <= 1 or not isinstance(size, int):
            return value  # the fields say what is wrong
        if value.get("resize_size") is not None:
            raise UsageError("preprocessing: expected resize_size or crop_share, found both; give one")
        return {**value, "crop_share": None, "resize_size": math.floor(size / share)}

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "Preprocessing":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UsageError(
                f"preprocessing: expected {self.channels} values in mean and std, found {len(self.mean)} and "
                f"{len(self.std)}; give one per channel"
            )
        if min(self.mean) < 0 or max(self.mean) > 1:
            raise UsageError(
                f"preprocessing: expected mean from 0 to 1, found {self.mean}; on the 0 to 255 scale? divide mean and "
                "std by 255"
            )
        if min(self.std) <= 0:
            raise UsageError(f"preprocessing: expected std > 0, found {self.std}")
        color = self.padding_color
        if color is not None and (len(color) != self.channels or min(color) < 0 or max(color) > 255):
            raise UsageError(
                f"preprocessing: expected {self.channels} whole numbers from 0 to 255 in padding_color, found {color}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_as_it_was(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = write(self)
        return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}

    @property
    def resized(self) -> int:
        """Pixels of the side that is resized."""
        return self.image_size if self.resize_size is None else self.resize_size

    @property
    def padding(self) -> tuple[int, ...]:
        """Level per channel of padded borders."""
        return self.padding_color or (self.background,) * self.channels

    def fingerprint(self) -> str:
        """Digest of these values: two generations with the same fingerprint can share decoded images."""
        values = self.model_dump()
        if self.decoding == "plain":  # cards were written with this digest before there was another decoding
            del values["decoding"]
            if not _LATER.keys() & values.keys():  # else the background may be what is padded with
                del values["background"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def at_size(self, image_size: int) -> "Preprocessing":
        """Return the same for an input of another size; a crop keeps its share of what is resized."""
        changed: dict[str, Any] = {"image_size": image_size}
        if self.resize_size is not None:
            changed["resize_size"] = round(self.resize_size * image_size / self.image_size)
        return self.model_copy(update=changed)

    def takes_weights_of(self, other: "Preprocessing") -> bool:
        """Whether a network trained on the other's input can go on with this one: shape and scale are the same."""
        mine, theirs = ((p.image_size, p.channels, p.mean, p.std) for p in (self, other))
        return mine == theirs


# Keys that came later, with the value that says what was done before them.
_LATER = {
    name: Preprocessing.model_fields[name].default
    for name in ("resize", "resize_size", "interpolation", "padding_color", "jpeg")
}


class BackboneSpec(BaseModel):
    """Which network to build; its weights come from the generation's own file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description='"small_cnn", a torchvision model, "timm/NAME" (the extra timm), or "package.module:factory".'
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the builder (JSON values only).")

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, value: Any) -> Any:
        """Take `backbone = "resnet18"` as { name = "resnet18" }."""
        return {"name": value} if isinstance(value, str) else value


class GenerationCard(BaseModel):
    """Everything that must be known of a generation without loading its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(default=FORMAT_VERSION, description="Version of this record.")
    generation_id: str = Field(description="Ordinal for people, weight digest for truth: g003-9f2c1a.")
    ordinal: int = Field(ge=0, description="Place in the lineage.")
    origin: Literal["trained", "adopted"] = Field(description="Trained here, or an encoder that came from elsewhere.")
    parent: str | None = Field(default=None, description="Generation whose weights the training started from.")
    predecessors: tuple[str, ...] = Field(default=(), description="Generations it was constrained against.")
    backbone: BackboneSpec = Field(description="Network to build; of a text tower its factory and parameters.")
    preprocessing: Preprocessing = Field(
        description="How an image becomes the network's input; of a text tower that of its generation."
    )
    preprocessing_fingerprint: str = Field(description="Digest of the preprocessing.")
    width: int = Field(ge=1, description="Length of an embedding.")
    prefix_widths: tuple[int, ...] = Field(default=(), description="Shorter prefixes that are valid embeddings too.")
    classes: tuple[str, ...] = Field(default=(), description="Class names, in the order of the classifier's rows.")
    digest: str = Field(
        description="sha256 of the weights file; of a text tower of its factory, parameters and vectors of a few texts."
    )
    has_classifier: bool = Field(description="Whether classifier rows and class means are stored.")
    classifier_digest: str | None = Field(default=None, description="sha256 of the classifier file.")
    normalized: bool = Field(default=True, description="Whether the stored rows have unit length.")
    calibrated_images: int = Field(
        default=0, ge=0, description="Clean images behind the batch norm statistics; 0: nothing to calibrate."
    )
    training: dict[str, Any] = Field(default_factory=dict, description="Summary of the training (JSON values only).")
    role: Literal["full", "query_only"] = Field(
        default="full", description="full: its vectors are stored and searched; query_only: a variant, which only asks."
    )
    of: str | None = Field(default=None, description="query_only: the generation that it is a variant of.")
    takes: Literal["image", "text"] = Field(
        default="image", description="What it encodes; text: a text tower, whose weights are where it came from."
    )

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = write(self)
        usual = {*(("role", "of") if self.role == "full" else ()), *(("takes",) if self.takes == "image" else ())}
        return {key: value for key, value in values.items() if key not in usual}

    @model_validator(mode="before")
    @classmethod
    def _decodes_as_when_written(cls, record: Any) -> Any:
        """A card that does not say how it decodes was written when there was one way: not today's default."""
        preprocessing = record.get("preprocessing") if isinstance(record, dict) else None
        if not isinstance(preprocessing, dict) or "decoding" in preprocessing:
            return record
        return {**record, "preprocessing": {**preprocessing, "decoding": "plain"}}

    @field_validator("generation_id")
    @classmethod
    def _well_formed_id(cls, value: str) -> str:
        ordinal_of(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationCard":
        variant = variant_in(self.generation_id)
        expected = make_generation_id(self.ordinal, self.digest, variant)
        if expected != self.generation_id:
            raise UsageError(
                f"card of {self.generation_id}: expected the id {expected} that ordinal and digest give; the card was "
                "edited or mixed up"
            )
        if (variant is not None, self.of is not None) != (self.role == "query_only",) * 2:
            raise UsageError(
                f"card of {self.generation_id}: expected the role query_only, a generation in 'of' and a variant's "
                f"name in the id together, found role {self.role}, of {self.of}; the card was edited or mixed up"
            )
        if self.takes == "text" and self.role != "query_only":
            raise UsageError(
                f"card of {self.generation_id}: expected the role query_only of a text tower, found {self.role}; the "
                "card was edited or mixed up"
            )
        if self.preprocessing.fingerprint() != self.preprocessing_fingerprint:
            raise UsageError(
                f"card of {self.generation_id}: expected preprocessing fingerprint {self.preprocessing.fingerprint()}, "
                f"found {self.preprocessing_fingerprint}"
            )
        return self


class PredecessorRef(BaseModel):
    """One predecessor and where its embeddings of the training images are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation_id: str = Field(description="Its id.")
    generation_uri: str = Field(description="Its folder.")
    embeddings_uri: str | tuple[str, ...] = Field(
        description="Parquet file or files with the column embedding (fixed-size binary, little-endian float32 or "
        "float16), one row per row of the manifest, in its order."
    )
    weight: float = Field(default=1.0, ge=0, description="Factor of this predecessor in every constraint.")


class VariantOf(BaseModel):
    """Which variant of which generation a training makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of the variant, such as edge.")
    of: str = Field(description="Id of the generation that it queries for.")


def make_generation_id(ordinal: int, weights_sha256: str, variant: str | None = None) -> str:
    """Return the id of a generation; that of a variant names the variant too, under its generation's ordinal.

    >>> make_generation_id(3, "9f2c1a" + "0" * 58)
    'g003-9f2c1a'
    >>> make_generation_id(3, "77a0b2" + "0" * 58, "edge")
    'g003.edge-77a0b2'
    """
    return f"g{ordinal:03d}{f'.{variant}' if variant else ''}-{weights_sha256[:6]}"


def ordinal_of(generation_id: str) -> int:
    """Return the ordinal that an id carries.

    >>> ordinal_of("g012-9f2c1a"), ordinal_of("g012.edge-77a0b2")
    (12, 12)
    """
    match = _ID_PATTERN.fullmatch(generation_id)
    if match is None:
        raise UsageError(
            f"reading a generation id: expected a form like g003-9f2c1a or g003.edge-77a0b2, found {generation_id!r}"
        )
    return int(match.group(1))


def variant_in(generation_id: str) -> str | None:
    """Return the variant's name that an id carries; None for a generation whose vectors are stored.

    >>> variant_in("g012.edge-77a0b2"), variant_in("g012-9f2c1a")
    ('edge', None)
    """
    match = _ID_PATTERN.fullmatch(generation_id)
    return match.group(2) if match is not None else None


def write_card(uri: str, card: GenerationCard) -> None:
    """Write card.json into the generation's folder, atomically. Call it after every other file is in place."""
    write_bytes(join(uri, CARD_FILE), (card.model_dump_json(indent=2) + "\n").encode())


def read_card(uri: str) -> GenerationCard:
    """Read the card of the generation in the folder `uri`.

    Raises: GenerationNotFoundError, UnknownFormatError.
    """
    place = join(uri, CARD_FILE)
    try:
        record = json.loads(read_bytes(place))
    except FileNotFoundError:
        raise GenerationNotFoundError(
            f"reading a generation: expected a card, found none (at {place}); its writing did not end, or the place is "
            "wrong"
        ) from None
    found = record.get("format_version") if isinstance(record, dict) else None
    if found != FORMAT_VERSION:
        raise UnknownFormatError(
            f"reading a generation: expected card format {FORMAT_VERSION}, found {found} (at {place}); use the program "
            "version that wrote it"
        )
    return GenerationCard.model_validate(record)
