"""What may be said about the index of a search: its kind, the recall it must reach, and what was measured of it.

Plain values, no FAISS: the configuration and the manifest of a snapshot are made of them.
"""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

IndexKind = Literal["flat", "ivf", "ivf_sq8", "ivf_pq", "hnsw"]
KINDS: tuple[IndexKind, ...] = get_args(IndexKind)

# Below this many rows of one width exact search is fast enough, and exact.
FLAT_BELOW_ROWS = 200_000
# From this many rows on, a second copy of the vectors in the inverted lists is kept in 8 bits a value.
COMPRESSED_FROM_ROWS = 10_000_000


class SearchConfig(BaseModel):
    """How searches are answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: Literal["auto", "flat", "ivf", "ivf_sq8", "ivf_pq", "hnsw"] = Field(
        default="auto",
        description="flat is exact; the others are approximate and are used only where they reach `recall_target` on "
        "this gallery's own vectors. auto: flat below 200,000 rows, then ivf, from 10,000,000 rows on ivf_sq8.",
    )
    recall_target: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="Share of the exact first 10 (and of the first 100) that an approximate index must find.",
    )
    refresh_s: float = Field(
        default=0.5, gt=0, description="Seconds between two looks of the HTTP service at the gallery and who serves."
    )

    def kind_for(self, num_rows: int) -> IndexKind:
        """The kind of index to build over so many rows of one width."""
        if self.index != "auto":
            return self.index
        if num_rows < FLAT_BELOW_ROWS:
            return "flat"
        return "ivf" if num_rows < COMPRESSED_FROM_ROWS else "ivf_sq8"


class MeasuredRecall(BaseModel):
    """Recall of an approximate index at one K, and the breadth of search (nprobe, efSearch) that reaches it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(ge=1, description="Recall of the first k.")
    breadth: int = Field(ge=1, description="Inverted lists visited (IVF), or candidates kept (HNSW), for each query.")
    recall: float = Field(ge=0, le=1, description="Share of the exact first k that was found, on held-out queries.")


class IndexReport(BaseModel):
    """What an approximate index is, and what was measured of it when it was built."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: IndexKind = Field(description="Kind of the index.")
    parameters: dict[str, int] = Field(description="How it was built.")
    recall_target: float = Field(description="Recall that was asked for.")
    measured: tuple[MeasuredRecall, ...] = Field(description="Recall and breadth by k, ascending.")
    num_queries: int = Field(ge=1, description="Stored vectors, drawn at random, that the recall was measured with.")
    oracle: str = Field(description="What the recall was measured against.")

    def breadth_for(self, k: int) -> int | None:
        """Breadth of a search for the first k; None where it was not measured: such a search is answered exactly."""
        return next((entry.breadth for entry in self.measured if k <= entry.k), None)
