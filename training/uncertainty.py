"""How far a predecessor's vector of an image is to be trusted, and whether it is right: what was bad need not be kept.

The portable core of hyperbolic backward-compatible training (2506.05826), which weights by the old vector's
uncertainty; here it is read from the vector's class margin.
"""

import torch
from torch import Tensor


def class_margins(stale: Tensor, means: Tensor, targets: Tensor) -> Tensor:
    """Return m_ik = <o_i, mu_k,y_i> - max_{c != y_i} <o_i, mu_k,c>, (K, B).

    stale (K, B, d) unit vectors o, means (K, S, d) the class means of the classes that take part, targets (B,) each
    image's own among them. With a single class the margin is the similarity to its mean.
    """
    similarities = stale @ means.transpose(1, 2)  # (K, B, S)
    index = targets.view(1, -1, 1).expand(len(stale), -1, 1)
    own = similarities.gather(2, index)[:, :, 0]
    if means.shape[1] == 1:
        return own
    return own - similarities.scatter(2, index, -torch.inf).amax(dim=2)


def trust(margins: Tensor) -> Tensor:
    """Return weights (K, B) of mean 1 from class margins (K, B): sigmoid((m - mean) / standard deviation), scaled.

    Mean and deviation are those of the batch, for each predecessor. No gradient flows.

    >>> trust(torch.tensor([[0.1, 0.1]])).tolist()
    [[1.0, 1.0]]
    """
    margins = margins.detach()
    centred = margins - margins.mean(dim=1, keepdim=True)
    weights = torch.sigmoid(centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6))
    return weights / weights.mean(dim=1, keepdim=True)


def focused(margins: Tensor, focus: float) -> Tensor:
    """Return 1 + focus where a predecessor is right on an image (its class margin is above 0), else 1: (K, B).

    Focal distillation's alpha + beta [k right on i] (2011.09161) for embeddings: right by the nearest class mean.

    >>> focused(torch.tensor([[0.1, 0.0, -0.2]]), 5.0).tolist()
    [[6.0, 1.0, 1.0]]
    """
    return 1.0 + focus * (margins.detach() > 0).to(margins.dtype)
