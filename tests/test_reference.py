"""The configuration reference in docs/ is the one that the models give."""

from pathlib import Path

from graceful.flows.settings.reference import reference


def test_configuration_reference_is_up_to_date():
    page = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: python -m graceful.flows.settings.reference > docs/configuration.md"
