"""What a Ray job runs, on the cluster, with specification and result on shared storage.

    python -m graceful.flows.runtime.job_main train <folder>       trains one generation
    python -m graceful.flows.runtime.job_main embed <folder>       embeds by orders
    python -m graceful.flows.runtime.job_main preflight <folder>   proves every node

The result is written last.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from graceful.files import join, read_json, write_json
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.embedding_job import carry_out_orders
from graceful.flows.runtime.preflight import prove_nodes
from graceful.flows.settings.config import ClusterConfig
from graceful.training.job import TrainingJob
from graceful.training.launch import run_training


def main(arguments: Sequence[str]) -> None:
    """Carry out one job on the cluster that this process runs in."""
    kind, location = arguments
    with RaySession(ClusterConfig(address="auto")) as session:
        session.ensure()
        write_json(join(location, "result.json"), _KINDS[kind](location))


def _train(location: str) -> dict[str, Any]:
    specification = read_json(join(location, "specification.json"))
    job = TrainingJob.model_validate(specification["job"])
    card = run_training(job, deadline_s=specification["deadline_s"])
    return {"generation_uri": join(job.output_uri, card.generation_id)}


def _preflight(location: str) -> dict[str, Any]:
    specification = read_json(join(location, "specification.json"))
    return {"nodes": prove_nodes(specification["shared"], specification["code"])}


_KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "train": _train,
    "embed": carry_out_orders,
    "preflight": _preflight,
}


if __name__ == "__main__":
    main(sys.argv[1:])
