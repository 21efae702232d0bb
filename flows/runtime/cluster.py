"""One Ray cluster for a whole update: started or joined when the first work needs it, and ended by whoever started it.

`local` starts a cluster inside this process; it dies with the process. `auto` (or `host:port`) joins a running one and
leaves it running. `http://head:8265` never joins: the work is submitted as Ray jobs (see `runtime.jobs`), so that it
survives the process that asked for it. Nodes of a real cluster get this code through the runtime environment made here.
"""

import atexit
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray._private import services, worker

from graceful import files
from graceful.errors import GracefulError
from graceful.flows.runtime.head import ClusterLostError, HeadWatch, require_head
from graceful.flows.settings.config import ClusterConfig

PACKAGES = ("training", "indexing", "evaluation", "flows")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_SINGLE_BOX = {
    # The controller looks several times before a training starts: with one look a second every start takes 7 s more.
    # Five a second take 7 % of a core while it lasts.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


_START_ATTEMPTS = 3
_SECONDS_TO_END = 4.0


class ClusterStartError(GracefulError):
    """A local Ray cluster did not come up."""


class RaySession:
    """A cluster for one update. Entering costs nothing; `ensure` starts or joins."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._started = False
        self._watch: HeadWatch | None = None

    @property
    def submits_jobs(self) -> bool:
        """Whether work goes to a head's job server instead of a driver in this process."""
        return self.config.address.startswith("http")

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._started = False
            if self._watch is not None:
                self._watch.stop()
            if kind is None:
                ray.shutdown()
                return
            # A signal may have ended Ray's own processes, or the head has gone: then it waits for them for a minute.
            ending = threading.Thread(target=ray.shutdown, daemon=True, name="ray-shutdown")
            ending.start()
            ending.join(_SECONDS_TO_END)

    def ensure(self) -> None:
        """Start or join the cluster unless this process is connected to one already."""
        if self.submits_jobs or ray.is_initialized():
            return
        before = signal.getsignal(signal.SIGTERM)
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if self.config.address == "local":
            for name, value in _SINGLE_BOX.items():
                os.environ.setdefault(name, value)
            # A cluster that lives and dies with this process on this machine needs no token.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            self._start_local()
        else:
            require_head(_head_of(self.config.address))
            # A Ray job has got this environment with its submission; naming the same variables again is refused.
            in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
            ray.init(
                address=self.config.address,
                runtime_env=None if in_job else runtime_environment(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        log_with_processes()
        self._started = True
        if threading.current_thread() is threading.main_thread():
            # Ray has put a handler of its own in place, below Python and in it: the one of before comes back.
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            self._watch = HeadWatch(ray.get_runtime_context().gcs_address)
            self._watch.start()

    def _start_local(self) -> None:
        """Start a cluster in this process. Ray gives its node 30 s, which a busy machine may not keep: try again."""
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, self.config.num_workers * self.config.cpus_per_worker + 1),
                    include_dashboard=False,
                    object_store_memory=self.config.object_store_mib * 2**20,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                )
                return
            except Exception as error:  # Ray raises a bare Exception when the node times out
                ray.shutdown()
                if "timed out" not in str(error) or attempt == _START_ATTEMPTS:
                    raise ClusterStartError(
                        f"starting a local Ray cluster: not up, attempt {attempt} ({str(error).splitlines()[0]}); "
                        'free some memory and processors, or join a running one with cluster.address = "auto"'
                    ) from error


def log_with_processes() -> None:
    """Let Ray's Python write where Ray's processes do, which a command sends to a log.

    Ray would print to `sys.stdout` that a node was lost, among what a command prints there for programs.
    """
    for handler in logging.getLogger("ray").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr and sys.__stderr__ is not None:
            handler.setStream(sys.__stderr__)
    worker.print_to_stdstream = _print_with_processes  # type: ignore[assignment]


def _print_with_processes(message: Mapping[str, Any], **_: object) -> None:
    """Print what a cluster says; stands for Ray's function, which is called with more."""
    if sys.__stderr__ is not None:
        print(*message["lines"], sep="\n", file=sys.__stderr__, flush=True)


def _head_of(address: str) -> str:
    """The host:port of the head that Ray would join."""
    try:
        return str(services.canonicalize_bootstrap_address_or_die(address))
    except (ConnectionError, ValueError) as error:
        raise ClusterLostError(
            f"joining the Ray cluster {address!r}: expected one, found none ({str(error).splitlines()[0]}); start it "
            "('ray start --head') or correct cluster.address"
        ) from None


def runtime_environment() -> dict[str, Any]:
    """What workers on other nodes need: this code (when it runs from a checkout) and the store's credentials."""
    # Ray shows the environment of a job to whoever opens its dashboard: tokens of our own stay here.
    ours = [name for name in os.environ if name.startswith("GRACEFUL_") and not name.endswith("_TOKEN")]
    names = [*ours, *(name for name in os.environ if name.startswith("AWS_"))]
    environment: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in names}}
    staged = _staged_checkout()
    if staged is not None:
        environment["py_modules"] = [staged]
    return environment


@functools.cache
def _staged_checkout() -> str | None:
    """The package as one folder, for shipping, when this code runs from a checkout; its folders lie apart there."""
    checkout = Path(files.__file__).resolve().parent.parent
    if not (checkout / "pyproject.toml").exists():
        return None
    folder = tempfile.mkdtemp(prefix="graceful-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = Path(folder, "graceful")
    shutil.copytree(checkout / "graceful", package, ignore=_LEFT_OUT)
    for name in PACKAGES:
        shutil.copytree(checkout / name, package / name, ignore=_LEFT_OUT)
    return str(package)
