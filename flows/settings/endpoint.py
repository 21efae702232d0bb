"""What the HTTP search endpoint accepts at a time, and for how long it waits. Plain values, no web framework."""

from pydantic import BaseModel, ConfigDict, Field


class EndpointConfig(BaseModel):
    """What the HTTP search endpoint accepts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_waiting: int = Field(
        default=256,
        ge=1,
        description="Images, vectors and texts, each, that may wait for their turn; more are refused with 429.",
    )
    max_waiting_mib: int = Field(
        default=512, ge=1, description="MiB of bodies that may be in memory at a time; more are refused with 429."
    )
    batch_searches: int = Field(
        default=16,
        ge=1,
        description="Searches that wait and are answered together, by one product, at most. Clients that are answered "
        "together ask again together, and /health waits while all of them are read.",
    )
    max_image_mib: int = Field(default=32, ge=1, description="MiB of the largest image; a larger body is 413.")
    max_megapixels: float = Field(
        default=25.0,
        gt=0,
        description="Width times height of the largest image, in millions, as its header says; a larger one is "
        "refused undecoded. Decoding takes up to 8 bytes for each pixel and processor.",
    )
    body_timeout_s: float = Field(
        default=20.0, gt=0, description="Seconds from the start of a request until all of its body must be here."
    )
    max_connections: int = Field(
        default=1_000,
        ge=2,
        description="Connections that may be open at a time; then the one closes that has been sending longest.",
    )
    sources: bool = Field(
        default=False, description="Whether hits name the server's image files without being asked (?sources=true)."
    )

    @property
    def max_pixels(self) -> int:
        """Width times height of the largest image."""
        return int(self.max_megapixels * 1_000_000)
