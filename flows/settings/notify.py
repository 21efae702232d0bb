"""Whom to tell what happens to a workspace, and from when on something is worth telling."""

from pydantic import BaseModel, ConfigDict, Field, field_validator


class NotifyConfig(BaseModel):
    """Where events go: a decision, a hold, a question, a rollback, a canary, a changed encoder, stuck updates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    webhook: str | None = Field(
        default=None,
        description="http(s) address that events are posted to, as JSON; $NAME takes it from the environment, so that "
        "no secret stands in the file.",
    )
    timeout_s: float = Field(default=5.0, gt=0, le=60, description="Seconds that one try to post may take; of three.")
    stuck_hours: float = Field(
        default=24.0, gt=0, description="From when on an update under way counts as stuck; 'graceful serve' looks."
    )
    max_unreadable_share: float = Field(
        default=0.01, ge=0, le=1, description="Share of the items that may be unreadable after an update, untold."
    )

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str | None) -> str | None:
        if webhook is not None and not webhook.startswith(("http://", "https://", "$")):
            raise ValueError("expected an address that starts with https:// or http://")
        return webhook
