"""What happens to a trained network before it is stored: interpolation with its parent, calibration, class means.

In this order: interpolation changes the weights, so that batch norm statistics must be taken after it; class means
need the final network.
"""

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.encoder import autocast, embed, normalise
from graceful.training.generation import Preprocessing
from graceful.training.material import Batch


def interpolate(network: nn.Module, parent_state: Mapping[str, Tensor], share: float) -> None:
    """theta <- share theta_parent + (1 - share) theta, in place, for every floating-point tensor of the network.

    Weight interpolation after training (BCWI, Schumann et al., 2023): fewer flips against the parent, a little less
    gain. Batch norm statistics are averaged too but mean nothing until `calibrate`.
    """
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(parent_state[name].to(tensor), share)


def mixed(own: Tensor, theirs: Tensor, share: float) -> Tensor:
    """Return n((1 - share) own + share theirs) of unit rows (N, d) and (N, d_k); a narrower space is filled with 0."""
    theirs = functional.pad(theirs, (0, own.shape[1] - theirs.shape[1]))
    return functional.normalize(torch.lerp(own, theirs, share), dim=1)


def interpolate_rows(rows: Tensor, parent_rows: Tensor, share: float) -> Tensor:
    """Return the classifier rows (C, d) that go with interpolated weights.

    n(share n(parent_row) + (1 - share) n(row)): the network's embeddings move part of the way back to the parent's, and
    so do the rows. `parent_rows` holds the parent's class mean where it has no row of its own.
    """
    own, earlier = functional.normalize(rows, dim=1), functional.normalize(parent_rows, dim=1)
    return mixed(own, earlier.to(own), share)


def calibrate(
    network: nn.Module,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype | None,
) -> int:
    """Replace the running statistics of every batch norm by those of clean training images; return how many were used.

    Statistics collected on augmented batches do not fit the clean images that are stored and searched. A random
    sample goes through in equal batches, without augmentation; the stored mean and variance are the plain averages over
    these batches. Returns 0 for a network without batch norm, and changes nothing where there are no images.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    batches = iter(batches)
    first = next(batches, None) if norms else None
    if first is None or not len(first.rows):
        return 0
    momenta = [norm.momentum for norm in norms]
    was_training = network.training
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches, instead of an exponential one
        norm.train()
    num_images = 0
    with torch.no_grad(), autocast(device, dtype):
        for batch in itertools.chain([first], batches):
            network(normalise(batch.pixels.to(device), preprocessing))
            num_images += len(batch.rows)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(was_training)
    return num_images


def sum_by_class(
    network: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the sums (C, d) of the unit embeddings of every class over one rank's share of the clean images.

    The sums of all ranks add up to those of all images.
    """
    network.eval()
    sums: Tensor | None = None
    for batch in batches:
        vectors = embed(network, batch.pixels, preprocessing, device, dtype)
        if sums is None:
            sums = torch.zeros(num_classes, vectors.shape[1], device=device)
        sums.index_add_(0, batch.labels.to(device), vectors.nan_to_num(0.0))
    if sums is None:
        raise UsageError("class means: expected images for every rank, found none for one; use fewer workers")
    return sums
