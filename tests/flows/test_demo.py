"""`graceful demo`: every outcome in one walk, on a workspace that the other commands then work on."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app

G1, G2, G4 = "g001-c0ffee", "g002-decade", "g004-beaded"
OUTCOMES = ["BOOTSTRAP", "INCONCLUSIVE", "COMPATIBLE_ROLLOUT", "HOLD", "FULL_BACKFILL"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The demo, run once: its workspace and what it printed."""
    root = tmp_path_factory.mktemp("demo") / "world"
    result = invoke("demo", "--root", root)
    assert result.exit_code == 0, result.output
    return root, result.output


@pytest.mark.timeout(60)
def test_demo_tells_every_outcome_in_order(told):
    _, text = told
    assert re.findall(r"recorded: ([A-Z_]+)", text) == OUTCOMES
    assert "ROLLBACK" in text
    too_long = [line for line in text.splitlines() if len(line) > 80 and "/" not in line]
    assert not too_long


@pytest.mark.timeout(60)
def test_every_outcome_says_what_it_means_and_what_to_do_next(told):
    _, text = told
    found = re.findall(r"recorded: ([A-Z_]+)\n     means: (\S.*)\n     next:  (.*)", text)
    assert [outcome for outcome, _, _ in found] == OUTCOMES
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for _, _, what_next in found:
        named = re.findall(r"graceful (\w+)", what_next)
        assert named
        assert set(named) <= commands


@pytest.mark.timeout(60)
def test_judging_every_example_again_gives_the_same_outcome_and_its_exit_code(told):
    root, _ = told
    codes = {}
    for folder in root.glob("evaluations/*"):
        again = invoke("decide", "--from", folder, "--json")
        document = json.loads(again.stdout)
        assert document["agrees_with_recorded"]
        codes[document["decision"]["outcome"]] = again.exit_code
    assert codes == {
        "BOOTSTRAP": 0,
        "INCONCLUSIVE": 4,
        "COMPATIBLE_ROLLOUT": 0,
        "HOLD": 3,
        "FULL_BACKFILL": 0,
    }


@pytest.mark.timeout(60)
def test_demo_searches_before_and_after_an_update_and_after_a_rollback(told):
    _, text = told
    answers = [
        (generation, re.findall(r"^     \d  (\S+)  (\S+) +(right|wrong)", part, re.MULTILINE)[:3])
        for generation, part in re.findall(r"asked of (\S+):\n((?:     \d .*\n)+)", text)
    ]
    assert [generation for generation, _ in answers] == [G1, G2, G1, G4]
    before, after, back, replaced = (hits for _, hits in answers)
    assert all(len(hits) == 3 for hits in (before, after, back, replaced))
    assert before[0][2] == "wrong"
    assert after[0][2] == replaced[0][2] == "right"
    assert back == before


@pytest.mark.timeout(60)
def test_demo_leaves_a_workspace_that_the_other_commands_work_on(told):
    root, text = told
    report = next(line.strip() for line in text.splitlines() if line.endswith("report.html"))
    assert Path(report).stat().st_size > 10_000
    for command in (f"graceful status --root {root}", "make quickstart", "graceful init shop --from photos/"):
        assert command in text
    assert len(list(root.glob("evaluations/*/report.html"))) == len(OUTCOMES)
    status = invoke("status", "--root", root)
    assert status.exit_code == 0
    assert G4 in status.output
    assert "FULL_BACKFILL" in invoke("report", "--root", root).output
    back = invoke("rollback", "--root", root)
    assert back.exit_code == 0
    assert G1 in back.output


def test_demo_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused = invoke("demo", "--root", tmp_path)
    assert refused.exit_code == 2
    assert "choose another --root" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
