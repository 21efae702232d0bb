"""Begin, look at and end a canary. Loads no torch, no Ray and no Prefect; the endpoints do the work."""

from dataclasses import asdict
from typing import Any

from graceful.flows.runtime.notify import Notice, tell_of
from graceful.flows.settings.config import load_canary_config, load_workspace_config
from graceful.flows.store.canaries import Canary, NoCanaryError, canaries, read_tallies, together, under_way
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.flows.update.canary import Wanted, begin, settle, summary_of
from graceful.flows.update.serving import operator


def start_canary(root: str, generation: str, wanted: Wanted) -> dict[str, Any]:
    """Watch a generation beside what serves."""
    workspace = open_workspace(root)
    config = load_workspace_config(root)
    begun = begin(
        workspace,
        load_canary_config(root),
        workspace.registry.resolve(generation),
        wanted,
        max_hidden=config.gallery.max_hidden_items,
        policy_nfr=config.policy.nfr_limit,
    )
    return _standing(workspace, begun)


def canary_status(root: str) -> dict[str, Any]:
    """How the newest canary stands, or how it ended. Raises NoCanaryError where there has been none."""
    workspace = open_workspace(root)
    known = canaries(workspace.registry)
    if not known:
        raise NoCanaryError(
            "looking at the canary: expected one, found that there has been none; begin with 'graceful canary start'"
        )
    return _standing(workspace, known[-1])


def stop_canary(root: str, reason: str) -> dict[str, Any]:
    """End the canary that is under way. What serves stays as it is. Raises NoCanaryError where there is none."""
    workspace = open_workspace(root)
    canary = under_way(workspace.registry)
    if canary is None:
        raise NoCanaryError("stopping the canary: expected one under way, found none; see 'graceful canary status'")
    tally = together(list(read_tallies(root, canary.number).values()))
    settle(workspace, canary, "stopped", reason, tally, by=operator())
    found = canary_status(root)
    summary = f"the canary of {canary.candidate} was stopped: {reason}"
    tell_of(root, Notice("canary", summary, str(canary.number), canary.candidate, found))
    return found


def _standing(workspace: Workspace, canary: Canary) -> dict[str, Any]:
    """What was seen, and the end where there is one. `processes`: that have written what they saw."""
    tallies = read_tallies(workspace.root, canary.number)
    ended = None if canary.ended is None else canary.ended.model_dump(include={"outcome", "reason", "move", "by"})
    return {
        **summary_of(canary, together(list(tallies.values()))),
        "processes": len(tallies),
        "limits": asdict(canary.limits),
        "ended": ended,
    }
