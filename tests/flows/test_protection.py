"""What is protected from collection, from when until when; and who may query."""

import pyarrow as pa
import pytest

from graceful.files import set_crash_hook
from graceful.flows.store.claim import UpdateInProgressError, claim
from graceful.flows.store.events import Decided, Trained
from graceful.flows.store.registry import UncertifiedGenerationError
from graceful.flows.store.workspace import UnsupportedGenerationError, Workspace
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.rollout import Rollout, embed_before_move, prepare, promote
from graceful.flows.update.serving import (
    abandon,
    go_forward,
    ingest,
    reject,
    release_previous,
    retire,
    revoke,
    rollback,
)
from graceful.indexing.maintenance import collect
from tests.flows import moves
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, items

pytestmark = pytest.mark.timeout(120)

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"


@pytest.fixture
def models():
    return SyntheticModels(*[SyntheticGeneration(name) for name in (G1, G2, G3)])


@pytest.fixture
def workspace(tmp_path, models):
    """Twelve items, served by the first generation."""
    opened = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(opened, items(4, 3))
    carry_out_whole(opened, rollout(G1, before_move="all", certified=()), champion=None)
    return opened


@pytest.fixture(autouse=True)
def no_crash_hook():
    yield
    set_crash_hook(None)


def rollout(generation, *, before_move="wave_zero", certified=(), fraction=1.0):
    pairs = ((generation, generation), *((generation, name) for name in certified))
    key = f"update-{generation}"
    return Rollout(key, generation, f"decision-{key}", fraction, "random", before_move, pairs, wave_rows=4, unit_rows=2)


def carry_out_whole(workspace, what, *, champion):
    moves.carry_out_whole(workspace, what, champion=champion, unit_rows=2)


def collect_now(workspace):
    """What `graceful collect` does, in a process of its own."""
    other = Workspace(workspace.root)
    return collect(other.gallery, other.protected, dead_share=0.0)


def unreadable(workspace):
    return len(workspace.view(workspace.registry.serving().champion).unreadable())


@pytest.mark.parametrize("before_move", ["wave_zero", "all"])
@pytest.mark.parametrize("certified", [(), (G1,)])
def test_collection_at_every_point_of_an_update_loses_nothing(workspace, before_move, certified):
    points = []

    def collect_here(name):
        set_crash_hook(None)
        points.append(name)
        collect_now(workspace)
        assert unreadable(workspace) == 0, name
        set_crash_hook(collect_here)

    set_crash_hook(collect_here)
    carry_out_whole(workspace, rollout(G2, before_move=before_move, certified=certified), champion=G1)
    set_crash_hook(None)
    assert {"certified", "protected", "plan-saved", "before-serving-moves", "vectors-after-commit"} <= set(points)
    serving = workspace.registry.serving()
    assert (serving.champion, serving.prepared, serving.active_plan) == (G2, None, None)
    assert unreadable(workspace) == 0
    rollback(workspace)
    assert unreadable(workspace) == 0


def test_wave_zero_survives_a_collection_and_an_abandoned_one_does_not(workspace):
    what = rollout(G2)
    plan = prepare(workspace, what)
    embed_before_move(workspace, what, plan)
    assert collect_now(workspace).generations == ()
    abandon(workspace)
    assert workspace.kept() == [G1]
    assert collect_now(workspace).generations == (G2,)
    # The update goes on after all: it is protected again, and what is missing is embedded before it serves.
    promote(workspace, what, plan, champion=G1)
    assert workspace.registry.serving().champion == G2
    assert unreadable(workspace) == 0


def test_collection_under_way_when_a_plan_is_prepared_looks_again(workspace):
    """It found the vectors of an abandoned plan unprotected; then an update takes them up again, and serves by them."""
    what = rollout(G2)
    embed_before_move(workspace, what, prepare(workspace, what))
    abandon(workspace)
    promoted = []

    def promote_meanwhile(name):
        if name == "rewrite-before-commit" and not promoted:
            promoted.append(name)
            set_crash_hook(None)
            carry_out_whole(workspace, what, champion=G1)

    set_crash_hook(promote_meanwhile)
    collect_now(workspace)
    set_crash_hook(None)
    assert promoted
    assert workspace.registry.serving().champion == G2
    assert unreadable(workspace) == 0
    rollback(workspace)
    assert unreadable(workspace) == 0


def test_generation_of_the_active_plan_is_kept(workspace):
    what = rollout(G2, before_move="all")
    embed_before_move(workspace, what, prepare(workspace, what))
    workspace.registry.change_serving(lambda _: {"prepared": None})
    assert workspace.kept() == [G1, G2]


def test_plan_names_no_item(workspace, tmp_path):
    """So that forgetting an item leaves nothing of it in plans."""
    prepare(workspace, rollout(G2))
    below = (tmp_path / "workspace" / "registry").glob("plan*/**/*")
    stored = [file for file in below if file.is_file()]
    assert [file for file in stored if file.suffix == ".parquet" and file.parent.name == "plan_items"]
    assert not [file for file in stored if b"item-000" in file.read_bytes()]


def test_next_candidate_takes_the_protection_of_a_plan_that_never_moved(workspace):
    first = rollout(G2, before_move="all")
    embed_before_move(workspace, first, prepare(workspace, first))
    assert workspace.kept() == [G1, G2]
    prepare(workspace, rollout(G3))
    assert workspace.kept() == [G1, G3]
    assert collect_now(workspace).generations == (G2,)


def test_generation_to_go_forward_to_is_kept_between_the_look_at_its_items_and_the_move(workspace):
    for generation, champion in ((G2, G1), (G3, G2)):
        carry_out_whole(workspace, rollout(generation), champion=champion)
    assert G1 not in workspace.kept()
    collected = []

    def collect_before_the_champion_changes(name):
        if name == "before-serving-moves" and workspace.registry.serving().left == G1:
            set_crash_hook(None)
            collected.append(collect_now(workspace).generations)

    set_crash_hook(collect_before_the_champion_changes)
    go_forward(workspace, G1, reason="test")
    assert len(collected) == 1
    assert unreadable(workspace) == 0


def test_generation_that_it_is_refused_to_go_forward_to_is_not_kept_for_it(workspace):
    for generation, champion in ((G2, G1), (G3, G2)):
        carry_out_whole(workspace, rollout(generation), champion=champion)
    assert collect_now(workspace).generations == (G1,)
    with pytest.raises(MoveRefusedError, match="found 12 that would not be"):
        go_forward(workspace, G1, reason="test")
    assert workspace.kept() == [G3, G2]


def test_candidate_turned_down_is_protected_no_longer(workspace):
    for act in (reject, retire):
        what = rollout(G2, before_move="all")
        embed_before_move(workspace, what, prepare(workspace, what))
        with claim(workspace.root, "an update"), pytest.raises(UpdateInProgressError):
            act(workspace, G2, reason="test")
        assert workspace.kept() == [G1, G2]
        act(workspace, G2, reason="test")
        assert workspace.kept() == [G1]


def test_candidate_that_waits_for_the_operators_word_is_kept(workspace):
    workspace.registry.record(Trained(), update_key="second", generation=G2)
    undecided = Decided(evaluation="second", outcome="INCONCLUSIVE", summary="")
    workspace.registry.record(undecided, update_key="second", generation=G2)
    assert workspace.kept() == [G1, G2]
    reject(workspace, G2, reason="test")
    assert workspace.kept() == [G1]


def test_client_of_a_released_generation_is_refused_by_name(workspace):
    carry_out_whole(workspace, rollout(G2), champion=G1)
    workspace.may_query(G1)
    workspace.may_query(G2)
    release_previous(workspace)
    collect_now(workspace)
    with pytest.raises(UnsupportedGenerationError, match=f"querying as {G1}.*generations that may query: {G2};"):
        workspace.may_query(G1)
    workspace.may_query(G1, supported=[G1])
    with pytest.raises(UncertifiedGenerationError):
        workspace.may_query(G3)


def test_revoking_a_certificate_says_how_many_items_it_hides(workspace):
    carry_out_whole(workspace, rollout(G2, certified=(G1,), fraction=0.5), champion=G1)
    with pytest.raises(MoveRefusedError, match="expected a certificate in force, found none; g002-bbbbbb may read g00"):
        revoke(workspace, G2, G3, reason="test")
    with pytest.raises(MoveRefusedError, match="found one that serves"):
        revoke(workspace, G2, G2, reason="test")
    with pytest.raises(MoveRefusedError, match=r"found 6 that would not be; .*--yes"):
        revoke(workspace, G2, G1, reason="test")
    assert unreadable(workspace) == 0
    assert revoke(workspace, G2, G1, reason="measured again", yes=True) == 6
    assert unreadable(workspace) == 6


def test_ingest_while_a_plan_is_prepared_writes_for_its_generation_unless_it_can_read_the_champions(workspace):
    late = pa.Table.from_pylist([item_row("late", "id000", "late")])
    prepare(workspace, rollout(G2))
    assert list(ingest(workspace, late)[1]) == [G1, G2]
    workspace.registry.certify([(G2, G1)], reason="test")
    later = pa.Table.from_pylist([item_row("later", "id000", "later")])
    assert list(ingest(workspace, later)[1]) == [G1]
