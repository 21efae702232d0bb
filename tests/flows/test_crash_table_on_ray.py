"""The cells of the crash table where Ray embeds: a worker killed, a node lost, between two waves of a full backfill."""

import functools
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from graceful.files import set_crash_hook
from graceful.flows.store.workspace import Workspace
from graceful.indexing.embedding_pool import EmbeddingPool
from tests.flows.crash_table import ACTS, GENERATIONS, NOISE, ON_RAY, ROWS, end_state, make_world, open_world
from tests.synthetic import SyntheticGeneration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DEADLINE_S = 120
START_S = 30
POINTS = [row.point for row in ROWS if row.act == "backfill" and row.point in ON_RAY]


class PidEncoder:
    """Says by a file which process embeds."""

    def __init__(self, generation, folder):
        self.generation, self.folder = generation, folder

    def __call__(self):
        return self.encode

    def encode(self, sources):
        (Path(self.folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + START_S
        while len(list(Path(self.folder).iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # the other worker has not started yet, and is to have something to lose
        return self.generation.encode(sources)


class PooledModels:
    """Encoders of synthetic generations on the workers of one pool."""

    def __init__(self, pool, folder):
        self.generations = {name: SyntheticGeneration(name, noise=NOISE) for name in GENERATIONS}
        self.pool = pool
        self.opener = functools.cache(lambda name: PidEncoder(self.generations[name], str(folder)))

    def __call__(self, generation):
        def embed(units, on_unit):
            self.pool.embed(units, self.opener(generation), deadline_s=DEADLINE_S, on_unit=on_unit)

        return embed


@pytest.fixture(scope="module")
def cluster():
    """A head and a node with a raylet each; one worker on each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        import ray
        from ray.cluster_utils import Cluster

        memory = 100 * 2**20
        started = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False},
        )
        ray.init(address=started.address, log_to_driver=False)
        yield started
        ray.shutdown()
        started.shutdown()


def pids(folder):
    return {int(path.name) for path in folder.iterdir()}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("what", ["lost Ray worker", "lost raylet"])
def test_backfill_that_loses_a_part_of_its_cluster_ends_as_if_it_had_not(cluster, tmp_path, what, point):
    make_world(str(tmp_path / "world"))
    shutil.copytree(tmp_path / "world", tmp_path / "quiet")
    quiet = open_world(str(tmp_path / "quiet"))
    ACTS["backfill"](quiet)
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes(timeout=60)
    seen, lost = tmp_path / "pids", []
    seen.mkdir()

    def lose(name):
        if name == point and not lost:
            if what == "lost raylet":
                lost.append(node)
                cluster.remove_node(node, allow_graceful=False)
            else:
                lost.append(min(pids(seen)))
                os.kill(lost[0], signal.SIGKILL)

    with EmbeddingPool(2) as pool:
        workspace = Workspace(str(tmp_path / "world"), PooledModels(pool, seen), create=True)
        set_crash_hook(lose)
        try:
            ACTS["backfill"](workspace)
        finally:
            set_crash_hook(None)
    assert lost
    assert len(pids(seen)) >= 2, "only one worker embedded: nothing of it was lost"
    assert end_state(workspace) == end_state(quiet)
    if what == "lost Ray worker":
        cluster.remove_node(node, allow_graceful=False)
