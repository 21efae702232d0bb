"""Agreement of clusterings, names that survive and churn, against slow loops over pairs and all matchings."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from graceful.evaluation import clustering
from graceful.evaluation.clustering import (
    b_cubed,
    b_cubed_values,
    changed_person,
    churn,
    keep_names,
    pairwise_agreement,
    renamed,
    variation_of_information,
)

SIZES = [(1, 1), (7, 3), (30, 6), (60, 4)]
CASES = [(seed, num_items, num_labels) for seed, (num_items, num_labels) in enumerate(SIZES)]


def labellings(seed: int, num_items: int, num_labels: int, nobody: bool = True) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    names = [*("abcdefgh"[:num_labels]), *([""] if nobody else [])]
    return rng.choice(names, num_items).tolist(), rng.choice(names, num_items).tolist()


def together(labels: list[str], i: int, j: int) -> bool:
    return i == j or (labels[i] != "" and labels[i] == labels[j])


@pytest.mark.parametrize(("seed", "num_items", "num_labels"), CASES)
def test_pairwise_agreement_is_that_of_a_loop_over_all_pairs(seed: int, num_items: int, num_labels: int) -> None:
    reference, found = labellings(seed, num_items, num_labels)
    pairs = list(itertools.combinations(range(num_items), 2))
    both = sum(together(reference, i, j) and together(found, i, j) for i, j in pairs)
    known, ours = (sum(together(labels, i, j) for i, j in pairs) for labels in (reference, found))
    expected = (
        both / ours if ours else math.nan,
        both / known if known else math.nan,
        2 * both / (known + ours) if known + ours else math.nan,
    )
    assert pairwise_agreement(reference, found) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("seed", "num_items", "num_labels"), CASES)
def test_b_cubed_is_that_of_a_loop_over_items(seed: int, num_items: int, num_labels: int) -> None:
    reference, found = labellings(seed, num_items, num_labels)
    precisions, recalls = [], []
    for i in range(num_items):
        both = sum(together(reference, i, j) and together(found, i, j) for j in range(num_items))
        precisions.append(both / sum(together(found, i, j) for j in range(num_items)))
        recalls.append(both / sum(together(reference, i, j) for j in range(num_items)))
    precision, recall = b_cubed_values(reference, found)
    assert precision == pytest.approx(precisions)
    assert recall == pytest.approx(recalls)
    mean, other = np.mean(precisions), np.mean(recalls)
    assert b_cubed(reference, found) == pytest.approx((mean, other, 2 * mean * other / (mean + other)))


@pytest.mark.parametrize(("seed", "num_items", "num_labels"), CASES)
def test_variation_of_information_is_the_sum_of_two_conditional_entropies(
    seed: int, num_items: int, num_labels: int
) -> None:
    first, second = labellings(seed, num_items, num_labels)
    total = 0.0
    for i in range(num_items):  # the mean over items of -log P(own cluster of one | own cluster of the other)
        both = sum(together(first, i, j) and together(second, i, j) for j in range(num_items))
        for labels in (first, second):
            total -= math.log(both / sum(together(labels, i, j) for j in range(num_items))) / num_items
    assert variation_of_information(first, second) == pytest.approx(total)
    assert variation_of_information(first, second) == pytest.approx(variation_of_information(second, first))


def test_agreement_knows_no_names_and_no_order() -> None:
    reference, found = labellings(3, 50, 5)
    order = np.random.default_rng(0).permutation(50)
    shuffled = [np.array(labels)[order] for labels in (reference, [f"x{label}" if label else "" for label in found])]
    assert pairwise_agreement(*shuffled) == pytest.approx(pairwise_agreement(reference, found))
    assert b_cubed(*shuffled) == pytest.approx(b_cubed(reference, found))
    assert variation_of_information(*shuffled) == pytest.approx(variation_of_information(reference, found))


def test_the_same_clusters_agree_fully_and_nothing_has_no_agreement() -> None:
    assert pairwise_agreement(["a", "a", "b"], ["y", "y", "x"]) == (1, 1, 1)
    assert b_cubed(["a", "a", "b"], ["y", "y", "x"]) == (1, 1, 1)
    assert variation_of_information(["a", "a", "b"], ["y", "y", "x"]) == 0
    assert variation_of_information([], []) == 0
    assert all(math.isnan(value) for value in (*pairwise_agreement([], []), *b_cubed([], [])))
    assert math.isnan(pairwise_agreement(["", ""], ["", ""]).f)  # nobody is alike nobody


def total_kept(before: list[str], after: list[str], names: dict[str, str]) -> int:
    return sum(name != "" and names.get(cluster) == name for name, cluster in zip(before, after, strict=True))


def components(before: list[str], after: list[str]) -> list[tuple[list[str], list[str]]]:
    """Names and clusters that photos connect, each in the order of their first photo."""
    old, new = (list(dict.fromkeys(label for label in labels if label)) for labels in (before, after))
    edges = {(b, a) for b, a in zip(before, after, strict=True) if b and a}
    found, left = [], [name for name in old if any(name == b for b, _ in edges)]
    while left:
        mine: tuple[set[str], set[str]] = ({left[0]}, set())
        for _ in edges:
            mine[1].update(a for b, a in edges if b in mine[0])
            mine[0].update(b for b, a in edges if a in mine[1])
        found.append(([name for name in old if name in mine[0]], [cluster for cluster in new if cluster in mine[1]]))
        left = [name for name in left if name not in mine[0]]
    return found


@pytest.mark.parametrize("seed", range(60))
def test_naming_is_the_best_of_all_and_ties_go_by_first_photo(seed: int) -> None:
    before, after = labellings(seed, 14, 4)
    names = keep_names(before, after)
    assert len(set(names.values())) == len(names)
    shared = {(b, a) for b, a in zip(before, after, strict=True)}
    for old, new in components(before, after):

        def value(naming: dict[str, str], old: list[str] = old, new: list[str] = new) -> tuple[int, int]:
            ranks = [(len(old) - old.index(name)) * (len(new) - new.index(c)) for c, name in naming.items()]
            return total_kept(before, after, naming), sum(ranks)

        best = (0, 0)
        for chosen in itertools.permutations([*old, *[None] * len(new)], len(new)):
            naming = {cluster: name for cluster, name in zip(new, chosen, strict=True) if name is not None}
            if all((name, cluster) in shared for cluster, name in naming.items()):
                best = max(best, value(naming))
        assert value({cluster: name for cluster, name in names.items() if cluster in new}) == best


def test_ties_are_those_of_the_documentation() -> None:
    assert keep_names(["Ann"] * 4, ["z", "z", "b", "b"]) == {"z": "Ann"}  # of two halves the first photo's
    assert keep_names(["Zoe", "Zoe", "Ann", "Ann"], ["1"] * 4) == {"1": "Zoe"}  # of two names the first photo's
    crossed = keep_names(["Ann", "Bob", "Ann", "Bob"], ["x", "x", "y", "y"])
    assert crossed == {"x": "Ann", "y": "Bob"}


@pytest.mark.parametrize("seed", range(5))
def test_naming_keeps_as_many_as_the_dense_assignment_and_ignores_what_clusters_are_called(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 40, 600)
    after = np.where(rng.random(600) < 0.7, before, rng.integers(0, 50, 600))
    names = keep_names(before, after)
    table = np.zeros((50, 50), int)
    np.add.at(table, (before, after), 1)
    rows, columns = linear_sum_assignment(-table)
    kept = total_kept([str(name) for name in before], [str(cluster) for cluster in after], names)
    assert kept == table[rows, columns].sum()
    other = keep_names(before, [f"c{999 - cluster}" for cluster in after])
    assert {f"c{999 - int(cluster)}": name for cluster, name in names.items()} == other


def test_naming_beyond_exact_ranks_still_keeps_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = labellings(2, 60, 8, nobody=False)
    expected = total_kept(before, after, keep_names(before, after))
    monkeypatch.setattr(clustering, "MAX_EXACT", 0)
    assert total_kept(before, after, keep_names(before, after)) == expected


def test_a_named_person_stays_named_through_a_new_clustering() -> None:
    before = ["Ann"] * 30 + ["Bob"] * 20 + [""] * 10
    after = ["c9"] * 28 + ["c1"] * 2 + ["c1"] * 20 + ["c4"] * 10
    names = keep_names(before, after, new_names=["person 3"])
    assert names == {"c9": "Ann", "c1": "Bob", "c4": "person 3"}
    seen = churn(before, renamed(after, names))
    assert (seen.num_items, seen.num_changed, seen.new) == (50, 2, ("person 3",))
    assert seen.share == 0.04
    assert changed_person(before, renamed(after, names)).nonzero()[0].tolist() == [28, 29]


def test_a_part_below_the_limit_is_a_changed_photo_and_no_split() -> None:
    before, after = ["Ann"] * 5, ["Ann"] * 4 + ["Bob"]
    assert churn(before, after).split == ()
    assert churn(before, after, min_photos=1).split == ("Ann",)
    assert churn(["Ann", "Ann", "Bob", "Bob"], ["Ann"] * 4).merged == ("Ann",)
    lost = churn(["Ann", "Ann"], ["", ""])
    assert (lost.num_changed, lost.gone, lost.split) == (2, ("Ann",), ())
    nobody = churn(["", ""], ["Ann", ""])
    assert (nobody.num_items, nobody.num_changed, nobody.new) == (0, 0, ("Ann",))
    assert math.isnan(nobody.share)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="same items twice, found shapes"):
        pairwise_agreement(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="expected 2 new names, found 1"):
        keep_names(["", ""], ["a", "b"], new_names=["x"])
    with pytest.raises(ValueError, match="expected min_photos >= 1, found 0"):
        churn(["a"], ["a"], min_photos=0)


def test_memory_grows_with_items_and_not_with_pairs_of_clusters() -> None:
    """20,000 clusters on both sides: a dense table of overlaps would take 3 GB."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 20_000, 60_000)
    after = np.where(rng.random(60_000) < 0.9, before, rng.integers(0, 20_000, 60_000))
    tracemalloc.start()
    names = keep_names(before, after)
    pairwise_agreement(before, after)
    b_cubed(before, after)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(names) > 18_000
    assert peak < 150 * 2**20
