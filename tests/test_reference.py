"""The references in docs/ are those that the code gives."""

from pathlib import Path

import graceful
from graceful.flows import api_reference, cli_reference
from graceful.flows.settings.reference import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_configuration_reference_is_up_to_date():
    page = DOCS / "configuration.md"
    assert page.read_text() == reference(), "run: python -m graceful.flows.settings.reference > docs/configuration.md"


def test_commands_reference_is_up_to_date():
    page = DOCS / "commands.md"
    expected = "run: python -m graceful.flows.cli_reference > docs/commands.md"
    assert page.read_text() == cli_reference.reference(), expected


def test_python_reference_is_up_to_date_and_leaves_no_public_name_out():
    page = (DOCS / "python.md").read_text()
    assert page == api_reference.reference(), "run: python -m graceful.flows.api_reference > docs/python.md"
    named = [name for name in graceful.__all__ if not name.startswith("_")]
    assert [name for name in named if f"### graceful.{name}\n" not in page] == []
