"""Search over a gallery that one machine does not hold: shards in Ray actors, merged by whoever asks.

A shard follows the items of a range of buckets (`Gallery.view(..., buckets=...)`), so shards share nothing, and every
item is in one of them. Exact answers are those of one process over the whole gallery; approximate ones keep their
measured recall in every shard.

Invariants:
* An answer comes from all shards at one version of the gallery and one query generation, or there is none: a question
  names the state that it wants, and a shard that does not hold it says so. Two phases move on: every shard prepares the
  next state, then one assignment here makes questions name it. Shards keep the last two states, so that questions
  under way end as they began.
* A shard that died is started again by Ray and builds the state that is asked for. Questions wait for it, and end in
  `IncompleteAnswerError` when it takes too long; what the other shards found is never given as the answer.
* Where a shard cannot build a past state any more, because its files have been collected, all shards move to the
  newest version.

Shapes: Q queries, K results, S shards.
"""

import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from graceful.files import join
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.search.searcher import IncompleteAnswerError, OpenSearcher, ServedSnapshot, searched_as
from graceful.flows.search.views import index_folder, thresholds_of
from graceful.flows.settings.config import ClusterConfig, load_search_config
from graceful.flows.store.workspace import Workspace, open_workspace
from graceful.indexing.following import Followed, IndexFollower, Target, leased, snapshot_id_of
from graceful.indexing.index_choice import SearchConfig
from graceful.indexing.leases import GalleryVersion
from graceful.indexing.revisions import NUM_BUCKETS
from graceful.indexing.search import SearchResult
from graceful.indexing.sidecar import ItemEntry
from graceful.indexing.snapshots import SHARDS_FOLDER

KEPT_STATES = 2
# A question waits so long for a shard that is being started again; preparing a state may build an index.
ANSWER_TIMEOUT_S = 20.0
PREPARE_TIMEOUT_S = 3_600.0
RETRY_S = 0.2

_log = logging.getLogger("graceful.search")


@dataclass(frozen=True)
class ShardCounts:
    """What one shard holds of a state."""

    num_unreadable: int
    rows_by_generation: dict[str, int]


class Shard:
    """One range of buckets, in a process of its own. Keeps the last two states that were prepared."""

    def __init__(self, root: str, buckets: tuple[int, int], config: SearchConfig) -> None:
        workspace = open_workspace(root)
        place = join(index_folder(workspace), SHARDS_FOLDER, f"{buckets[0]:03d}-{buckets[1]:03d}")
        self._follower = IndexFollower(workspace.gallery, place, config, buckets)
        self._states: dict[str, tuple[Followed, ShardCounts]] = {}
        self._one_writer = threading.Lock()

    def prepare(self, target: Target, version: GalleryVersion) -> ShardCounts:
        """Have the state of one version ready to be searched."""
        with self._one_writer:
            followed = self._follower.follow(target, version)
            name = followed.index.snapshot_id
            held = self._states.get(name)
            if held is None or held[0] is not followed:
                rows = followed.index.rows_by_generation()
                counts = ShardCounts(followed.num_unreadable, {one: rows.get(one, 0) for one in target.readable})
                held = (followed, counts)
            kept = [(known, state) for known, state in self._states.items() if known != name]
            self._states = dict([*kept, (name, held)][-KEPT_STATES:])
            return held[1]

    def find(
        self, snapshot_id: str, queries: NDArray[np.float32], k: int
    ) -> tuple[SearchResult, dict[int, ItemEntry]] | None:
        """Search one state; None where this shard does not hold it."""
        held = self._states.get(snapshot_id)
        if held is None:
            return None
        followed, _ = held
        found = followed.index.search(queries, k)
        return found, followed.book.entries(found.revisions[found.revisions >= 0])

    def process_id(self) -> int:
        """Of the process that it runs in."""
        return os.getpid()


class ShardedIndex:
    """One state of all shards."""

    def __init__(self, shards: list[Any], target: Target, version: GalleryVersion, counts: list[ShardCounts]) -> None:
        self.target = target
        self.version = version
        self._shards = shards
        self._counts = counts

    @property
    def snapshot_id(self) -> str:
        """Name of the view that is searched: that of the whole gallery."""
        return snapshot_id_of(self.target.query_generation, self.version, self.target.readable)

    @property
    def num_unreadable(self) -> int:
        """Live items that cannot be found."""
        return sum(counts.num_unreadable for counts in self._counts)

    def rows_by_generation(self) -> dict[str, int]:
        """Number of rows of each generation."""
        names = self.target.readable
        return {name: sum(counts.rows_by_generation[name] for counts in self._counts) for name in names}

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[SearchResult, dict[int, ItemEntry]]:
        """The best `k` rows of all shards.

        Raises:
            IncompleteAnswerError: a shard has not answered in time.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        asked = [shard.find.remote(self.snapshot_id, queries, k) for shard in self._shards]
        found = [self._answer_of(number, asked[number], queries, k, deadline) for number in range(len(asked))]
        results = [result for result, _ in found]
        entries = {revision: entry for _, part in found for revision, entry in part.items()}
        return _merged(results, k), entries

    def _answer_of(
        self, number: int, asked: Any, queries: NDArray[np.float32], k: int, deadline: float
    ) -> tuple[SearchResult, dict[int, ItemEntry]]:
        """The answer of one shard, which may have to be started again and to build this state again."""
        shard, problem = self._shards[number], "no answer"
        while time.monotonic() < deadline:
            try:
                answer = ray.get(asked, timeout=max(0.01, deadline - time.monotonic()))
                if answer is not None:
                    return answer  # type: ignore[no-any-return]
                # It has been started again, and holds nothing yet.
                problem = "it is building its part of the index again"
                if not self._prepared_again(shard, deadline):
                    break
            except RayActorError:
                problem = "it is being started again"
                time.sleep(RETRY_S)
            except GetTimeoutError:
                break
            asked = shard.find.remote(self.snapshot_id, queries, k)
        raise IncompleteAnswerError(
            f"searching: expected an answer of all {len(self._shards)} shards, found none of shard {number} "
            f"({problem}); ask again"
        )

    def _prepared_again(self, shard: Any, deadline: float) -> bool:
        """Let a shard build this state again; False where it cannot, since files of this version are gone."""
        try:
            ray.get(shard.prepare.remote(self.target, self.version), timeout=max(0.01, deadline - time.monotonic()))
        except RayTaskError as error:
            _log.warning("building a shard again: %s", str(error).splitlines()[-1])
            return False
        return True


class ShardedSearcher:
    """Searches what production serves over shards; safe to use from several threads.

    Its shards end with `close`, or once neither it nor an answer under way is held any more.
    """

    def __init__(
        self, workspace: Workspace, num_shards: int, query_generation: str | None = None, granted: Sequence[str] = ()
    ) -> None:
        """Start the shards on the cluster that this process is connected to, and prepare them.

        `query_generation` and `granted` as of a `GallerySearcher`.
        """
        self._workspace = workspace
        self._pinned = query_generation
        self._granted = tuple(granted)
        self._lock = threading.Lock()
        self._served: ServedSnapshot | None = None
        config = load_search_config(workspace.root)
        # As many questions at a time as a shard has threads; one more prepares the next state meanwhile.
        options = {"max_restarts": -1, "max_concurrency": 9, "num_cpus": 0, "scheduling_strategy": "SPREAD"}
        actor: Any = ray.remote(Shard).options(**options)
        self.shards = [actor.remote(workspace.root, buckets, config) for buckets in shard_buckets(num_shards)]
        self.refresh()

    @property
    def served(self) -> ServedSnapshot:
        """What is served now; take it once per request."""
        assert self._served is not None
        return self._served

    def refresh(self) -> bool:
        """Follow the serving state and the gallery; True when another snapshot serves now. If it fails, the old stays.

        Raises:
            IncompleteAnswerError: a shard could not prepare the next state.
        """
        with self._lock:
            served = self._served
            encoder, target = searched_as(self._workspace, self._pinned, self._granted, served)
            generation = target.query_generation
            version = self._workspace.gallery.version()
            if served is not None and served.snapshot_id == snapshot_id_of(generation, version, target.readable):
                self._heal(served)
                return False
            # No file of this version goes before every shard has read what it needs.
            with leased(self._workspace.gallery, _log.warning) as version:
                counts = self._prepared(target, version)
            index = ShardedIndex(self.shards, target, version, counts)
            self._served = ServedSnapshot(generation, encoder, index, thresholds_of(self._workspace, target))
            return served is None or served.snapshot_id != index.snapshot_id

    def close(self) -> None:
        """End the shards."""
        for shard in self.shards:
            ray.kill(shard)

    def _heal(self, served: ServedSnapshot) -> None:
        """Let a shard that was started again prepare what is served, before a question has to wait for it."""
        assert isinstance(served.index, ShardedIndex)
        with contextlib.suppress(IncompleteAnswerError):
            self._prepared(served.index.target, served.index.version)

    def _prepared(self, target: Target, version: GalleryVersion) -> list[ShardCounts]:
        """Phase one: every shard prepares the state, or none is switched to."""
        asked = [shard.prepare.remote(target, version) for shard in self.shards]
        try:
            return list(ray.get(asked, timeout=PREPARE_TIMEOUT_S))
        except (RayActorError, GetTimeoutError) as error:
            raise IncompleteAnswerError(
                f"following the gallery: expected all {len(self.shards)} shards to prepare the next state, found "
                f"{type(error).__name__}; it is tried again"
            ) from None


def shard_buckets(num_shards: int) -> list[tuple[int, int]]:
    """Split the buckets into ranges (low, high) of about the same size.

    >>> shard_buckets(3)
    [(0, 85), (85, 170), (170, 256)]
    """
    if not 1 <= num_shards <= NUM_BUCKETS:
        raise ValueError(f"splitting the index: expected 1 to {NUM_BUCKETS} shards, found {num_shards}")
    bounds = [NUM_BUCKETS * number // num_shards for number in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))


@contextlib.contextmanager
def open_sharded_searcher(num_shards: int, address: str = "local") -> Iterator[OpenSearcher]:
    """Connect to a Ray cluster, or start one, for as long as the block runs; yield what opens a searcher there."""
    opened = weakref.WeakSet[ShardedSearcher]()
    with RaySession(ClusterConfig(address=address, num_workers=0)) as session:
        session.ensure()

        def open_searcher(
            workspace: Workspace, query_generation: str | None = None, granted: Sequence[str] = ()
        ) -> ShardedSearcher:
            searcher = ShardedSearcher(workspace, num_shards, query_generation, granted)
            opened.add(searcher)
            return searcher

        try:
            yield open_searcher
        finally:
            for searcher in list(opened):
                searcher.close()


def _merged(results: list[SearchResult], k: int) -> SearchResult:
    """The best K of all shards' rows: by score, ties by the lower revision."""
    revisions = np.concatenate([result.revisions for result in results], axis=1)
    scores = np.concatenate([result.scores for result in results], axis=1)
    generations = np.concatenate([result.generations for result in results], axis=1)
    ranked = np.where(revisions >= 0, scores, -np.inf)
    order = np.lexsort((revisions, -ranked), axis=-1)[:, :k]
    revisions, scores, generations = (np.take_along_axis(v, order, axis=1) for v in (revisions, scores, generations))
    return SearchResult(revisions, scores, generations, results[0].snapshot_id)
