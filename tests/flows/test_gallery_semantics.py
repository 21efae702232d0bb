"""Every row of the table "what happens / what follows from the reading rule", on the real tables."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from graceful.flows.store.registry import ServingMovedError, UncertifiedGenerationError
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.rollout import Rollout, continue_plan, embed_before_move, prepare, promote
from graceful.flows.update.serving import (
    NothingToRollBackError,
    abandon,
    delete,
    generations_to_write,
    ingest,
    release_previous,
    rollback,
)
from graceful.indexing.checked_files import DamagedFileError
from graceful.indexing.maintenance import LeasedError, collect, forget
from tests.flows.moves import carry_out_whole, move_only
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, items

G1, G2, G3 = "g001-aaaaaa", "g002-bbbbbb", "g003-cccccc"


@pytest.fixture
def models():
    return SyntheticModels(*[SyntheticGeneration(name) for name in (G1, G2, G3)])


@pytest.fixture
def workspace(tmp_path, models):
    """Twelve items, served by the first generation."""
    opened = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(opened, items(4, 3))
    carry_out_whole(opened, rollout(G1, fraction=1.0, before_move="all", certified=[]), champion=None)
    return opened


def rollout(generation, *, fraction=0.5, before_move="wave_zero", certified=(G1,), key=None, wave_rows=3):
    pairs = ((generation, generation), *((generation, name) for name in certified))
    key = key or f"update-{generation}"
    return Rollout(key, generation, f"decision-{key}", fraction, "random", before_move, pairs, wave_rows=wave_rows)


def owners(workspace, query_generation):
    view = workspace.view(query_generation)
    names = [view.readable[code] if code >= 0 else None for code in view.owner]
    return dict(zip(view.item_ids, names, strict=True))


def one_item(item_id, identity="id000", image="new"):
    return pa.Table.from_pylist([item_row(item_id, identity, image)])


def test_bootstrap_embeds_everything_before_the_first_generation_serves(workspace):
    assert set(owners(workspace, G1).values()) == {G1}
    assert len(owners(workspace, G1)) == 12
    assert workspace.registry.serving().champion == G1
    assert workspace.registry.serving().active_plan is None


def test_ingest_while_a_candidate_trains_is_read_by_the_candidate_through_its_certificate(workspace):
    """When: ingest while a candidate trains."""
    ingest(workspace, one_item("late"))
    workspace.registry.certify([(G2, G2), (G2, G1)], reason="test")
    assert owners(workspace, G2)["late"] == G1


def test_ingest_while_a_candidate_trains_is_unreadable_and_embedded_first_without_a_certificate(workspace):
    """When: ingest while a candidate trains."""
    ingest(workspace, one_item("late"))
    workspace.registry.certify([(G2, G2)], reason="test")
    assert owners(workspace, G2)["late"] is None
    plan = prepare(workspace, rollout(G2, certified=[]))
    assert plan.num_wave_zero == 13


def test_image_changed_while_a_wave_embeds_the_old_bytes_is_dropped_counted_and_embedded_again(workspace, models):
    """When: an image changes while a wave embeds the old one."""
    plan_of = rollout(G2, fraction=1.0, wave_rows=100)
    move_only(workspace, plan_of, champion=G1)
    changed = []

    def change_once(unit):
        if not changed:
            changed.append(unit)
            workspace.gallery.ingest(one_item("item-000-0", "id003", "other"))

    models.before_unit = change_once
    report = continue_plan(workspace)
    assert report.stale == 1
    view = workspace.view(G2)
    position = list(view.item_ids).index("item-000-0")
    expected = models.generations[G2].encode(["synthetic:id003/other"])[0]
    np.testing.assert_allclose(view.vectors(np.array([position])), expected, atol=1e-6)


def test_deleted_item_is_gone_from_every_view_after_a_rollback_too(workspace):
    """When: an item is deleted."""
    carry_out_whole(workspace, rollout(G2), champion=G1)
    assert delete(workspace, ["item-000-0", "never-there"]) == 1
    assert "item-000-0" not in owners(workspace, G2)
    rollback(workspace)
    assert "item-000-0" not in owners(workspace, G1)
    assert delete(workspace, ["item-000-0"]) == 0


def test_deleted_item_that_comes_back_is_a_new_revision_and_not_served_from_its_old_vector(workspace):
    delete(workspace, ["item-000-0"])
    workspace.gallery.ingest(one_item("item-000-0", "id001", "back"))
    assert owners(workspace, G1)["item-000-0"] is None


def test_forgotten_item_is_removed_physically(workspace, tmp_path):
    delete(workspace, ["item-000-0"])
    assert forget(workspace.gallery, ["item-000-0"]) == 2
    stored = [p.read_bytes() for p in (tmp_path / "workspace" / "gallery").rglob("*.parquet")]
    assert not any(b"item-000-0" in content for content in stored)
    reopened = Workspace(workspace.root, workspace.embed_with)
    assert len(owners(reopened, G1)) == 11
    assert set(owners(reopened, G1).values()) == {G1}


def test_forget_refuses_live_items_and_open_leases(workspace):
    with pytest.raises(ValueError, match="delete them first"):
        forget(workspace.gallery, ["item-000-0"])
    delete(workspace, ["item-000-0"])
    with workspace.gallery.lease(), pytest.raises(LeasedError):
        forget(workspace.gallery, ["item-000-0"])


def test_hold_after_a_wave_leaves_vectors_that_nobody_sees_and_that_are_collected(workspace):
    """When: a decision to hold after some waves."""
    plan = prepare(workspace, rollout(G2, fraction=0.5))
    items_of_plan = workspace.registry.plan(plan.plan_id)[1]
    from graceful.indexing.reindex import carry_out

    carry_out(workspace.gallery, G2, items_of_plan, workspace.embed_with(G2), waves=[1])
    assert workspace.gallery.generations()[G2] == 3
    before = owners(workspace, G1)
    assert set(before.values()) == {G1}
    assert collect(workspace.gallery, workspace.protected).generations == (), "a prepared plan is protected"
    abandon(workspace)
    assert collect(workspace.gallery, workspace.protected).generations == (G2,)
    assert owners(workspace, G1) == before


def test_vectors_that_are_an_items_only_readable_ones_are_never_collected(workspace):
    carry_out_whole(workspace, rollout(G2), champion=G1)
    release_previous(workspace)
    assert collect(workspace.gallery, workspace.protected).generations == ()
    assert None not in owners(workspace, G2).values()


def test_collection_keeps_the_files_that_a_lease_pins(workspace):
    with workspace.gallery.lease() as version:
        carry_out_whole(workspace, rollout(G2, fraction=1.0), champion=G1)
        release_previous(workspace)
        assert collect(workspace.gallery, workspace.protected).generations == (G1,)
        pinned = workspace.view(G1, version)
        assert pinned.vectors(np.arange(12)).shape == (12, 24)
    collect(workspace.gallery, workspace.protected)
    with pytest.raises(DamagedFileError, match="expected a file, found none"):
        pinned.vectors(np.arange(12))


def test_rollback_after_a_part_was_reindexed_moves_one_pointer_and_skips_the_newer_vectors(workspace):
    """When: rollback with 40 % re-indexed."""
    before = owners(workspace, G1)
    carry_out_whole(workspace, rollout(G2, fraction=0.4), champion=G1)
    assert list(owners(workspace, G2).values()).count(G2) == 5
    version = workspace.gallery.version()
    state = rollback(workspace)
    assert (state.champion, state.previous, state.active_plan) == (G1, None, None)
    assert workspace.gallery.version() == version
    assert owners(workspace, G1) == before
    with pytest.raises(NothingToRollBackError):
        rollback(workspace)


def test_items_ingested_since_the_promotion_are_found_after_a_rollback_until_previous_is_released(workspace):
    """When: items ingested since a promotion."""
    carry_out_whole(workspace, rollout(G2), champion=G1)
    ingest(workspace, one_item("in-probation"))
    assert generations_to_write(workspace) == [G2, G1]
    release_previous(workspace)
    assert generations_to_write(workspace) == [G2]
    with pytest.raises(NothingToRollBackError):
        rollback(workspace)
    assert owners(workspace, G1)["in-probation"] == G1
    assert owners(workspace, G2)["in-probation"] == G2


def test_next_promotion_supersedes_the_active_plan_and_its_late_wave_is_harmless(workspace):
    """When: the next promotion comes before a re-index has ended."""
    first = rollout(G2, fraction=1.0)
    move_only(workspace, first, champion=G1)
    plan_items = workspace.registry.plan("update-g002-bbbbbb-g002-bbbbbb")[1]
    move_only(workspace, rollout(G3, certified=[G1, G2]), champion=G2)
    assert workspace.registry.serving().active_plan == "update-g003-cccccc-g003-cccccc"
    from graceful.indexing.reindex import carry_out

    active = workspace.registry.serving().active_plan
    report = carry_out(
        workspace.gallery, G2, plan_items, workspace.embed_with(G2),
        still_wanted=lambda: workspace.registry.serving().active_plan != active,
    )  # fmt: skip
    assert report.superseded
    assert report.embedded == 0
    carry_out(workspace.gallery, G2, plan_items, workspace.embed_with(G2), waves=[1])
    assert set(owners(workspace, G3).values()) == {G1, G2}


def test_old_client_reads_what_is_certified_for_it_and_is_refused_by_name_otherwise(workspace):
    """When: an old client goes on querying."""
    carry_out_whole(workspace, rollout(G2, fraction=1.0), champion=G1)
    carry_out_whole(workspace, rollout(G3, fraction=1.0, certified=[G1, G2]), champion=G2)
    assert generations_to_write(workspace, supported=[G1]) == [G3, G2, G1]
    ingest(workspace, one_item("for-old-clients"), supported=[G1])
    assert owners(workspace, G1)["for-old-clients"] == G1
    workspace.registry.certify([(G1, G3)], reason="measured")
    assert generations_to_write(workspace, supported=[G1]) == [G3, G2]
    assert owners(workspace, G1)["for-old-clients"] == G3
    with pytest.raises(UncertifiedGenerationError, match="g009-ffffff"):
        workspace.view("g009-ffffff")


def test_live_generation_that_fails_its_certificate_is_wave_zero_and_embedded_before_the_move(workspace):
    """When: a generation's rows get no certificate for the candidate."""
    carry_out_whole(workspace, rollout(G2, fraction=0.25), champion=G1)
    third = rollout(G3, fraction=0.5, certified=[G1])
    plan = prepare(workspace, third)
    assert plan.num_wave_zero == 0  # those rows still have vectors of g1, which g3 may read
    workspace.registry.revoke([(G3, G1)], reason="test")
    ingest(workspace, one_item("new"))
    plan = prepare(workspace, rollout(G3, fraction=0.5, certified=[G2], key="again"))
    assert plan.num_wave_zero == 9
    move_only(workspace, rollout(G3, fraction=0.5, certified=[G2], key="again"), champion=G2)
    assert None not in owners(workspace, G3).values()


def test_full_backfill_writes_both_generations_from_its_start_and_moves_last(workspace, models):
    """When: a full backfill."""
    whole = rollout(G2, fraction=1.0, before_move="all", certified=[])
    plan = prepare(workspace, whole)
    arrived = []

    def arrive_once(unit):
        if not arrived:
            arrived.append(unit)
            ingest(workspace, one_item("during"))
            assert workspace.registry.serving().champion == G1

    models.before_unit = arrive_once
    embed_before_move(workspace, whole, plan)
    assert workspace.registry.serving().champion == G1
    promote(workspace, whole, plan, champion=G1)
    assert set(owners(workspace, G2).values()) == {G2}
    assert owners(workspace, G1)["during"] == G1


def test_full_backfill_serves_items_whose_image_is_gone_through_their_certificate_or_lists_them(workspace, models):
    gone = frozenset({"synthetic:id000/g0"})
    models.add(SyntheticGeneration(G2, unreadable=gone))
    whole = rollout(G2, fraction=1.0, before_move="all", certified=[])
    plan = prepare(workspace, whole)
    report = embed_before_move(workspace, whole, plan)
    assert report.failures == (("item-000-0", "cannot be read"),)
    assert owners(workspace, G2)["item-000-0"] is None
    workspace.registry.certify([(G2, G1)], reason="measured")
    assert owners(workspace, G2)["item-000-0"] == G1


def test_promotion_is_refused_when_another_update_finished_first(workspace):
    second, third = rollout(G2), rollout(G3)
    plan = prepare(workspace, second)
    move_only(workspace, third, champion=G1)
    with pytest.raises(ServingMovedError, match="another update finished first"):
        promote(workspace, second, plan, champion=G1)
    assert workspace.registry.serving().champion == G3


def test_serving_move_is_refused_from_a_stale_state(workspace):
    stale = workspace.registry.serving()
    other = Workspace(workspace.root, workspace.embed_with)
    other.registry.move_serving(stale, moved_by="other")
    with pytest.raises(ServingMovedError):
        workspace.registry.move_serving(stale, champion=G2, moved_by="late")


def test_resuming_an_update_does_not_repeat_a_promotion_that_was_rolled_back(workspace):
    second = rollout(G2)
    carry_out_whole(workspace, second, champion=G1)
    rollback(workspace)
    promote(workspace, second, prepare(workspace, second), champion=G1)
    assert workspace.registry.serving().champion == G1


def test_every_row_of_the_table_of_the_architecture_page_is_a_test_here():
    """What the page says happens is what a test of that row shows."""
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    table = page.split("| what happens | what follows |")[1].split("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    told = {test.__doc__ for name, test in globals().items() if name.startswith("test_")}
    assert len(rows) == 10
    assert [row for row in rows if f"When: {row}." not in told] == []
