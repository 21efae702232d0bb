"""The ledger of the error level: what takes a look, what takes none, and what brings something back."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from graceful.evaluation.outcomes import SERVED, Outcomes, live_state
from graceful.evaluation.policy import RolloutPolicy
from graceful.files import set_crash_hook
from graceful.flows.commands.status import workspace_status
from graceful.flows.store.evaluation_set import EvaluationSet, save_evaluation_set
from graceful.flows.store.evaluations import recompute
from graceful.flows.store.events import Looked
from graceful.flows.store.ledger import next_look, outcomes_digest, take_look
from graceful.flows.store.registry import Registry
from tests.flows import running
from tests.synthetic import labelled

POLICY = RolloutPolicy()


@pytest.fixture
def root(tmp_path):
    return str(tmp_path)


@pytest.fixture
def registry(root):
    return Registry(f"{root}/registry", create=True)


def evaluation_set(root, identities, images=("q0", "q1"), name=None, clusters=None):
    queries, _ = labelled(list(identities), list(images))
    found = EvaluationSet(
        name or f"set-{'-'.join(identities)}-{'-'.join(images)}", queries, queries, queries.labels, {}
    )  # fmt: skip
    if clusters is not None:
        found = replace(found, clusters=np.array(clusters))
    save_evaluation_set(root, found)
    return found


def outcomes(ranks, champion="g1", candidate="g2", extra=None):
    states = {
        SERVED: [1, 1, 1, 1],
        live_state(champion, champion): [1, 1, 1, 1],
        live_state(candidate, champion): ranks,
    }
    states |= extra or {}
    ids = np.array([f"q{i}" for i in range(4)])
    ranked = {name: np.array(values, np.int32) for name, values in states.items()}
    return Outcomes(ids, ids, ids, {}, ranked, {name: (1 / rank).astype(np.float32) for name, rank in ranked.items()})


def take(registry, root, found, ranks=(1, 1, 1, 2), candidate="g2", policy=POLICY, **kwargs):
    return take_look(registry, root, found, outcomes(list(ranks), candidate=candidate, **kwargs), candidate, policy)


def test_candidates_on_one_set_share_alpha(registry, root):
    found = evaluation_set(root, ["a", "b", "c"])
    looks = [take(registry, root, found, candidate=f"g{number}") for number in range(2, 12)]
    assert [look.number for look in looks] == list(range(1, 11))
    assert [look.share for look in looks[:3]] == pytest.approx([1 / 5, 2 / 15, 2 / 21])
    assert looks[-1].spent + looks[-1].share == pytest.approx(10 / 14)
    assert sum(look.share for look in looks) < 1


def test_the_same_candidate_on_the_same_outcomes_takes_no_second_look(registry, root):
    found = evaluation_set(root, ["a", "b", "c"])
    first = take(registry, root, found)
    assert take(registry, root, found) == first
    assert take(registry, root, found, policy=POLICY.model_copy(update={"max_nfr": 0.05})) == first
    # What is measured for a policy, and not what the policy is judged by, makes no other look.
    assert take(registry, root, found, extra={"fraction/0.3": [1, 1, 1, 1], "pair/g1/g1": [1, 1, 1, 1]}) == first
    assert len(registry.events(Looked)) == 1


@pytest.mark.parametrize("change", ["ranks", "champion", "candidate", "plan"])
def test_other_outcomes_another_candidate_or_no_plan_is_another_look(registry, root, change):
    found = evaluation_set(root, ["a", "b", "c"])
    take(registry, root, found)
    changed = {
        "ranks": {"ranks": (1, 1, 2, 1)},
        "champion": {"champion": "g3"},
        "candidate": {"candidate": "g4"},
        "plan": {"policy": POLICY.model_copy(update={"alpha_spending": "none"})},
    }[change]
    second = take(registry, root, found, **changed)
    assert second.number == 2
    assert second.spent == pytest.approx(0.2)
    assert second.share == pytest.approx(1.0 if change == "plan" else 2 / 15)


def test_average_precision_is_part_of_the_outcomes(root):
    one = outcomes([1, 1, 1, 1])
    precision = {**one.average_precision, SERVED: np.array([1, 1, 1, 0.5], np.float32)}
    assert outcomes_digest(replace(one, average_precision=precision)) != outcomes_digest(one)


def test_fresh_identities_bring_back_their_share_and_a_fresh_set_everything(registry, root):
    take(registry, root, evaluation_set(root, ["a", "b"]))
    grown = take(registry, root, evaluation_set(root, ["a", "b", "c", "d"]), candidate="g3")
    assert (grown.fresh, grown.number) == (0.5, 2)
    assert grown.spent == pytest.approx(0.1)
    fresh = take(registry, root, evaluation_set(root, ["e", "f"]), candidate="g4")
    assert (fresh.fresh, fresh.number, fresh.spent) == (1.0, 1, 0.0)
    # What c and d have spent is one look, what a and b have is two.
    again = next_look(registry.events(Looked), root, evaluation_set(root, ["a", "d"]), POLICY)
    assert again.spent == pytest.approx((0.2 + grown.share + grown.share) / 2)


def test_a_further_query_of_a_known_identity_brings_nothing_back(registry, root):
    take(registry, root, evaluation_set(root, ["a", "b"]))
    for images in (["q0", "q1", "q2"], ["q1"], ["q8", "q9"]):
        look = next_look(registry.events(Looked), root, evaluation_set(root, ["a", "b"], images), POLICY)
        assert (look.fresh, look.spent, look.number) == (0.0, pytest.approx(0.2), 2)


def test_many_fresh_identities_of_few_queries_do_not_outweigh_the_queries_of_known_ones(registry, root):
    take(registry, root, evaluation_set(root, ["a", "b"]))
    queries, _ = labelled(["a", "b"], [f"q{n}" for n in range(9)])
    others, _ = labelled(["c", "d", "e", "f"], ["q0"])
    both = replace(
        queries,
        content_sha256=[*queries.content_sha256, *others.content_sha256],
        labels=np.array([*queries.labels, *others.labels]),
        sources=[*queries.sources, *others.sources],
    )
    look = next_look(registry.events(Looked), root, EvaluationSet("both", both, both, both.labels, {}), POLICY)
    assert look.fresh == pytest.approx(4 / 6)
    assert look.spent == pytest.approx(0.2 * 18 / 22)


def test_renaming_identities_brings_nothing_back(registry, root):
    found = evaluation_set(root, ["a", "b"])
    take(registry, root, found)
    renamed = replace(found, set_id="renamed", clusters=np.array(["x", "x", "y", "y"]))
    look = next_look(registry.events(Looked), root, renamed, POLICY)
    assert (look.fresh, look.spent) == (0.0, pytest.approx(0.2))


def test_a_plan_that_begins_after_looks_without_one_finds_nothing_left(registry, root):
    found = evaluation_set(root, ["a", "b"])
    free = POLICY.model_copy(update={"alpha_spending": "none"})
    assert take(registry, root, found, policy=free).share == 1.0
    assert take(registry, root, found, candidate="g3").share == 0.0


def test_killed_at_any_point_of_taking_a_look_none_is_lost_and_none_taken_twice(registry, root):
    class Killed(BaseException):
        pass

    found = evaluation_set(root, ["a", "b"])
    expected = next_look([], root, found, POLICY)

    def die(wanted):
        def hook(point):
            if point == wanted:
                set_crash_hook(None)
                raise Killed

        return hook

    for point in ("table-file-written", "table-committed", "look-taken"):
        set_crash_hook(die(point))
        with pytest.raises(Killed):
            take(registry, root, found, candidate=f"g-{point}")
        look = take(Registry(registry.location), root, found, candidate=f"g-{point}")
        assert look.number == len(registry.events(Looked))
        if point == "table-file-written":
            assert look == expected
    assert [event.payload.look.number for event in registry.events(Looked)] == [1, 2, 3]


def test_two_that_look_at_the_same_moment_take_two_looks(registry, root):
    found = evaluation_set(root, ["a", "b"])
    handles = [Registry(registry.location) for _ in range(4)]
    threads = [
        threading.Thread(target=take, args=(handle, root, found), kwargs={"candidate": f"g{number}"})
        for number, handle in enumerate(handles)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    looks = [event.payload.look for event in registry.events(Looked)]
    assert sorted(look.number for look in looks) == [1, 2, 3, 4]
    assert sum(look.share for look in looks) == pytest.approx(4 / 8)


def test_an_update_takes_one_look_that_the_stored_evaluation_reproduces_and_the_status_tells(workspace_root):
    registry = Registry(str(workspace_root / "registry"))
    assert registry.events(Looked) == []  # the first generation is not compared with anything
    result = running.update(workspace_root)
    (event,) = registry.events(Looked)
    assert event.generation == result.candidate
    stored, again = recompute(result.evaluation)
    assert stored.evidence.look == stored.question.look == event.payload.look
    assert stored.evidence.alpha == pytest.approx(0.05 / 5)
    assert again.evidence.model_dump_json() == stored.evidence.model_dump_json()
    assert again.decision == stored.decision
    assert running.update(workspace_root).repeated
    assert len(registry.events(Looked)) == 1
    told = workspace_status(str(workspace_root))["error_level"]
    assert (told["judgements"], told["spent"], told["next_share"]) == (1, 0.2, pytest.approx(2 / 15, abs=1e-4))
