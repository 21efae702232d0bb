"""What a candidate may do while it is watched beside what serves. Plain values, written down before it begins."""

from pydantic import BaseModel, ConfigDict, Field


class CanaryConfig(BaseModel):
    """How a shadow or a canary is watched; `graceful canary start` takes other values for one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.05, gt=0, le=1, description="Share of the queries that take part.")
    hours: float = Field(
        default=24.0, gt=0, description="Hours after which it ends; those in which a search endpoint runs count."
    )
    max_changed_excess: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="By how much the share of changed first answers may exceed the one that the evaluation measured on "
        "the query log.",
    )
    max_changed: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of first answers that may change, whatever was measured; needed where the evaluation had no "
        "query log.",
    )
    max_failed: float = Field(
        default=0.01, ge=0, le=1, description="Share of the candidate's answers that may fail or come too late."
    )
    max_nfr: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the labelled pictures for which the candidate may be wrong where the other generation is "
        "right; by default that of the policy.",
    )
    max_answer_s: float = Field(
        default=2.0, gt=0, description="Seconds of computing after which an answer of the candidate comes too late."
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Chance that a candidate which keeps to all limits is ended all the same, however long it is "
        "watched.",
    )
