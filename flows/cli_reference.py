"""Writes docs/commands.md from the commands themselves, so that the page cannot differ from what they take.

python -m graceful.flows.cli_reference > docs/commands.md
"""

import re
from collections.abc import Iterator
from typing import Any

import typer

from graceful.flows.cli import app


def reference() -> str:
    """The whole page."""
    parts = [
        "# Commands",
        "`graceful COMMAND --help` says the same. `--root`, or `GRACEFUL_ROOT`, names the workspace. Exit codes: 0 "
        "done, 1 failed, 2 wrong use, 3 hold, 4 inconclusive, 5 waiting for a person, 130 interrupted, 143 ended. What "
        "you can mend comes as one line; a traceback is a bug. This page is made by `python -m "
        "graceful.flows.cli_reference`.",
    ]
    for name, command in _commands(typer.main.get_command(app)):
        parts += [f"## graceful {name}", _plain(command.help or ""), _table(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its name, those of groups after the name of their group."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _table(command: Any) -> str:
    lines = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        named = (
            (parameter.name or "").upper() if is_argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
        )
        lines.append(f"| `{named}` | {_plain(getattr(parameter, 'help', None) or '')} |")
    return "\n".join(["| argument or option | meaning |", "|---|---|", *lines]) if lines else ""


def _plain(text: str) -> str:
    """Help without the marks of the terminal."""
    text = re.sub(r"\[/?bold\]", "", text).replace("\\[", "[")
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
