"""A predecessor without readable row and supported client is retired, one of a client is not; weights by share."""

from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import Retired, UpdateStarted
from graceful.flows.store.workspace import Workspace
from graceful.flows.update import train
from graceful.flows.update.conclude import conclude
from graceful.flows.update.diagnosis import lineage_rows
from graceful.flows.update.predecessors import predecessors_of
from graceful.flows.update.serving import release_previous
from graceful.training.launch import run_training as run
from tests.flows import running, tiny


def test_generation_of_a_supported_client_is_neither_retired_nor_left_out(workspace_root, digits_file):
    first = Workspace(str(workspace_root)).registry.serving().champion
    changes = {**tiny.grown(5), "policy.fractions": [0.0, 1.0], "predecessors": "live"}
    supported = {"gallery.supported_query_generations": [first]}
    tiny.write_config(workspace_root, digits_file, {**changes, **supported})
    second = running.update(workspace_root)
    workspace = Workspace(str(workspace_root))
    assert workspace.view(second.candidate).rows_by_generation().get(first, 0) == 0, "everything is re-embedded"
    release_previous(workspace)
    assert predecessors_of(workspace, tiny.open_config(workspace_root)) == [first, second.candidate]
    decision = read_evaluation(second.evaluation).decision
    conclude(workspace, "again", decision, supported=(first,))
    assert workspace.registry.events(Retired) == []
    for key in ("once more", "and again"):  # said once
        conclude(workspace, key, decision)
        assert [event.generation for event in workspace.registry.events(Retired)] == [first]
    assert [row["what"] for row in lineage_rows(workspace.registry) if row["event"] == "retired"] == [
        "owns no readable row, has no supported client"
    ]
    tiny.write_config(workspace_root, digits_file, changes)
    assert predecessors_of(workspace, tiny.open_config(workspace_root)) == [second.candidate]


def test_weights_by_share_are_frozen_with_the_update_and_reach_the_training(workspace_root, digits_file, monkeypatch):
    jobs = []
    monkeypatch.setattr(train, "run_training", lambda job, *how, **ways: (jobs.append(job), run(job, *how, **ways))[1])
    changes = {**tiny.grown(5), "policy.fractions": [0.0, 0.6, 1.0], "training.predecessor_weights": "share"}
    tiny.write_config(workspace_root, digits_file, changes)
    second = running.update(workspace_root)
    workspace = Workspace(str(workspace_root))
    names = workspace.registry.generations()
    rows = workspace.view(second.candidate).rows_by_generation()
    tiny.write_config(workspace_root, digits_file, {**changes, **tiny.grown(6)})
    running.update(workspace_root)
    frozen = [event.payload for event in workspace.registry.events(UpdateStarted)]
    assert [update.weights for update in frozen] == [
        (),
        (1.0,),
        tuple(max(0.1, 2 * rows[name] / 100) for name in names),
    ]
    assert [tuple(reference.weight for reference in job.predecessors) for job in jobs] == [(1.0,), frozen[-1].weights]
