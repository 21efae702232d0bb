"""How the gallery is re-indexed and served: the table [gallery], beside nothing that trains."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from graceful.indexing.planner import ORDERS


class GalleryConfig(BaseModel):
    """How the gallery is re-indexed and served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["random", "oldest_generation", "class_distance"] = Field(
        default="random", description="Which items a partial re-index embeds first."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random order.")
    wave_rows: int = Field(default=16_384, ge=1, description="Items of one wave; a newer plan takes over between two.")
    unit_rows: int = Field(default=4_096, ge=1, description="Images that one worker embeds at a time.")
    probation_hours: float = Field(
        default=168.0, ge=0, description="How long after a promotion ingest writes for the previous generation too."
    )
    supported_query_generations: tuple[str, ...] = Field(
        default=(), description="Older generations whose clients still query."
    )
    max_mix_drift: float = Field(
        default=0.02, ge=0, le=1, description="Share of the gallery that may change owner between evidence and move."
    )


assert set(ORDERS) == set(get_args(GalleryConfig.model_fields["order"].annotation))
