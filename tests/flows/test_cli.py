"""The command line: what it refuses, how it exits, and that every command explains itself."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from graceful.errors import GracefulError
from graceful.flows import cli
from graceful.flows.cli import app, reported_errors
from tests.flows import tiny

COMMANDS = [
    "accept", "adopt", "blame", "check", "cluster", "collect", "debt", "decide", "delete", "demo", "deploy", "doctor",
    "export", "flips", "forget-training", "history", "ingest", "init", "plan", "promote", "reject", "replay", "report",
    "retire", "revoke", "rollback", "search", "selftest", "serve", "status", "update", "variant",
]  # fmt: skip
IN_GROUPS = [
    "canary start",
    "canary status",
    "canary stop",
    "evalset create",
    "evalset grow",
    "evalset label",
    "evalset show",
]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands_are_these():
    commands = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
    assert commands == COMMANDS
    groups = {group.name: group.typer_instance.registered_commands for group in app.registered_groups}
    assert {f"{name} {command.callback.__name__}" for name in groups for command in groups[name]} == {*IN_GROUPS}


@pytest.mark.parametrize("name", [*COMMANDS, *IN_GROUPS])
def test_every_command_and_every_option_explains_itself(name):
    result = invoke(*name.split(), "--help")
    assert result.exit_code == 0
    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    assert command.help
    for parameter in command.params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("arguments", [["-h"], ["update", "-h"]])
def test_help_has_a_short_name(arguments):
    short, long = invoke(*arguments), invoke(*arguments[:-1], "--help")
    assert short.exit_code == 0
    assert short.output == long.output


def test_version_is_that_of_the_installed_package():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"graceful {version('graceful')}\n")


def test_no_command_prints_the_help():
    result = invoke()
    assert result.exit_code in (0, 2)  # click 8.2 counts it as wrong use
    assert "graceful init" in " ".join(result.output.split())


@pytest.mark.parametrize("arguments", [("fly",), ("search",), ("search", "x.png", "-k", "0"), ("status", "--wings")])
def test_wrong_use_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


class LostError(GracefulError):
    pass


def test_expected_error_is_one_line_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.delenv("GRACEFUL_DEBUG", raising=False)
    with pytest.raises(typer.Exit) as end, reported_errors():
        raise LostError("losing it: expected one,\n   found none;\nlook again")
    assert end.value.exit_code == 1
    printed = capsys.readouterr()
    assert printed.err == "graceful: losing it: expected one, found none; look again\n"
    assert printed.out == ""


def test_a_bug_keeps_its_traceback_and_says_where_to_report_it(capsys):
    with pytest.raises(typer.Exit) as end, reported_errors():
        raise KeyError("order")
    assert end.value.exit_code == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "please report it" in printed.splitlines()[-1]
    assert "report" in (tiny.ROOT / "CONTRIBUTING.md").read_text().lower()


def test_error_is_a_document_too_with_json(capsys):
    with pytest.raises(typer.Exit), reported_errors(as_json=True):
        raise LostError("it is gone")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": "it is gone", "kind": "LostError", "bug": False}
    assert printed.err == "graceful: it is gone\n"


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("GRACEFUL_DEBUG", "1")
    with pytest.raises(LostError), reported_errors():
        raise LostError("it is gone")


def test_init_creates_a_workspace_and_leaves_what_is_there_alone(tmp_path):
    root = tmp_path / "new"
    assert invoke("init", root).exit_code == 0
    assert (root / "graceful.toml").exists()
    (root / "graceful.toml").write_text("# mine\n")
    assert invoke("init", root).exit_code == 0
    assert (root / "graceful.toml").read_text() == "# mine\n"
    status = json.loads(invoke("status", "--root", root, "--json").stdout)
    assert (status["champion"], status["items"], status["generations"]) == (None, 0, [])
    other = tiny.write_config(tmp_path / "other", tmp_path / "digits.parquet")
    refused = invoke("init", root, "--config", other)
    assert refused.exit_code == 2
    assert "is there already" in refused.stderr
    assert (root / "graceful.toml").read_text() == "# mine\n"


def test_init_refuses_a_configuration_that_is_wrong_and_creates_nothing(tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("nam = 'x'\n")
    refused = invoke("init", tmp_path / "new", "--config", wrong)
    assert refused.exit_code == 2
    assert "did you mean 'name'?" in refused.stderr
    assert not (tmp_path / "new" / "registry").exists()
    assert not (tmp_path / "new" / "graceful.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("search", "x.png"), "expected a serving generation, found none; run 'graceful update' first"),
        (("rollback",), "expected a previous generation, found none"),
        (("report",), "no update has decided yet; run 'graceful update'"),
        (("report", "nothing-like-that"), "expected outcomes.parquet, found none"),
    ],
)
def test_command_on_an_empty_workspace_says_what_to_do_first(tmp_path, arguments, words):
    root = tmp_path / "new"
    invoke("init", root)
    result = invoke(*arguments, "--root", root)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_collect_drops_what_nobody_reads_and_says_so(workspace_root):
    found = json.loads(invoke("collect", "--root", workspace_root, "--json").stdout)
    assert found["generations"] == []  # all vectors are the champion's
    (workspace_root / "graceful.toml").unlink()
    assert invoke("collect", "--root", workspace_root).exit_code == 2


def test_decide_on_no_evaluation_and_under_no_policy(tmp_path):
    result = invoke("decide", "--from", tmp_path)
    assert result.exit_code == 1
    assert "expected outcomes.parquet, found none" in result.stderr
    (tmp_path / "policy.toml").write_text("[policy]\nmax_nfrr = 1\n")
    result = invoke("decide", "--from", tmp_path, "--policy", tmp_path / "policy.toml")
    assert result.exit_code == 2
    assert "max_nfrr" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.timeout(300)
def test_module_and_console_script_are_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "graceful.flows.cli", "status", "--root", str(tmp_path)],
        cwd=tiny.ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("graceful: opening the workspace: expected one at")
    assert callable(cli.main)
