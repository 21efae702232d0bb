"""The index of what a query generation sees in a workspace. No encoder, no torch: vectors that are stored."""

from collections.abc import Sequence

from graceful.files import join
from graceful.flows.settings.config import load_consumers, load_search_config
from graceful.flows.store.thresholds import Thresholds, served_thresholds
from graceful.flows.store.workspace import Workspace
from graceful.indexing.following import Followed, IndexFollower, Target
from graceful.indexing.index_choice import SearchConfig


def open_follower(workspace: Workspace, config: SearchConfig | None = None) -> IndexFollower:
    """A follower of the workspace's gallery, as its configuration says."""
    return IndexFollower(workspace.gallery, index_folder(workspace), config or load_search_config(workspace.root))


def index_folder(workspace: Workspace) -> str:
    """Where the index of this very gallery lies: one made anew under the same name has another."""
    return join(workspace.index_location(), workspace.gallery.identity())


def target_of(workspace: Workspace, query_generation: str, prefix_widths: Sequence[int] = ()) -> Target:
    """What a query generation may read now: its certificates decide."""
    readable = workspace.registry.readable(query_generation)
    return Target(query_generation, tuple(readable), tuple(sorted(prefix_widths)))


def thresholds_of(workspace: Workspace, target: Target) -> Thresholds:
    """Thresholds of the workspace's consumers for what a query generation may read now."""
    consumers = load_consumers(workspace.root)
    return served_thresholds(workspace.registry, consumers, target.query_generation, target.readable)


def open_view(workspace: Workspace, query_generation: str, prefix_widths: Sequence[int] = ()) -> Followed:
    """Open the index of what a query generation sees now; it is built, and kept for the next time, if there is none."""
    return open_follower(workspace).follow(target_of(workspace, query_generation, prefix_widths))
