"""What to try next: commands about this very workspace, that work as they are printed."""

import os
import shlex

from graceful.files import exists, is_remote, join
from graceful.flows.store.approvals import awaited
from graceful.flows.store.events import Decided, Promoted, Rejected, Retired
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
    commands += settling_commands(root)
    if serving.champion is not None:
        view = workspace.view(serving.champion)
        readable = (view.owner >= 0).nonzero()[0]
        if len(readable):
            source = view.column("source", readable[:1])[0].as_py()
            commands.append(f"graceful search {shlex.quote(shortest(source))} --root {place}")
    if serving.previous is not None:
        commands.append(f"graceful rollback --root {place}")
    return commands


def settling_commands(root: str) -> list[str]:
    """Commands that settle what the newest decision held, left open or waits with; none where that is settled."""
    workspace = open_workspace(root)
    registry = workspace.registry
    asked = awaited(registry)
    if asked is not None:
        stale = asked.stale_with(registry.serving().champion) is not None
        place = shlex.quote(shortest(root))
        return [f"graceful update --root {place}"] if stale else _word_on(asked.generation, place)
    decided = registry.events(Decided)
    if not decided or decided[-1].payload.outcome not in ("HOLD", "INCONCLUSIVE"):
        return []
    last, candidate = decided[-1], decided[-1].generation
    turned_down = [event for kind in (Rejected, Retired) for event in registry.events(kind)]
    settled = {event.generation for event in turned_down if event.sequence > last.sequence}
    settled |= {event.generation for event in registry.events(Promoted, last.update_key)}
    if candidate in settled or registry.serving().champion == candidate:
        return []
    place = shlex.quote(shortest(root))
    log = join(workspace.evaluation_uri(last.payload.evaluation), "log.parquet")
    to_label = last.payload.outcome == "INCONCLUSIVE" and exists(log)
    return [
        *([f"graceful evalset label --next --root {place}"] if to_label else []),
        *_word_on(candidate, place),
    ]


def _word_on(candidate: str, place: str) -> list[str]:
    return [
        f"graceful flips {candidate} --root {place}",
        f"graceful accept {candidate} --reason '...' --root {place}",
        f"graceful reject {candidate} --reason '...' --root {place}",
    ]


def shortest(location: str) -> str:
    """A location below the current folder as it is called from there; any other as it is."""
    if is_remote(location):
        return location
    relative = os.path.relpath(location)
    return location if relative.startswith("..") else relative
