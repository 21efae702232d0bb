"""`graceful accept`: the operator's word on a candidate. It embeds; no flow server."""

from typing import Any

from rich.console import Console

from graceful.flows.runtime.environment import prepare_environment
from graceful.flows.runtime.progress import TerminalProgress
from graceful.flows.update import by_hand


def accept_candidate(
    root: str, console: Console, generation: str, *, reason: str, fraction: float | None = None, by: str = ""
) -> dict[str, Any]:
    """Carry out the operator's word on a candidate; no flow server, nothing is trained."""
    prepare_environment(root)
    progress = TerminalProgress(console)
    return by_hand.accept_candidate(root, progress, generation, reason=reason, fraction=fraction, by=by)
