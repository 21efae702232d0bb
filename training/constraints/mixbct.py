"""Mixed features (MixBCT): part of a batch is replaced by what a predecessor stored for it, and the task goes on.

Liang et al., 2308.06948. The classifier then has to serve new and stored embeddings alike, which ties the spaces
without a loss of its own: it changes the task term, and what is logged as "task" is what was optimised. Stored
embeddings far from their class mean are noise and are left out.
"""

from typing import ClassVar

import torch
from torch import Tensor

from graceful.training.choices import check_parameters
from graceful.training.constraints.contract import Reference


class MixedFeatures:
    """CE(head(g_i), y_i) with g_i = o_i for a random share of the batch, else f_i; o_i as stored by a predecessor.

    share: 0.3, of the batch; typical: 0.9, of each class's images, nearest to the class mean, may be replaced. Both as
    in the paper, which has one predecessor: with several, each replaced image takes one of them at random.
    """

    reference: ClassVar[Reference] = "batch"

    def __init__(self, share: float = 0.3, typical: float = 0.9) -> None:
        check_parameters("mixbct", {"share": share, "typical": typical})
        self.share = share
        self.typical = typical

    def draw(self, is_typical: Tensor, generator: torch.Generator) -> Tensor:
        """Return which predecessor each of B images is replaced by, (B,) int64, -1 for none, from is_typical (K, B).

        The predecessor is drawn first; then round(share B) of the images that are typical of theirs, or all of them
        where there are fewer.
        """
        num_predecessors, num_images = is_typical.shape
        chosen = torch.randint(num_predecessors, (num_images,), generator=generator)
        keys = torch.rand(num_images, generator=generator)
        may = is_typical.cpu().gather(0, chosen[None])[0]
        order = keys.masked_fill(~may, 2.0).argsort()[: round(self.share * num_images)]
        order = order[may[order]]
        found = torch.full((num_images,), -1)
        found[order] = chosen[order]
        return found


def typical_images(similarities: Tensor, labels: Tensor, share: float) -> Tensor:
    """Return which of N images (N,) belong to the `share` of their class that is nearest to its mean.

    similarities (N,): cosine of each image's stored embedding to its class mean. ceil(share n) of n images stay.
    """
    order = torch.argsort(similarities, descending=True, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, nearest first
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels)) - starts[labels[order]]
    return places < (share * counts.double()).ceil().long()[labels]
