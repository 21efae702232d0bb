"""Consumers' thresholds: measured for every certified pair and mixed state, recalibrated, recorded, and served."""

import tomllib

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from typer.testing import CliRunner

from graceful.evaluation.consumers import Consumed, ScoreSample
from graceful.evaluation.matrix import matrix_from_outcomes
from graceful.evaluation.policy import Consumer, RolloutPolicy
from graceful.evaluation.report import render_report
from graceful.flows.cli import app
from graceful.flows.commands.images import search_gallery
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher
from graceful.flows.settings.config import ConfigError, GalleryConfig, load_consumers
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.evaluations import judge, read_evaluation, recompute, write_evaluation
from graceful.flows.store.thresholds import served_thresholds
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import consumers
from graceful.flows.update.assess import Candidacy, assess
from graceful.flows.update.bench import Bench
from graceful.flows.update.consumer_sections import consumer_sections
from graceful.flows.update.consumers import sample_scores
from graceful.flows.update.rollout import Rollout
from graceful.flows.update.serving import ingest
from graceful.training.datasets import load_images
from tests.flows import moves, tiny
from tests.flows.running import killed_at, update
from tests.synthetic import SyntheticGeneration, SyntheticModels, labelled

pytestmark = pytest.mark.timeout(180)

G1, G2 = "g001-aaaaaa", "g002-bbbbbb"
IDENTITIES, ROWS_EACH, QUERIES_EACH = 150, 3, 2
UNLOCK = Consumer(threshold=0.5, guards="FAR", limit=0.05)
WIDE = RolloutPolicy(
    num_resamples=200, max_nfr=0.5, quality_margin_points=50, max_dip_points=50, fractions=(0.0, 0.5, 1.0)
)


def policy(**thresholds):
    return WIDE.model_copy(update={"thresholds": thresholds})


@pytest.fixture(scope="module")
def faces():
    identities = [f"id{identity:03d}" for identity in range(IDENTITIES)]
    gallery, rows = labelled(identities, [f"g{image}" for image in range(ROWS_EACH)])
    queries, _ = labelled(identities, [f"q{image}" for image in range(QUERIES_EACH)])
    return EvaluationSet("faces", queries, gallery, queries.labels, {}), rows


@pytest.fixture
def world(tmp_path, faces):
    models = SyntheticModels(SyntheticGeneration(G1, noise=0.5))
    workspace = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(workspace, faces[1])
    return workspace, models, faces[0]


def judged(world, limits, candidate=G1, champion=None, clients=(), **geometry):
    workspace, models, evaluation_set = world
    if candidate not in models.generations:
        models.add(SyntheticGeneration(candidate, **geometry))
    source_of = dict(zip(*evaluation_set.images, strict=True))

    def vectors(generation, hashes):
        return models.generations[generation].encode([source_of[digest] for digest in hashes])[0]

    served = tuple(workspace.registry.served_generations())
    return assess(workspace, evaluation_set, Candidacy(candidate, champion, served, limits, "random", clients), vectors)


def carried_out(world, evaluation, key):
    rollout = Rollout.of(evaluation.decision, update_key=key, evaluation=key, gallery=GalleryConfig(wave_rows=100))
    moves.carry_out_whole(world[0], rollout, champion=evaluation.decision.champion)


def bootstrapped(world, limits):
    evaluation = judged(world, limits)
    assert evaluation.decision.outcome == "BOOTSTRAP"
    carried_out(world, evaluation, "first")
    return evaluation


def reasons(evaluation):
    return {(r.scope, r.state): r for r in evaluation.decision.reasons if r.guard == "threshold"}


def by_pair(evaluation, consumer="unlock"):
    found = [item for item in evaluation.evidence.consumers.thresholds if item.consumer == consumer]
    pairs = {(item.query_generation, item.gallery_generation): item for item in found if item.state is None}
    return pairs, {item.state: item for item in found if item.state is not None}


def exact_rates(world, query, owners, threshold_of):
    """FAR and FRR over all pairs, by a loop: `owners` (N,) and the threshold of each owner."""
    _, models, evaluation_set = world
    queries, gallery = evaluation_set.queries, evaluation_set.gallery
    asked = models.generations[query].encode(queries.sources)[0]
    stored = {name: models.generations[name].encode(gallery.sources)[0] for name in set(owners)}
    accepted, counts = {True: 0, False: 0}, {True: 0, False: 0}
    for q in range(len(queries)):
        for row, owner in enumerate(owners):
            same = queries.labels[q] == gallery.labels[row]
            counts[same] += 1
            accepted[same] += float(asked[q] @ stored[owner][row]) >= threshold_of[owner]
    return accepted[False] / counts[False], 1 - accepted[True] / counts[True]


def test_every_pair_and_state_is_measured_and_each_pair_gets_its_own_threshold(world):
    limits = policy(unlock=UNLOCK)
    first = bootstrapped(world, limits)
    assert [t.query_generation for t in first.decision.thresholds] == [G1]
    evaluation = judged(world, limits, G2, G1, noise=0.1)
    assert evaluation.decision.outcome == "COMPATIBLE_ROLLOUT", evaluation.decision.summary
    pairs, states = by_pair(evaluation)
    assert set(pairs) == {(G1, G1), (G2, G1), (G2, G2)}
    assert set(states) == {"served", "fraction/0", "fraction/0.5", "fraction/1"}
    assert {r.verdict for r in reasons(evaluation).values()} == {"PASS"}
    chosen = {t.gallery_generation: t.threshold for t in evaluation.decision.thresholds}
    assert set(chosen) == {G1, G2}
    for owner, threshold in chosen.items():
        item = pairs[G2, owner]
        assert item.far_upper <= UNLOCK.limit
        assert item.thresholds == {owner: threshold}
        far, frr = exact_rates(world, G2, [owner] * IDENTITIES * ROWS_EACH, chosen)
        assert (item.far, item.frr) == (pytest.approx(far), pytest.approx(frr))  # few enough to be all pairs
    owners = evaluation.consumed.scores.owners["fraction/0.5"].tolist()
    assert set(owners) == {G1, G2}
    far, frr = exact_rates(world, G2, owners, chosen)
    assert (states["fraction/0.5"].far, states["fraction/0.5"].frr) == (pytest.approx(far), pytest.approx(frr))
    # What serves now is measured at the thresholds that serve now.
    assert states["served"].thresholds == {G1: first.decision.thresholds[0].threshold}
    assert evaluation.question.thresholds == {"unlock": {G1: first.decision.thresholds[0].threshold}}


def test_recorded_thresholds_are_served_for_their_pair_and_no_other(world):
    workspace, _, _ = world
    album = Consumer(threshold=0.5, guards="FRR", limit=0.1)  # scores of one identity rise as noise falls
    limits = policy(album=album)
    before = served_thresholds(workspace.registry, limits.thresholds, G1, [G1])
    assert before == {"album": {G1: 0.5}}  # registered, and no decision yet
    bootstrapped(world, limits)
    evaluation = judged(world, limits, G2, G1, noise=0.1)
    carried_out(world, evaluation, "second")
    chosen = {t.gallery_generation: t.threshold for t in evaluation.decision.thresholds}
    assert served_thresholds(workspace.registry, limits.thresholds, G2, [G1, G2]) == {"album": chosen}
    first = served_thresholds(workspace.registry, limits.thresholds, G1, [G1, G2])["album"]
    assert set(first) == {G1}  # nobody has measured queries of the first on vectors of the second
    assert first[G1] not in chosen.values()
    assert served_thresholds(workspace.registry, {}, G2, [G1, G2]) == {}
    other = {"other": UNLOCK}
    assert served_thresholds(workspace.registry, other, G2, [G1, G2]) == {"other": {G1: 0.5, G2: 0.5}}


def test_thresholds_are_there_before_anything_may_be_read_and_are_recorded_once(world):
    workspace, _, _ = world
    evaluation = judged(world, policy(unlock=UNLOCK))
    with killed_at("certified"):
        carried_out(world, evaluation, "first")
    assert workspace.registry.thresholds() == {("unlock", G1, G1): evaluation.decision.thresholds[0].threshold}
    carried_out(world, evaluation, "first")
    assert [event.kind for event in workspace.registry.history()].count("thresholds_set") == 1


def test_the_report_shows_each_threshold_with_its_rates(world):
    limits = policy(unlock=UNLOCK)
    bootstrapped(world, limits)
    evaluation = judged(world, limits, G2, G1, noise=0.1)
    section = consumer_sections(evaluation.evidence)[0]
    assert [row["where"] for row in section.rows] == [
        f"rows of {G1}", f"rows of {G1}", f"rows of {G2}", "served", "fraction/0", "fraction/0.5", "fraction/1"
    ]  # fmt: skip
    matrix = matrix_from_outcomes(evaluation.outcomes, [G1, G2])
    page = render_report(evaluation.evidence, evaluation.decision, evaluation.policy, matrix=matrix, sections=[section])
    chosen = {t.gallery_generation: t.threshold for t in evaluation.decision.thresholds}
    assert "Thresholds of consumers" in page
    assert f"{G1}: {chosen[G1]:.4f}, {G2}: {chosen[G2]:.4f}" in page
    assert consumer_sections(judged(world, WIDE, G2, G1).evidence) == []


def test_an_older_client_gets_a_threshold_for_the_new_rows_that_it_may_read(world):
    limits = policy(unlock=UNLOCK)
    bootstrapped(world, limits)
    carried_out(world, judged(world, limits, G2, G1, noise=0.1), "second")
    third = judged(world, limits, "g003-cccccc", G2, clients=(G1,), noise=0.1)
    assert ("unlock", G1, "g003-cccccc") in {
        (t.consumer, t.query_generation, t.gallery_generation) for t in third.decision.thresholds
    }


def test_a_threshold_that_stays_fails_when_scores_have_shifted(world):
    fixed = Consumer(threshold=0.42, guards="FRR", limit=0.1, on_shift="fail")
    bootstrapped(world, policy(unlock=fixed))
    better = judged(world, policy(unlock=fixed), "g003-cccccc", G1, noise=0.1)
    assert reasons(better)["unlock FRR", "fraction/1"].verdict == "PASS"
    assert {t.threshold for t in better.decision.thresholds} == {0.42}
    held = judged(world, policy(unlock=fixed), G2, G1, noise=1.0)
    pairs, _ = by_pair(held)
    assert {item.thresholds[owner] for (_, owner), item in pairs.items()} == {0.42}
    assert pairs[G2, G2].frr > pairs[G1, G1].frr
    assert reasons(held)["unlock FRR", "fraction/1"].verdict == "FAIL"
    assert held.decision.outcome == "HOLD"
    assert held.decision.thresholds == ()
    assert "threshold unlock, fraction/1: FRR at 0.4200 on g002-bbbbbb" in held.decision.summary
    moved = fixed.model_copy(update={"on_shift": "recalibrate"})
    assert reasons(judged(world, policy(unlock=moved), G2, G1))["unlock FRR", "fraction/1"].verdict == "PASS"


def test_too_few_identities_leave_a_recalibration_open_and_nothing_is_rolled_out(world):
    strict = UNLOCK.model_copy(update={"limit": 1e-4})
    bootstrapped(world, policy(unlock=strict))
    evaluation = judged(world, policy(unlock=strict), G2, G1, noise=0.1)
    assert {r.verdict for r in reasons(evaluation).values()} == {"UNKNOWN"}
    assert evaluation.decision.outcome == "INCONCLUSIVE"
    assert "no threshold can be shown to keep it on g001-aaaaaa" in evaluation.decision.reasons[0].text
    assert "while no pair is judged wrong, 36,887 of them show it" in evaluation.decision.summary
    # What an operator orders all the same has no threshold, rather than a wrong one.
    ordered = Rollout.ordered_by_operator(evaluation.evidence, update_key="x", evaluation="x", gallery=GalleryConfig())
    assert ordered.thresholds == ()


def test_the_other_rate_has_a_limit_too_where_it_is_given(world):
    both = UNLOCK.model_copy(update={"limit": 0.02, "other_limit": 0.02})
    bootstrapped(world, policy(unlock=both))
    evaluation = judged(world, policy(unlock=both), G2, G1, noise=1.0)
    found = reasons(evaluation)
    assert found["unlock FAR", "fraction/1"].verdict == "PASS"
    assert found["unlock FRR", "fraction/1"].verdict == "FAIL"
    assert evaluation.decision.outcome == "HOLD"


def test_a_consumer_may_guard_false_rejects(world):
    album = Consumer(threshold=0.3, guards="FRR", limit=0.1)
    bootstrapped(world, policy(album=album))
    evaluation = judged(world, policy(album=album), G2, G1, noise=0.1)
    pairs, states = by_pair(evaluation, "album")
    assert pairs[G2, G2].frr_upper <= 0.1
    assert {r.verdict for r in reasons(evaluation).values()} == {"PASS"}
    assert states["fraction/1"].frr <= 0.1


def test_thresholds_are_judged_again_from_what_is_stored(world, tmp_path):
    limits = policy(unlock=UNLOCK)
    bootstrapped(world, limits)
    evaluation = judged(world, limits, G2, G1, noise=0.1)
    location = str(tmp_path / "evaluation")
    write_evaluation(location, evaluation)
    stored, again = recompute(location)
    assert stored.decision == again.decision == evaluation.decision
    assert again.evidence == evaluation.evidence
    lax = recompute(location, policy(unlock=UNLOCK.model_copy(update={"limit": 0.2})))[1]
    thresholds = [{t.gallery_generation: t.threshold for t in e.decision.thresholds} for e in (evaluation, lax)]
    assert all(thresholds[1][owner] < thresholds[0][owner] for owner in (G1, G2))
    assert recompute(location, WIDE)[1].decision.thresholds == ()
    unmeasured = judged(world, WIDE, G2, G1)
    write_evaluation(str(tmp_path / "without"), unmeasured)
    assert read_evaluation(str(tmp_path / "without")).consumed.scores is None
    missing = recompute(str(tmp_path / "without"), limits)[1].decision
    assert missing.outcome == "HOLD"
    assert "scores for the thresholds of unlock" in missing.summary


def test_sampled_pairs_are_what_they_are_called_and_as_many_of_each_query(world, monkeypatch):
    _, models, evaluation_set = world
    monkeypatch.setattr(consumers, "MAX_IMPOSTORS", 20 * len(evaluation_set.queries))
    monkeypatch.setattr(consumers, "MAX_GENUINE", 100)
    monkeypatch.setattr(consumers, "_BLOCK_PAIRS", 999)
    everything = evaluation_set.queries
    asked, stored = (models.generations[G1].encode(part.sources)[0] for part in (everything, evaluation_set.gallery))
    same = EvaluationSet("same", everything, everything, everything.labels, {})
    for chosen, gallery in ((evaluation_set, stored), (same, asked)):
        bench = Bench(chosen, {G1: asked}, {G1: gallery})
        sample = sample_scores(bench, policy(unlock=UNLOCK), [(G1, G1)], 0)
        again = sample_scores(bench, policy(unlock=UNLOCK), [(G1, G1)], 0)
        assert (sample.rows == again.rows).all()
        labels = np.unique(everything.labels)
        queries_of = labels[sample.query_groups]
        rows_of = np.unique(chosen.gallery.labels)[sample.row_groups]
        assert ((queries_of == rows_of) == sample.genuine).all()
        assert sample.genuine.sum() == 100
        assert (~sample.genuine).sum() == 20 * len(everything)
        assert (rows_of == chosen.gallery.labels[sample.rows]).all()
        for pair in (0, 50, 150, 3000):
            possible = asked[everything.labels == queries_of[pair]] @ gallery[sample.rows[pair]]
            assert np.abs(possible - sample.scores[G1, G1][pair]).min() < 1e-6
        if chosen is same:  # the own item is no pair: it would have a score of 1
            assert sample.scores[G1, G1].max() < 0.9999
    assert sample_scores(bench, WIDE, [(G1, G1)], 0) is None


def test_unreadable_rows_are_no_pair(world):
    _, models, _ = world
    bootstrapped(world, policy(unlock=UNLOCK))
    models.add(SyntheticGeneration(G2, noise=0.1))
    evaluation = judged(world, policy(unlock=UNLOCK), G2, G1)
    sample = evaluation.consumed.scores
    owners = dict(sample.owners)
    owners["fraction/0.5"] = np.where(np.arange(len(owners["fraction/0.5"])) < 30, "", owners["fraction/0.5"])
    partly = ScoreSample(**{**vars(sample), "owners": owners})
    again = judge(evaluation.outcomes, evaluation.policy, evaluation.question, Consumed(scores=partly))
    _, states = by_pair(again)
    _, all_states = by_pair(evaluation)
    assert states["fraction/0.5"].num_genuine == all_states["fraction/0.5"].num_genuine - 30 * QUERIES_EACH
    with pytest.raises(ValueError, match="expected rows of shape"):
        ScoreSample(**{**vars(sample), "rows": sample.rows[:3]})


def test_a_wrong_consumer_is_refused_by_name(tmp_path):
    assert load_consumers(str(tmp_path)) == {}
    (tmp_path / "graceful.toml").write_text(
        '[policy.thresholds.unlock]\nthreshold = 0.5\nguards = "FPR"\nlimit = 0.1\n'
    )
    with pytest.raises(ConfigError, match=r"policy\.thresholds\.unlock\.guards: Input should be 'FAR' or 'FRR'"):
        load_consumers(str(tmp_path))
    with pytest.raises(ValidationError, match="limit"):
        Consumer(threshold=0.5, guards="FAR", limit=0)
    (tmp_path / "graceful.toml").write_text(
        '[policy]\nmax_nfr = 7\n[policy.thresholds.unlock]\nthreshold = 0.5\nguards = "FAR"\nlimit = 0.1\n'
    )
    assert load_consumers(str(tmp_path))["unlock"].limit == 0.1  # whatever else it says


def test_the_page_shows_a_configuration_that_is_accepted(tmp_path):
    page = (tiny.ROOT / "docs" / "howto" / "thresholds.md").read_text()
    shown = tomllib.loads(page.partition("```text\n")[2].partition("```")[0])
    assert RolloutPolicy.model_validate(shown["policy"]).thresholds["unlock"].guards == "FAR"


# Real updates and real searches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Two generations trained and rolled out, with a consumer of five digits' scores."""
    root = tmp_path_factory.mktemp("digits") / "workspace"
    unlock = {"threshold": 0.9, "guards": "FAR", "limit": 0.95}
    # Five identities show nothing at a part of the error level.
    changes = {"policy.thresholds": {"unlock": unlock}, "policy.alpha_spending": "none"}
    tiny.new_workspace(root, changes)
    update(root)
    tiny.write_config(root, root / "digits.parquet", {**changes, **tiny.grown(5)})
    result = update(root)
    assert result.outcome in ("COMPATIBLE_ROLLOUT", "FULL_BACKFILL")
    return root


def test_a_search_answers_with_the_threshold_of_each_hit(searched):
    searcher = GallerySearcher(Workspace(str(searched)))
    recorded = searcher._workspace.registry.thresholds()
    generation = searcher.generation
    expected = {owner: recorded["unlock", generation, owner] for owner in searcher.served.rows_by_generation}
    assert searcher.served.thresholds == {"unlock": expected}
    view = searcher._workspace.view(generation)
    vectors = view.vectors(view.owned_by(generation)[:1])
    hits = searcher.search_vectors(vectors, k=100)[0]
    assert {hit.above["unlock"] for hit in hits} == {True, False}
    for hit in hits:
        assert hit.above == {"unlock": hit.score >= expected[hit.generation]}
    with TestClient(make_app(str(searched))) as client:
        answer = client.post("/search", params={"k": 100}, json={"vector": vectors[0].tolist()}).json()
    assert answer["thresholds"] == {"unlock": expected}
    assert [hit["above"] for hit in answer["hits"]] == [dict(hit.above) for hit in hits]


def test_the_command_says_which_hits_are_above(searched):
    image = load_images(tiny.open_config(searched).evaluation.queries).sources[0]
    found = search_gallery(str(searched), image, 100, None)
    above = [hit["above"]["unlock"] for hit in found["hits"]]
    assert set(above) == {True, False}
    printed = CliRunner().invoke(app, ["search", image, "-r", str(searched), "-k", "100"])
    assert printed.exit_code == 0, printed.output
    asked, *lines = printed.output.splitlines()
    assert found["query_generation"] in asked
    assert ["above unlock)" in line for line in lines] == above
    assert ["below unlock)" in line for line in lines] == [not yes for yes in above]
