"""What the steps of one run share: workspace, configuration, cluster and where progress is reported."""

from collections.abc import Iterator
from contextlib import contextmanager

from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.encoders import GenerationEncoders, limit_threads
from graceful.flows.runtime.progress import Progress, SilentProgress
from graceful.flows.runtime.under_way import RecordedProgress
from graceful.flows.settings.config import PipelineConfig
from graceful.flows.store.workspace import Workspace


class Session:
    """One run's handles. The cluster starts when the first work needs it and ends with the run."""

    def __init__(
        self,
        config: PipelineConfig,
        workspace: Workspace,
        cluster: RaySession,
        encoders: GenerationEncoders,
        progress: Progress,
    ) -> None:
        self.config = config
        self.workspace = workspace
        self.cluster = cluster
        self.encoders = encoders
        self.progress = progress
        self.compute_s = 0.0
        """Seconds that trainings and judgements of this session say they computed."""

    def with_config(self, config: PipelineConfig) -> "Session":
        """The same handles under another configuration (a replay changes the data, not the workspace)."""
        return Session(config, self.workspace, self.cluster, self.encoders, self.progress)


@contextmanager
def open_session(root: str, config: PipelineConfig, progress: Progress | None = None) -> Iterator[Session]:
    """Open a run on a workspace."""
    limit_threads()
    recorded = RecordedProgress(root, progress or SilentProgress())
    with RaySession(config.cluster) as cluster:
        encoders = GenerationEncoders(root, cluster, recorded.say)
        try:
            yield Session(config, Workspace(root, encoders), cluster, encoders, recorded)
        finally:
            encoders.release()
            recorded.close()
