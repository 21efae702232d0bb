"""Generations that were trained on the images that are to judge: found by content in the manifests of every update."""

from pathlib import Path

import pytest

from graceful.flows.store.evaluation_set import load_evaluation_set
from graceful.flows.store.events import Adopted, Retired, Trained
from graceful.flows.store.leaks import TrainedOnQueriesError, refuse_trained_on
from graceful.flows.store.workspace import Workspace
from tests.flows import tiny


@pytest.fixture
def workspace(workspace_root):
    return Workspace(str(workspace_root), tiny.no_encoder)


def queries(root, **where):
    return load_evaluation_set(tiny.open_config(Path(root), {"evaluation.queries.where": where}).evaluation)


def test_disjoint_evaluation_leaks_nothing(workspace):
    evaluation_set = load_evaluation_set(tiny.open_config(Path(workspace.root)).evaluation)
    refuse_trained_on(workspace, evaluation_set)


def test_queries_in_an_earlier_training_are_counted_and_refused_with_names(workspace):
    # Trained on instances 0 to 29 of three digits; asked about 25 to 34 of two of them and of one unseen.
    leaky = queries(workspace.root, label=("0", "1", "8"), instance={"min": 25, "max": 34})
    first = workspace.registry.generations()[0]
    with pytest.raises(TrainedOnQueriesError, match=rf"expected none of 30, found 10 in {first} \(such as .*parquet#"):
        refuse_trained_on(workspace, leaky)


def test_every_generation_is_looked_at(workspace):
    leaky = queries(workspace.root, label=("2",), instance={"max": 4})
    first = workspace.registry.generations()[0]
    update = workspace.registry.events(Trained)[0].update_key
    for key, generation in ((update, "g002-000000"), ("gone", "g003-000000"), (update, "g004-000000")):
        workspace.registry.record(Trained(), update_key=key, generation=generation)
    workspace.registry.record(Adopted(name="theirs", factory="theirs:build"), generation="g004-000000")
    with pytest.raises(TrainedOnQueriesError, match=rf"found 5 in {first}, 5 in g002-000000 \("):
        refuse_trained_on(workspace, leaky)
    workspace.registry.record(Retired(reason="leaky"), generation="g002-000000")
    with pytest.raises(TrainedOnQueriesError, match=rf"found 5 in {first} \("):
        refuse_trained_on(workspace, leaky)
