"""What `benchmarks.kills` kills: commands, a Ray cluster of several raylets on this machine, an object store."""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.world import HERE_ALONE, ROOT, Trial, free_port, until
from graceful.files import read_json, write_bytes
from graceful.flows.store.events import Decided
from graceful.flows.store.workspace import Workspace
from graceful.processes import descendants

MARK = "GRACEFUL_TRIAL"
"""Variable that every process of a trial has, workers on a cluster too: whoever has it at the end is an orphan."""

EPOCHS = 40
SECONDS_FOR_ORPHANS = 60.0
_STEPS = 3 * EPOCHS
_TRAINING_S, _EMBEDDING_S = 16.0, 0.4
_PRICES = """[prices]
fixed_worker_hours = 0.0
price_per_worker_hour = 0.0
price_per_gib_month = 0.0
value_per_point_day = 1.0
days_until_next_generation = 100.0
[gallery]
wave_rows = 25
unit_rows = 10
"""
ON_RAY = "num_workers = 1\nembed_workers = 1\nin_process_below = 0\naddress = {address}"


class SlowEncoder(torch.nn.Module):
    """A linear encoder that sleeps at every step and at every batch that it embeds, so that there is time to kill."""

    def __init__(self, width: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(channels * image_size**2, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings (n, width) of images (n, channels, image_size, image_size)."""
        time.sleep(_TRAINING_S / _STEPS if self.training else _EMBEDDING_S)
        embedded: torch.Tensor = self.layer(images.flatten(1))
        return embedded


class MortalTrial(Trial):
    """A workspace with a slow candidate to train, in a folder or an object store."""

    def __init__(
        self, bootstrapped: Path, folder: Path, cluster: str = HERE_ALONE, environment: dict[str, str] | None = None
    ) -> None:
        folder.mkdir()
        mine = {"PYTHONPATH": str(ROOT), MARK: str(folder), "RAY_AUTH_MODE": "disabled", **(environment or {})}
        super().__init__(bootstrapped, folder, cluster, mine)
        self.mark = f"{MARK}={folder}"
        configuration = self.root / "graceful.toml"
        text = configuration.read_text()
        for given, wanted in (
            ('name = "small_cnn", kwargs = { block_widths = [8, 16] }', 'name = "benchmarks.mortal_world:SlowEncoder"'),
            ("epochs = 600", f'epochs = {EPOCHS}\nstart = "scratch"\ninterpolation = 0.0'),
            ("num_resamples = 200", "num_resamples = 200\nfractions = [0.0, 0.5, 1.0]"),
        ):
            assert given in text, given
            text = text.replace(given, wanted)
        configuration.write_text(text + _PRICES)
        self.place = str(self.root)

    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        """Start a command of the command line in the workspace, wherever it is."""
        arguments = [str(ROOT / ".venv" / "bin" / "python"), "-m", "graceful.flows.cli", *(command or ("update",))]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*arguments, "--root", self.place], env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        """What its commands have printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def epochs(self) -> int:
        """How many epochs of the second generation are recorded."""
        return sum(len(path.read_text().splitlines()) for path in self.root.glob("runs/g002-*/metrics.jsonl"))

    def is_decided(self) -> bool:
        """Whether the candidate's decision has been carried out."""
        return bool(list(self.root.glob("evaluations/*/decision.json"))[1:])

    def end_state(self) -> dict[str, Any]:
        """What must not depend on what was killed: who serves, who owns each item, how many rows, what was decided."""
        workspace = Workspace(self.place)
        serving = workspace.registry.serving()
        view = workspace.view(serving.champion)
        decided = workspace.registry.events(Decided)
        return {
            "champion": serving.champion,
            "previous": serving.previous,
            "active_plan": serving.active_plan,
            "owners": {
                str(item): view.readable[code] if code >= 0 else ""
                for item, code in zip(view.item_ids.tolist(), view.owner.tolist(), strict=True)
            },
            "rows": workspace.gallery.generations(),
            "decision": read_json(f"{self.place}/evaluations/{decided[-1].payload.evaluation}/decision.json"),
            "num_decisions": len(decided),
        }

    def orphans(self) -> list[str]:
        """Command lines of the trial's processes that belong to nobody and do not end within a minute.

        Idle workers of a cluster that is still there belong to it.
        """
        deadline = time.monotonic() + SECONDS_FOR_ORPHANS
        while (found := self._belonging_to_nobody()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _belonging_to_nobody(self) -> list[str]:
        found = []
        for pid in set(living(self.mark)) - set(descendants(os.getpid())):
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return found

    def end(self) -> None:
        """Kill what is left."""
        for pid in living(self.mark):
            kill(pid)


def living(text: str, *words: str) -> list[int]:
    """Living processes with a text in their environment, and words in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes().split(b"\0")
            if state != "Z" and text.encode() in environment and all(word.encode() in command for word in words):
                found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    """SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Raylets:
    """A Ray cluster of a head without processors and nodes of one each, all on this machine.

    Its processes call the `python` that runs this. It has a folder of its own: a job joins the cluster that was started
    last in its folder, which by default is that of every cluster on the machine.
    """

    def __init__(self, num_nodes: int = 3, *, with_jobs: bool = False) -> None:
        from ray._private.utils import write_ray_address
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="raylets-")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # By default a raylet aborts where its agents take more than 15 s to start.
        variables = {"PATH": path, "RAY_agent_register_timeout_ms": "120000"}
        of_all = {"object_store_memory": 80 * 2**20, "env_vars": variables, "temp_dir": self._folder}
        jobs = {"include_dashboard": with_jobs} | ({"dashboard_port": free_port()} if with_jobs else {})
        # A job needs no processor of its own, but one of a node that has any.
        self.cluster = _patiently(lambda: Cluster(True, head_node_args={"num_cpus": 0, **of_all, **jobs}))
        write_ray_address(self.cluster.address, self._folder)
        self.nodes = [_patiently(lambda: self.cluster.add_node(num_cpus=1, **of_all)) for _ in range(num_nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """By which `cluster.address = "auto"` finds it."""
        return {"RAY_ADDRESS": self.cluster.address}

    @property
    def job_server(self) -> str:
        """Address of the head for jobs."""
        return f"http://{self.cluster.head_node.address_info['webui_url']}"

    def raylet_of(self, worker: str) -> "subprocess.Popen[bytes] | None":
        """The raylet below which a worker of a class works."""
        for node in self.nodes:
            for started in node.all_processes.get("raylet", []):
                for pid in descendants(started.process.pid):
                    with contextlib.suppress(OSError):
                        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{worker}".encode()):
                            found: subprocess.Popen[bytes] = started.process
                            return found
        return None

    def lose(self, raylet: "subprocess.Popen[bytes]") -> None:
        """Kill a raylet and reap it, as init does: Ray's workers end with it, but take a zombie for one that lives."""
        raylet.kill()
        raylet.wait(60)

    def head(self) -> int:
        """The process that is the head."""
        return int(self.cluster.head_node.all_processes["gcs_server"][0].process.pid)

    def end(self) -> None:
        """End all of it."""
        self.cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """What a start comes to that Ray gives half a minute; a busy machine may not keep that, and tries again."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:  # Ray raises a bare one
            if "timed out" not in str(error):
                raise
    return start()


def _serve_store(port: int) -> None:
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    lock, put = threading.RLock(), S3Response.put_object

    def locked(self: Any) -> Any:
        with lock:  # a real store's puts are atomic
            return put(self)

    S3Response.put_object = locked
    ThreadedMotoServer("127.0.0.1", port, verbose=False).start()
    signal.pause()


@contextlib.contextmanager
def object_store() -> Iterator[tuple[int, dict[str, str]]]:
    """Process id of a store that speaks S3, and the variables by which it is found. They are set here too meanwhile."""
    import boto3

    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=_serve_store, args=(port,), daemon=True)
    process.start()
    found = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    os.environ.update(found)
    client = boto3.client("s3")

    def is_there() -> bool:
        with contextlib.suppress(Exception):
            client.create_bucket(Bucket="graceful")
            return True
        return False

    try:
        until(is_there, "the object store")
        assert process.pid is not None
        yield process.pid, found
    finally:
        process.kill()
        process.join(10)
        for name in found:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def into_store(trial: MortalTrial, place: str, leave_out: Sequence[str] = (".prefect",)) -> None:
    """Copy a trial's workspace to an object store, and have its commands work there."""
    for path in sorted(trial.root.rglob("*")):
        inner = path.relative_to(trial.root)
        if path.is_file() and inner.parts[0] not in leave_out:
            write_bytes(f"{place}/{inner.as_posix()}", path.read_bytes())
    trial.place = place
