"""The whole of an update without Ray and Prefect: synthetic encoders, real tables, gate, waves and rollback."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from graceful.evaluation.decision import CertificateToIssue
from graceful.evaluation.policy import RolloutPolicy
from graceful.flows.settings.config import GalleryConfig
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.evaluations import NotMeasuredError, read_evaluation, recompute, write_evaluation
from graceful.flows.store.events import Decided
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import act, gate, rollout
from graceful.flows.update.act import Case, decide_and_act
from graceful.flows.update.assess import Candidacy, assess, mix_drift, record_decision
from graceful.flows.update.consumer_sections import consumer_sections
from graceful.flows.update.rollout import Rollout
from graceful.flows.update.serving import generations_to_write, ingest, release_previous, rollback
from graceful.indexing.reindex import ReindexReport
from tests.synthetic import SyntheticGeneration, SyntheticModels, item_row, labelled

IDENTITIES, PER_IDENTITY, QUERIES_EACH = 200, 3, 6
# What 200 identities can prove where a handful of them flips: no smaller limit, however many queries each has.
POLICY = RolloutPolicy(num_resamples=400, max_nfr=0.04, quality_margin_points=3.0, max_dip_points=3.0)
# Limits as wide as 1,200 queries can prove, for tests of what a mixed gallery serves and not of power.
WIDE = POLICY.model_copy(
    update={"max_nfr": 0.08, "max_wave_zero_share": 1.0, "quality_margin_points": 4.0, "max_dip_points": 4.0}
)
FIRST = SyntheticGeneration("g001-aaaaaa", noise=0.5)


def images(first, count):
    identities = [f"id{identity:03d}" for identity in range(IDENTITIES)]
    return labelled(identities, [f"g{image}" for image in range(first, first + count)])


@pytest.fixture(scope="module")
def evaluation_set():
    gallery, _ = images(0, PER_IDENTITY)
    queries, _ = images(PER_IDENTITY, QUERIES_EACH)
    return EvaluationSet("synthetic", queries, gallery, queries.labels, {})


@pytest.fixture
def world(tmp_path, evaluation_set):
    """A gallery served by the first generation."""
    models = SyntheticModels(FIRST)
    workspace = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(workspace, images(0, PER_IDENTITY)[1])
    evaluation = judge_candidate(workspace, models, evaluation_set, FIRST.generation_id, None)
    assert evaluation.decision.outcome == "BOOTSTRAP"
    carry_out(workspace, evaluation, "bootstrap")
    return workspace, models


def judge_candidate(workspace, models, evaluation_set, candidate, champion, policy=POLICY, order="random", clients=()):
    source_of = dict(zip(*reversed(evaluation_set.images), strict=True))
    by_hash = {digest: source for source, digest in source_of.items()}

    def vectors(generation, hashes):
        return models.generations[generation].encode([by_hash[digest] for digest in hashes])[0]

    served = tuple(workspace.registry.served_generations())
    return assess(workspace, evaluation_set, Candidacy(candidate, champion, served, policy, order, clients), vectors)


def carry_out(workspace, evaluation, key, *, step=act.plain, publish=lambda decided, evaluation: None):
    """What an update does with a decision, `evaluation` being what its judgement came to."""
    case = Case(
        workspace=workspace,
        update_key=key,
        champion=evaluation.decision.champion,
        gallery=GalleryConfig(wave_rows=100),
        judge=lambda: (record_decision(workspace, evaluation, key), evaluation),
        publish=publish,
        conclude=lambda decision: None,
    )
    return decide_and_act(case, do=step)[2]


def candidate(models, **geometry):
    generation = SyntheticGeneration("g002-bbbbbb", **geometry)
    models.add(generation)
    return generation.generation_id


def verdicts(evaluation):
    return {c.gallery_generation: c.verdict for c in evaluation.evidence.certificates}


def test_less_noisy_copy_gets_a_certificate_and_rolls_out_without_a_backfill(world, evaluation_set):
    workspace, models = world
    better = candidate(models, noise=0.2)
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id)
    assert verdicts(evaluation) == {FIRST.generation_id: "PASS"}
    assert evaluation.decision.outcome == "COMPATIBLE_ROLLOUT", evaluation.decision.summary
    assert evaluation.decision.wave_zero_generations == ()
    carry_out(workspace, evaluation, "second")
    assert workspace.registry.serving().champion == better
    rows = workspace.view(better).rows_by_generation()
    assert rows[better] == int(np.ceil(evaluation.decision.fraction * IDENTITIES * PER_IDENTITY))
    assert rollback(workspace).champion == FIRST.generation_id


def test_rotated_space_gets_no_certificate_and_its_gallery_would_have_to_be_reembedded(world, evaluation_set):
    workspace, models = world
    rotated = candidate(models, noise=0.1, rotation_seed=7)
    evaluation = judge_candidate(workspace, models, evaluation_set, rotated, FIRST.generation_id)
    assert verdicts(evaluation) == {FIRST.generation_id: "FAIL"}
    assert evaluation.decision.outcome == "FULL_BACKFILL", evaluation.decision.summary
    assert all(c.gallery_generation != FIRST.generation_id for c in evaluation.decision.certificates)
    carry_out(workspace, evaluation, "second")
    assert set(workspace.view(rotated).rows_by_generation()) == {rotated}
    assert len(workspace.view(rotated).unreadable()) == 0


def test_planted_flips_are_counted_and_hold_the_candidate(world, evaluation_set):
    workspace, models = world
    lost = frozenset(f"id{number:03d}" for number in range(15))
    broken = candidate(models, noise=0.5, lost=lost)
    evaluation = judge_candidate(workspace, models, evaluation_set, broken, FIRST.generation_id)
    assert evaluation.decision.outcome == "HOLD", evaluation.decision.summary
    full = next(s for s in evaluation.evidence.states if s.fraction == 1.0)
    assert full.nfr >= 0.08
    assert full.nfr_lower > POLICY.max_nfr


def test_too_few_queries_are_inconclusive_and_say_how_many_would_do(world, evaluation_set):
    workspace, models = world
    few = np.arange(0, len(evaluation_set.queries), 24)
    small = EvaluationSet(
        "small", evaluation_set.queries.take(few), evaluation_set.gallery, evaluation_set.clusters[few], {}
    )
    better = candidate(models, noise=0.45)
    models.add(SyntheticGeneration("g002-bbbbbb", noise=0.2))
    evaluation = judge_candidate(workspace, models, small, better, FIRST.generation_id)
    assert evaluation.decision.outcome in ("INCONCLUSIVE", "HOLD")
    if evaluation.decision.outcome == "INCONCLUSIVE":
        assert evaluation.decision.queries_needed is None or evaluation.decision.queries_needed > 0
    assert workspace.registry.serving().champion == FIRST.generation_id


def test_missing_slice_never_yields_a_rollout(world, evaluation_set):
    workspace, models = world
    better = candidate(models, noise=0.2)
    policy = POLICY.model_copy(update={"required_slices": ("country",)})
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id, policy)
    assert evaluation.decision.outcome == "HOLD"
    assert "country" in evaluation.decision.summary


def test_states_that_are_judged_are_those_that_production_serves(world, evaluation_set):
    """The quality of the evidence's states equals what the real mixed gallery gives after the waves."""
    workspace, models = world
    better = candidate(models, noise=0.2)
    policy = POLICY.model_copy(update={"fractions": (0.0, 0.5, 1.0), "max_dip_points": 20.0})
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id, policy)
    decision = evaluation.decision.model_copy(update={"outcome": "COMPATIBLE_ROLLOUT", "fraction": 0.5})
    carry_out(workspace, replace(evaluation, decision=decision), "second")
    after = judge_candidate(workspace, models, evaluation_set, candidate(models, noise=0.2), better, policy)
    expected = evaluation.outcomes.first_rank["fraction/0.5"]
    # The plan ranks by item id and the evidence by source: two random halves, equal up to sampling.
    served = after.outcomes.first_rank["served"]
    assert abs((served == 1).mean() - (expected == 1).mean()) < 0.04
    assert mix_drift(workspace, after) == 0.0
    assert mix_drift(workspace, evaluation) == pytest.approx(0.5, abs=0.51)


def test_a_golden_query_and_a_slice_that_is_lost_are_named(world, evaluation_set):
    workspace, models = world
    labels = evaluation_set.queries.labels
    lost = frozenset(f"id{number:03d}" for number in range(15))
    shop, golden = np.where(np.isin(labels, [*lost]), "north", "south"), np.where(labels == "id003", "true", "")
    slices = {"golden": golden, "shop": shop}
    tagged = EvaluationSet(
        "tagged", evaluation_set.queries, evaluation_set.gallery, evaluation_set.clusters, slices
    )  # fmt: skip
    broken = candidate(models, noise=0.2, lost=lost)
    wide = POLICY.model_copy(update={"max_nfr": 0.9, "quality_margin_points": 90.0, "max_dip_points": 90.0})
    evaluation = judge_candidate(workspace, models, tagged, broken, FIRST.generation_id, wide)
    assert evaluation.decision.outcome == "HOLD"
    assert "(synthetic:id003/g" in evaluation.decision.summary
    assert "shop=north" in {item.scope for item in evaluation.evidence.consumers.discovered}
    (section,) = consumer_sections(evaluation.evidence)
    assert section.rows[0]["slice"] == "shop=north"
    untagged = judge_candidate(workspace, models, evaluation_set, broken, FIRST.generation_id, wide)
    assert untagged.decision.outcome == "COMPATIBLE_ROLLOUT"


def test_decision_is_recomputed_from_the_stored_outcomes(world, evaluation_set, tmp_path):
    workspace, models = world
    better = candidate(models, noise=0.2)
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id)
    location = str(tmp_path / "evaluation")
    write_evaluation(location, evaluation)
    stored, again = recompute(location)
    assert stored.decision == evaluation.decision == again.decision
    assert again.evidence == evaluation.evidence
    strict = evaluation.policy.model_copy(update={"max_nfr": 1e-4})
    assert recompute(location, strict)[1].decision.outcome != evaluation.decision.outcome
    np.testing.assert_array_equal(
        read_evaluation(location).outcomes.first_rank["served"], evaluation.outcomes.first_rank["served"]
    )


def test_a_supported_old_client_reads_the_new_rows_once_measured_and_needs_no_vectors_of_its_own(world, evaluation_set):
    workspace, models = world
    old = FIRST.generation_id
    second = candidate(models, noise=0.2)
    carry_out(workspace, judge_candidate(workspace, models, evaluation_set, second, old), "second")
    assert workspace.registry.readable(old) == [old]  # the champion of then: a rollback must find its view unchanged
    release_previous(workspace)
    assert old in generations_to_write(workspace, supported=[old])

    third = SyntheticGeneration("g003-cccccc", noise=0.1)
    models.add(third)
    evaluation = judge_candidate(workspace, models, evaluation_set, third.generation_id, second, WIDE, clients=(old,))
    assert evaluation.decision.outcome == "COMPATIBLE_ROLLOUT", evaluation.decision.summary
    carry_out(workspace, evaluation, "third")
    assert workspace.registry.readable(old) == [old, third.generation_id]
    release_previous(workspace)
    assert generations_to_write(workspace, supported=[old]) == [third.generation_id]
    ingest(workspace, pa.Table.from_pylist([item_row("new", "id000", "g99")]), supported=[old])
    seen = workspace.view(old)
    assert not len(seen.unreadable())
    assert "new" in seen.item_ids[seen.owned_by(third.generation_id)]


@pytest.mark.parametrize("order", ["random", "oldest_generation"])
def test_a_chain_of_generations_over_a_mixed_gallery(world, evaluation_set, order):
    workspace, models = world
    champion = FIRST.generation_id
    for ordinal, noise in ((2, 0.25), (3, 0.15), (4, 0.1)):
        generation = SyntheticGeneration(f"g{ordinal:03d}-{ordinal * 111111:06d}"[:11], noise=noise)
        models.add(generation)
        evaluation = judge_candidate(workspace, models, evaluation_set, generation.generation_id, champion, WIDE, order)
        assert evaluation.decision.outcome == "COMPATIBLE_ROLLOUT", evaluation.decision.summary
        decision = evaluation.decision.model_copy(update={"fraction": 0.3})
        carry_out(workspace, replace(evaluation, decision=decision), f"u{ordinal}")
        champion = generation.generation_id
    rows = workspace.view(champion).rows_by_generation()
    # The random order is one order: each plan re-embeds the rows of the one before it again. By age, all take part.
    assert len([count for count in rows.values() if count]) == {"random": 2, "oldest_generation": 4}[order]
    assert len(workspace.view(champion).unreadable()) == 0


# Three mistakes that must not be made, each with a check that finds it and a mutant that makes it.


def check_that_a_backfill_embeds_before_it_serves(world, evaluation_set):
    """While the gallery is embedded the old champion answers, from its own rows; afterwards nothing is unreadable.

    The candidate could read the old rows, and the mix of both is what the decision has refused.
    """
    workspace, models = world
    better = candidate(models, noise=0.2)
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id)
    assert verdicts(evaluation) == {FIRST.generation_id: "PASS"}
    decision = evaluation.decision.model_copy(update={"outcome": "FULL_BACKFILL", "fraction": 1.0})
    served = []

    def look(unit):
        champion = workspace.registry.serving().champion
        rows = workspace.view(champion).rows_by_generation()
        served.append((champion, {name for name, count in rows.items() if count}))

    def look_after(name, step):
        result = step()
        if name == "move serving state":
            view = workspace.view(workspace.registry.serving().champion)
            moved.append((view.rows_by_generation(), len(view.unreadable())))
        return result

    moved = []
    models.before_unit = look
    carry_out(workspace, replace(evaluation, decision=decision), "second", step=look_after)
    assert served, "nothing was embedded"
    assert all(seen == (FIRST.generation_id, {FIRST.generation_id}) for seen in served), served
    assert moved == [({FIRST.generation_id: 0, better: IDENTITIES * PER_IDENTITY}, 0)], "the refused mix was served"
    assert workspace.registry.serving().champion == better


def check_that_wave_zero_is_embedded_before_the_move(world, evaluation_set):
    """A candidate that may not read an owner's rows serves only when it has vectors of its own for all of them."""
    workspace, models = world
    better = candidate(models, noise=0.2)
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id)
    carry_out(workspace, evaluation, "second")
    owned = workspace.view(better).rows_by_generation()
    assert owned[better] or evaluation.decision.fraction == 0.0
    third = SyntheticGeneration("g003-cccccc", noise=0.1)
    models.add(third)
    evaluation = judge_candidate(workspace, models, evaluation_set, third.generation_id, better, WIDE)
    own = CertificateToIssue(query_generation=third.generation_id, gallery_generation=third.generation_id)
    decision = evaluation.decision.model_copy(
        update={"outcome": "COMPATIBLE_ROLLOUT", "fraction": 0.0, "order": "random", "certificates": (own,)}
    )
    unreadable = []

    def look_after(name, step):
        result = step()
        if name == "move serving state":
            unreadable.append(len(workspace.view(third.generation_id).unreadable()))
        return result

    carry_out(workspace, replace(evaluation, decision=decision), "third", step=look_after)
    assert workspace.registry.serving().champion == third.generation_id
    assert unreadable == [0], "right after the move items could not be read"


def check_that_a_decision_is_recorded_before_it_is_published(world, evaluation_set):
    """Whoever is shown a decision finds it in the lineage and on disk, and nothing has moved yet."""
    workspace, models = world
    better = candidate(models, noise=0.2)
    evaluation = judge_candidate(workspace, models, evaluation_set, better, FIRST.generation_id)
    found = []

    def publish(decided, shown):
        recorded = [event.payload for event in workspace.registry.events(Decided, "second")]
        found.append((decided in recorded, workspace.registry.serving().champion))
        assert decided in recorded, "published what is not in the lineage"
        assert read_evaluation(workspace.evaluation_uri(decided.evaluation)).decision == shown.decision

    carry_out(workspace, evaluation, "second", publish=publish)
    assert found == [(True, FIRST.generation_id), (True, better)]


def serve_before_embedding(monkeypatch):
    real = Rollout.of

    def hasty(decision, **names):
        rollout = real(decision, **names)
        return replace(rollout, before_move="wave_zero") if decision.outcome == "FULL_BACKFILL" else rollout

    monkeypatch.setattr(Rollout, "of", hasty)


def skip_wave_zero(monkeypatch):
    monkeypatch.setattr(act, "embed_before_move", lambda *_, **__: ReindexReport())
    # The move gate would embed what is missing: it has to be passed over, too.
    monkeypatch.setattr(rollout, "move", lambda *given, **named: gate.move(*given, **{**named, "allowed": None}))


def publish_before_recording(monkeypatch):
    unrecorded = Decided(evaluation="second", outcome="COMPATIBLE_ROLLOUT", summary="")
    monkeypatch.setitem(globals(), "record_decision", lambda *_, **__: unrecorded)


PROPERTIES = {
    check_that_a_backfill_embeds_before_it_serves: serve_before_embedding,
    check_that_wave_zero_is_embedded_before_the_move: skip_wave_zero,
    check_that_a_decision_is_recorded_before_it_is_published: publish_before_recording,
}


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_order_of_writes(world, evaluation_set, check):
    check(world, evaluation_set)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_check_finds_the_mutant(world, evaluation_set, check, monkeypatch):
    """A check that cannot fail proves nothing."""
    PROPERTIES[check](monkeypatch)
    with pytest.raises(AssertionError):
        check(world, evaluation_set)


def test_judging_again_uses_the_states_of_the_wave_zero_that_the_other_policy_decides(world, evaluation_set, tmp_path):
    """A certificate that passes only under the wider margin: what is then served is the old gallery, not the new."""
    workspace, models = world
    # Its own space is better, its way to the old vectors worse.
    askew = candidate(models, noise=0.3, lost=frozenset(f"id{number:03d}" for number in range(3)))
    strict = WIDE.model_copy(
        update={"quality_margin_points": 0.0, "max_dip_points": 100.0, "fractions": (0.0, 0.5, 1.0)}
    )
    evaluation = judge_candidate(workspace, models, evaluation_set, askew, FIRST.generation_id, strict)
    lax = strict.model_copy(update={"quality_margin_points": 90.0})
    expected = judge_candidate(workspace, models, evaluation_set, askew, FIRST.generation_id, lax)
    assert expected.evidence.wave_zero_generations != evaluation.evidence.wave_zero_generations
    write_evaluation(str(tmp_path / "evaluation"), evaluation)
    again = recompute(str(tmp_path / "evaluation"), lax)[1]

    def served(one):
        return [(state.fraction, state.difference, state.nfr) for state in one.evidence.states]

    assert again.evidence.wave_zero_generations == expected.evidence.wave_zero_generations
    assert served(again) == served(expected)
    assert again.decision.outcome == expected.decision.outcome
    # What the undecided one hopes for are those states too: its own are the fully re-embedded gallery, three times.
    assert len({one[1:] for one in served(evaluation)}) == 1
    hoped = evaluation.evidence.hoped_states
    assert [state.state for state in hoped] == ["fraction/0/after/nothing", "fraction/0.5/after/nothing", "fraction/1"]


def test_judging_again_is_refused_where_nobody_measured_what_would_be_served(world, evaluation_set, tmp_path):
    workspace, models = world
    askew = candidate(models, noise=0.3, lost=frozenset(f"id{number:03d}" for number in range(3)))
    strict = WIDE.model_copy(update={"quality_margin_points": 0.0})
    evaluation = judge_candidate(workspace, models, evaluation_set, askew, FIRST.generation_id, strict)
    kept = [name for name in evaluation.outcomes.states if "/after/" not in name]
    stored = replace(
        evaluation,
        outcomes=replace(
            evaluation.outcomes,
            first_rank={name: evaluation.outcomes.first_rank[name] for name in kept},
            average_precision={name: evaluation.outcomes.average_precision[name] for name in kept},
        ),
    )
    location = str(tmp_path / "evaluation")
    for question in (evaluation.question, evaluation.question.model_copy(update={"wave_zero": None})):
        write_evaluation(location, replace(stored, question=question))
        assert recompute(location)[1].decision.outcome == evaluation.decision.outcome
        with pytest.raises(NotMeasuredError, match="run 'graceful update', which measures them"):
            recompute(location, strict.model_copy(update={"quality_margin_points": 90.0}))
