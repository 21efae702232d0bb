"""The order of records is the order of commits; and who wins when two move the serving state at the same moment."""

import threading
import time

import pytest

from graceful.files import set_crash_hook
from graceful.flows.store.events import Decided, Promoted, Rejected, Retired, Trained
from graceful.flows.store.registry import DamagedPlanError, Registry, ServingMovedError
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.flows.update.serving import NothingToRollBackError, go_forward, ingest, release_previous, rollback
from tests.flows.moves import move_only
from tests.synthetic import SyntheticGeneration, SyntheticModels, items

pytestmark = pytest.mark.timeout(120)

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"
HOUR_S = 3600.0


@pytest.fixture
def registry(tmp_path):
    return Registry(str(tmp_path / "registry"), create=True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that can be set back."""
    now = [time.time()]

    def tick():
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(time, "time", tick)
    return now


@pytest.fixture
def workspace(tmp_path):
    models = SyntheticModels(*[SyntheticGeneration(name) for name in (G1, G2, G3)])
    opened = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(opened, items(2, 2))
    promote_whole(opened, G1, None)
    promote_whole(opened, G2, G1)
    return opened


@pytest.fixture(autouse=True)
def no_crash_hook():
    yield
    set_crash_hook(None)


def rollout(generation):
    key = f"update-{generation}"
    return Rollout(key, generation, key, 1.0, "random", "wave_zero", ((generation, generation),))


def promote_whole(workspace, generation, champion):
    move_only(workspace, rollout(generation), champion=champion)


def at_the_next_move(act):
    """Do something between the look at the serving state and its swap, once."""
    done = []

    def hook(name):
        if name == "before-serving-moves" and not done:
            done.append(name)
            act()

    set_crash_hook(hook)
    return done


def test_revoked_certificate_does_not_come_back_when_the_clock_steps_back(registry, clock):
    registry.certify([(G2, G2), (G2, G1)], reason="measured")
    clock[0] -= HOUR_S
    registry.revoke([(G2, G1)], reason="measured again")
    assert registry.certificates() == {(G2, G2)}
    clock[0] -= HOUR_S
    registry.certify([(G2, G1)], reason="measured once more")
    assert registry.certificates() == {(G2, G2), (G2, G1)}


def test_event_written_last_is_the_newest_whatever_the_clock_says(registry, clock):
    registry.record(Trained(), update_key="u", generation=G2)
    for number, outcome in enumerate(("HOLD", "INCONCLUSIVE"), start=1):
        registry.record(
            Decided(evaluation=str(number), outcome=outcome, summary=""), update_key="u", generation=G2,
            occurrence=number,
        )  # fmt: skip
        clock[0] -= HOUR_S
    assert [event.payload.outcome for event in registry.events(Decided)] == ["HOLD", "INCONCLUSIVE"]
    assert registry.pending_generation() == G2
    registry.record(Rejected(reason="no"), generation=G2)
    assert registry.pending_generation() is None
    assert [event.kind for event in registry.history()] == ["trained", "decided", "decided", "rejected"]


def test_order_survives_compaction(registry, clock):
    for number in range(10):
        registry.record(Retired(reason=str(number)), generation=G1)
        clock[0] -= HOUR_S
        (registry.certify if number % 2 else registry.revoke)([(G1, G1)], reason="test")
        if number % 3 == 2:
            assert registry._lineage.compact(at_least=2)
            assert registry._certificates.compact(at_least=2)
    assert [event.payload.reason for event in registry.events(Retired)] == [str(number) for number in range(10)]
    assert registry.certificates() == {(G1, G1)}
    registry.revoke([(G1, G1)], reason="test")
    assert registry.certificates() == set()


def test_serving_periods_are_in_the_order_of_the_moves(registry, clock):
    for generation in (G1, G2, G1):
        registry.move_serving(registry.serving(), champion=generation)
        clock[0] -= HOUR_S
    assert [name for name, _, _ in registry.serving_periods()] == [G1, G2, G1]


def test_writers_at_the_same_time_lose_no_event_and_share_no_number(registry):
    def write(thread):
        own = Registry(registry.location)
        for number in range(5):
            own.record(Retired(reason=f"{thread}/{number}"), generation=G1)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    events = registry.events(Retired)
    assert len({event.sequence for event in events}) == len(events) == 20
    for thread in range(4):
        own = [event.payload.reason for event in events if event.payload.reason.startswith(f"{thread}/")]
        assert own == [f"{thread}/{number}" for number in range(5)]


def test_rollback_wins_against_a_plan_that_ends_at_the_same_moment(workspace):
    """The plan ends between the rollback's look and its swap."""
    assert workspace.registry.serving().active_plan is not None
    done = at_the_next_move(lambda: continue_plan(Workspace(workspace.root, workspace.embed_with)))
    state = rollback(workspace)
    assert done
    assert (state.champion, state.previous, state.active_plan) == (G1, None, None)


def test_plan_that_ends_gives_way_to_a_rollback_at_the_same_moment(workspace):
    done = at_the_next_move(lambda: rollback(Workspace(workspace.root)))
    continue_plan(workspace)
    assert done
    serving = workspace.registry.serving()
    assert (serving.champion, serving.left, serving.active_plan) == (G1, G2, None)


def test_release_gives_way_to_a_rollback_at_the_same_moment(workspace):
    done = at_the_next_move(lambda: rollback(Workspace(workspace.root)))
    release_previous(workspace)
    assert done
    assert (workspace.registry.serving().champion, workspace.registry.serving().left) == (G1, G2)


def test_rollback_is_refused_when_its_goal_is_released_at_the_same_moment(workspace):
    at_the_next_move(lambda: release_previous(Workspace(workspace.root)))
    with pytest.raises(NothingToRollBackError):
        rollback(workspace)
    assert workspace.registry.serving().champion == G2


def test_rollback_does_not_leave_a_generation_that_it_did_not_look_at(workspace):
    other = Workspace(workspace.root, workspace.embed_with)

    def promote_another():
        set_crash_hook(None)
        promote_whole(other, G3, G2)

    at_the_next_move(promote_another)
    with pytest.raises(ServingMovedError, match=f"expected champion {G2}, found {G3}"):
        rollback(workspace)
    assert workspace.registry.serving().champion == G3


def test_promotion_survives_bookkeeping_at_the_same_moment(workspace):
    other = Workspace(workspace.root, workspace.embed_with)
    what = rollout(G3)
    plan = prepare(workspace, what)
    embed_before_move(workspace, what, plan)
    done = at_the_next_move(lambda: continue_plan(other))
    promote(workspace, what, plan, champion=G2)
    assert done
    serving = workspace.registry.serving()
    assert (serving.champion, serving.previous, serving.active_plan) == (G3, G2, plan.plan_id)


def test_forward_and_back_again(workspace):
    rollback(workspace)
    assert go_forward(workspace, G2, reason="test").left is None
    assert rollback(workspace).champion == G1
    assert [event.generation for event in workspace.registry.events(Promoted)] == [G1, G2]


def test_damaged_items_of_a_plan_are_found_when_they_are_read(workspace, tmp_path):
    plan_id = workspace.registry.serving().active_plan
    plan, rows = workspace.registry.plan(plan_id)
    assert rows.num_rows == plan.num_items == 4
    files = sorted((tmp_path / "workspace" / "registry" / "plan_items").glob("*.parquet"))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    with pytest.raises(DamagedPlanError, match="plan_items"):
        workspace.registry.plan(plan_id)
    for file in files:
        file.unlink()
    with pytest.raises(DamagedPlanError, match="found no file"):
        workspace.registry.plan(plan_id)
