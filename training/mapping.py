"""Maps between the spaces of two generations, and merges of their rankings: compatibility without training.

Everything here works on stored vectors of the same images, without labels: `fit` on training images, never on what is
reported. Unit rows throughout; o_i is what an older generation has stored for image i, n_i the newer one's vector.
A mapped or merged search costs a map to keep (or a second encoder run per query) for as long as old rows are there.

Sources: orthogonal Procrustes, Schoenemann 1966; lambda-orthogonal maps, 2509.16664; SLERP of the two queries, after
Shoemake 1985; rank merge, Seo et al., WACV 2025, 2301.03767; reciprocal rank fusion, Cormack et al., SIGIR 2009;
simplex projection of class scores, the square root of the softmax.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from graceful.errors import UsageError

Vectors = NDArray[np.float32]
RECIPROCAL_RANK = 60.0


@dataclass(frozen=True)
class LinearMap:
    """x -> n((x - source_mean) matrix + target_mean): from d_source to d_target wide, unit rows out."""

    matrix: NDArray[np.float64]  # (d_source, d_target)
    source_mean: NDArray[np.float64]  # (d_source,)
    target_mean: NDArray[np.float64]  # (d_target,)

    def __call__(self, vectors: Vectors) -> Vectors:
        """Map rows (N, d_source) to unit rows (N, d_target) float32."""
        return unit((vectors.astype(np.float64) - self.source_mean) @ self.matrix + self.target_mean)


def procrustes(source: Vectors, target: Vectors, *, centred: bool = True) -> LinearMap:
    """Return the orthogonal map that takes source rows (N, d) closest to target rows (N, d') in squared distance.

    R = P Q^T with P S Q^T the singular value decomposition of X^T Y; with `centred` both means are taken off first.

    >>> rng = np.random.default_rng(0)
    >>> points = unit(rng.normal(size=(50, 4)))
    >>> rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    >>> bool(np.allclose(procrustes(points, unit(points @ rotation), centred=False).matrix, rotation, atol=1e-5))
    True
    """
    x, y = _aligned(source, target)
    source_mean = x.mean(axis=0) if centred else np.zeros(x.shape[1])
    target_mean = y.mean(axis=0) if centred else np.zeros(y.shape[1])
    left, _, right = np.linalg.svd((x - source_mean).T @ (y - target_mean), full_matrices=False)
    return LinearMap(left @ right, source_mean, target_mean)


def lambda_orthogonal(
    source: Vectors, target: Vectors, *, strictness: float = 12.0, sharpness: float = 1.0, steps: int = 300
) -> LinearMap:
    """Return a linear map that may leave orthogonality where that pays, and is drawn back beyond a threshold.

    Minimises mean ||x W - y||^2 + sigmoid(a (||W W^T - I||_F - lam)) ||W W^T - I||_F, lam `strictness`, a `sharpness`
    (2509.16664), from the Procrustes solution by Adam. Deterministic.
    """
    start = procrustes(source, target, centred=False)
    x = torch.from_numpy(np.ascontiguousarray(source, np.float32))
    y = torch.from_numpy(np.ascontiguousarray(target, np.float32))
    weight = torch.tensor(start.matrix, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    eye = torch.eye(weight.shape[0])
    for _ in range(steps):
        distance = torch.linalg.matrix_norm(weight @ weight.t() - eye)
        loss = (x @ weight - y).square().sum(dim=1).mean() + torch.sigmoid(
            sharpness * (distance - strictness)
        ) * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return LinearMap(weight.detach().numpy().astype(np.float64), start.source_mean, start.target_mean)


def slerp(first: Vectors, second: Vectors, share: float) -> Vectors:
    """Return the points (N, d) at `share` of the way along the great circle from each first to each second row.

    (sin((1-a) w) u + sin(a w) v) / sin w, w the angle between u and v. 0 gives the first, 1 the second.
    """
    u, v = _aligned(first, second)
    angle = np.arccos(np.clip((u * v).sum(axis=1, keepdims=True), -1.0, 1.0))
    is_flat = np.sin(angle) < 1e-6
    along = np.where(is_flat, 1.0, np.sin(angle))
    left = np.where(is_flat, 1 - share, np.sin((1 - share) * angle) / along)
    right = np.where(is_flat, share, np.sin(share * angle) / along)
    return unit(left * u + right * v)


def blend(first: Vectors, second: Vectors, share: float) -> Vectors:
    """Return n((1 - b) u + b v) (N, d) for unit rows u, v and `share` b: the mixture of two generations."""
    u, v = _aligned(first, second)
    return unit((1 - share) * u + share * v)


def match_quantiles(scores: NDArray[np.float32], fitted: Vectors, target: Vectors) -> NDArray[np.float64]:
    """Return scores of the old space as the new space would say them: equal ranks among fitted and target scores.

    `fitted` and `target` (any shape) are scores of the same pairs in the two spaces. Monotone: no order inside the old
    space changes.
    """
    known, wanted = np.sort(fitted, axis=None).astype(np.float64), np.sort(target, axis=None).astype(np.float64)
    places = np.searchsorted(known, scores.astype(np.float64), side="left") / max(len(known) - 1, 1)
    return np.interp(places, np.linspace(0.0, 1.0, len(wanted)), wanted) + 1e-9 * scores  # ties keep their old order


def reciprocal_ranks(scores: NDArray[np.floating], rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1 / (60 + rank) of every score (Q, N) among the given rows of its query; 0 elsewhere. Best rank is 1."""
    found = np.zeros(scores.shape, np.float64)
    inside = np.flatnonzero(rows)
    order = np.argsort(-scores[:, inside], axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, len(inside) + 1)[None, :].repeat(len(scores), axis=0), axis=1)
    found[:, inside] = 1.0 / (RECIPROCAL_RANK + ranks)
    return found


def simplex(logits: NDArray[np.floating], num_classes: int, temperature: float = 1.0) -> Vectors:
    """Return sqrt(softmax(z / T)) (N, num_classes): unit rows on the sphere's positive part; missing classes are 0.

    Two classifiers that agree about an image lie close, whatever their spaces; works for known classes alone.
    """
    if logits.shape[1] > num_classes:
        raise UsageError(f"projecting on a simplex: expected at most {num_classes} classes, found {logits.shape[1]}")
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    padded = np.zeros((len(logits), num_classes))
    padded[:, : logits.shape[1]] = np.sqrt(shares / shares.sum(axis=1, keepdims=True))
    return padded.astype(np.float32)


def centroid_queries(
    gallery: Vectors, gallery_identities: NDArray[np.str_], query_identities: NDArray[np.str_], own: NDArray[np.int64]
) -> Vectors:
    """Return each query's direction (Q, d) to the mean of its relevant rows, its own row (`own`, -1: none) left out.

    What the best single point of each query can reach on a gallery is estimated by searching with these. It is no
    bound: the mean maximises summed similarity, not recall. With a single relevant row it is trivially perfect.
    """
    names, codes = np.unique(gallery_identities, return_inverse=True)
    sums = np.zeros((len(names), gallery.shape[1]))
    np.add.at(sums, codes, gallery.astype(np.float64))
    place = {name: number for number, name in enumerate(names.tolist())}
    queries = np.stack(
        [sums[place[name]] if name in place else np.zeros(gallery.shape[1]) for name in query_identities]
    )
    has_own = own >= 0
    queries[has_own] -= gallery[own[has_own]]
    return unit(queries)


def unit(vectors: NDArray[np.floating]) -> Vectors:
    """Return rows of unit length, float32; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def _aligned(
    first: NDArray[np.floating], second: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(first) != len(second):
        raise UsageError(
            f"comparing two spaces: expected vectors of the same images, found {len(first)} and {len(second)}"
        )
    return first.astype(np.float64), second.astype(np.float64)
