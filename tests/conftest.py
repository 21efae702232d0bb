"""What every test shares: Hypothesis measures no time, because the machine may be busy; pytest-timeout does."""

from hypothesis import HealthCheck, settings

settings.register_profile("graceful", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graceful")
