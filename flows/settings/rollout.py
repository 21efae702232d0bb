"""Who has the last word on a decision: the gate alone, or a person after it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RolloutConfig(BaseModel):
    """Whether a person is asked before a decision is carried out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    approval: Literal["never", "full_backfill", "always"] = Field(
        default="never",
        description="Which decisions wait for 'graceful accept' or 'graceful reject' before anything moves: none, "
        "those to re-embed the whole gallery, or every one that changes what is served, the first too.",
    )
    approval_hours: float = Field(
        default=168.0, gt=0, description="How long a decision waits; not accepted by then, it is held."
    )

    def asks_for(self, outcome: str) -> bool:
        """Whether a decision of this outcome waits for a person."""
        return self.approval == "always" or (self.approval == "full_backfill" and outcome == "FULL_BACKFILL")
