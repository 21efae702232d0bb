"""A node is lost: the training goes on with the workers that are left, from its checkpoint."""

from collections.abc import Callable, Iterator

import pytest

from graceful.training.job import TrainingConfig, TrainingJob
from graceful.training.launch import run_training
from graceful.training.progress import TrailReporter

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def cluster_of_nodes(ray_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head and two nodes, each with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    # Ray counts on the lost node once more, and gives up after this long.
    for name, value in {**ray_environment, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25"}.items():
        monkeypatch.setenv(name, value)
    sizes = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **sizes})
    try:
        nodes = [cluster.add_node(num_cpus=1, resources={"trainer": 1}, object_store_memory=80 * 2**20) for _ in "ab"]
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_node_leaves_a_training_with_fewer_workers(
    make_job: MakeJob, config: TrainingConfig, cluster_of_nodes: tuple[object, list[object]]
) -> None:
    cluster, nodes = cluster_of_nodes
    job = make_job(
        num_workers=2,
        min_workers=1,
        resources={"trainer": 1},
        config=config.model_copy(update={"epochs": 40}),
    )
    removed: list[int] = []

    def lose_a_node(line: dict[str, int]) -> None:
        if not removed and line["epoch"] >= 2:
            removed.append(line["workers"])
            cluster.remove_node(nodes[1], allow_graceful=False)

    card = run_training(job, on_progress=lose_a_node, deadline_s=300)
    assert removed == [2]
    assert card.training["workers"] == 1
    ((epoch, step, before, after),) = card.training["worker_changes"]
    assert (before, after) == (2, 1)
    assert 0 < epoch < 39
    assert 0 <= step < 10
    lines = TrailReporter(job.storage_uri, job.name).metrics()
    assert [line["epoch"] for line in lines] == list(range(40))
    assert [line.get("workers_before") for line in lines if "workers_before" in line] == [2]
