"""An update as `run_update` orders it, without Prefect, for tests that kill it between two writes."""

import os
import sys

from graceful.files import CRASH_VARIABLE
from graceful.flows.runtime.session import open_session
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.claim import claim
from graceful.flows.update.steps import UpdateRun, release_when_due
from graceful.indexing.reindex import ReindexReport

FINISHED, REPEATED = 0, 10


def run_update_steps(root: str, *, again: bool = False) -> int:
    """Run the update of a workspace to its end; REPEATED when it had ended before."""
    config = load_workspace_config(root)
    with open_session(root, config) as session:
        with claim(root, "an update"):
            release_when_due(session)
            run = UpdateRun(session, again=again)
            if run.decided() is not None and run.completed():
                return REPEATED
            for predecessor in run.frozen.predecessors:
                run.extend_cache(predecessor)
            candidate = run.train()
            for generation in (*run.frozen.generations, candidate):
                run.embed_evaluation(generation)
            evaluation = run.judge(candidate)
            report = ReindexReport()
            if run.acts_on(evaluation):
                rollout = run.rollout(evaluation)
                report = run.embed_before_move(rollout)
                run.move(rollout)
        report.plus(run.carry_on())
        run.conclude(evaluation)
    return FINISHED


def in_child(root: str, crash_at: str = "", log: str = "", environment: dict[str, str] | None = None) -> None:
    """Entry point of a child process: run the update and exit with its code; die at `crash_at`."""
    os.environ.update(environment or {})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if crash_at:
        os.environ[CRASH_VARIABLE] = crash_at
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    sys.exit(run_update_steps(root))
