"""What becomes of scheduled runs that are due while another one works: they are skipped, or wait, but never pile up."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

Overlap = Literal["skip", "latest_only", "queue"]
SECONDS_BETWEEN_LOOKS = 3.0
SKIPPED = "Skipped"
"""Name of the state of a run that was not carried out."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Due:
    """A scheduled run whose time has come and that has not begun."""

    identity: UUID
    expected: datetime


def skipped(due: Sequence[Due], is_working: bool, overlap: Overlap) -> list[tuple[Due, str]]:
    """Return the runs that will not be carried out, each with the reason.

    >>> from uuid import UUID
    >>> runs = [Due(UUID(int=n), datetime(2026, 1, 1, 3, n, tzinfo=UTC)) for n in range(3)]
    >>> [run.expected.minute for run, _ in skipped(runs, True, "skip")]
    [0, 1, 2]
    >>> [run.expected.minute for run, _ in skipped(runs, True, "latest_only")]
    [0, 1]
    >>> [run.expected.minute for run, _ in skipped(runs, False, "skip")]  # a service that was down for a while
    [0, 1]
    >>> skipped(runs, True, "queue")
    []
    """
    if overlap == "queue":
        return []
    ordered = sorted(due, key=lambda run: run.expected)
    if overlap == "skip" and is_working:
        return [(run, "another update was under way when it was due") for run in ordered]
    return [(run, "a newer run is due as well") for run in ordered[:-1]]


async def keep_from_piling_up(deployment: UUID, overlap: Overlap, is_answered: Callable[[str], bool]) -> None:
    """Look every few seconds, until cancelled. A server that does not answer is asked again at the next look.

    `is_answered`: whether the decision of an evaluation, for which a run is suspended, waits no longer.
    """
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        while True:
            with contextlib.suppress(Exception):
                await look(client, deployment, overlap)
                await wake_answered(client, deployment, is_answered)
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)


async def crash_left_behind(client: Any, deployment: UUID) -> int:
    """Mark the runs of a service that was killed as crashed, so that they hold no place; return how many there were.

    For the moment when the only service of a workspace starts: none of its runs can be working then.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    runs = await _runs_of(client, deployment, [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    for run in runs:
        await client.set_flow_run_state(run.id, Crashed(message="The service that ran it was killed."), force=True)
    return len(runs)


async def look(client: Any, deployment: UUID, overlap: Overlap) -> None:
    """End the runs of a deployment that will not be carried out, as Skipped."""
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled

    runs = await _runs_of(client, deployment, [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING])
    now = datetime.now(UTC)
    is_working = any(run.state_type in (StateType.PENDING, StateType.RUNNING) for run in runs)
    due = [
        Due(run.id, run.expected_start_time)
        for run in runs
        # One that has begun and waited for a person is no run of the schedule any more.
        if run.state_type == StateType.SCHEDULED
        and run.auto_scheduled
        and not run.run_count
        and run.expected_start_time <= now
    ]
    for run, reason in skipped(due, is_working, overlap):
        logger.info("skipping the run that was due at %s: %s", run.expected, reason)
        await client.set_flow_run_state(
            run.identity, Cancelled(name=SKIPPED, message=f"Skipped: {reason}."), force=True
        )


async def waiting_runs(client: Any, deployment: UUID) -> list[Any]:
    """The runs of a deployment that have not begun."""
    from prefect.client.schemas.objects import StateType

    runs = await _runs_of(client, deployment, [StateType.SCHEDULED, StateType.PENDING])
    return [run for run in runs if not run.run_count]


async def wake_answered(client: Any, deployment: UUID, is_answered: Callable[[str], bool]) -> None:
    """Start suspended runs again whose decision was answered by a command, or not in time: they end as it says."""
    from prefect.client.schemas.objects import StateType
    from prefect.states import Scheduled

    for run in await _runs_of(client, deployment, [StateType.PAUSED]):
        key = run.state.state_details.pause_key
        if key and await asyncio.to_thread(is_answered, key):
            await client.set_flow_run_state(run.id, Scheduled(name="Resuming"), force=True)


async def _runs_of(client: Any, deployment: UUID, types: Sequence[Any]) -> list[Any]:
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )

    return list(
        await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))),
            limit=200,
        )
    )
