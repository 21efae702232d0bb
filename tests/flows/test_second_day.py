"""The second day: the operator's word on a candidate, going back and forward, retiring, adopting. Real commands."""

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from torch import nn

import graceful
from graceful.errors import GracefulError, UsageError
from graceful.evaluation.outcomes import pair_state
from graceful.files import CRASH_EXIT_CODE
from graceful.flows.commands import updates
from graceful.flows.commands.adopt import AdoptionError, adopt_generation
from graceful.flows.commands.flips import flips_of
from graceful.flows.commands.suggestions import settling_commands
from graceful.flows.runtime.session import open_session
from graceful.flows.store.claim import UpdateInProgressError, claim
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import (
    Adopted,
    Decided,
    Forwarded,
    Overridden,
    Promoted,
    Rejected,
    Retired,
    Trained,
    UpdateStarted,
)
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import order
from graceful.flows.update.conclude import release_when_due
from graceful.flows.update.gate import MoveRefusedError
from graceful.flows.update.serving import go_forward, rollback
from graceful.flows.update.train import EmbeddingFailuresError
from graceful.training.generation import read_card
from graceful.training.manifest import read_manifest
from tests.flows import running, tiny
from tests.flows.running import command as run
from tests.flows.running import document

UNSURE = {**tiny.WIDE, "max_nfr": 0.1, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}
STRICT = {"quality_margin_points": 0.0, "max_nfr": 0.0001, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}

UNLEARNING = {"training.max_lr": 0.3}
"""So fast that a candidate is worse on every processor."""


def judged(bootstrapped, folder, digits_file, **changes):
    root = tiny.copy_workspace(bootstrapped, folder / "workspace")
    tiny.write_config(root, digits_file, {**tiny.grown(5), **changes})
    return root, running.update(root)


@pytest.fixture(scope="module")
def held_once(bootstrapped, tmp_path_factory, digits_file):
    root, result = judged(bootstrapped, tmp_path_factory.mktemp("held"), digits_file, policy=STRICT, **UNLEARNING)
    assert result.outcome == "HOLD"
    return root, result.candidate


@pytest.fixture(scope="module")
def open_once(bootstrapped, tmp_path_factory, digits_file):
    root, result = judged(bootstrapped, tmp_path_factory.mktemp("open"), digits_file, policy=UNSURE)
    assert result.outcome == "INCONCLUSIVE"
    return root, result.candidate


@pytest.fixture
def held(held_once, tmp_path):
    """A workspace whose second generation was held by a strict policy."""
    return tiny.copy_workspace(held_once[0], tmp_path / "workspace"), held_once[1]


@pytest.fixture
def undecided(open_once, tmp_path):
    """A workspace whose second generation was left open: too few queries for the limit on flips."""
    return tiny.copy_workspace(open_once[0], tmp_path / "workspace"), open_once[1]


def weights_of(root):
    return {file: file.stat().st_mtime_ns for file in root.glob("generations/*/*")}


def test_accepting_serves_the_candidate_trains_nothing_and_says_who_and_why(held):
    root, candidate = held
    before = {file: file.stat().st_mtime_ns for file in root.glob("generations/*/weights.safetensors")}
    found = document("accept", "g002", "--reason", "looked at the flips", "--root", root)
    assert (found["accepted"], found["serving"]) == (candidate, candidate)
    assert {file: file.stat().st_mtime_ns for file in root.glob("generations/*/weights.safetensors")} == before
    workspace = Workspace(str(root))
    assert workspace.view(candidate).rows_by_generation() == {candidate: 100}, "everything is embedded before it serves"
    said = workspace.registry.events(Overridden)[-1]
    assert (said.generation, said.payload.reason, bool(said.payload.by)) == (candidate, "looked at the flips", True)
    assert document("status", "--root", root)["pending"] is None
    told = run("history", "--root", root).stdout
    assert "looked at the flips" in " ".join(told.split())
    assert "operator" in told
    assert "serves already" in run("accept", "g002", "--reason", "again", "--root", root, code=1).stderr


def test_accepting_to_a_fraction_re_embeds_so_much_and_leaves_nothing_unreadable(held):
    root, candidate = held
    run("accept", candidate, "--reason", "a half first", "--fraction", "0.5", "--root", root)
    view = Workspace(str(root)).view(candidate)
    assert len(view.unreadable()) == 0
    assert view.rows_by_generation()[candidate] >= 50


def test_what_is_pending_is_said_with_the_commands_that_settle_it(undecided):
    root, candidate = undecided
    assert document("status", "--root", root)["pending"] == candidate
    told = run("status", "--root", root).stdout
    for word in (f"{candidate} waits", "graceful flips g002", "graceful accept g002", "graceful reject g002"):
        assert word in told
    for value in ("None", "[", "{", "'g0"):
        assert value not in told


def test_accepting_what_was_left_open_keeps_what_the_certificates_allow(undecided):
    root, candidate = undecided
    found = document("accept", "g002", "--fraction", "0.5", "--reason", "a half first", "--root", root)
    assert (found["accepted"], found["decided"], found["serving"]) == (candidate, "INCONCLUSIVE", candidate)
    workspace = Workspace(str(root))
    rows = workspace.view(candidate).rows_by_generation()
    assert (rows[candidate], sum(rows.values())) == (50, 100)
    assert document("status", "--root", root)["pending"] is None
    assert workspace.registry.events(Overridden)[-1].payload.ordered == "COMPATIBLE_ROLLOUT 50%"


def test_accepting_in_the_order_of_class_distance_knows_the_class_means(undecided, digits_file):
    root, candidate = undecided
    tiny.write_config(root, digits_file, {**tiny.grown(5), "policy": UNSURE, "gallery.order": "class_distance"})
    run("accept", "g002", "--fraction", "0.2", "--reason", "farthest first", "--root", root)
    assert Workspace(str(root)).view(candidate).rows_by_generation()[candidate] == 20


def test_accepting_what_was_taken_back_is_refused_and_says_which_command_goes_forward(held):
    root, candidate = held
    run("accept", "g002", "--reason", "yes", "--root", root)
    run("rollback", "--root", root)
    before = Workspace(str(root)).registry.serving()
    line = run("accept", "g002", "--reason", "yes again", "--root", root, code=1).stderr
    assert f"graceful promote {candidate}" in line
    assert Workspace(str(root)).registry.serving() == before


def test_accepting_what_the_gate_rolls_out_itself_is_refused(workspace_root):
    def killed_before_the_move(name, act):
        if name == "embed before the move":
            raise KeyboardInterrupt
        return act()

    session = open_session(str(workspace_root), tiny.open_config(workspace_root))
    with session as opened, pytest.raises(KeyboardInterrupt):
        order.update(opened, step=killed_before_the_move)
    line = run("accept", "g002", "--reason", "x", "--root", workspace_root, code=1).stderr
    assert "found COMPATIBLE_ROLLOUT; run 'graceful update'" in line
    assert Workspace(str(workspace_root)).registry.events(Overridden) == []
    running.update(workspace_root)
    run("rollback", "--root", workspace_root)
    assert "graceful promote" in run("accept", "g002", "--reason", "x", "--root", workspace_root, code=1).stderr


def test_accepting_about_another_champion_than_serves_is_refused(held, digits_file):
    root, candidate = held
    tiny.write_config(root, digits_file, {**tiny.grown(5), "training.seed": 3})
    assert running.update(root).outcome == "COMPATIBLE_ROLLOUT"
    line = run("accept", candidate, "--reason", "x", "--root", root, code=1).stderr
    assert "about which it was judged" in line
    assert "--again" in line


def test_accepting_a_retired_generation_or_going_forward_to_it_is_refused(held):
    root, candidate = held
    run("accept", candidate, "--reason", "yes", "--root", root)
    run("rollback", "--root", root)
    run("retire", candidate, "--reason", "a wrong turn", "--root", root)
    assert "a wrong turn" in run("promote", candidate, "--reason", "x", "--yes", "--root", root, code=1).stderr
    assert Workspace(str(root)).registry.serving().champion != candidate


@pytest.mark.parametrize("point", ["certified", "plan-saved", "vectors-after-commit", "before-serving-moves",
                                   "after-serving-moved"])  # fmt: skip
@pytest.mark.timeout(300)
def test_killed_accept_run_again_ends_as_one_that_was_not_killed(held, spawn, tmp_path, point):
    root, _ = held
    whole = tiny.copy_workspace(root, tmp_path / "whole")
    run("accept", "g002", "--reason", "yes", "--root", whole)
    arguments = ["accept", "g002", "--reason", "yes", "--root", str(root)]
    process = spawn(running.command_in_child, arguments, point, str(tmp_path / "log"))
    process.join(120)
    assert process.exitcode == CRASH_EXIT_CODE, (tmp_path / "log").read_text()[-2000:]
    if point != "after-serving-moved":
        other = ["accept", "g002", "--reason", "yes", "--fraction", "0.5", "--root", str(root)]
        assert "the same --fraction" in run(*other, code=1).stderr
    run(*arguments)
    assert tiny.end_state(root) == tiny.end_state(whole)
    assert "serves already" in run(*arguments, code=1).stderr


def test_another_policy_judges_again_and_trains_nothing(held, digits_file):
    root, candidate = held
    registry = Workspace(str(root)).registry
    before, decisions = weights_of(root), len(registry.events(Decided))
    tiny.write_config(root, digits_file, {**tiny.grown(5), **UNLEARNING, "policy": UNSURE})
    result = running.update(root)
    assert result.candidate == candidate
    assert result.outcome in ("HOLD", "INCONCLUSIVE")  # how much it has unlearned is the processor's
    assert len(registry.events(Decided)) == decisions + 1
    assert weights_of(root) == before
    pending = candidate if result.outcome == "INCONCLUSIVE" else None
    assert document("status", "--root", root)["pending"] == pending


def test_rejecting_settles_what_was_pending(undecided):
    root, candidate = undecided
    assert "it serves" in run("reject", "g001", "--reason", "x", "--root", root, code=1).stderr
    run("reject", "g002", "--reason", "too many flips", "--root", root)
    registry = Workspace(str(root)).registry
    assert [event.generation for event in registry.events(Rejected)] == [candidate]
    assert document("status", "--root", root)["pending"] is None
    assert registry.serving().champion != candidate
    assert settling_commands(str(root)) == []
    assert "rejected by operator" in " ".join(run("history", "--root", root).stdout.split())


def test_probation_of_what_was_left_by_going_forward_starts_then(held, digits_file):
    root, candidate = held
    run("accept", candidate, "--reason", "yes", "--root", root)
    run("rollback", "--root", root)
    time.sleep(1.0)
    run("promote", candidate, "--reason", "after all", "--root", root)
    tiny.write_config(root, digits_file, {**tiny.grown(5), "gallery.probation_hours": 0.9 / 3600})
    with open_session(str(root), tiny.open_config(root)) as session:
        promoted = session.workspace.registry.events(Promoted)[-1].at
        assert time.time() - promoted > 1.0
        forward = session.workspace.registry.events(Forwarded)[-1].at
        released = release_when_due(session)
        assert released == (time.time() - forward > 0.9)


def test_history_tells_everything_in_80_columns_and_in_words(held, monkeypatch):
    root, candidate = held
    run("accept", candidate, "--reason", "a reason that is rather long, " * 6, "--root", root)
    run("rollback", "--reason", "a complaint", "--root", root)
    run("retire", candidate, "--reason", "a wrong turn", "--root", root)
    found = document("history", "--root", root)
    first, second = found["generations"]
    assert [(g["ordinal"], g["origin"], g["serves"]) for g in (first, second)] == [
        (1, "trained", True), (2, "trained", False),
    ]  # fmt: skip
    assert (first["decided_by"], first["decision"], second["decision"]) == ("gate", "BOOTSTRAP", "HOLD")
    assert second["decided_by"].startswith("operator ")
    assert (second["ordered"], second["retired_because"]) == ("FULL_BACKFILL", "a wrong turn")
    evaluation = Path(root, "evaluations", Workspace(str(root)).registry.events(Decided)[-1].payload.evaluation)
    own = json.loads((evaluation / "evidence.json").read_text())["self_test"]
    assert second["self_test"] == pytest.approx(own)
    assert [bool(period["until"]) for period in first["serving_periods"]] == [True, False]
    assert [bool(period["until"]) for period in second["serving_periods"]] == [True]
    kinds = [event["what"] for event in found["events"] if event["generation"] == candidate]
    assert kinds == ["trained", "decided", "overridden", "promoted", "rolled_back", "retired"]
    monkeypatch.setenv("COLUMNS", "80")
    told = run("history", "--root", root).stdout
    assert all(len(line) <= 80 for line in told.splitlines())
    for value in ("None", "[", "{", "True", "rolled_back"):
        assert value not in told
    for words in ("self-test", "retired: a wrong turn", "serves since", "rolled back from", "a complaint"):
        assert words in told


def test_a_short_id_searches_as_that_generation(workspace_root, digits_file):
    import io

    from PIL import Image

    payload = pq.read_table(digits_file)["image"][0].as_py()
    file = workspace_root / "query.png"
    Image.open(io.BytesIO(payload["bytes"] if isinstance(payload, dict) else payload)).save(file)
    found = document("search", file, "--generation", "g001", "--root", workspace_root)
    assert found["query_generation"] == Workspace(str(workspace_root)).registry.resolve("g001")
    assert len(graceful.open(workspace_root).search([file], k=3, generation="g001")[0]) == 3
    assert "g007" in run("search", file, "--generation", "g007", "--root", workspace_root, code=1).stderr


def test_an_update_that_moves_nothing_says_what_can_be_done(held):
    root, candidate = held
    from graceful.flows.commands.suggestions import next_commands

    commands = next_commands(str(root), str(root / "report.html"))
    for word in ("flips", "accept", "reject"):
        assert any(command.startswith(f"graceful {word} {candidate}") for command in commands)


def test_flips_lists_what_would_be_lost_worst_first(held):
    root, candidate = held
    found = document("flips", "--root", root, "--limit", "1000")
    assert found["generation"] == candidate
    assert found["num_flips"] == len(found["flips"])
    after = [flip["rank_after"] or 10**9 for flip in found["flips"]]
    assert after == sorted(after, reverse=True)
    assert all(flip["rank_before"] == 1 for flip in found["flips"])
    decision = json.loads(Path(root, "evaluations", found["evaluation"], "decision.json").read_text())
    measured = next(reason for reason in decision["reasons"] if reason["guard"] == "NFR" and reason["n"])
    assert found["num_flips"] == round(measured["value"] * measured["n"]), "the same count as the report's"
    assert "go from right to wrong" in " ".join(run("flips", "g002", "--root", root).stdout.split())


def test_blame_names_the_searches_that_an_item_spoils(held):
    root, candidate = held
    flip = next(flip for flip in document("flips", "--root", root)["flips"] if flip["wrong_item"])
    found = document("blame", flip["wrong_item"], "--root", root)
    assert found["generation"] == candidate
    assert flip["query"] in [entry["query"] for entry in found["wrong_answer_to"]]
    assert all(entry["cause"] in ("model", "mixed gallery") and entry["states"] for entry in found["wrong_answer_to"])
    lost = document("blame", flip["right_item"], candidate, "--root", root)["right_answer_lost"]
    assert flip["query"] in [entry["query"] for entry in lost]
    items = Workspace(str(root)).view(found["against"]).items(["item_id", "source"]).to_pylist()
    row_of = flip["wrong_item"].rpartition("#")[2]
    item = next(row["item_id"] for row in items if row["source"].rpartition("#")[2] == row_of)
    by_id = document("blame", item, "--root", root)
    assert by_id["wrong_answer_to"] == found["wrong_answer_to"]
    assert by_id["owner_now"] == found["against"]
    assert "comes first, wrongly" in run("blame", item, "--root", root).stdout
    assert "found neither" in run("blame", "nobody", "--root", root, code=1).stderr


def test_blame_names_the_training_images_that_a_lost_search_hangs_on(held):
    root, candidate = held
    flip = next(flip for flip in document("flips", "--root", root)["flips"] if flip["wrong_item"])
    found = document("blame", flip["query"], "--training", "4", "--root", root)["training"]
    search = found["searches"][flip["query"]]
    workspace = Workspace(str(root))
    trained = next(event for event in workspace.registry.events(Trained) if event.generation == candidate)
    sources = read_manifest(workspace.manifest_uri(trained.update_key)).sources
    assert (found["num_images"], found["num_taken"]) == (len(sources), len(sources))
    assert search["margin"] <= -flip["margin"] + 1e-3, "the wrong answer leads the best right one by so much"
    effects = [image["effect"] for image in search["against"]]
    assert len(effects) == 4
    assert effects == sorted(effects, reverse=True)
    assert search["margin_without"] == pytest.approx(search["margin"] + sum(effects), rel=0.2)
    assert all(image["effect"] < 0 for image in search["for"])
    assert {image["source"] for side in ("for", "against") for image in search[side]} <= set(sources)
    told = run("blame", flip["query"], "--training", "4", "--root", root).stdout
    assert search["against"][0]["source"] in told
    assert "training" not in document("blame", flip["query"], "--root", root)


def test_promote_goes_forward_again_after_a_rollback(held):
    root, candidate = held
    first = Workspace(str(root)).registry.serving().champion
    refused = run("promote", candidate, "--reason", "x", "--root", root, code=1).stderr
    assert "graceful accept" in refused
    run("accept", candidate, "--reason", "yes", "--root", root)
    run("rollback", "--root", root)
    assert Workspace(str(root)).registry.serving().champion == first
    run("promote", "g002", "--reason", "the complaint was about something else", "--root", root)
    registry = Workspace(str(root)).registry
    assert (registry.serving().champion, registry.serving().previous) == (candidate, first)
    assert [event.generation for event in registry.events(Forwarded)] == [candidate]
    run("rollback", "--root", root)
    assert Workspace(str(root)).registry.serving().champion == first


def test_a_move_that_would_hide_items_is_refused_unless_the_operator_insists(held):
    root, candidate = held
    run("accept", candidate, "--reason", "yes", "--root", root)
    workspace = Workspace(str(root))
    first = workspace.registry.serving().previous
    workspace.gallery.vectors_table  # noqa: B018  the table is there
    # The previous generation's vectors are gone, as after a collection at the worst moment.
    from graceful.indexing.maintenance import collect

    collect(workspace.gallery, lambda: [[candidate]])
    assert workspace.view(first).rows_by_generation().get(first, 0) == 0
    with pytest.raises(MoveRefusedError, match=r"found 100 that would not be; .*give --yes"):
        rollback(workspace)
    assert workspace.registry.serving().champion == candidate
    assert "--yes" in run("rollback", "--root", root, code=1).stderr
    run("rollback", "--yes", "--root", root)
    assert workspace.registry.serving().champion == first
    go_forward(workspace, candidate, reason="of course")


def test_retired_generation_takes_no_part_in_later_updates(held, digits_file):
    root, candidate = held
    assert "serves" in run("retire", "g001", "--reason", "x", "--root", root, code=1).stderr
    run("retire", "g002", "--reason", "a wrong turn", "--root", root)
    registry = Workspace(str(root)).registry
    assert [(event.generation, event.payload.reason) for event in registry.events(Retired)] == [
        (candidate, "a wrong turn")
    ]
    tiny.write_config(root, digits_file, {**tiny.grown(5), "training.seed": 5})
    result = running.update(root)
    assert result.candidate.startswith("g003")
    outcomes = json.loads(Path(result.evaluation, "question.json").read_text())
    assert candidate not in json.dumps(outcomes)


def test_deleting_what_is_not_there_is_refused_by_name_and_deletes_nothing(workspace_root):
    item = str(Workspace(str(workspace_root)).gallery.view([]).item_ids[0])
    line = run("delete", item, "no such item", "--root", workspace_root, code=1).stderr
    assert "no such item" in line
    assert Workspace(str(workspace_root)).gallery.view([]).num_items == 100
    assert document("delete", item, "--root", workspace_root)["deleted"] == 1


def test_a_name_that_is_no_generation_is_refused_with_those_that_are(held):
    root, candidate = held
    line = run("accept", "g009", "--reason", "x", "--root", root, code=1).stderr
    assert candidate in line
    assert "g009" in line


ENCODERS = """
import torch
from torch import nn

class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(1)), value
    def forward(self, x):
        return self.value * torch.ones(len(x), 16) * self.weight

def nan(): return Broken(float("nan"))
def zero(): return Broken(0.0)
def constant(): return Broken(1.0)
def raises(channels, image_size): raise RuntimeError("kaboom")
class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(224 * 224, 16)
    def forward(self, x):
        assert x.shape[-1] == 224, "Wrong image height! Expected 224"
        return self.linear(x.flatten(1))
def picky(): return Picky()
def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24))
def stated(): return wide(2)
stated.preprocessing = {"resize": "shorter_side", "resize_size": 9}
"""


LATER = """
import torch
from torch import nn

class Later(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls = nn.Linear(64, 16), 0
    def forward(self, images):
        self.calls += 1
        return self.linear(images.flatten(1)) * (float("nan") if self.calls > 3 else 1.0)
def nan_later(): return Later()
"""


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    (tmp_path / "their_encoders.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def later_encoders(tmp_path, monkeypatch):
    """Encoders that can be used on the images that they are tried on, and not on others."""
    (tmp_path / "later_encoders.py").write_text(LATER)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_an_encoder_that_fails_while_it_is_judged_breaks_no_later_update(workspace_root, later_encoders, digits_file):
    name = adopt_generation(
        Workspace(str(workspace_root)), tiny.open_config(workspace_root), "theirs", "later_encoders:nan_later"
    )
    with pytest.raises(EmbeddingFailuresError, match=f"graceful retire {name}"):
        running.update(workspace_root, adopted=name)
    assert running.update(workspace_root).outcome == "COMPATIBLE_ROLLOUT"
    started = Workspace(str(workspace_root)).registry.events(UpdateStarted)[-1].payload
    assert name not in started.generations


def test_an_encoder_that_serves_is_not_judged_against_itself(workspace_root, encoders, digits_file):
    name = adopt(workspace_root, "wide")
    assert running.update(workspace_root, adopted=name).champion == name
    assert running.update(workspace_root, adopted=name).repeated, "adopting it again finds what was done"
    tiny.write_config(workspace_root, digits_file, tiny.grown(4))
    with pytest.raises(MoveRefusedError, match="expected an encoder that does not serve"):
        running.update(workspace_root, adopted=name)


def test_adopting_waits_for_no_update_and_leaves_nothing_beside_it(workspace_root, encoders):
    before = sorted(file.name for file in (workspace_root / "generations").iterdir())
    with claim(str(workspace_root), "an update"), pytest.raises(UpdateInProgressError, match="adopting theirs"):
        adopt(workspace_root, "wide")
    assert sorted(file.name for file in (workspace_root / "generations").iterdir()) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preprocessing": {"channels": 3}}, "expected 3 values in mean and std, found 1 and 1.*--mean and --std"),
        ({"preprocessing": {"image_size": 1}}, "greater than or equal to 4, found 1; correct --image-size"),
        ({"weights": "nothing-there.pt"}, "nothing-there.pt.*--weights"),
        ({"kwargs": {"sed": 1}}, "sed"),
    ],
)
def test_what_is_wrong_with_an_adoption_is_one_line_that_names_the_option(workspace_root, encoders, given, words):
    with pytest.raises(GracefulError, match=words) as refused:
        adopt(workspace_root, "wide", **given)
    assert "\n" not in str(refused.value)
    assert Workspace(str(workspace_root)).registry.events(Adopted) == []


@pytest.mark.parametrize("kwargs", ["[1]", "{", "1"])
def test_arguments_of_a_factory_are_a_json_object(workspace_root, kwargs):
    with pytest.raises(UsageError, match="expected --kwargs as a JSON object"):
        updates.adopt_encoder(str(workspace_root), "theirs", "their_encoders:wide", None, kwargs, {})


def adopt(root, factory, **given):
    return adopt_generation(
        Workspace(str(root)), tiny.open_config(root), "theirs", f"their_encoders:{factory}", **given
    )


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nan", "expected finite vectors"),
        ("zero", "expected finite vectors"),
        ("constant", "found the same one"),
        ("raises", "kaboom"),
        ("picky", "Expected 224.*--image-size"),
        ("missing", "missing"),
    ],
)
def test_a_failed_adoption_leaves_no_trace_and_the_next_update_works(workspace_root, encoders, factory, words):
    before = tiny.end_state(workspace_root)
    folders = sorted(file.name for file in (workspace_root / "generations").iterdir())
    with pytest.raises(Exception, match=words) as refused:
        adopt(workspace_root, factory)
    assert isinstance(refused.value, AdoptionError | ValueError)
    assert tiny.end_state(workspace_root) == before
    assert sorted(file.name for file in (workspace_root / "generations").iterdir()) == folders
    assert running.update(workspace_root).outcome == "COMPATIBLE_ROLLOUT"


def test_an_encoder_is_known_by_its_weights_and_not_by_its_name(workspace_root, encoders):
    first = adopt(workspace_root, "wide")
    assert adopt(workspace_root, "wide") == first
    other = adopt(workspace_root, "wide", kwargs={"seed": 1})
    assert other != first
    assert [event.payload.name for event in Workspace(str(workspace_root)).registry.events(Adopted)] == ["theirs"] * 2


def card_of(root, generation):
    return read_card(Workspace(str(root)).generation_uri(generation))


def test_other_weights_arguments_or_preprocessing_are_another_generation_under_the_same_name(
    workspace_root, encoders, tmp_path
):
    file, found = tmp_path / "theirs.pt", []
    for seed in (3, 4):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 24)).state_dict(), file)
        found += [adopt(workspace_root, "wide", weights=str(file)) for _ in range(2)]
    for given in ({"kwargs": {"seed": 0}}, {"preprocessing": {"resize": "fit", "background": 0}}):
        found += [adopt(workspace_root, "wide", weights=str(file), **given) for _ in range(2)]
    assert found[::2] == found[1::2], "the same again is the same one"
    assert len(set(found)) == 4
    assert card_of(workspace_root, found[-1]).preprocessing.resize == "fit"


def test_a_network_of_a_library_is_adopted_with_its_own_preprocessing(workspace_root, tmp_path):
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    name = updates.adopt_encoder(
        str(workspace_root),
        "theirs",
        "torchvision/resnet18",
        str(tmp_path / "theirs.pth"),
        "{}",
        {"image_size": 32},
        '{"interpolation": "bicubic"}',
    )
    card, configured = card_of(workspace_root, name), tiny.open_config(workspace_root).training.preprocessing
    assert (card.width, card.origin, card.preprocessing.channels, configured.channels) == (512, "adopted", 3, 1)
    assert (card.preprocessing.image_size, card.preprocessing.resized) == (32, 36)
    assert (card.preprocessing.resize, card.preprocessing.interpolation) == ("shorter_side", "bicubic")
    assert Workspace(str(workspace_root)).registry.events(Adopted)[-1].payload.factory == "torchvision/resnet18"


def test_what_a_factory_states_of_its_preprocessing_goes_before_the_configuration(workspace_root, encoders):
    stated = card_of(workspace_root, adopt(workspace_root, "stated")).preprocessing
    assert (stated.resize, stated.resized, stated.image_size) == ("shorter_side", 9, 8)
    given = adopt(workspace_root, "stated", preprocessing={"crop_share": 0.8})
    assert card_of(workspace_root, given).preprocessing.resized == 10
    with pytest.raises(AdoptionError, match="correct --preprocessing, resise"):
        adopt(workspace_root, "stated", preprocessing={"resise": "fit"})


@pytest.mark.parametrize(("name", "near"), [("torchvision/resnet17", "resnet18"), ("timm/resnet18x", "resnet18")])
def test_a_network_that_no_library_has_is_refused_with_the_nearest_name(workspace_root, name, near):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs timm: pip install 'graceful[timm]'")
    done = run("adopt", "theirs", "--from", name, "--root", workspace_root, code=2)
    assert f"did you mean '{near}'?" in done.output
    assert Workspace(str(workspace_root)).registry.events(Adopted) == []


def test_an_encoder_of_another_width_is_judged_and_later_updates_go_on(workspace_root, encoders, digits_file):
    """It can read none of the old rows, so that whatever is decided embeds all of them before it serves."""
    name = adopt(workspace_root, "wide")
    champion = Workspace(str(workspace_root)).registry.serving().champion
    result = running.update(workspace_root, adopted=name)
    registry = Workspace(str(workspace_root)).registry
    assert (name, champion) not in registry.certificates()
    if result.champion == name:
        assert Workspace(str(workspace_root)).view(name).rows_by_generation() == {name: 100}
        rollback(Workspace(str(workspace_root)))
    run("retire", name, "--reason", "too wide", "--root", workspace_root, code=0)
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "training.seed": 3})
    assert running.update(workspace_root).outcome == "COMPATIBLE_ROLLOUT"


def test_an_encoder_of_another_width_is_backfilled_or_held_under_the_usual_share_of_wave_zero(
    workspace_root, encoders, digits_file
):
    policy = {**tiny.WIDE, "max_wave_zero_share": 0.1, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": policy, "prices": {}})
    name = adopt(workspace_root, "wide")
    result = running.update(workspace_root, adopted=name)
    assert result.outcome == "FULL_BACKFILL"
    evaluation = read_evaluation(result.evaluation)
    assert pair_state(name, evaluation.decision.champion) not in evaluation.outcomes.states
    assert "PASS" not in [certificate.verdict for certificate in evaluation.evidence.certificates]
    assert flips_of(str(workspace_root), None, 5)["state"] == "fraction/1"


def test_no_margin_is_wide_enough_to_certify_vectors_of_another_width(workspace_root, encoders, digits_file):
    policy = {**tiny.WIDE, "quality_margin_points": 100.0, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": policy})
    name = adopt(workspace_root, "wide")
    result = running.update(workspace_root, adopted=name)
    workspace = Workspace(str(workspace_root))
    assert {pair for pair in workspace.registry.certificates() if pair[0] == name} <= {(name, name)}
    assert workspace.view(result.champion).rows_by_generation() == {result.champion: 100}
    assert len(workspace.view(result.champion).unreadable()) == 0


def test_an_encoder_of_another_width_that_is_held_breaks_no_later_update(workspace_root, encoders, digits_file):
    name = adopt(workspace_root, "wide")
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": STRICT})
    assert running.update(workspace_root, adopted=name).outcome in ("HOLD", "INCONCLUSIVE")
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "training.seed": 3})
    assert running.update(workspace_root).outcome == "COMPATIBLE_ROLLOUT"
