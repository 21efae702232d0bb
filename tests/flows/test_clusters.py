"""`graceful cluster`: people keep their names across clusterings and updates, and the gate judges who would change."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from graceful.errors import UnknownFormatError, UsageError
from graceful.evaluation.decision import CertificateToIssue, Decision
from graceful.evaluation.matrix import matrix_from_outcomes
from graceful.evaluation.policy import RolloutPolicy
from graceful.evaluation.report import render_report
from graceful.flows.cli import app
from graceful.flows.commands import clusters
from graceful.flows.commands.clusters import NothingClusteredError, cluster_workspace, compare_clusters, rename_people
from graceful.flows.commands.status import delete_items
from graceful.flows.settings.config import ConfigError, GalleryConfig, load_clustering_config
from graceful.flows.store.clusterings import clusterings, newest, read_clustering
from graceful.flows.store.evaluation_set import EvaluationSet
from graceful.flows.store.evaluations import read_evaluation, recompute, write_evaluation
from graceful.flows.store.events import Adopted, Decided
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import act
from graceful.flows.update.act import Case, decide_and_act
from graceful.flows.update.assess import Candidacy, assess
from graceful.flows.update.consumer_sections import consumer_sections
from graceful.flows.update.serving import ingest
from graceful.indexing.cluster_choice import ClusteringConfig
from tests.flows import tiny
from tests.synthetic import SyntheticGeneration, SyntheticModels, items, labelled

pytestmark = pytest.mark.timeout(120)

G1, G2 = "g001-aaaaaa", "g002-bbbbbb"
TIGHT = 0.05  # deviation of the photos of a person


class Evaluated:
    """What `act` reads of an evaluation."""

    def __init__(self, decision):
        self.decision = decision


def serve(workspace, candidate, champion=None, certified=(), fraction=0.0):
    """Carry out a rollout of a generation, as an update does."""
    workspace.registry.record(Adopted(name=candidate, factory="none"), generation=candidate)
    pairs = [(candidate, candidate), *((candidate, name) for name in certified)]
    outcome = "BOOTSTRAP" if champion is None else "COMPATIBLE_ROLLOUT"
    decision = Decision(
        outcome=outcome, summary="", candidate=candidate, champion=champion, fraction=fraction, order="random",
        certificates=tuple(CertificateToIssue(query_generation=q, gallery_generation=g) for q, g in pairs), reasons=(),
    )  # fmt: skip
    case = Case(
        workspace=workspace,
        update_key=f"update-{candidate}",
        champion=champion,
        gallery=GalleryConfig(wave_rows=16, unit_rows=8),
        judge=lambda: (Decided(evaluation=candidate, outcome=outcome, summary=""), Evaluated(decision)),
        publish=lambda decided, evaluation: None,
        conclude=lambda decision: None,
    )
    decide_and_act(case, do=act.plain)


@pytest.fixture
def world(tmp_path):
    """Ten people, four photos each, served by the first generation."""
    models = SyntheticModels(SyntheticGeneration(G1, spread=TIGHT), SyntheticGeneration(G2, spread=TIGHT))
    root = tmp_path / "album"
    workspace = Workspace(str(root), models, create=True)
    ingest(workspace, items(10, 4))
    (root / "graceful.toml").write_text("[clusters]\nthreshold = 0.8\n")
    serve(workspace, G1)
    return workspace, str(root)


def names_by_identity(workspace):
    """Names that the photos of each synthetic identity bear in the newest clustering."""
    found = newest(workspace)
    by_identity = {}
    for item_id, name in zip(found.item_ids.tolist(), found.name.tolist(), strict=True):
        by_identity.setdefault(item_id.rsplit("-", 1)[0], set()).add(name)
    return by_identity


def test_everybody_is_one_person_and_keeps_the_name_across_an_update(world):
    workspace, root = world
    first = cluster_workspace(root)
    assert (first["photos"], first["people"], first["of_nobody"], first["churn"]) == (40, 10, 0, None)
    assert names_by_identity(workspace)["item-002"] == {"person 3"}
    rename_people(root, {"person 3": "Ann"})
    serve(workspace, G2, G1, certified=[G1], fraction=0.5)
    assert set(workspace.view(G2).rows_by_generation().values()) == {20}
    second = cluster_workspace(root)
    assert (second["generation"], second["people"]) == (G2, 10)
    assert (second["churn"]["num_changed"], second["churn"]["share"]) == (0, 0.0)
    assert names_by_identity(workspace)["item-002"] == {"Ann"}


def test_a_name_that_is_gone_is_not_given_to_somebody_new(world):
    workspace, root = world
    cluster_workspace(root)
    delete_items(root, [f"item-009-{image}" for image in range(4)], forget=False)
    ingest(workspace, items(2, 4, start=20))
    found = cluster_workspace(root)
    assert found["churn"]["num_changed"] == 0
    assert found["churn"]["new"] == ["person 11", "person 12"]
    assert names_by_identity(workspace)["item-020"] == {"person 11"}
    rename_people(root, {"person 1": "person 13"})
    ingest(workspace, items(1, 4, start=30))
    cluster_workspace(root)
    assert names_by_identity(workspace)["item-030"] == {"person 14"}
    assert names_by_identity(workspace)["item-000"] == {"person 13"}


def test_a_coarser_clustering_tells_who_was_merged(world):
    _, root = world
    cluster_workspace(root)
    coarse = cluster_workspace(root, threshold=-1.0)
    assert coarse["people"] == 1
    seen = coarse["churn"]
    assert (seen["num_changed"], seen["num_items"], seen["merged"], seen["num_gone"]) == (36, 40, ["person 1"], 9)
    strict = cluster_workspace(root, threshold=1.0)
    assert (strict["people"], strict["of_nobody"]) == (0, 40)
    assert cluster_workspace(root, min_photos=5)["people"] == 0


def test_a_preview_changes_no_names_and_a_comparison_stores_nothing(world):
    workspace, root = world
    cluster_workspace(root)
    serve(workspace, G2, G1, certified=[G1], fraction=1.0)
    preview = cluster_workspace(root, generation="g001", threshold=1.0)
    assert preview["preview"]
    assert newest(workspace).made.generation == G1
    assert newest(workspace).made.number == 1
    stored = clusterings(workspace)
    compared = compare_clusters(root, "g001", G2)
    assert clusterings(workspace) == stored
    assert (compared["pairwise_f"], compared["b_cubed_f"], compared["variation_of_information"]) == (1.0, 1.0, 0.0)
    assert (compared["people"], compared["churn"]["num_changed"]) == ([10, 10], 0)
    assert cluster_workspace(root)["churn"]["num_changed"] == 0


def test_forgotten_photos_are_in_no_clustering_any_more(world):
    workspace, root = world
    cluster_workspace(root)
    cluster_workspace(root)
    made = newest(workspace).made
    delete_items(root, ["item-003-1"], forget=True)
    for uri in clusterings(workspace):
        assert "item-003-1" not in read_clustering(uri).item_ids.tolist()
        assert len(read_clustering(uri).item_ids) == 39
        assert b"item-003-1" not in Path(uri).read_bytes()
    assert newest(workspace).made == made


def test_two_runs_at_the_same_time_leave_two_clusterings(world, monkeypatch):
    workspace, root = world
    monkeypatch.setattr(clusters, "next_number", lambda workspace: 1)
    cluster_workspace(root)
    cluster_workspace(root)
    assert len(clusterings(workspace)) == 2


def test_what_cannot_be_clustered_or_named_is_refused_in_a_sentence(world, tmp_path):
    _, root = world
    with pytest.raises(NothingClusteredError, match="run 'graceful cluster' first"):
        rename_people(root, {"a": "b"})
    cluster_workspace(root)
    with pytest.raises(UsageError, match="expected a name of the newest clustering, found 'Zoe'"):
        rename_people(root, {"Zoe": "Ann"})
    with pytest.raises(UsageError, match="expected every name once, found 'person 2' for two people"):
        rename_people(root, {"person 1": "person 2"})
    with pytest.raises(UsageError, match="found an empty one"):
        rename_people(root, {"person 1": " "})
    swapped = {"person 1": "person 2", "person 2": "person 1"}
    assert rename_people(root, swapped)["renamed"] == swapped
    Path(root, "graceful.toml").write_text("[clusters]\ntreshold = 0.8\n")
    with pytest.raises(ConfigError, match=r"clusters\.treshold"):
        cluster_workspace(root)
    Path(root, "graceful.toml").unlink()
    with pytest.raises(UsageError, match=r"set clusters\.threshold or give --threshold"):
        cluster_workspace(root)
    assert load_clustering_config(root) == ClusteringConfig()
    empty = Workspace(str(tmp_path / "empty"), SyntheticModels(), create=True)
    empty.create()
    with pytest.raises(NothingClusteredError, match="expected a serving generation, found none"):
        cluster_workspace(empty.root)


def test_a_limit_of_churn_needs_to_know_how_to_cluster(tmp_path):
    limit = {"policy.max_cluster_churn": 0.1}
    tiny.write_config(tmp_path, tmp_path / "digits.parquet", limit)
    with pytest.raises(ConfigError, match=r"policy: max_cluster_churn needs clusters\.threshold"):
        tiny.open_config(tmp_path)
    assert tiny.open_config(tmp_path, {"clusters.method": "hdbscan"}).clusters.is_complete
    judged = tiny.open_config(tmp_path, {"clusters.threshold": 0.5})
    assert judged.digest() != tiny.open_config(tmp_path, {"clusters.threshold": 0.6}).digest()
    tiny.write_config(tmp_path, tmp_path / "digits.parquet")
    free = tiny.open_config(tmp_path, {"clusters.threshold": 0.5})
    assert free.digest() == tiny.open_config(tmp_path).digest()  # what decides nothing has nothing judged again


def test_a_file_that_is_no_clustering_is_named(world):
    workspace, root = world
    cluster_workspace(root)
    stranger = Path(root, "clusters", "999999-x.parquet")
    pq.write_table(pa.table({"item_id": ["a"]}), stranger)
    with pytest.raises(UnknownFormatError, match=r"found another file \(at .*999999-x.parquet\)"):
        cluster_workspace(root)
    stranger.write_bytes(b"no parquet")
    with pytest.raises(UnknownFormatError, match="found another file"):
        cluster_workspace(root)
    found = newest_metadata(clusterings(workspace)[0])
    found["format_version"] = 2
    table = pq.read_table(clusterings(workspace)[0]).replace_schema_metadata({"graceful_clustering": json.dumps(found)})
    pq.write_table(table, stranger)
    with pytest.raises(UnknownFormatError, match="less than or equal to 1"):
        cluster_workspace(root)


def command(*arguments):
    return CliRunner().invoke(app, ["cluster", *map(str, arguments)])


def test_the_command_clusters_names_and_compares(world):
    _, root = world
    first = command("-r", root)
    assert first.exit_code == 0, first.output
    assert "10 people on 40 photos" in first.output
    assert "change person" not in first.output
    assert "person 3 is Ann from now on." in command("-r", root, "--name", "person 3=Ann").output
    again = command("-r", root, "--threshold", "-1")
    assert "Photos that change person: 36 of 40 (90.00 %)" in again.output
    assert "People merged: 1: person 1" in again.output
    compared = command("-r", root, "--compare", "g001", G1)
    assert "pairwise F 1.0000, B-cubed F 1.0000, distance 0.000 nats" in compared.output
    document = json.loads(command("-r", root, "--json").stdout)
    assert (document["people"], document["churn"]["num_items"]) == (10, 40)
    wrong = command("-r", root, "--name", "Ann")
    assert (wrong.exit_code, "expected each as 'person 3=Ann', found 'Ann'" in wrong.stderr) == (1, True)
    assert command("-r", root, "--min-photos", "1").exit_code == 2
    assert "expected one of g001-aaaaaa, found no such" in command("-r", root, "--generation", "g009").stderr


def newest_metadata(uri):
    return json.loads(pq.read_schema(uri).metadata[b"graceful_clustering"])


# The gate -------------------------------------------------------------------------------------------------------------

PEOPLE, PHOTOS, QUERIES_EACH = 120, 4, 2
# Wide limits but for the clusters: those alone decide.
POLICY = RolloutPolicy(
    num_resamples=200, max_nfr=0.5, quality_margin_points=50, max_dip_points=50, fractions=(0.0, 0.5, 1.0),
    max_cluster_churn=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def album():
    identities = [f"id{identity:03d}" for identity in range(PEOPLE)]
    gallery, rows = labelled(identities, [f"g{image}" for image in range(PHOTOS)])
    queries, _ = labelled(identities, [f"q{image}" for image in range(QUERIES_EACH)])
    return EvaluationSet("album", queries, gallery, queries.labels, {}), rows


def judged(tmp_path, album, policy=POLICY, config=ClusteringConfig(threshold=0.8), **geometry):
    evaluation_set, rows = album
    models = SyntheticModels(
        SyntheticGeneration(G1, spread=TIGHT), SyntheticGeneration(G2, **{"spread": TIGHT, **geometry})
    )
    workspace = Workspace(str(tmp_path / "workspace"), models, create=True)
    ingest(workspace, rows)
    serve(workspace, G1)
    source_of = dict(zip(*evaluation_set.images, strict=True))

    def vectors(generation, hashes):
        return models.generations[generation].encode([source_of[digest] for digest in hashes])[0]

    return assess(workspace, evaluation_set, Candidacy(G2, G1, (G1,), policy, "random", clusters=config), vectors)


def cluster_reasons(evaluation):
    return {r.state: r.verdict for r in evaluation.decision.reasons if r.guard == "clusters"}


def test_an_update_that_leaves_people_alone_passes(tmp_path, album):
    evaluation = judged(tmp_path, album)
    assert evaluation.decision.outcome == "COMPATIBLE_ROLLOUT", evaluation.decision.summary
    assert set(cluster_reasons(evaluation).values()) == {"PASS"}
    for item in evaluation.evidence.consumers.clusters:
        assert (item.changed, item.num_items, item.num_split, item.num_merged) == (0.0, PEOPLE * PHOTOS, 0, 0)
        assert item.pairwise_f == item.b_cubed_f == item.pairwise_f_served == 1.0


def test_planted_people_that_fall_apart_are_counted_and_hold_the_update(tmp_path, album):
    lost = frozenset(f"id{number:03d}" for number in range(24))
    evaluation = judged(tmp_path, album, lost=lost)
    full = next(item for item in evaluation.evidence.consumers.clusters if item.fraction == 1.0)
    assert full.changed == pytest.approx(24 / PEOPLE, abs=0.01)
    assert full.changed_lower > POLICY.max_cluster_churn
    assert full.b_cubed_f < full.b_cubed_f_served == 1.0
    assert evaluation.decision.outcome == "HOLD"
    assert "of the photos change person, at least" in evaluation.decision.summary
    (section,) = consumer_sections(evaluation.evidence)
    assert (section.title, section.rows[-1]["people split"]) == ("People", f"{full.num_split:,}")


def test_a_rotated_space_is_whole_when_it_is_whole_and_in_pieces_on_a_mixed_gallery(tmp_path, album):
    """Half re-embedded in another space, everybody is in two halves: only the mixed state shows it."""
    policy = POLICY.model_copy(update={"quality_margin_points": 100.0})
    evaluation = judged(tmp_path, album, policy, rotation_seed=7)
    by_fraction = {item.fraction: item for item in evaluation.evidence.consumers.clusters}
    assert by_fraction[1.0].changed == 0
    assert by_fraction[0.5].changed > 0.3


def test_clusters_are_judged_again_from_what_is_stored(tmp_path, album):
    lost = frozenset(f"id{number:03d}" for number in range(24))
    evaluation = judged(tmp_path, album, lost=lost)
    location = str(tmp_path / "evaluation")
    write_evaluation(location, evaluation)
    stored, again = recompute(location)
    assert stored.decision == again.decision == evaluation.decision
    assert again.evidence == evaluation.evidence
    lax = recompute(location, POLICY.model_copy(update={"max_cluster_churn": 0.5}))[1]
    assert set(cluster_reasons(lax).values()) == {"PASS"}
    unjudged = recompute(location, POLICY.model_copy(update={"max_cluster_churn": None}))[1]
    assert cluster_reasons(unjudged) == {}
    assert unjudged.decision.outcome == "COMPATIBLE_ROLLOUT"


def test_too_few_people_leave_it_open_and_say_how_many_photos_would_do(tmp_path, album):
    evaluation = judged(tmp_path, album, POLICY.model_copy(update={"max_cluster_churn": 0.01}))
    assert set(cluster_reasons(evaluation).values()) == {"UNKNOWN"}  # nobody of 120: at most 3 % at 2.5 %
    assert evaluation.decision.outcome == "INCONCLUSIVE"
    assert "clusters" in evaluation.decision.queries_needed_for
    assert evaluation.decision.queries_needed > 480
    matrix = matrix_from_outcomes(evaluation.outcomes, [G1, G2])
    page = render_report(evaluation.evidence, evaluation.decision, evaluation.policy, matrix=matrix)
    assert "of the photos change person, at most" in page


def test_what_was_not_clustered_is_missing_and_never_passes(tmp_path, album):
    evaluation = judged(tmp_path, album, config=None)
    assert evaluation.consumed.clusterings is None
    assert evaluation.decision.outcome == "HOLD"
    assert "clusters: state 'fraction/0'" in evaluation.decision.summary
    location = str(tmp_path / "evaluation")
    write_evaluation(location, evaluation)
    assert read_evaluation(location).consumed == evaluation.consumed


def test_photos_of_unknown_people_take_no_part_in_the_agreement(tmp_path, album):
    evaluation_set, rows = album
    labels = evaluation_set.gallery.labels.copy()
    labels[: PHOTOS * 10] = ""
    gallery = evaluation_set.gallery.take(np.arange(len(labels)))
    object.__setattr__(gallery, "labels", labels)
    unknown = EvaluationSet("album", evaluation_set.queries, gallery, evaluation_set.clusters, {})
    evaluation = judged(tmp_path, (unknown, rows), lost=frozenset(f"id{number:03d}" for number in range(10)))
    full = next(item for item in evaluation.evidence.consumers.clusters if item.fraction == 1.0)
    assert full.changed == pytest.approx(10 / PEOPLE, abs=0.01)
    assert full.b_cubed_f == 1.0
