"""Which way of updating a model serves best: constraints, maps between spaces, merged rankings, mixtures.

`python -m benchmarks.comparison FOLDER` measures the chains that `python -m benchmarks.chains FOLDER` left, and writes
benchmarks/results-comparison.json; `python -m benchmarks.tables` makes docs/comparison.md of it. Nothing is trained.

Every step of a chain is an update: before it, everything that is served comes from the generation before. A way of
updating says how queries are scored while a share of the gallery is re-embedded. Choices (a share of the mixture, a
point on the great circle, a temperature) are made for each step on dev: half of the identities of Omniglot, half of the
images of CIFAR-100. All that is printed comes from the other half.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.chains import CHAINS, DATA, SEEDS, Data
from benchmarks.harness import processor
from graceful.training.manifest import LabelledImages
from graceful.training.mapping import (
    LinearMap,
    blend,
    centroid_queries,
    lambda_orthogonal,
    match_quantiles,
    procrustes,
    reciprocal_ranks,
    simplex,
    slerp,
)

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
FLIPS_AT = (0.0, 0.5, 1.0)
MAX_NFR = 0.05  # the limit of examples/omniglot.toml and cifar100.toml
LEAST_ROOM = 0.01  # below it nothing can be said about the share of it
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
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
    if data.is_closed:
        in_dev = np.array([int(digest[8:12], 16) % 2 == 0 for digest in queries.content_sha256])
        gallery_in = {"dev": np.ones(len(rows), bool), "test": np.ones(len(rows), bool)}
    else:
        names = np.unique(queries.labels)
        chosen = set(np.random.default_rng(5).permutation(names)[: len(names) // 2].tolist())
        in_dev = np.array([label in chosen for label in queries.labels])
        dev_rows = np.array([label in chosen for label in rows.labels])
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


def choose(flips: Sequence[float], quality: Sequence[float], max_nfr: float = MAX_NFR) -> int:
    """The rule for every share that trades quality for flips, on dev: best quality within the limit, else fewest flips.

    >>> choose([0.08, 0.04, 0.02], [0.70, 0.69, 0.66])
    1
    >>> choose([0.09, 0.08, 0.07], [0.70, 0.69, 0.66])
    2
    """
    allowed = [place for place, value in enumerate(flips) if value <= max_nfr]
    if allowed:
        return max(allowed, key=lambda place: quality[place])
    return min(range(len(flips)), key=lambda place: flips[place])


def flips(way: Way, t: int, at: Iterable[float]) -> list[float]:
    """Negative flips of update t against what was served, at shares of the gallery."""
    part = way.v.part
    before = part.right(way.scores(t - 1, t - 1))
    return [float((before & ~part.right(way.state(t, part.place < share))).mean()) for share in at]


def chosen_mixture(kind: type[Mixed], dev: Vectors) -> dict[int, float]:
    """A share of the mixture for each step, by the rule; the steps before it are as they were chosen."""
    shares: dict[int, float] = {}
    for t in range(2, dev.last + 1):
        tried = []
        for share in SHARES:
            way = kind(dev, {**shares, t: share})
            tried.append((max(flips(way, t, FLIPS_AT)), float(dev.part.right(way.scores(t, t)).mean())))
        shares[t] = SHARES[choose([found for found, _ in tried], [found for _, found in tried])]
    return shares


def chosen_slerp(dev: Vectors) -> dict[int, float]:
    """For each step the point that answers best on the old gallery."""
    found = {}
    for t in range(2, dev.last + 1):
        tried = [dev.part.right(Slerp(dev, share).cross(t, t - 1)).mean() for share in np.linspace(0, 1, 11)]
        found[t] = float(np.linspace(0, 1, 11)[int(np.argmax(tried))])
    return found


def chosen_temperature(dev: Vectors) -> float:
    """The temperature with the best last self-test."""
    tried = (0.25, 0.5, 1.0, 2.0)
    return max(tried, key=lambda value: float(dev.part.right(Simplex(dev, value).cross(dev.last, dev.last)).mean()))


WAYS: dict[str, Callable[[Vectors, Vectors], Way]] = {
    "plain": lambda test, _: Way(test),
    "Procrustes": lambda test, _: Mapped(test),
    "lambda-orthogonal": lambda test, _: LambdaMapped(test),
    "SLERP query": lambda test, dev: Slerp(test, chosen_slerp(dev)),
    "merge, raw": lambda test, _: Merged(test),
    "merge, quantiles": lambda test, _: QuantileMerged(test),
    "merge, reciprocal ranks": lambda test, _: ReciprocalMerged(test),
    "simplex": lambda test, dev: Simplex(test, chosen_temperature(dev)),
    "mixture, b = 0.3": lambda test, _: Mixed(test, 0.3),
    "mixture, b = 0.5": lambda test, _: Mixed(test, 0.5),
    "mixture, b on dev": lambda test, dev: Mixed(test, chosen_mixture(Mixed, dev)),
    "aligned mixture, b = 0.5": lambda test, _: AlignedMixed(test, 0.5),
    "aligned mixture, b on dev": lambda test, dev: AlignedMixed(test, chosen_mixture(AlignedMixed, dev)),
}
CONSTRAINED = ("plain", "mixture, b = 0.3", "mixture, b = 0.5", "mixture, b on dev", "SLERP query")
UNCONSTRAINED = tuple(WAYS)


def ways_of(chain: str) -> tuple[str, ...]:
    """Ways that are measured of a chain."""
    return UNCONSTRAINED if chain in ("from scratch", "initialised") else CONSTRAINED


def measure(way: Way) -> dict[str, Any]:
    """All columns of one chain served in one way; shares of 1."""
    part, last = way.v.part, way.v.last
    curves = [[float(part.right(way.state(t, part.place < f)).mean()) for f in FRACTIONS] for t in range(2, last + 1)]
    lost = [flips(way, t, FLIPS_AT) for t in range(2, last + 1)]
    found: dict[str, Any] = {
        "last": curves[-1][-1],
        "backfill": float(np.mean(curves)),
        "backfill_last": float(np.mean(curves[-1])),
        "nfr": np.mean(lost, axis=0).tolist(),
        "encoders": way.encoders,
        "seconds": way.v.seconds,
    }
    if isinstance(way, Mixed | Slerp) and isinstance(way.shares, dict):
        found["chosen"] = {str(t): share for t, share in way.shares.items()}
    return {**found, **_matrix(way)} if way.has_matrix else found


def _matrix(way: Way) -> dict[str, Any]:
    part, last = way.v.part, way.v.last
    own = {t: part.right(way.scores(t, t)) for t in range(1, last + 1)}
    margins, values, attained = [], [float(hits.mean()) for hits in own.values()], []
    for t in range(2, last + 1):
        for k in range(1, t):
            hits = part.right(way.scores(t, k))
            margin, error = clustered(hits.astype(float) - own[k].astype(float), part.clusters)
            margins.append((margin, error))
            values.append(float(hits.mean()))
            if t == last:
                best = centroid_queries(way.row(k), part.gallery_identities, part.query_identities, part.own)
                ceiling = part.right(best @ way.row(k).T).mean()
                room = float(ceiling - own[k].mean())
                attained.append(margin / room if room > LEAST_ROOM else np.nan)
    smallest = min(margins)
    return {
        "ac": float(np.mean([margin > 0 for margin, _ in margins])),
        "above_error": float(np.mean([margin > error for margin, error in margins])),
        "smallest_margin": smallest[0],
        "its_error": smallest[1],
        "am": float(np.mean(values)),
        **({} if np.isnan(attained).any() else {"attained": float(np.mean(attained))}),
    }


def clustered(differences: NDArray[np.float64], clusters: NDArray[np.str_]) -> tuple[float, float]:
    """Mean and its standard error, whole clusters (identities) drawn."""
    names, codes = np.unique(clusters, return_inverse=True)
    mean = float(differences.mean())
    sums = np.bincount(codes, weights=differences - mean)
    return mean, float(np.sqrt((sums**2).sum() * len(names) / (len(names) - 1)) / len(differences))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and half width of the 95 % interval over seeds of every number."""
    found: dict[str, Any] = {"seeds": len(rows)}
    for name in [name for name in rows[0] if all(name in row for row in rows)]:
        if name == "chosen":
            found["chosen"] = [row["chosen"] for row in rows]
            continue
        values = np.array([row[name] for row in rows], float)
        half = np.full(values.shape[1:], np.nan)
        if len(rows) > 1:
            half = stats.t.ppf(0.975, len(rows) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(rows))
        found[name] = {"mean": np.mean(values, axis=0).tolist(), "half_width": half.tolist()}
    return found


def main() -> None:
    """Measure every chain that is there with all its seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=sorted(DATA), action="append", help="Only these; the others stay.")
    wanted = parser.parse_args()
    folder, place = wanted.folder, Path(__file__).with_name("results-comparison.json")
    results: dict[str, Any] = {
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "rows": json.loads(place.read_text())["rows"] if place.exists() else {},
    }
    for name in wanted.data or DATA:
        data = DATA[name]
        queries, gallery = data.evaluation()
        split = parts(data, queries, gallery)
        results["rows"][name] = []
        for chain in CHAINS:
            files = [folder / name / f"{_file(chain)}-seed{seed}.npz" for seed in SEEDS]
            stored = [dict(np.load(file)) for file in files if file.exists()]
            if len(stored) < len(SEEDS):
                continue
            for way in ways_of(chain):
                rows = []
                for found in stored:
                    dev, test = (Vectors(found, split[p], one_set=gallery is None) for p in ("dev", "test"))
                    rows.append(measure(WAYS[way](test, dev)))
                results["rows"][name].append({"chain": chain, "way": way, **summary(rows)})
                print(f"{name}, {chain}, {way}: {len(rows)} seeds", flush=True)
    place.write_text(json.dumps(results, indent=1) + "\n")


def _file(chain: str) -> str:
    return chain.replace(" ", "_").replace(",", "")


if __name__ == "__main__":
    main()
