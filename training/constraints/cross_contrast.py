"""Cross contrast: the predecessor's classifier is one random stored embedding per class, drawn anew at every step.

Stored vectors, not class means, are what a query will meet in the gallery, so the new embedding is trained against
them.
"""

from typing import ClassVar

from torch import Tensor, nn

from graceful.training.constraints.bct import reference_cross_entropy


class CrossContrast(nn.Module):
    """mean_i CE(s (cos(f_i[:d_k], O_k) - m onehot), y_i), O_k (C, d_k) one cached clean embedding by k of each class.

    scale s 20 and margin m 0.2, as in the task loss of the default recipe.
    """

    reference: ClassVar[str] = "instances"

    def __init__(self, scale: float = 20.0, margin: float = 0.2) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Tensor:
        """Return one loss per predecessor; lower is better."""
        return reference_cross_entropy(embeddings, labels, ref_emb, ref_labels, self.scale, self.margin)
