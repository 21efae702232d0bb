"""The operator's word on a candidate that the gate held, left open, or waits with. It embeds; no flow server."""

from typing import Any

from rich.console import Console

from graceful.flows.runtime.environment import prepare_environment
from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.approvals import approval_of
from graceful.flows.store.reports import report_address
from graceful.flows.store.workspace import open_workspace
from graceful.flows.update.act import Order
from graceful.flows.update.order import accept


def accept_candidate(
    root: str, console: Console, generation: str, *, reason: str, fraction: float | None = None, by: str = ""
) -> dict[str, Any]:
    """Carry out the operator's word on a candidate; no flow server, nothing is trained."""
    workspace = open_workspace(root)
    name = workspace.registry.resolve(generation)
    prepare_environment(root)
    order = Order(reason, fraction)
    config = load_workspace_config(root)
    with open_session(root, config, TerminalProgress(console)) as session:
        decided = accept(session, name, order, by=by)
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
