"""Carries a rollout out on a workspace, with the functions that an update calls between the decision and its end."""

from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.indexing.reindex import ReindexReport


def move_only(workspace: Workspace, rollout: Rollout, *, champion: str | None) -> None:
    """Up to the move of the serving state; the waves after it are left."""
    plan = prepare(workspace, rollout)
    embed_before_move(workspace, rollout, plan)
    promote(workspace, rollout, plan, champion=champion)


def carry_out_whole(
    workspace: Workspace, rollout: Rollout, *, champion: str | None, unit_rows: int = 4096
) -> ReindexReport:
    """The move, and every wave after it."""
    move_only(workspace, rollout, champion=champion)
    return continue_plan(workspace, unit_rows=unit_rows)
