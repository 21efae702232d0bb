"""torch.compile around the network of a training, where it pays; what cannot be compiled is trained as it is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from graceful.errors import in_one_line
from graceful.training.distributed import world_size

Compile = Literal["auto", "off", "on"]
LEAST_STEPS = 1000  # auto: compiling takes a minute or so, which fewer steps do not win back
logger = logging.getLogger(__name__)


@contextmanager
def compiled(
    network: nn.Module, choice: Compile, device: torch.device, num_steps: int, rehearse: Callable[[], None]
) -> Iterator[bool]:
    """Compile `network` inside this context; yields whether it runs compiled.

    auto compiles on a GPU for at least LEAST_STEPS steps. `rehearse` runs the network forward and backward once, so
    that a failure shows before the training: it is logged in one line and the network runs as it is, on every rank if
    it failed on one.
    """
    wanted = choice == "on" or (choice == "auto" and device.type == "cuda" and num_steps >= LEAST_STEPS)
    works = wanted and _works(network, device, rehearse)
    try:
        yield works
    finally:
        network._compiled_call_impl = None


def _works(network: nn.Module, device: torch.device, rehearse: Callable[[], None]) -> bool:
    network.compile()
    failed = torch.zeros((), device=device)
    try:
        rehearse()
    except Exception as error:
        logger.warning("torch.compile failed, training goes on without it: %s", in_one_line(error))
        failed += 1
    if world_size() > 1:
        dist.all_reduce(failed)
    if failed:
        network._compiled_call_impl = None
    return not failed
