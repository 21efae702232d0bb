"""What to try next: commands about this very workspace, that work as they are printed."""

import os
import shlex

from graceful.files import is_remote
from graceful.flows.store.events import Decided
from graceful.flows.store.workspace import open_workspace


def next_commands(root: str, report: str) -> list[str]:
    """Commands to open a report, search with an image of the gallery, and roll back; only those that can work."""
    workspace = open_workspace(root)
    serving = workspace.registry.serving()
    place = shlex.quote(shortest(root))
    commands = []
    if not is_remote(report):
        commands.append(f"python3 -m webbrowser file://{shlex.quote(os.path.abspath(report))}")
    commands.append(f"graceful report --root {place}")
    decided = workspace.registry.events(Decided)
    if decided and decided[-1].payload.outcome in ("HOLD", "INCONCLUSIVE"):
        candidate = decided[-1].generation
        if candidate != serving.champion:
            commands.append(f"graceful flips {candidate} --root {place}")
            commands.append(f"graceful accept {candidate} --reason '...' --root {place}")
            commands.append(f"graceful reject {candidate} --reason '...' --root {place}")
    if serving.champion is not None:
        view = workspace.view(serving.champion)
        readable = (view.owner >= 0).nonzero()[0]
        if len(readable):
            source = view.items["source"][int(readable[0])].as_py()
            commands.append(f"graceful search {shlex.quote(shortest(source))} --root {place}")
    if serving.previous is not None:
        commands.append(f"graceful rollback --root {place}")
    return commands


def shortest(location: str) -> str:
    """A location below the current folder as it is called from there; any other as it is."""
    if is_remote(location):
        return location
    relative = os.path.relpath(location)
    return location if relative.startswith("..") else relative
