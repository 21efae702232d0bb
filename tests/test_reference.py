"""The configuration reference in docs/ is the one that the models give."""

from pathlib import Path

from flows.config_reference import reference


def test_configuration_reference_is_up_to_date():
    page = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: python -m flows.config_reference > docs/configuration.md"
