"""The move gate: whatever fails, no move of the serving state makes unreadable what can be read now."""

from dataclasses import replace

import pyarrow as pa
import pytest

from graceful.evaluation.decision import CertificateToIssue, Decision
from graceful.files import set_crash_hook
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.store.events import Decided, Promoted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import act, gate
from graceful.flows.update.act import Case, decide_and_act
from graceful.flows.update.gate import MoveRefusedError, compare
from graceful.flows.update.serving import delete, go_forward, ingest, release_previous, retire, rollback
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, items

pytestmark = pytest.mark.timeout(120)

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"
GALLERY = GalleryConfig(wave_rows=16, unit_rows=8)
ALL = frozenset(f"synthetic:id{identity:03d}/g{image}" for identity in range(10) for image in range(4))
ONE = frozenset({"synthetic:id000/g0"})


class Evaluated:
    """What `act` reads of an evaluation."""

    def __init__(self, decision):
        self.decision = decision


def decision(outcome, candidate, champion, certified=(), fraction=0.5):
    pairs = [(candidate, candidate), *((candidate, name) for name in certified)]
    return Decision(
        outcome=outcome,
        summary="",
        candidate=candidate,
        champion=champion,
        fraction=fraction,
        order="random",
        certificates=tuple(CertificateToIssue(query_generation=q, gallery_generation=g) for q, g in pairs),
        reasons=(),
    )


def carry_out(workspace, made, *, gallery=GALLERY, order=None, do=act.plain):
    """What an update does with a decision; called again, it goes on."""
    key = f"update-{made.candidate}"
    case = Case(
        workspace=workspace,
        update_key=key,
        champion=made.champion,
        gallery=gallery,
        judge=lambda: (Decided(evaluation=key, outcome=made.outcome, summary=""), Evaluated(made)),
        publish=lambda decided, evaluation: None,
        conclude=lambda decision: None,
    )
    return decide_and_act(case, do=do, order=order)[2]


@pytest.fixture
def models():
    return SyntheticModels(*[SyntheticGeneration(name) for name in (G1, G2, G3)])


@pytest.fixture
def workspace(tmp_path, models):
    """Forty items, all of them served by the first generation."""
    opened = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(opened, items(10, 4))
    carry_out(opened, decision("BOOTSTRAP", G1, None))
    assert num_readable(opened) == 40
    return opened


@pytest.fixture(autouse=True)
def no_crash_hook():
    yield
    set_crash_hook(None)


def num_readable(workspace, generation=None):
    view = workspace.view(generation or workspace.registry.serving().champion)
    return view.num_items - len(view.unreadable())


def without_bookkeeping(serving):
    return serving.champion, serving.previous, serving.moved_by.partition(",")[0]


WHOLE = ("FULL_BACKFILL", ())
WAVE_ZERO = ("COMPATIBLE_ROLLOUT", ())


@pytest.mark.parametrize(("outcome", "certified"), [WHOLE, WAVE_ZERO])
@pytest.mark.parametrize("failing", [ALL, ONE], ids=["every image fails", "one image fails"])
def test_update_whose_images_cannot_be_embedded_fails_and_moves_nothing(workspace, models, outcome, certified, failing):
    models.add(SyntheticGeneration(G2, unreadable=failing))
    made = decision(outcome, G2, G1, certified)
    with pytest.raises(MoveRefusedError) as refused:
        carry_out(workspace, made)
    said = str(refused.value)
    assert f"found {len(failing)} that would not be" in said
    assert "item-000-0: cannot be read" in said
    assert "nothing was moved" in said
    serving = workspace.registry.serving()
    assert (serving.champion, serving.previous) == (G1, None)
    assert num_readable(workspace) == 40
    assert workspace.registry.events(Promoted, "update-g002-bbbbbb") == []
    # The images are there again: the same update goes on, and ends.
    models.add(SyntheticGeneration(G2))
    carry_out(workspace, made)
    assert workspace.registry.serving().champion == G2
    assert num_readable(workspace) == 40


def test_image_that_is_gone_is_no_loss_where_a_certificate_reads_it(workspace, models):
    models.add(SyntheticGeneration(G2, unreadable=ONE))
    carry_out(workspace, decision("FULL_BACKFILL", G2, G1, [G1]))
    assert workspace.view(G2).rows_by_generation() == {G1: 1, G2: 39}


def test_loss_that_the_configuration_allows_moves(workspace, models):
    models.add(SyntheticGeneration(G2, unreadable=ONE))
    with pytest.raises(MoveRefusedError):
        carry_out(workspace, decision(*WHOLE[:1], G2, G1))
    carry_out(workspace, decision(*WHOLE[:1], G2, G1), gallery=GALLERY.model_copy(update={"max_hidden_items": 1}))
    assert num_readable(workspace) == 39


def test_item_that_nobody_reads_now_does_not_stop_a_move(workspace, models):
    for name in (G1, G2):
        models.add(SyntheticGeneration(name, unreadable=frozenset({"synthetic:gone/x"})))
    ingest(workspace, pa.Table.from_pylist([item_row("gone", "gone", "x")]))
    carry_out(workspace, decision("FULL_BACKFILL", G2, G1))
    assert (workspace.registry.serving().champion, num_readable(workspace)) == (G2, 40)


def test_image_that_can_be_read_the_second_time_is_asked_for_again_before_the_move(workspace, models):
    models.add(SyntheticGeneration(G2, unreadable=ALL))
    tries = []

    def heal(unit):
        tries.append(unit)
        if len(tries) == 12:  # the waves and the first look of the gate have failed by then
            models.add(SyntheticGeneration(G2))

    models.before_unit = heal
    carry_out(workspace, decision(*WAVE_ZERO[:1], G2, G1))
    assert (workspace.registry.serving().champion, num_readable(workspace)) == (G2, 40)


@pytest.mark.parametrize("failing", [ALL, ONE], ids=["every image fails", "one image fails"])
def test_first_generation_that_reads_nothing_does_not_serve(tmp_path, models, failing):
    models.add(SyntheticGeneration(G1, unreadable=failing))
    opened = Workspace(str(tmp_path / "new"), models, create=True)
    ingest(opened, items(10, 4))
    made = decision("BOOTSTRAP", G1, None)
    if failing == ALL:
        with pytest.raises(MoveRefusedError, match=r"expected items that g001-aaaaaa can read, found none of 40"):
            carry_out(opened, made)
        assert opened.registry.serving().champion is None
        models.add(SyntheticGeneration(G1))
    carry_out(opened, made)
    assert num_readable(opened) == (40 if failing == ALL else 39)


def test_first_generation_of_an_empty_gallery_serves(tmp_path, models):
    opened = Workspace(str(tmp_path / "new"), models, create=True)
    carry_out(opened, decision("BOOTSTRAP", G1, None))
    assert opened.registry.serving().champion == G1


def test_ordered_backfill_is_gated_like_a_decided_one(workspace, models, monkeypatch):
    models.add(SyntheticGeneration(G2, unreadable=ONE))
    from graceful.flows.update.rollout import Rollout

    ordered = Rollout.of(decision("FULL_BACKFILL", G2, G1), update_key="k", evaluation="e", gallery=GALLERY)
    monkeypatch.setattr(Rollout, "ordered_by_operator", lambda *_, **__: replace(ordered, ordered=True))
    held = Evaluated(decision("HOLD", G2, G1))
    held.evidence = None
    case = Case(
        workspace, "k", G1, GALLERY, lambda: (Decided(evaluation="e", outcome="HOLD", summary=""), held),
        lambda *_: None, lambda _: None,
    )  # fmt: skip
    with pytest.raises(MoveRefusedError, match="found 1 that would not be"):
        decide_and_act(case, order=act.Order("the operator's word"))
    assert num_readable(workspace) == 40


def test_item_ingested_at_the_very_moment_of_the_move_is_readable_afterwards(workspace):
    """Its champion's vector is written by an ingest that began before anybody prepared the candidate."""
    late = pa.Table.from_pylist([item_row("late", "id000", "late")])
    points = []

    def arrive(name):
        points.append(name)
        if name == "before-serving-moves" and workspace.registry.serving().prepared == G2 and "late" not in points:
            points.append("late")
            ingest(workspace, late)

    set_crash_hook(arrive)
    carry_out(workspace, decision(*WAVE_ZERO[:1], G2, G1))
    set_crash_hook(None)
    assert "late" in points
    assert num_readable(workspace) == 41


def test_ingest_under_way_while_the_serving_state_moves_writes_for_whoever_serves_at_its_end(workspace):
    late = pa.Table.from_pylist([item_row("late", "id000", "late")])
    moved = []

    def promote_meanwhile(name):
        if name == "generation-ingested" and not moved:
            moved.append(name)
            set_crash_hook(None)
            carry_out(workspace, decision(*WAVE_ZERO[:1], G2, G1))

    set_crash_hook(promote_meanwhile)
    reports = ingest(workspace, late)[1]
    assert list(reports) == [G1, G2]
    assert num_readable(workspace) == 41


def test_gate_looks_again_when_the_gallery_was_written_to_while_it_compared(workspace, monkeypatch):
    """An item that arrives after both views were read, and that only the champion can read."""
    real, late = gate.compare, pa.Table.from_pylist([item_row("late", "id000", "late")])
    seen = []

    def compare_and_be_overtaken(*given):
        found = real(*given)
        seen.append(len(found.hidden))
        if len(seen) == 1:
            workspace.gallery.ingest(late)
            from graceful.indexing.reindex import embed_missing

            embed_missing(workspace.gallery, G1, workspace.embed_with(G1))
        return found

    monkeypatch.setattr(gate, "compare", compare_and_be_overtaken)
    carry_out(workspace, decision(*WAVE_ZERO[:1], G2, G1))
    assert seen[:2] == [0, 1]
    assert num_readable(workspace) == 41


def test_rollback_and_going_forward_say_how_many_items_they_would_hide(workspace, models):
    carry_out(workspace, decision(*WHOLE[:1], G2, G1))
    models.add(SyntheticGeneration(G1, unreadable=frozenset({"synthetic:id000/late"})))
    ingest(workspace, pa.Table.from_pylist([item_row("late", "id000", "late")]))
    with pytest.raises(MoveRefusedError, match=r"rolling back: .* found 1 that would not be; .*--yes"):
        rollback(workspace)
    assert workspace.registry.serving().champion == G2
    rollback(workspace, yes=True)
    models.add(SyntheticGeneration(G2, unreadable=frozenset({"synthetic:id000/later"})))
    models.add(SyntheticGeneration(G1))
    ingest(workspace, pa.Table.from_pylist([item_row("later", "id000", "later")]))
    with pytest.raises(MoveRefusedError, match=r"promoting g002-bbbbbb: .* found 1 that would not be; .*--yes"):
        go_forward(workspace, G2, reason="test")
    assert go_forward(workspace, G2, reason="test", yes=True).champion == G2


def test_generation_that_a_rollback_left_stays_complete_until_it_is_released(workspace):
    carry_out(workspace, decision(*WHOLE[:1], G2, G1))
    rollback(workspace)
    assert workspace.kept() == [G1, G2]
    ingest(workspace, pa.Table.from_pylist([item_row("since", "id000", "since")]))
    assert go_forward(workspace, G2, reason="a false alarm").previous == G1
    assert num_readable(workspace) == 41
    rollback(workspace)
    release_previous(workspace)
    assert workspace.kept() == [G1]


def test_generation_that_a_rollback_left_is_kept_no_longer_once_it_is_retired(workspace):
    carry_out(workspace, decision(*WHOLE[:1], G2, G1))
    rollback(workspace)
    retire(workspace, G2, reason="broken")
    assert workspace.kept() == [G1]


def test_backfill_that_was_rolled_back_is_not_begun_again_when_its_update_is_resumed(workspace):
    made = decision(*WHOLE[:1], G2, G1)
    carry_out(workspace, made)
    state = rollback(workspace)
    carry_out(workspace, made)
    assert workspace.registry.serving() == state


def test_decision_to_hold_gives_up_what_was_prepared_and_never_moved(workspace, models):
    for outcome in ("FULL_BACKFILL", "COMPATIBLE_ROLLOUT"):
        models.add(SyntheticGeneration(G2, unreadable=ONE))
        with pytest.raises(MoveRefusedError):
            carry_out(workspace, decision(outcome, G2, G1))
        assert workspace.kept() == [G1, G2]
        carry_out(workspace, decision("HOLD", G3, G1))
        assert workspace.kept() == [G1]
        assert workspace.registry.serving().active_plan is None


def test_deleted_items_are_not_hidden(workspace):
    carry_out(workspace, decision(*WHOLE[:1], G2, G1))
    delete(workspace, ["item-000-0"])
    assert len(compare(workspace, G1, G2).hidden) == 0
    assert rollback(workspace).champion == G1
