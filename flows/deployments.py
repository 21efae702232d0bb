"""The deployments of a workspace: its updates, and beside them a backfill, a report, and the replay of its history.

`graceful serve` runs them itself, `graceful deploy` leaves them to the workers of a pool. Each has the name of the
pipeline and runs once at a time; but for updates none is scheduled. What must not meet, meets the workspace's claim.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graceful.flows.settings.config import PipelineConfig

UPDATE, BACKFILL, REPORT, REPLAY = "graceful-update", "graceful-backfill", "graceful-report", "graceful-replay"


async def deployments(
    root: str, config: "PipelineConfig", by: str, *, name: str, schedules: Sequence[Any], pool: str | None = None
) -> dict[str, Any]:
    """Prefect's deployments by the names of their flows, to be registered; that of the updates is the first.

    by: the command that registers them. schedules: Prefect's, of the updates. pool: whose workers run them; None: who
    registers them.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType

    from graceful.files import join
    from graceful.flows.settings.config import CONFIG_FILE
    from graceful.flows.update import flow

    wanted: dict[str, tuple[Any, str, dict[str, Any]]] = {
        UPDATE: (flow.update, "Updates", {}),
        BACKFILL: (flow.backfill, "A full backfill, or your word on a candidate,", {}),
        REPORT: (flow.report, "The report, written anew,", {}),
    }
    if config.replay is not None:
        wanted[REPLAY] = (flow.replay, "The history", {"config_file": join(root, CONFIG_FILE)})
    return {
        kind: await acts.ato_deployment(
            name,
            schedules=list(schedules) if kind == UPDATE and schedules else None,
            parameters={"workspace": root, **parameters},
            description=f"{what} of {root}. Registered by '{by}'.",
            tags=["graceful"],
            work_pool_name=pool,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for kind, (acts, what, parameters) in wanted.items()
    }
