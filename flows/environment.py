"""Environment variables that Prefect and Ray read when they are imported: quiet, local, and without telemetry.

Everything is a default: what the caller has set stays. Call before the first import of prefect or ray.
"""

import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The newer of the two interfaces asks an outside address whatever is switched off.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # Migrating a new database on a busy machine takes longer than the default of 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def prepare_environment(root: str, *, log_level: str = "WARNING") -> None:
    """Set the defaults; the flow server's database lies in the workspace when that is a local folder."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", log_level)
    if "://" not in root:
        os.environ.setdefault("PREFECT_HOME", os.path.join(os.path.abspath(root), ".prefect"))
