"""What a person asks for apart from an update, by a command or in the flow UI: serve a candidate, publish a report."""

from typing import Any

from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.runtime.progress import Progress
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.approvals import approval_of
from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation
from graceful.flows.store.events import Decided
from graceful.flows.store.reports import report_address
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update.act import Order, Step, plain
from graceful.flows.update.order import accept
from graceful.flows.update.publish import publish


def accept_candidate(
    root: str,
    progress: Progress,
    generation: str,
    *,
    reason: str,
    fraction: float | None = None,
    by: str = "",
    step: Step = plain,
) -> dict[str, Any]:
    """Carry out the operator's word on a candidate that the gate held, left open, or waits with; nothing is trained.

    Raises: as `order.accept`.
    """
    workspace = open_workspace(root)
    name = workspace.registry.resolve(generation)
    order = Order(reason, fraction)
    config = load_workspace_config(root)
    with open_session(root, config, progress) as session:
        decided = accept(session, name, order, by=by, step=step)
    asked = approval_of(workspace.registry, decided.evaluation)
    serving = workspace.registry.serving().champion
    details = {
        "outcome": decided.outcome,
        "champion": serving,
        "report": report_address(config.report.url, decided.evaluation),
        "approval": None if asked is None else asked.said,
    }
    summary = f"{name} was accepted by a person: {reason}"
    tell_of(root, Notice("decision", summary, f"{decided.evaluation}/accepted", name, details))
    return {
        "accepted": name,
        "decided": decided.outcome,
        "ordered": order.ordered if asked is None else decided.outcome,
        "awaited": asked is not None,
        "serving": serving,
        "evaluation": workspace.evaluation_uri(decided.evaluation),
    }


def publish_again(root: str, progress: Progress, evaluation: str | None = None) -> tuple[Decided, str]:
    """Write the report of an evaluation anew, by default the newest, with what the lineage has become since.

    Returns the decision that it is about, and where the report is.

    Raises:
        EvaluationMissingError: there is no such decision.
    """
    workspace, config = open_workspace(root), load_workspace_config(root)
    known = [event.payload for event in workspace.registry.events(Decided)]
    found = [decided for decided in known if evaluation in (None, decided.evaluation)]
    if not found:
        names = ", ".join(decided.evaluation for decided in known) or "none"
        raise EvaluationMissingError(
            f"publishing a report: expected a decision, found {names} and not {evaluation or 'any'}; name one of them, "
            "or run 'graceful update'"
        )
    stored = read_evaluation(workspace.evaluation_uri(found[-1].evaluation))
    place = publish(workspace, found[-1], stored, shows=config.report, name=config.name, progress=progress)
    return found[-1], place
