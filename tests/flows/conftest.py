"""One bundled data set and one bootstrapped workspace for the tests of whole updates; an environment of their own."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.flows import running, tiny


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as a Parquet file."""
    from graceful.training.materialise import materialise_digits

    return Path(materialise_digits(str(tmp_path_factory.mktemp("digits") / "digits.parquet")))


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of commands run in processes of their own: quiet, and with a Prefect home of their own."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "GRACEFUL_"))},
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


@pytest.fixture(scope="session")
def flow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of commands that find a running flow server, as beside `graceful serve`: they start in no time."""
    from graceful.flows.runtime import server

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with server.flow_server(str(tmp_path_factory.mktemp("server"))) as api_url:
            yield {"PREFECT_API_URL": api_url, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}


Spawn = Callable[..., BaseProcess]


@pytest.fixture(scope="session")
def spawn() -> Iterator[Spawn]:
    """Start processes that have the code imported already: killing one is cheap, and as real as any other kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.flows.running"])
    started: list[BaseProcess] = []

    def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
        process = context.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
            process.join(10)


@pytest.fixture(scope="session")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> Path:
    """A workspace whose first generation serves 100 items; its configuration shows two more digits to the next one.

    Copy it before changing it.
    """
    root = tiny.new_workspace(tmp_path_factory.mktemp("bootstrapped") / "workspace")
    tiny.write_config(root, digits_file)
    assert running.update(root).outcome == "BOOTSTRAP"
    tiny.write_config(root, digits_file, tiny.grown(5))
    return root


@pytest.fixture
def workspace_root(bootstrapped: Path, tmp_path: Path) -> Path:
    """A bootstrapped workspace of one's own."""
    return tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
