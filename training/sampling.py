"""Which classes take part in a step's softmax: the batch's own, and a random sample of the others.

A softmax over all classes costs in proportion to their number, for every predecessor anew. Over a sample, each drawn
class stands for several: log((C - P) / (S - P)) is added to its logit, P the batch's own classes, S the drawn ones with
them, so that the sum under the logarithm is on average that of all C classes (Bengio and Senecal, 2008; Jean et al.,
ACL 2015, 1412.2007).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DEFAULT_CLASSES = 1024


@dataclass(frozen=True)
class ClassSample:
    """The classes of one step, the same on every rank."""

    classes: Tensor  # (S,) int64, ascending
    offsets: Tensor  # (S,) float32, added to their logits: 0 for the batch's own


def sample_size(configured: int | None, num_classes: int, batch_size: int) -> int:
    """Return how many classes take part in a step, 0 for all of them. None: all up to 1,024, else so many.

    A sample is never smaller than twice the batch by default, so that at least half of it are others.
    """
    size = max(DEFAULT_CLASSES, 2 * batch_size) if configured is None else configured
    return size if size < num_classes else 0


def sample_classes(labels: Tensor, num_classes: int, size: int, generator: torch.Generator) -> ClassSample:
    """Draw `size` classes: all of `labels` (B,), the global batch's, and random others, each set at most once.

    More classes than that where the batch alone has more. Time and memory do not depend on num_classes.
    """
    own = torch.unique(labels.cpu())
    num_others = min(max(size - len(own), 0), num_classes - len(own))
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn = np.random.default_rng(seed).choice(num_classes - len(own), num_others, replace=False, shuffle=False)
    places = torch.from_numpy(np.sort(drawn))
    others = places + torch.searchsorted(own - torch.arange(len(own)), places, right=True)
    classes, order = torch.cat([own, others]).sort()
    offset = math.log((num_classes - len(own)) / num_others) if num_others else 0.0
    offsets = torch.cat([torch.zeros(len(own)), torch.full((num_others,), offset)])[order]
    return ClassSample(classes.to(labels.device), offsets.to(labels.device))
