"""Making a candidate: what must have ended before its training starts."""

import pytest

from graceful.flows.runtime.session import open_session
from graceful.flows.update import order
from graceful.flows.update import train as candidate
from tests.flows import running, tiny


class TrainingStartedError(Exception):
    pass


def test_embedding_workers_end_before_a_training_that_may_need_their_processors(workspace_root, monkeypatch):
    done = []

    def start(*_, **__):
        done.append("training")
        raise TrainingStartedError

    monkeypatch.setattr(candidate, "run_training", start)
    with open_session(str(workspace_root), tiny.open_config(workspace_root)) as session:
        monkeypatch.setattr(session.encoders, "release", lambda: done.append("released"))
        with pytest.raises(TrainingStartedError):
            order.update(session)
        assert done[:2] == ["released", "training"]


def test_a_first_generation_that_is_held_ends_well(tmp_path):
    few = {"evaluation.cluster": None, "evaluation.queries.where.label": tiny.DIGITS[:2]}
    root = tiny.new_workspace(tmp_path / "w", few)
    result = running.update(root)
    assert (result.outcome, result.champion) == ("HOLD", None), result.summary
