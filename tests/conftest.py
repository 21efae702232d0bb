"""What every test shares: Hypothesis measures no time, because the machine may be busy; pytest-timeout does."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("graceful", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graceful")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests share a process when several run: those of a file, and all of training, which share a cluster."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("training" if folder == "training" else f"{folder}/{item.path.stem}"))
