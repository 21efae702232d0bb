"""Decisions that wait for a person: nothing moves before an answer, the first one counts, a stale one is refused."""

import asyncio
import functools
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pyarrow as pa
import pytest
from prefect.client.schemas.objects import StateType

from graceful.flows import overlap
from graceful.flows.commands.suggestions import settling_commands
from graceful.flows.settings.rollout import RolloutConfig
from graceful.flows.store.approvals import AlreadyAnsweredError, answer, approval_of, awaited, is_answered
from graceful.flows.store.events import ApprovalAnswered, ApprovalAsked, Decided, UpdateStarted
from graceful.flows.store.workspace import Workspace
from graceful.indexing.items import NEW_ITEM_COLUMNS
from tests.flows import crash_table, running, tiny
from tests.flows.crash_table import G2, G3
from tests.flows.running import command as run
from tests.flows.running import document

ASKING = {**tiny.grown(5), "rollout.approval": "always"}


# A small world of known vectors: what an update does behind the judgement -----------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "workspace"
    crash_table.make_world(str(root))
    return root


@pytest.fixture
def workspace(world, tmp_path):
    return crash_table.open_world(str(tiny.copy_workspace(world, tmp_path / "workspace")))


def update(workspace, approval="always", outcome="COMPATIBLE_ROLLOUT"):
    crash_table.update(workspace, G3, G2, outcome, (G2,), 0.6, RolloutConfig(approval=approval))
    return workspace.registry.serving().champion


@pytest.mark.parametrize(
    ("approval", "outcome", "waits"),
    [
        ("never", "FULL_BACKFILL", False), ("full_backfill", "COMPATIBLE_ROLLOUT", False),
        ("full_backfill", "FULL_BACKFILL", True), ("always", "COMPATIBLE_ROLLOUT", True),
        ("always", "HOLD", None),
    ],
)  # fmt: skip
def test_what_waits_is_said_by_the_configuration(workspace, approval, outcome, waits):
    before = (workspace.registry.certificates(), workspace.gallery.generations(), workspace.registry.serving())
    assert (update(workspace, approval, outcome) == G3) == (waits is False)
    assert (awaited(workspace.registry) is not None) == bool(waits)
    if waits:
        after = (workspace.registry.certificates(), workspace.gallery.generations(), workspace.registry.serving())
        assert after == before, "nothing is certified, embedded or moved before somebody accepts"


def test_the_first_answer_counts(workspace):
    update(workspace)
    waiting = awaited(workspace.registry)
    answer(workspace.registry, waiting, "accepted", by="Ada", reason="yes")
    answer(workspace.registry, waiting, "accepted", by="Ada", reason="yes")
    with pytest.raises(AlreadyAnsweredError, match="accepted by Ada: yes"):
        answer(workspace.registry, waiting, "rejected", by="Bob", reason="no")
    assert len(workspace.registry.events(ApprovalAnswered)) == 1
    assert update(workspace) == G3


def test_what_nobody_accepts_in_time_is_held(workspace, monkeypatch):
    update(workspace)
    waiting = awaited(workspace.registry)
    assert not is_answered(workspace.root, waiting.evaluation)
    late = time.time() + 169 * 3600
    monkeypatch.setattr("graceful.flows.store.approvals.time.time", lambda: late)
    assert is_answered(workspace.root, waiting.evaluation), "it waits no longer"
    with pytest.raises(AlreadyAnsweredError, match="nobody accepted it by"):
        answer(workspace.registry, waiting, "accepted", by="Ada", reason="late")
    assert update(workspace) == G2
    assert approval_of(workspace.registry, waiting.evaluation).word == "expired"
    assert update(workspace, "never") == G2, "nor when nobody is asked any more"


def test_approvals_switched_off_carry_out_what_waits_but_not_what_was_rejected(workspace, tmp_path):
    update(workspace)
    other = crash_table.open_world(str(tiny.copy_workspace(workspace.root, tmp_path / "other")))
    answer(other.registry, awaited(other.registry), "rejected", by="Ada", reason="no")
    assert update(workspace, "never") == G3
    (given,) = workspace.registry.events(ApprovalAnswered)
    assert given.payload.reason == "rollout.approval asks nobody any more"
    assert update(other, "never") == G2
    assert awaited(other.registry) is None


def test_a_decision_that_was_carried_out_before_anybody_was_to_be_asked_is_not_asked_about(workspace):
    assert update(workspace, "never") == G3
    update(workspace)
    assert workspace.registry.events(ApprovalAsked) == []


# The real commands --------------------------------------------------------------------------------------------------


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


def test_what_waits_is_said_with_its_evidence_and_accepted_as_it_was_decided(asked):
    root, candidate = asked
    assert list(root.glob("evaluations/*/report.html")), "the evidence is there to be looked at"
    found = document("status", "--root", root)["awaiting_approval"]
    assert (found["generation"], found["outcome"], found["stale"]) == (candidate, "COMPATIBLE_ROLLOUT", None)
    told = run("status", "--root", root).stdout
    for word in ("AWAITING APPROVAL", f"graceful accept {candidate}", f"graceful reject {candidate}"):
        assert word in told
    assert "update_completed" not in kinds(root)[kinds(root).index("approval_asked") :]
    half = ("accept", "g002", "--reason", "half", "--fraction", "0.5", "--root", root)
    assert "leave it out" in run(*half, code=1).stderr

    found = document("accept", "g002", "--reason", "looked at the flips", "--by", "Ada", "--root", root)
    assert (found["serving"], found["decided"], found["ordered"]) == (candidate, *2 * ["COMPATIBLE_ROLLOUT"])
    registry = Workspace(str(root)).registry
    (given,) = registry.events(ApprovalAnswered)
    assert (given.payload.answer, given.payload.by, given.payload.reason) == ("accepted", "Ada", "looked at the flips")
    assert given.generation == candidate
    assert registry.serving().moved_by == registry.events(Decided)[-1].payload.evaluation, "no order of the operator"
    assert "overridden" not in kinds(root)
    assert document("status", "--root", root)["awaiting_approval"] is None
    assert "accepted by operator Ada: looked at the flips" in " ".join(run("history", "--root", root).stdout.split())
    done = running.update(root)
    assert (done.repeated, done.approval, done.champion) == (True, "accepted", candidate)
    assert "serves already" in run("accept", "g002", "--reason", "again", "--root", root, code=1).stderr


def test_a_rejected_decision_is_held_by_the_next_update_and_cannot_be_accepted_afterwards(asked):
    root, _ = asked
    before = Workspace(str(root)).registry.serving()
    run("reject", "g002", "--reason", "too many flips", "--root", root)
    assert "graceful accept" not in " ".join(settling_commands(str(root)))
    refused = run("accept", "g002", "--reason", "but", "--root", root, code=1).stderr
    assert "too many flips" in refused
    assert "--again" in refused
    result = running.update(root)
    assert (result.approval, result.is_held, result.repeated) == ("rejected", True, False)
    assert Workspace(str(root)).registry.serving().champion == before.champion
    (given,) = Workspace(str(root)).registry.events(ApprovalAnswered)
    assert "@" in given.payload.by, "who runs the command"
    assert running.update(root).repeated


def test_a_decision_about_another_champion_is_refused_and_judged_anew(asked):
    """A rollback, or any other move, between question and answer."""
    root, _ = asked
    registry = Workspace(str(root)).registry
    first = registry.serving().champion
    registry.change_serving(lambda _: {"champion": None, "moved_by": "an incident"})
    refused = run("accept", "g002", "--reason", "yes", "--root", root, code=1).stderr
    assert f"expected champion {first}, about which it was judged, found None" in refused
    assert registry.events(ApprovalAnswered) == [], "what was refused is no answer"
    assert "judged against" in document("status", "--root", root)["awaiting_approval"]["stale"]
    assert settling_commands(str(root))[0].startswith("graceful update")
    result = running.update(root)
    assert result.update_key == registry.events(UpdateStarted)[-1].payload.update_key
    assert len(registry.events(UpdateStarted)) == 3


def test_a_gallery_that_has_changed_since_is_refused_judged_anew_and_asked_about_again(asked):
    """Items whose vectors are not there yet: the evidence was about another mix."""
    root, _ = asked
    workspace = Workspace(str(root))
    items = workspace.gallery.items_table.snapshot().rows(list(NEW_ITEM_COLUMNS))
    late = [{**row, "item_id": f"late-{row['item_id']}"} for row in items.slice(0, 5).to_pylist()]
    workspace.gallery.ingest(pa.Table.from_pylist(late, schema=items.schema))
    refused = run("accept", "g002", "--reason", "yes", "--root", root, code=1).stderr
    assert "found 4.8% of it with other vectors, above 2.0%" in refused
    assert workspace.registry.events(ApprovalAnswered) == []
    assert running.update(root).approval == "waiting"
    first, second = workspace.registry.events(ApprovalAsked)
    assert second.payload.evaluation == f"{first.payload.evaluation}-drift2"
    assert awaited(workspace.registry).evaluation == second.payload.evaluation


class Runs:
    """What a flow server says of the runs of a deployment, and which of them were given another state."""

    def __init__(self, *runs):
        self.runs, self.changed = runs, {}

    async def read_flow_runs(self, *, flow_run_filter, **_):
        return [run for run in self.runs if run.state_type in flow_run_filter.state.type.any_]

    async def set_flow_run_state(self, identity, state, **_):
        self.changed[identity] = (state.type, state.name)


def flow_run(kind, **fields):
    past = datetime(2026, 1, 1, tzinfo=UTC)
    defaults = {"id": uuid4(), "state_type": kind, "auto_scheduled": True, "run_count": 0, "expected_start_time": past}
    return SimpleNamespace(**{**defaults, **fields})


def test_a_run_of_the_schedule_that_waited_for_a_person_is_not_skipped_when_it_goes_on():
    working, resumed, due = (
        flow_run(StateType.RUNNING), flow_run(StateType.SCHEDULED, run_count=1), flow_run(StateType.SCHEDULED)
    )  # fmt: skip
    client = Runs(working, resumed, due)
    asyncio.run(overlap.look(client, uuid4(), "skip"))
    assert client.changed == {due.id: (StateType.CANCELLED, "Skipped")}


def test_a_suspended_run_whose_decision_was_answered_elsewhere_is_started_again():
    def suspended(key):
        return flow_run(StateType.PAUSED, state=SimpleNamespace(state_details=SimpleNamespace(pause_key=key)))

    answered, waits, foreign = suspended("e1"), suspended("e2"), suspended(None)
    client = Runs(answered, waits, foreign, flow_run(StateType.RUNNING))
    asyncio.run(overlap.wake_answered(client, uuid4(), lambda key: key == "e1"))
    assert client.changed == {answered.id: (StateType.SCHEDULED, "Resuming")}


# The form in the flow UI --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_deployed_run_is_suspended_and_goes_on_when_its_form_is_filled_in(asked, spawn, flow_server, tmp_path):
    """A real server; the process of the run ends while it waits, and another one carries the answer out."""
    root, candidate = asked
    ask = functools.partial(running.ask_server, flow_server["PREFECT_API_URL"])

    def carry_out(run):
        log = tmp_path / "log"
        process = spawn(running.deployed_run_in_child, run, str(log), flow_server)
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
        return ask("GET", f"/flow_runs/{run}")

    flow = ask("POST", "/flows/", {"name": "graceful-update"})["id"]
    deployment = ask("POST", "/deployments/", {"name": "asking", "flow_id": flow, "enforce_parameter_schema": False})[
        "id"
    ]
    start = {"parameters": {"workspace": str(root)}, "state": {"type": "SCHEDULED"}}
    run, other = (ask("POST", f"/deployments/{deployment}/create_flow_run", start)["id"] for _ in range(2))
    waiting = carry_out(run)
    assert (waiting["state_type"], waiting["state_name"]) == ("PAUSED", "AWAITING APPROVAL")
    assert "AWAITING APPROVAL" in waiting["tags"]
    keys = waiting["state"]["state_details"]["run_input_keyset"]
    form = ask("GET", f"/flow_runs/{run}/input/{keys['schema']}")
    assert set(form["properties"]) == {"answer", "reason", "by"}
    assert form["properties"]["answer"]["enum"] == ["accept", "reject"]
    described = ask("GET", f"/flow_runs/{run}/input/{keys['description']}")
    assert f"graceful accept {candidate}" in described
    assert "guards pass" in described, "the evidence is in the form"
    assert carry_out(other)["state_name"] == "AWAITING APPROVAL", "one form is enough"
    assert ask("GET", f"/flow_runs/{other}")["state_type"] == "COMPLETED"

    missing = ask("POST", f"/flow_runs/{run}/resume", {"run_input": {"answer": "accept", "by": "Ada"}})
    assert missing["status"] == "REJECT", "a reason is needed"
    given = ask("POST", f"/flow_runs/{run}/resume", {"run_input": {"answer": "accept", "reason": "seen", "by": "Ada"}})
    assert given["status"] == "ACCEPT", given
    done = carry_out(run)
    assert done["state_type"] == "COMPLETED"
    assert done["state_name"].startswith("COMPATIBLE_ROLLOUT ")
    assert "AWAITING APPROVAL" not in done["tags"]
    registry = Workspace(str(root)).registry
    assert registry.serving().champion == candidate
    (given,) = registry.events(ApprovalAnswered)
    assert (given.payload.answer, given.payload.by, given.payload.reason) == ("accepted", "Ada", "seen")
    artifacts = ask("POST", "/artifacts/latest/filter", {})
    assert "tiny-approval" in {found["key"] for found in artifacts}
