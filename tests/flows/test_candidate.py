"""Making a candidate: what must have ended before its training starts."""

import pytest

from graceful.flows.runtime.session import open_session
from graceful.flows.update import order
from graceful.flows.update import train as candidate
from tests.flows import tiny


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
