"""The form in the flow UI by which a person accepts or rejects a decision that waits.

A run of a deployment is suspended: its process ends, and the server starts it again when the form was filled in. What
was said is recorded in the workspace before anything is done about it. Where there is no server, no deployment, or a
form is open already, nothing is suspended, and the commands answer.
"""

import logging
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.input import RunInput, filter_flow_run_input, read_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from prefect.states import Paused
from pydantic import Field

AWAITING_APPROVAL = "AWAITING APPROVAL"
"""Name of the state, and tag, of a run that waits for a person."""

_PREFIX = "approval-"  # of the keys of a run's forms
logger = logging.getLogger(__name__)


class Word(RunInput):
    """What a person says to a decision."""

    answer: Literal["accept", "reject"] = Field(description="Carry out what was decided, or leave everything as it is.")
    reason: str = Field(min_length=1, description="Why; it stands in the lineage.")
    by: str = Field(min_length=1, description="Your name; it stands in the lineage.")


def is_resumed() -> bool:
    """Whether this run was suspended with a form, and has been started again."""
    run = _run_of_deployment()
    if run is None:
        return False
    try:
        # Not by the run's count: the server does not count a start after a suspension.
        return bool(filter_flow_run_input(_PREFIX, limit=1, flow_run_id=run.id))
    except Exception as error:  # the flow server is no dependency
        logger.warning("whether the run was suspended is not known (%s: %s)", type(error).__name__, error)
        return False


def word_in_form(evaluation: str) -> Word | None:
    """What was filled in for this run about the decision of an evaluation; None where nothing was."""
    run = _run_of_deployment()
    found = None if run is None else read_flow_run_input(_keyset(evaluation)["response"], flow_run_id=run.id)
    return None if found is None else Word.model_validate(found)


def suspend(evaluation: str, description: str) -> None:
    """Suspend this run until the form is filled in; returns where that is not possible.

    Raises:
        Pause: the run is suspended, and this process is to end.
    """
    run = _run_of_deployment()
    if run is None:
        return
    state: State[Any] = Paused(name=AWAITING_APPROVAL, reschedule=True, pause_key=evaluation)
    state.state_details.run_input_keyset = _keyset(evaluation)
    try:
        with get_client(sync_client=True) as client:
            if _waiting(client, run):
                return
            # The form first: a run that waits without one could not be resumed.
            Word.with_initial_data(description=description).save(_keyset(evaluation), flow_run_id=run.id)
            client.set_flow_run_state(run.id, state)
            if client.read_flow_run(run.id).state_type != StateType.PAUSED:
                return
    except Exception as error:  # the flow server is no dependency
        logger.warning("the run cannot wait in the flow UI (%s: %s)", type(error).__name__, error)
        return
    raise Pause(state=state)


def _run_of_deployment() -> FlowRun | None:
    context = FlowRunContext.get()
    run: Any = None if context is None else context.flow_run
    return run if run is not None and run.deployment_id is not None else None


def _waiting(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether another run of the deployment waits with a form."""
    assert run.deployment_id is not None
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))),
        limit=1,
    )
    return bool(found)


def _keyset(evaluation: str) -> Any:
    return keyset_from_base_key(f"{_PREFIX}{evaluation}")
