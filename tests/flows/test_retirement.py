"""A predecessor that owns no readable row and serves no supported client is retired; one of a client is not."""

from graceful.flows.runtime.session import open_session
from graceful.flows.store.evaluations import read_evaluation
from graceful.flows.store.events import Retired
from graceful.flows.store.workspace import Workspace
from graceful.flows.update.conclude import conclude
from graceful.flows.update.freeze import predecessors_of
from graceful.flows.update.serving import release_previous
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
    with open_session(str(workspace_root), tiny.open_config(workspace_root)) as session:
        assert predecessors_of(session) == [first, second.candidate]
    decision = read_evaluation(second.evaluation).decision
    conclude(workspace, "again", decision, supported=(first,))
    assert workspace.registry.events(Retired) == []
    conclude(workspace, "once more", decision)
    assert [event.generation for event in workspace.registry.events(Retired)] == [first]
    tiny.write_config(workspace_root, digits_file, changes)
    with open_session(str(workspace_root), tiny.open_config(workspace_root)) as session:
        assert predecessors_of(session) == [second.candidate]
