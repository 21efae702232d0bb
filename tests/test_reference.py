"""The configuration reference in docs/ is the one that the models give."""

from pathlib import Path

from graceful.flows import cli_reference
from graceful.flows.settings.reference import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_configuration_reference_is_up_to_date():
    page = DOCS / "configuration.md"
    assert page.read_text() == reference(), "run: python -m graceful.flows.settings.reference > docs/configuration.md"


def test_commands_reference_is_up_to_date():
    page = DOCS / "commands.md"
    expected = "run: python -m graceful.flows.cli_reference > docs/commands.md"
    assert page.read_text() == cli_reference.reference(), expected
