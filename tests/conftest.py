"""What every test shares: Hypothesis measures no time, because the machine may be busy; a file leaves no Ray behind."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("graceful", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graceful")


@pytest.fixture(scope="module", autouse=True)
def no_ray_left_behind() -> Iterator[None]:
    """End a cluster that a file's tests have left in this process, and fail: the next file would meet it."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("the tests of this file have left Ray connected in this process")
