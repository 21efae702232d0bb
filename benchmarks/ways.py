"""Ways of serving an update while a part of the gallery is re-embedded: plain, mapped, merged, mixed.

Each is made of what a chain left for one part of the evaluation (`Vectors`) and says how queries are scored (`Way`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.chains import Data
from graceful.training.manifest import LabelledImages
from graceful.training.mapping import (
    LinearMap,
    blend,
    lambda_orthogonal,
    match_quantiles,
    procrustes,
    reciprocal_ranks,
    simplex,
    slerp,
)

Scores = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Dev or test: queries and gallery rows that take part; `own` (Q,) is a query's row in the gallery, or -1."""

    queries: NDArray[np.int64]
    gallery: NDArray[np.int64]
    query_identities: NDArray[np.str_]
    gallery_identities: NDArray[np.str_]
    own: NDArray[np.int64]
    clusters: NDArray[np.str_]

    @cached_property
    def relevant(self) -> Flags:
        """(Q, N): rows of the query's identity; its own row is neither relevant nor a rival."""
        return (self.query_identities[:, None] == self.gallery_identities[None, :]) & ~self.is_own

    @cached_property
    def is_own(self) -> Flags:
        """(Q, N)."""
        return self.own[:, None] == np.arange(len(self.gallery))[None, :]

    @cached_property
    def place(self) -> NDArray[np.float64]:
        """(N,) from 0 to 1: the order in which rows are re-embedded, random and fixed."""
        return np.random.default_rng(7).permutation(len(self.gallery)) / len(self.gallery)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Flat places of relevant entries, where each query's begin, and flat places of relevant and own entries."""
        flat = np.flatnonzero(self.relevant)
        begins = np.searchsorted(flat, np.arange(len(self.queries)) * len(self.gallery))
        return flat, begins, np.flatnonzero(self.relevant | self.is_own)

    def right(self, scores: Scores | NDArray[np.float64]) -> Flags:
        """(Q,): whether the best row has the query's identity; a tie with a wrong row is wrong."""
        flat, begins, hidden = self._places
        best = np.maximum.reduceat(scores.reshape(-1)[flat], begins)
        rivals = scores.copy()
        rivals.reshape(-1)[hidden] = -np.inf
        return best > rivals.max(axis=1)


def parts(data: Data, queries: LabelledImages, gallery: LabelledImages | None) -> dict[str, Part]:
    """Dev and test."""
    rows = queries if gallery is None else gallery
    in_dev = data.in_dev(queries)
    gallery_in = {"dev": np.ones(len(rows), bool), "test": np.ones(len(rows), bool)}
    if not data.is_closed:
        dev_rows = data.in_dev(rows)
        gallery_in = {"dev": dev_rows, "test": ~dev_rows}
    found = {}
    for name, mask in (("dev", in_dev), ("test", ~in_dev)):
        kept = np.flatnonzero(gallery_in[name])
        own = np.flatnonzero(mask) if gallery is None else np.full(int(mask.sum()), -1)
        labels = queries.labels[mask]
        found[name] = Part(np.flatnonzero(mask), kept, labels, rows.labels[kept], own, labels)
    return found


class Vectors:
    """What a chain left, for one part: q(t) (Q, d) and g(t) (N, d) for t = 1, 2, ..."""

    def __init__(self, stored: Any, part: Part, *, one_set: bool) -> None:
        self.part, self._stored = part, stored
        self.last = max(int(name.split("/")[1]) for name in stored if name.startswith("queries/"))
        self._gallery = "queries" if one_set else "gallery"
        self.seconds = float(sum(float(stored[f"seconds/{t}"]) for t in range(1, self.last + 1)))

    def q(self, t: int) -> NDArray[np.float32]:
        """Query vectors of generation t."""
        return self._stored[f"queries/{t}"][self.part.queries]  # type: ignore[no-any-return]

    def g(self, t: int) -> NDArray[np.float32]:
        """Gallery vectors of generation t."""
        return self._stored[f"{self._gallery}/{t}"][self.part.gallery]  # type: ignore[no-any-return]

    def training(self, t: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors by t and by t - 1 of the same training images."""
        return self._stored[f"training/{t}/{t}"], self._stored[f"training/{t}/{t - 1}"]

    def classifier(self, t: int) -> tuple[NDArray[np.float32], list[str]]:
        """Rows and classes of generation t."""
        return self._stored[f"rows/{t}"], self._stored[f"classes/{t}"].tolist()


class Way:
    """How an update is served: scores of state (t, re-embedded rows), and of queries by t on a pure gallery of k."""

    encoders = 1
    has_matrix = True

    def __init__(self, vectors: Vectors) -> None:
        self.v = vectors
        self._known: dict[tuple[str, int, int], Scores] = {}

    def scores(self, t: int, k: int) -> Scores:
        """`cross`, computed once."""
        return self._once("cross", t, k, lambda: self.cross(t, k))

    def _once(self, what: str, t: int, k: int, compute: Callable[[], Any]) -> Scores:
        if (what, t, k) not in self._known:
            self._known[what, t, k] = compute()
        return self._known[what, t, k]

    def query(self, t: int) -> NDArray[np.float32]:
        """What is asked with, once everything is of generation t."""
        return self.v.q(t)

    def row(self, t: int) -> NDArray[np.float32]:
        """What is stored by generation t."""
        return self.v.g(t)

    def cross(self, t: int, k: int) -> Scores:
        """Scores (Q, N) of queries by t on the gallery of k."""
        return self.query(t) @ self.row(k).T

    def state(self, t: int, fresh: Flags) -> Scores | NDArray[np.float64]:
        """Scores while the rows `fresh` (N,) are of t and the others of t - 1."""
        return np.where(fresh, self.scores(t, t), self.scores(t, t - 1))


class Mapped(Way):
    """One encoder: the new query for new rows, the new query mapped into the old space for old rows."""

    fit: Callable[[NDArray[np.float32], NDArray[np.float32]], LinearMap] = staticmethod(procrustes)

    def __init__(self, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._maps: dict[int, LinearMap] = {}

    def down(self, t: int, k: int) -> NDArray[np.float32]:
        """Queries of t in the space of k, map by map."""
        found = self.v.q(t)
        for step in range(t, k, -1):
            if step not in self._maps:
                self._maps[step] = type(self).fit(*self.v.training(step))
            found = self._maps[step](found)
        return found

    def cross(self, t: int, k: int) -> Scores:
        return self.down(t, k) @ self.v.g(k).T


class LambdaMapped(Mapped):
    """The same with a lambda-orthogonal map."""

    fit = staticmethod(lambda_orthogonal)


class Slerp(Mapped):
    """Two encoders: old rows are asked with a point between the old query and the mapped new one."""

    encoders = 2

    def __init__(self, vectors: Vectors, shares: dict[int, float] | float = 0.5) -> None:
        super().__init__(vectors)
        self.shares = shares

    def cross(self, t: int, k: int) -> Scores:
        if t == k:
            return super().cross(t, k)
        share = self.shares if isinstance(self.shares, float) else self.shares[t]
        return slerp(self.v.q(k), self.down(t, k), share) @ self.v.g(k).T


class Merged(Way):
    """Two encoders: each row is asked in its own space, and the rankings are merged by raw score."""

    encoders = 2
    has_matrix = False

    def state(self, t: int, fresh: Flags) -> Scores | NDArray[np.float64]:
        return np.where(fresh, self.scores(t, t), self._once("old", t, t - 1, lambda: self.old_scores(t)))

    def old_scores(self, t: int) -> Scores | NDArray[np.float64]:
        """Scores of the old rows by the old query."""
        return self.scores(t - 1, t - 1)


class QuantileMerged(Merged):
    """The same, old scores made comparable by equal ranks on training images."""

    def old_scores(self, t: int) -> Scores | NDArray[np.float64]:
        new, old = (vectors[:1000] for vectors in self.v.training(t))
        pairs = np.triu_indices(len(new), 1)
        return match_quantiles(self.scores(t - 1, t - 1), (old @ old.T)[pairs], (new @ new.T)[pairs])


class ReciprocalMerged(Merged):
    """The same, by reciprocal rank."""

    def state(self, t: int, fresh: Flags) -> Scores | NDArray[np.float64]:
        return reciprocal_ranks(self.scores(t, t), fresh) + reciprocal_ranks(self.scores(t - 1, t - 1), ~fresh)


class Simplex(Way):
    """One encoder: queries and rows as points of a simplex of class shares."""

    def __init__(self, vectors: Vectors, temperature: float = 1.0) -> None:
        super().__init__(vectors)
        self._names = vectors.classifier(vectors.last)[1]
        self._temperature = temperature

    def query(self, t: int) -> NDArray[np.float32]:
        return self._project(self.v.q(t), t)

    def row(self, t: int) -> NDArray[np.float32]:
        return self._project(self.v.g(t), t)

    def _project(self, vectors: NDArray[np.float32], t: int) -> NDArray[np.float32]:
        rows, names = self.v.classifier(t)
        shares = simplex(20.0 * vectors @ rows.T, len(names), self._temperature)
        found = np.zeros((len(vectors), len(self._names)), np.float32)
        found[:, [self._names.index(name) for name in names]] = shares
        return found


class Mixed(Way):
    """Two encoders: queries and re-embedded rows are mixtures of the new generation and the one before it."""

    encoders = 2
    aligned = False

    def __init__(self, vectors: Vectors, shares: dict[int, float] | float = 0.5) -> None:
        super().__init__(vectors)
        self.shares = shares
        self._maps: dict[int, LinearMap] = {}

    def query(self, t: int) -> NDArray[np.float32]:
        return self._mixed(t, self.v.q)

    def row(self, t: int) -> NDArray[np.float32]:
        return self._mixed(t, self.v.g)

    def cross(self, t: int, k: int) -> Scores:
        return self.query(t) @ self._up(self.row(k), k, t).T

    def _mixed(self, t: int, of: Callable[[int], NDArray[np.float32]]) -> NDArray[np.float32]:
        share = self.shares if isinstance(self.shares, float) else self.shares.get(t, 0.0)
        return of(t) if t == 1 or share == 0 else blend(of(t), self._up(of(t - 1), t - 1, t), share)

    def _up(self, rows: NDArray[np.float32], k: int, t: int) -> NDArray[np.float32]:
        """Rows of generation k in the space of t: as they are, or aligned map by map."""
        if self.aligned:
            for step in range(k + 1, t + 1):
                if step not in self._maps:
                    new, old = self.v.training(step)
                    self._maps[step] = procrustes(old, new)
                rows = self._maps[step](rows)
        return rows


class AlignedMixed(Mixed):
    """The same for generations whose spaces have nothing to do with each other."""

    aligned = True
