"""Which way of updating a model serves best: constraints, maps between spaces, merged rankings, mixtures.

`python -m benchmarks.comparison FOLDER` measures the chains that `python -m benchmarks.chains FOLDER` left, and writes
benchmarks/results-comparison.json; rows of chains that are not in FOLDER stay as they are. `python -m
benchmarks.tables` makes docs/comparison.md of it. Nothing is trained.

Every step of a chain is an update: before it, everything that is served comes from the generation before. A way of
updating says how queries are scored while a share of the gallery is re-embedded. Choices (a share of the mixture, a
point on the great circle, a temperature) are made for each step on dev: half of the identities of Omniglot, half of the
images of CIFAR-100. All that is printed comes from the other half, but for tables of plain searches on dev: what the
default is chosen by.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.chains import CHAINS, DATA, MAX_NFR, SEEDS, Data, vectors_file
from benchmarks.harness import processor
from benchmarks.ways import (
    AlignedMixed,
    LambdaMapped,
    Mapped,
    Merged,
    Mixed,
    QuantileMerged,
    ReciprocalMerged,
    Simplex,
    Slerp,
    Vectors,
    Way,
    parts,
)
from graceful.training import choosing
from graceful.training.choosing import Option
from graceful.training.mapping import centroid_queries
from graceful.training.validation import SHARES

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
FLIPS_AT = (0.0, 0.5, 1.0)
LEAST_ROOM = 0.01  # below it nothing can be said about the share of it


def choose(flips: Sequence[float], quality: Sequence[float], max_nfr: float = MAX_NFR) -> int:
    """Return which of several values `training.choosing.choose` takes, by what each came to on dev.

    >>> choose([0.08, 0.04, 0.02], [0.70, 0.69, 0.66])
    1
    >>> choose([0.09, 0.08, 0.07], [0.70, 0.69, 0.66])
    2
    """
    tried = zip(flips, quality, strict=True)
    options = [Option(value=place, self_test=good, flips=lost) for place, (lost, good) in enumerate(tried)]
    return int(choosing.choose(options, max_nfr).value)


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


def ways_of(data: Data, chain: str) -> tuple[str, ...]:
    """Ways that are measured of a chain; of long ones the plain search alone."""
    if data.chains is not None:
        return ("plain",)
    return UNCONSTRAINED if chain in ("from scratch", "initialised") else CONSTRAINED


def measure(way: Way) -> dict[str, Any]:
    """All columns of one chain served in one way; shares of 1."""
    part, last = way.v.part, way.v.last
    curves = [[float(part.right(way.state(t, part.place < f)).mean()) for f in FRACTIONS] for t in range(2, last + 1)]
    lost = [flips(way, t, FLIPS_AT) for t in range(2, last + 1)]
    found: dict[str, Any] = {
        "last": curves[-1][-1],
        "self_tests": [float(part.right(way.scores(t, t)).mean()) for t in range(1, last + 1)],
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
    parser.add_argument("--chain", choices=sorted(CHAINS), action="append", help="Only these; the others stay.")
    parser.add_argument("--way", choices=sorted(WAYS), action="append", help="Only these; the others stay.")
    wanted = parser.parse_args()
    folder, place = wanted.folder, Path(__file__).with_name("results-comparison.json")
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    about = {"measured": today, "hardware": f"{os.cpu_count()} x {processor()}"}
    results: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {"rows": {}}
    for name in wanted.data or DATA:
        data = DATA[name]
        queries, gallery = data.evaluation()
        split = parts(data, queries, gallery)
        rows = results["rows"].setdefault(name, [])
        for chain in wanted.chain or CHAINS:
            files = [vectors_file(folder, data, CHAINS[chain], seed) for seed in SEEDS]
            stored = [dict(np.load(file)) for file in files if file.exists()]
            if len(stored) < (len(SEEDS) if data.chains is None else 1):
                continue
            ways = [way for way in ways_of(data, chain) if not wanted.way or way in wanted.way]
            rows[:] = [row for row in rows if row["chain"] != chain or row["way"] not in ways]
            for way in ways:
                measured, on_dev = [], []
                for found in stored:
                    dev, test = (Vectors(found, split[p], one_set=gallery is None) for p in ("dev", "test"))
                    measured.append(measure(WAYS[way](test, dev)))
                    if way == "plain" and len(stored) == len(SEEDS):
                        on_dev.append(measure(Way(dev)))
                chosen_by = {"on_dev": summary(on_dev)} if on_dev else {}
                rows.append({"chain": chain, "way": way, **about, **summary(measured), **chosen_by})
                print(f"{name}, {chain}, {way}: {len(measured)} seeds", flush=True)
            place.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
