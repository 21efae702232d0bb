"""The second day: the operator's word on a candidate, going back and forward, retiring, adopting. Real commands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.commands.adopt import AdoptionError, adopt_generation
from graceful.flows.store.events import Adopted, Forwarded, Overridden, Rejected, Retired
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.serving import MoveRefusedError, go_forward, rollback
from tests.flows import running, tiny

STRICT = {"quality_margin_points": 0.0, "max_nfr": 0.0001, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}


def run(*arguments, code: int = 0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def document(*arguments, code: int = 0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def held(workspace_root, digits_file):
    """A workspace whose second generation was held or left open by a strict policy."""
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": STRICT})
    result = running.update(workspace_root)
    assert result.outcome in ("HOLD", "INCONCLUSIVE")
    return workspace_root, result.candidate


def test_accepting_serves_the_candidate_trains_nothing_and_says_who_and_why(held):
    root, candidate = held
    before = {file: file.stat().st_mtime_ns for file in root.glob("generations/*/weights.safetensors")}
    found = document("accept", "g002", "--reason", "looked at the flips", "--root", root)
    assert (found["accepted"], found["serving"]) == (candidate, candidate)
    assert {file: file.stat().st_mtime_ns for file in root.glob("generations/*/weights.safetensors")} == before
    workspace = Workspace(str(root))
    assert workspace.view(candidate).rows_by_generation() == {candidate: 100}, "everything is embedded before it serves"
    order = workspace.registry.events(Overridden)[-1]
    assert (order.generation, order.payload.reason, bool(order.payload.by)) == (candidate, "looked at the flips", True)
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


def test_rejecting_settles_what_was_pending(held):
    root, candidate = held
    run("reject", "g002", "--reason", "too many flips", "--root", root)
    registry = Workspace(str(root)).registry
    assert [event.generation for event in registry.events(Rejected)] == [candidate]
    assert document("status", "--root", root)["pending"] is None
    assert registry.serving().champion != candidate


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
    assert "go from right to wrong" in " ".join(run("flips", "g002", "--root", root).stdout.split())


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

    collect(workspace.gallery, [[candidate]])
    assert workspace.view(first).rows_by_generation().get(first, 0) == 0
    with pytest.raises(MoveRefusedError, match=r"found 100 that would not be; give --yes"):
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
    item = str(Workspace(str(workspace_root)).gallery.latest_items()["item_id"][0].as_py())
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
"""


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    (tmp_path / "their_encoders.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(str(tmp_path))


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


def test_an_encoder_of_another_width_that_is_held_breaks_no_later_update(workspace_root, encoders, digits_file):
    name = adopt(workspace_root, "wide")
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": STRICT})
    assert running.update(workspace_root, adopted=name).outcome in ("HOLD", "INCONCLUSIVE")
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "training.seed": 3})
    assert running.update(workspace_root).outcome == "COMPATIBLE_ROLLOUT"
