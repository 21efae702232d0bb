"""Commands that read evaluations: judge again, report."""

import tomllib
from pathlib import Path

from pydantic import ValidationError

from graceful.evaluation.decision import Decision
from graceful.evaluation.policy import RolloutPolicy
from graceful.files import join
from graceful.flows.settings.config import ConfigError
from graceful.flows.store.evaluations import EvaluationMissingError, read_evaluation, recompute
from graceful.flows.store.events import Decided
from graceful.flows.store.reports import REPORT_FILE
from graceful.flows.store.workspace import open_workspace


def decide_again(evaluation: str, policy_file: Path | None) -> tuple[Decision, bool]:
    """Judge stored outcomes again: the decision, and whether it is the recorded one."""
    policy = None
    if policy_file is not None:
        policy = read_policy(policy_file)
    stored, again = recompute(evaluation, policy)
    return again.decision, stored.decision == again.decision


def read_policy(path: Path) -> RolloutPolicy:
    """Read the [policy] table of a TOML file. Raises ConfigError, also where there is no such table."""
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"reading a policy: {error} ({path})") from None
    if "policy" not in tables:
        raise ConfigError(
            f"reading a policy: expected a table [policy], found {', '.join(tables) or 'nothing'} ({path}); write the "
            "limits below a line [policy]"
        )
    try:
        return RolloutPolicy.model_validate(tables["policy"])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"reading a policy: policy.{key}: {problem['msg']}, found {problem.get('input')!r} ({path})"
        ) from None


def read_report(root: str, evaluation: str | None) -> tuple[str, Decision]:
    """Location of an evaluation's report, and its decision."""
    workspace = open_workspace(root)
    if evaluation is None:
        decided = workspace.registry.events(Decided)
        if not decided:
            raise EvaluationMissingError("reading the newest report: no update has decided yet; run 'graceful update'")
        evaluation = decided[-1].payload.evaluation
    location = workspace.evaluation_uri(evaluation)
    return join(location, REPORT_FILE), read_evaluation(location).decision
