"""What a person reads fits a terminal of 80 columns, and says in words what it says."""

import io
import shlex

import pytest
from rich.console import Console

from graceful.evaluation.decision import Decision
from graceful.evaluation.guards import Reason
from graceful.flows.commands.suggestions import next_commands
from graceful.flows.terminal import _print_matrix, print_decision, print_next, print_status


def printed(act, *arguments):
    console = Console(width=80, file=io.StringIO())
    act(console, *arguments)
    return console.file.getvalue()


def reason(guard, verdict, state="fraction/0.25", **fields):
    known = {"threshold": 0.02, "value": 0.0123, "bound": 0.0456, "n": 123_456, "text": "in words"}
    return Reason(guard=guard, verdict=verdict, state=state, **{**known, **fields})


def decision(*reasons, decisive):
    return Decision(
        outcome="HOLD", summary="HOLD: " + "because of this and that " * 8, candidate="g002-bbbbbb",
        champion="g001-aaaaaa", reasons=reasons, num_decisive=decisive,
    )  # fmt: skip


MANY = decision(
    reason("NFR", "FAIL", scope="country=Liechtenstein"),
    *(reason("dip", "PASS", text=f"way to {place}") for place in range(22)),
    reason("quality", "UNKNOWN", threshold=-0.005, value=-0.9213, bound=-0.9111),
    reason("certificate", "FAIL", state=None, scope="g001-aaaaaa"),
    reason("self-test", "PASS", state="pair/g002-bbbbbb/g002-bbbbbb", threshold=None, bound=None, n=None),
    decisive=1,
)


def test_decision_fits_80_columns_with_the_deciding_rows_first_and_marked():
    lines = printed(print_decision, MANY).splitlines()
    assert all(len(line) <= 80 for line in lines)
    header = next(place for place, line in enumerate(lines) if "verdict" in line)
    assert lines[header + 1].startswith("* NFR")
    assert not any(line.startswith("*") for line in lines[header + 2 : -1])
    assert lines[-1].startswith("* led to the decision.")


def test_decision_counts_what_passes_and_shows_what_does_not():
    text = printed(print_decision, MANY)
    assert "23 of 26 guards pass, 23 not shown." in text
    assert "dip" not in text
    assert "UNKNOWN" in text
    assert "-0.50 pt" in text
    assert "-91.11 pt" in text


def test_long_places_are_wrapped_and_not_cut():
    text = printed(print_decision, decision(reason("NFR", "FAIL", scope="country=Bosnia and Herzegovina"), decisive=1))
    assert "..." not in text
    assert "\u2026" not in text
    words = " ".join(text.split())
    for word in ("country=Bosnia", "Herzegovina,", "25", "re-embedded"):
        assert word in words
    own = printed(print_decision, decision(reason("self-test", "PASS", "pair/g002-b/g001-a"), decisive=1))
    assert "gallery" in own
    assert "pair/" not in own


def test_rows_that_read_the_same_are_printed_once_with_their_number():
    text = printed(print_decision, decision(*(reason("dip", "FAIL", text=f"{n}") for n in range(5)), decisive=5))
    assert sum(line.startswith("* dip") for line in text.splitlines()) == 1
    assert "(5" in text


def test_status_speaks_words():
    status = {
        "champion": None, "generations": [], "rows_by_generation": {}, "moved_by": "", "items": 1_200,
        "plan": {"generation": "g002-bbbbbb", "fraction": 0.5, "items": 600}, "due": False,
        "names": ["g001-aaaaaa", "g002-bbbbbb"], "odd": "[red]",
    }  # fmt: skip
    text = printed(print_status, status)
    for value in ("None", "[]", "{}", "False", "'"):
        assert value not in text
    for words in ("1,200", "g001-aaaaaa, g002-bbbbbb", "fraction: 0.5", "[red]"):
        assert words in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("num_generations", [1, 4, 9, 10, 23])
def test_matrix_fits_80_columns_and_shows_every_cell(num_generations):
    names = [f"g{place + 1:03d}" for place in range(num_generations)]
    values = [[1.0 if row >= column else None for column in range(num_generations)] for row in range(num_generations)]
    text = printed(_print_matrix, "A title", names, values)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("100.0") == num_generations * (num_generations + 1) // 2
    assert "\u2026" not in text


def test_next_commands_are_lines_to_copy_whole():
    long = f"graceful report --root /{'a' * 90}/[b]"
    assert printed(print_next, [long]).splitlines() == ["Next:", f"  {long}"]
    assert printed(print_next, []) == ""


def test_next_commands_work_as_printed(tmp_path):
    from typer.testing import CliRunner

    from graceful.flows.cli import app

    root = tmp_path / "a folder"
    assert CliRunner().invoke(app, ["init", str(root)]).exit_code == 0
    assert next_commands(str(root), str(root / "report.html"))[-1] == f"graceful report --root {shlex.quote(str(root))}"
    program, *arguments = shlex.split(next_commands(str(root), "s3://bucket/report.html")[0])
    assert program == "graceful"
    # No decision yet: the command is understood, and says so.
    assert "no update has decided yet" in CliRunner().invoke(app, arguments).stderr
