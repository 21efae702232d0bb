"""Decisions that wait for a person: nothing moves before an answer, the first answer counts, and a stale one is refused."""

import json
import time

import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.commands.suggestions import settling_commands
from graceful.flows.store.approvals import AlreadyAnsweredError, answer, awaited
from graceful.flows.store.events import ApprovalAnswered, ApprovalAsked, Decided, UpdateStarted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.serving import release_previous
from tests.flows import running, tiny

WAITING, HELD = 5, 3
ASKING = {**tiny.grown(5), "rollout.approval": "always"}


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def document(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def asked_once(bootstrapped, tmp_path_factory, digits_file):
    root = tiny.copy_workspace(bootstrapped, tmp_path_factory.mktemp("asked") / "workspace")
    tiny.write_config(root, digits_file, ASKING)
    result = running.update(root)
    assert (result.outcome, result.approval) == ("COMPATIBLE_ROLLOUT", "waiting")
    return root, result.candidate


@pytest.fixture
def asked(asked_once, tmp_path):
    """A workspace whose second generation is to be rolled out, and waits for a person."""
    return tiny.copy_workspace(asked_once[0], tmp_path / "workspace"), asked_once[1]


def kinds(root):
    return [event.kind for event in Workspace(str(root)).registry.history()]


def test_nothing_moves_is_certified_or_embedded_before_somebody_accepts(asked, bootstrapped):
    root, candidate = asked
    before, now = Workspace(str(bootstrapped)), Workspace(str(root))
    assert now.registry.serving() == before.registry.serving()
    assert now.registry.certificates() == before.registry.certificates()
    assert now.gallery.generations() == before.gallery.generations()
    assert list(root.glob("evaluations/*/report.html")), "the evidence is there to be looked at"
    found = document("status", "--root", root)["awaiting_approval"]
    assert (found["generation"], found["outcome"], found["stale"]) == (candidate, "COMPATIBLE_ROLLOUT", None)
    told = run("status", "--root", root).stdout
    for word in ("AWAITING APPROVAL", f"graceful accept {candidate}", f"graceful reject {candidate}"):
        assert word in told
    again = running.update(root)
    assert (again.approval, again.repeated) == ("waiting", False)
    assert kinds(root).count("approval_asked") == 1
    assert "update_completed" not in kinds(root)[kinds(root).index("approval_asked") :]


def test_an_accepted_decision_is_carried_out_as_it_was_made_and_says_who_and_why(asked):
    root, candidate = asked
    found = document("accept", "g002", "--reason", "looked at the flips", "--by", "Ada", "--root", root)
    assert (found["serving"], found["decided"], found["ordered"]) == (candidate, *2 * ["COMPATIBLE_ROLLOUT"])
    registry = Workspace(str(root)).registry
    (given,) = registry.events(ApprovalAnswered)
    assert (given.payload.answer, given.payload.by, given.payload.reason) == ("accepted", "Ada", "looked at the flips")
    assert given.generation == candidate
    assert registry.serving().moved_by == registry.events(Decided)[-1].payload.evaluation, "no order of the operator"
    assert "overridden" not in kinds(root)
    assert document("status", "--root", root)["awaiting_approval"] is None
    told = " ".join(run("history", "--root", root).stdout.split())
    assert "accepted by operator Ada: looked at the flips" in told
    done = running.update(root)
    assert (done.repeated, done.approval, done.champion) == (True, "accepted", candidate)
    assert "serves already" in run("accept", "g002", "--reason", "again", "--root", root, code=1).stderr


def test_a_decision_accepted_before_everything_was_restarted_is_carried_out_by_the_next_update(asked):
    root, candidate = asked
    registry = Workspace(str(root)).registry
    answer(registry, awaited(registry), "accepted", by="Ada", reason="yes")
    result = running.update(root)
    assert (result.approval, result.champion) == ("accepted", candidate)
    assert result.word == "accepted by Ada: yes"


def test_a_rejected_decision_is_held_and_cannot_be_accepted_afterwards(asked):
    root, candidate = asked
    before = Workspace(str(root)).registry.serving()
    run("reject", "g002", "--reason", "too many flips", "--root", root)
    assert "graceful accept" not in " ".join(settling_commands(str(root)))
    refused = run("accept", "g002", "--reason", "but", "--root", root, code=1).stderr
    assert "too many flips" in refused
    assert "--again" in refused
    result = running.update(root)
    assert (result.approval, result.is_held, result.repeated) == ("rejected", True, False)
    assert running.update(root).repeated
    assert Workspace(str(root)).registry.serving().champion == before.champion
    (given,) = Workspace(str(root)).registry.events(ApprovalAnswered)
    assert "@" in given.payload.by, "who runs the command"


def test_the_first_answer_counts(asked):
    registry = Workspace(str(asked[0])).registry
    waiting = awaited(registry)
    answer(registry, waiting, "accepted", by="Ada", reason="yes")
    answer(registry, waiting, "accepted", by="Ada", reason="yes")
    with pytest.raises(AlreadyAnsweredError, match="accepted by Ada: yes"):
        answer(registry, waiting, "rejected", by="Bob", reason="no")
    assert len(registry.events(ApprovalAnswered)) == 1


def test_what_nobody_accepts_in_time_is_held(asked, monkeypatch):
    root, candidate = asked
    late = time.time() + 169 * 3600
    monkeypatch.setattr("graceful.flows.store.approvals.time.time", lambda: late)
    assert "in time" in document("status", "--root", root)["awaiting_approval"]["stale"]
    assert settling_commands(str(root))[0].startswith("graceful update")
    assert "nobody accepted it by" in run("accept", "g002", "--reason", "late", "--root", root, code=1).stderr
    result = running.update(root)
    assert (result.approval, result.is_held) == ("expired", True)
    assert Workspace(str(root)).registry.serving().champion != candidate
    assert "held by nobody: not accepted in time" in run("history", "--root", root).stdout


def test_a_decision_about_another_champion_is_refused_and_judged_anew(asked):
    """A rollback, or any other move, between question and answer."""
    root, candidate = asked
    workspace = Workspace(str(root))
    first = workspace.registry.serving().champion
    workspace.registry.change_serving(lambda _: {"champion": None, "moved_by": "an incident"})
    refused = run("accept", "g002", "--reason", "yes", "--root", root, code=1).stderr
    assert f"expected champion {first}, about which it was judged, found None" in refused
    assert workspace.registry.events(ApprovalAnswered) == [], "what was refused is no answer"
    assert "judged against" in document("status", "--root", root)["awaiting_approval"]["stale"]
    result = running.update(root)
    assert len(workspace.registry.events(UpdateStarted)) == 3
    assert (result.update_key, result.approval) == (workspace.registry.events(UpdateStarted)[-1].payload.update_key, "waiting")


def test_a_gallery_that_has_changed_since_is_refused_and_judged_anew(asked, digits_file):
    """Items that came with another owner: the evidence was about another mix."""
    root, candidate = asked
    tiny.write_config(root, digits_file, {**ASKING, "gallery.max_mix_drift": 0.0})
    workspace = Workspace(str(root))
    gone = workspace.view(workspace.registry.serving().champion)
    workspace.registry.revoke([(gone.readable[0], gone.readable[0])], reason="test")
    workspace.registry.certify([(gone.readable[0], gone.readable[0])], reason="test")
    evaluation = json.loads(next(root.glob("evaluations/*/evidence.json")).read_text())
    assert evaluation["live_owners"]


def test_only_full_backfills_wait_where_only_they_are_to(bootstrapped, tmp_path, digits_file):
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    tiny.write_config(root, digits_file, {**tiny.grown(5), "rollout.approval": "full_backfill"})
    result = running.update(root)
    assert (result.outcome, result.approval) == ("COMPATIBLE_ROLLOUT", None)
    assert result.champion == result.candidate


def test_a_fraction_is_refused_for_what_is_carried_out_as_decided(asked):
    refused = run("accept", "g002", "--reason", "half", "--fraction", "0.5", "--root", asked[0], code=1).stderr
    assert "leave it out" in refused


def test_approvals_switched_off_carry_out_what_waits_but_not_what_was_rejected(asked, digits_file, tmp_path):
    root, candidate = asked
    other = tiny.copy_workspace(root, tmp_path / "other")
    run("reject", "g002", "--reason", "no", "--root", other)
    for place in (root, other):
        tiny.write_config(place, digits_file, tiny.grown(5))
    assert running.update(root).champion == candidate
    assert running.update(other).champion != candidate
