"""When updates run by themselves."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from graceful.flows.settings.cron import check_cron, check_timezone


class ScheduleConfig(BaseModel):
    """When `graceful serve` runs an update."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str = Field(default="0 3 * * 1", description="Cron expression; by default Monday at three.")
    timezone: str = Field(default="UTC", description="Time zone of the expression, such as Europe/Vienna.")
    every_minutes: float | None = Field(
        default=None,
        ge=1,
        description="Instead of cron: an update every so many minutes.",
    )
    overlap: Literal["skip", "latest_only", "queue"] = Field(
        default="skip",
        description="What becomes of a scheduled run that is due while another works. skip: it ends as Skipped; "
        "latest_only: the newest one waits, those before it end as Skipped; queue: all wait and run in turn.",
    )

    watch_minutes: float | None = Field(
        default=None,
        gt=0,
        description="Besides, look every so many minutes whether files of training_data have come, gone or changed, "
        "by path, size and time: an update begins once they have been the same for quiet_minutes.",
    )
    quiet_minutes: float = Field(
        default=5.0,
        ge=0,
        description="With watch_minutes: how long nothing may have changed, so that an upload is over.",
    )

    @property
    def in_words(self) -> str:
        """How often, for people."""
        often = f"cron {self.cron!r}" if self.every_minutes is None else f"every {self.every_minutes:g} minutes"
        return often if self.watch_minutes is None else f"{often}, and when new data have come"

    _cron = field_validator("cron")(check_cron)
    _timezone = field_validator("timezone")(check_timezone)
