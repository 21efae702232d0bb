"""A generation without some of its training images: computed, not trained, and what of them can still be told.

The last linear layer becomes what it would be without them, in closed form (`influence.LastLayer.without`): exactly so
where it was fitted by that loss, as by linear quadratic fine-tuning; for any other generation as far as that loss is a
model of it. A class that has lost all of its images loses its classifier row. The layers below have seen the images
and stay as they are, so what they have kept is measured: a membership test (ML-Leaks, Salem et al., NDSS 2019,
1806.01246) asks of an image how near it is to the nearest classifier row, and guesses that the nearer one was trained
on.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from graceful.errors import UsageError
from graceful.training.combinations import CORNERS
from graceful.training.encoder import save_generation
from graceful.training.generation import GenerationCard
from graceful.training.influence import FeatureReader, LastLayer, matrix_of, open_classifier
from graceful.training.manifest import LabelledImages


@dataclass(frozen=True)
class Traces:
    """How often the membership test takes the trained image of a pair for the trained one; 0.5: nothing can be told.

    The other one of each pair was never trained on. `before` and `after`: of forgotten images, by the old generation
    and by the new one; `kept`: of images that stay, by the new one. `cosine`: mean cosine of the vectors of kept images
    under both.
    """

    before: float
    after: float
    kept: float
    cosine: float


def leave_out(
    generation_uri: str,
    images: LabelledImages,
    is_forgotten: NDArray[np.bool_],
    unseen: Sequence[str],
    *,
    out_uri: str,
    ordinal: int,
) -> GenerationCard:
    """Store a generation below `out_uri` that is another one without the images (N,) that are forgotten; its card.

    images: all that the other one was trained on; their features are in memory, N x (m + 1) float64. `unseen`: sources
    of images that it was not trained on. The card's `training` says what was left out, and the `Traces`.

    Raises:
        UsageError: no linear last layer or classifier, an image that cannot be embedded, or no image that is forgotten,
            or none that stays.
    """
    started = time.perf_counter()
    reader = FeatureReader(generation_uri)
    card, rows, labels = open_classifier(generation_uri, images)
    gone = torch.from_numpy(is_forgotten)
    if not gone.any() or gone.all():
        raise UsageError(
            f"leaving images out of {card.generation_id}: expected some of {len(images)} images, found "
            f"{int(gone.sum())}; name images that it was trained on, and not all of them"
        )
    features, others = reader(images.sources), reader(unseen)
    change = LastLayer(features, labels, rows, matrix_of(reader.layer)).without(gone.nonzero().flatten())
    with torch.no_grad():
        reader.layer.weight.add_(change[:, :-1].to(reader.layer.weight))
        if reader.layer.bias is not None:
            reader.layer.bias.add_(change[:, -1].to(reader.layer.bias))
    matrix = matrix_of(reader.layer)
    vectors, unseen_vectors = (functional.normalize(part.inputs @ matrix.t(), dim=1) for part in (features, others))
    stay = labels[~gone].unique()
    kept_rows = rows[stay].double()
    kept = vectors[~gone]
    means = torch.zeros(len(stay), rows.shape[1], dtype=kept.dtype)
    means.index_add_(0, torch.searchsorted(stay, labels[~gone]), kept)
    before, after = _nearness(others.vectors, rows.double()), _nearness(unseen_vectors, kept_rows)
    traces = Traces(
        before=told_apart(_nearness(features.vectors[gone], rows.double()), before),
        after=told_apart(_nearness(vectors[gone], kept_rows), after),
        kept=told_apart(_nearness(kept, kept_rows), after),
        cosine=float((features.vectors[~gone] * kept).sum(dim=1).mean()),
    )
    _, made = save_generation(
        out_uri,
        reader.network,
        ordinal=ordinal,
        backbone=card.backbone,
        preprocessing=card.preprocessing,
        width=card.width,
        classifier=([card.classes[place] for place in stay], rows[stay], means.float()),
        prefix_widths=card.prefix_widths,
        parent=card.generation_id,
        calibrated_images=card.calibrated_images,
        training={
            "images": len(kept),
            "classes": len(stay),
            "seconds": round(time.perf_counter() - started, 2),
            "forgotten": int(gone.sum()),
            "traces": {name: round(value, 4) for name, value in asdict(traces).items()},
            **({CORNERS: card.training[CORNERS]} if CORNERS in card.training else {}),
        },
    )
    return made


def told_apart(trained: Tensor, unseen: Tensor) -> float:
    """Share of the pairs of a trained (n,) and an unseen (m,) image in which the trained one is nearer; ties are half.

    >>> told_apart(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    0.875
    """
    pairs = trained[:, None] - unseen[None, :]
    return float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())


def _nearness(vectors: Tensor, rows: Tensor) -> Tensor:
    """Cosine of unit vectors (n, d) to the nearest classifier row."""
    return (vectors @ functional.normalize(rows, dim=1).t()).amax(dim=1)
