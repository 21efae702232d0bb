"""How a generation's encoder is put to work: in this process, by Ray actors, or as a Ray job."""

import functools
import os
from collections.abc import Callable, Sequence

from graceful.files import join
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.embedding_job import EmbeddingJob
from graceful.indexing.embed import EmbeddedUnit, EmbedUnit, embed_units
from graceful.indexing.embedding_pool import EmbeddingPool
from graceful.indexing.reindex import EmbedFunction
from graceful.training.encoder import open_encoder


class GenerationEncoders:
    """Embeds with stored generations: the `embed_with` of a workspace.

    `rows_per_s` holds the last measured throughput of one worker, for pricing a backfill; `busy_s` adds up what the
    encoders themselves took. Workers on Ray stay from one call to the next, until `release`.
    """

    def __init__(self, root: str, session: RaySession, say: Callable[[str], None]) -> None:
        self.root = root
        self._say = say
        self.session = session
        self.rows_per_s: float | None = None
        self.busy_s = 0.0
        self._pool: EmbeddingPool | None = None
        self._job: EmbeddingJob | None = None
        # One object per generation, by which a worker knows that it need not open its encoder again.
        self._opener = functools.cache(lambda uri: functools.partial(open_encoder, uri))

    def release(self) -> None:
        """End the workers, so that something else can have their processors."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._job is not None:
            self._job.close()
            self._job = None

    def __call__(self, generation: str) -> EmbedFunction:
        return functools.partial(self._embed, join(self.root, "generations", generation))

    def _embed(self, uri: str, units: Sequence[EmbedUnit], on_unit: Callable[[EmbeddedUnit], None]) -> None:
        config = self.session.config
        num_sources = sum(len(unit.sources) for unit in units)
        deadline_s = config.deadline_hours * 3600
        if config.embed_workers == 0 or num_sources < config.in_process_below:
            num_workers = 0
            done = embed_units(units, self._opener(uri), deadline_s=deadline_s, on_unit=on_unit)
        elif self.session.submits_jobs:
            num_workers = config.embed_workers
            if self._job is None:
                self._job = EmbeddingJob(config, join(self.root, "jobs"), self._say)
            try:
                done = self._job.embed(units, uri, on_unit)
            except BaseException:
                self._job = None  # it has ended with the call
                raise
        else:
            self.session.ensure()
            if self._pool is None:
                self._pool = EmbeddingPool(
                    config.embed_workers,
                    gpus_per_worker=config.embed_gpus_per_worker,
                    resources=config.embed_resources,
                    labels=config.embed_labels,
                )
            num_workers = min(config.embed_workers, len(units))
            done = self._pool.embed(units, self._opener(uri), deadline_s=deadline_s, on_unit=on_unit)
        seconds = sum(unit.seconds for unit in done)
        self.busy_s += seconds / max(num_workers, 1)
        self.rows_per_s = sum(unit.num_rows for unit in done) / max(seconds, 1e-6)


def limit_threads(threads: int | None = None) -> None:
    """Let encoders in this process use the cores that it has, unless the environment says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or os.cpu_count() or 1))
