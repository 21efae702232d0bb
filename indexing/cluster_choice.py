"""How photos are put together into people: plain values, for the configuration. No scikit-learn."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ClusteringConfig(BaseModel):
    """How the gallery is clustered, where it is a collection of photos of people or things."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["threshold_graph", "hdbscan"] = Field(
        default="threshold_graph",
        description="threshold_graph: connected components of the graph that joins every photo with its nearest "
        "neighbours of at least `threshold`; hdbscan: by density, with no threshold.",
    )
    threshold: float | None = Field(
        default=None, ge=-1, le=1, description="threshold_graph: lowest score at which two photos are the same person."
    )
    neighbours: int = Field(default=20, ge=1, description="threshold_graph: nearest neighbours of a photo to look at.")
    min_photos: int = Field(default=2, ge=2, description="Fewest photos of a person; others belong to nobody.")

    @property
    def is_complete(self) -> bool:
        """Whether it says all that its method needs."""
        return self.method != "threshold_graph" or self.threshold is not None
