"""Several ranks of one gloo process group, in processes of their own and without Ray.

A fork server imports the training once; every rank is forked from it in a moment.
"""

import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from graceful.training.generation import GenerationCard
from graceful.training.job import TrainingJob
from graceful.training.loop import train_worker
from graceful.training.progress import TrailReporter


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 100.0) -> list[Any]:
    """Return what `function(rank, num_ranks, *arguments)` returns on every rank; it must be importable by name."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graceful.training.loop"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes: list[Connection] = []
    processes = []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, rank, num_ranks, port, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_answer(pipe, timeout_s) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def trained(rank: int, num_ranks: int, job: TrainingJob) -> GenerationCard | None:
    """Be one worker of a whole training; the card comes from rank 0."""
    return train_worker(job, TrailReporter(job.storage_uri, job.name), rank, num_ranks)


def _answer(pipe: Connection, timeout_s: float) -> Any:
    assert pipe.poll(timeout_s), f"a rank has not answered for {timeout_s} s"
    error, value = pickle.loads(pipe.recv_bytes())
    assert error is None, error
    return value


def _rank(
    pipe: Connection, rank: int, num_ranks: int, port: int, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
        )
        answer = (None, function(rank, num_ranks, *arguments))
    except BaseException:
        answer = (traceback.format_exc(), None)
    try:
        pipe.send_bytes(pickle.dumps(answer))  # by value: a pipe's own way shares memory with a process that ends
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
