"""What an update is known by: what starts it anew, what judges it again without training, and what changes nothing."""

import json
from pathlib import Path

import pytest
import torch

from graceful.evaluation import decision
from graceful.flows.runtime.session import open_session
from graceful.flows.store.events import Trained
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import freeze as freezing
from graceful.flows.update.freeze import freeze
from graceful.training import job
from graceful.training.constraints import CONSTRAINTS
from graceful.training.constraints.contract import BY_IMAGE
from graceful.training.heads import HEADS, build_head
from tests.flows import running, tiny


def keys(root: Path) -> tuple[str, str]:
    with open_session(str(root), tiny.open_config(root)) as session:
        frozen = freeze(session).frozen
        return frozen.update_key, frozen.training_key


def trainings(root: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in root.glob("generations/*/weights.safetensors")}


def test_update_key_reads_declared_versions_and_no_source_file(workspace_root, monkeypatch):
    """Were files hashed, this would read some: a comment in the search endpoint must not train anything."""
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or read(self))
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self) or read(self).decode())
    keys(workspace_root)
    assert [path for path in opened if path.suffix == ".py"] == []


def test_changed_loss_or_judgement_starts_anew_by_its_declared_version(workspace_root, monkeypatch):
    update_key, training_key = keys(workspace_root)
    assert keys(workspace_root) == (update_key, training_key)
    monkeypatch.setattr(freezing, "JUDGING_VERSION", decision.JUDGING_VERSION + 1)
    judged_again = keys(workspace_root)
    assert judged_again[0] != update_key
    assert judged_again[1] == training_key
    monkeypatch.setattr(freezing, "TRAINING_VERSION", job.TRAINING_VERSION + 1)
    assert keys(workspace_root)[1] != training_key


def test_the_losses_of_this_training_version_are_these():
    """If this fails, a recipe means something else now: raise TRAINING_VERSION, and write the new numbers down."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 6, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=1)
    labels, classes = torch.tensor([0, 2, 1, 1]), torch.arange(3)
    batch = torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1)
    found = {}
    for name, build in CONSTRAINTS.items():
        constraint = build()
        references = (batch, labels) if constraint.reference in BY_IMAGE else (rows, classes)
        found[name] = float(constraint(embeddings, labels, *references))
    for name in HEADS:
        head = build_head(job.HeadConfig(name=name), 3, 6)
        if not head.is_fixed:
            head.set_rows(rows)
        found[name] = float(head(embeddings, labels).detach())
    recorded = {3: GOLDEN}
    assert found == pytest.approx(recorded[job.TRAINING_VERSION], rel=1e-4)


GOLDEN = {
    "bct": 12.984468, "cross_contrast": 10.662285, "hoc": 5.440829, "l2": 2.287714, "oca": 134.33757,
    "ract": 15.587896, "repulsion": 11.853113, "focal_kl": 0.6275494, "focal_logits": 0.648409, "ldi": 1.296818,
    "additive_margin": 10.662285, "arcface": 10.452746, "cosine_softmax": 8.656504, "simplex": 5.580216,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{"policy.max_nfr": 0.8}, {"prices.value_per_point_day": 2.0}, {"schedule": {"cron": "0 4 * * *"}}]
)
def test_changed_policy_price_or_schedule_trains_nothing(workspace_root, digits_file, changes):
    first = running.update(workspace_root)
    before = trainings(workspace_root)
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), **changes})
    second = running.update(workspace_root)
    assert trainings(workspace_root) == before
    assert (second.candidate, second.champion, second.repeated) == (first.candidate, first.champion, True)


def test_candidate_that_was_held_is_judged_again_under_another_policy_and_not_trained_again(
    workspace_root, digits_file
):
    strict = {"quality_margin_points": 0.0, "max_nfr": 0.0001, "num_resamples": 200, "fractions": [0.0, 0.5, 1.0]}
    tiny.write_config(workspace_root, digits_file, {**tiny.grown(5), "policy": strict})
    held = running.update(workspace_root)
    assert held.outcome in ("HOLD", "INCONCLUSIVE")
    before = trainings(workspace_root)
    tiny.write_config(workspace_root, digits_file, tiny.grown(5))
    judged = running.update(workspace_root)
    assert judged.outcome == "COMPATIBLE_ROLLOUT", judged.summary
    assert judged.candidate == held.candidate
    assert judged.update_key != held.update_key
    assert trainings(workspace_root) == before
    registry = Workspace(str(workspace_root)).registry
    assert [event.generation for event in registry.events(Trained)][-2:] == [held.candidate, held.candidate]
    assert registry.serving().champion == held.candidate
    stored = json.loads(Path(judged.evaluation, "question.json").read_text())
    assert stored["cost"] is not None, "the price was measured with the first judgement and is still known"
