"""Each component of a running update killed once, by SIGKILL, while it trains: `python -m benchmarks kills`.

An update of scikit-learn's digits works in processes of its own, as a command, under `graceful serve`, or on a Ray
cluster of three nodes on this machine. When the training has begun, one component is killed. Whatever an operator would
do then is done: nothing, the same command again, or another service. Stored are how the update ended, the seconds from
the kill until the training went on, and whether the end is that of an update that nobody killed: the same weights, the
same decision, the same generation serving.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import processor
from benchmarks.world import HERE_ALONE, ROOT, WAIT_S, Trial, bootstrap, free_port, until
from graceful.processes import descendants

RESULTS = ROOT / "benchmarks" / "results-kills.json"
_BEGUN = 5  # epochs
_ON_RAY = 'address = "{address}"\nnum_workers = 1\nembed_workers = 1\nin_process_below = 0'


def kill_command(trial: Trial) -> float:
    """The command itself; the operator runs it again."""
    process = trial.start()
    trial.reach(_BEGUN)
    os.killpg(process.pid, signal.SIGKILL)
    killed, epochs = time.monotonic(), trial.epochs()
    trial.end(process)
    return again(trial, killed, epochs)


def kill_flow_server(trial: Trial) -> float:
    """The flow server of a command; nothing is done."""
    process = trial.start()
    trial.reach(_BEGUN)
    (server,) = [pid for pid in descendants(process.pid) if "graceful.flows.runtime.server" in command_of(pid)]
    return undisturbed(trial, process, server)


def kill_service(trial: Trial) -> float:
    """`graceful serve`; the operator starts another."""
    return under_service(trial, lambda service: service.pid)


def kill_run(trial: Trial) -> float:
    """The process of a run under `graceful serve`; nothing is done, the next run that is due goes on."""
    return under_service(trial, lambda service: child_with(service.pid, "prefect.engine", "prefect.flow_engine"))


def under_service(trial: Trial, victim: Callable[["subprocess.Popen[bytes]"], int]) -> float:
    """Kill a process of a service; where it was the service, start another."""
    service = trial.start("serve", "--ui-port", str(free_port()))
    trial.reach(_BEGUN)
    pid = victim(service)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    if pid == service.pid:
        trial.ended.append(f"exit {service.wait(WAIT_S)}")
        service = trial.start("serve", "--ui-port", str(free_port()))
        until(lambda: "Ended an update" in trial.log.read_text(errors="replace"), "the orphan's end")
    else:
        trial.ended.append("run Crashed")
    trial.reach(trial.epochs() + 1)
    recovered = time.monotonic() - killed
    until(lambda: serving(trial.root).startswith("g002"), "the move")
    service.send_signal(signal.SIGTERM)
    service.wait(60)
    return recovered


def kill_training_node(trial: Trial) -> float:
    """The raylet of the training worker; nothing is done."""
    process = trial.start()
    trial.reach(_BEGUN)
    return undisturbed(trial, process, raylet_of(trial, "ray::RayTrainWorker"))


def kill_embedding_node(trial: Trial) -> float:
    """The raylet of the embedding worker, before the training; nothing is done."""
    process = trial.start()
    cluster = trial.environment["RAY_TMPDIR"]
    until(lambda: living(cluster, "ray::_Worker"), "an embedding worker")
    return undisturbed(trial, process, raylet_of(trial, "ray::_Worker"))


def kill_head(trial: Trial) -> float:
    """The head of the cluster; the operator starts the cluster anew and runs the command again."""
    process = trial.start()
    trial.reach(_BEGUN)
    cluster = trial.environment["RAY_TMPDIR"]
    (head,) = living(cluster, "gcs_server")
    os.kill(head, signal.SIGKILL)
    killed, epochs = time.monotonic(), trial.epochs()
    trial.end(process)
    trial.ended.append(f"after {time.monotonic() - killed:.0f} s")
    end_all(cluster)
    start_cluster(cluster, trial.environment["RAY_ADDRESS"])
    return again(trial, killed, epochs)


def kill_job(trial: Trial) -> float:
    """The driver of a training that was submitted as a Ray job; the operator runs the command again."""
    process = trial.start()
    trial.reach(_BEGUN)
    (driver,) = [pid for pid in living(str(trial.root), "job_main train") if "sh -c" not in command_of(pid)]
    os.kill(driver, signal.SIGKILL)
    killed, epochs = time.monotonic(), trial.epochs()
    trial.end(process)
    return again(trial, killed, epochs)


def again(trial: Trial, killed: float, epochs: int) -> float:
    """Run the command again to its end; seconds from the kill to the next epoch."""
    process = trial.start()
    trial.reach(epochs + 1)
    recovered = time.monotonic() - killed
    trial.end(process)
    return recovered


def undisturbed(trial: Trial, process: "subprocess.Popen[bytes]", victim: int) -> float:
    """Kill a process and wait for the update's end; seconds to the next epoch."""
    epochs = trial.epochs()
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    trial.reach(epochs + 1)
    recovered = time.monotonic() - killed
    trial.end(process)
    return recovered


HERE: dict[str, Callable[[Trial], float]] = {
    "the command": kill_command,
    "its flow server": kill_flow_server,
    "the service": kill_service,
    "a run of the service": kill_run,
}
ON_RAY: dict[str, Callable[[Trial], float]] = {
    "raylet of the training worker": kill_training_node,
    "raylet of the embedding worker": kill_embedding_node,
    "head of the cluster": kill_head,
}
AS_JOB: dict[str, Callable[[Trial], float]] = {"driver of the training job": kill_job}


# The world ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_cluster() -> Iterator[dict[str, str]]:
    """Environment of commands beside a cluster: a head without processors and two nodes with two each."""
    # Ray's sockets lie below this folder, and a socket's path must be short.
    folder = tempfile.mkdtemp(prefix="gk", dir="/tmp")
    address = f"127.0.0.1:{free_port()}"
    try:
        job_server = start_cluster(folder, address)
        yield {
            "RAY_TMPDIR": folder, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "JOB_SERVER": job_server,
        }  # fmt: skip
    finally:
        end_all(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_cluster(folder: str, address: str) -> str:
    """Start head and nodes; the address of the head's job server."""
    dashboard = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    memory = f"--object-store-memory={100 * 2**20}"
    head = ["--head", f"--port={address.rpartition(':')[2]}", f"--dashboard-port={dashboard}", "--num-cpus=0", memory]
    for options in (head, *[[f"--address={address}", "--num-cpus=2", memory]] * 2):
        with Path(folder, "start.log").open("ab") as log:
            subprocess.run(
                [*ray, *options], env=environment, cwd=folder, stdout=log, stderr=log, timeout=300, check=True
            )
    server = f"http://127.0.0.1:{dashboard}"
    until(lambda: _answers(f"{server}/api/version"), "the job server")
    return server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def command_of(pid: int) -> str:
    """Command line of a process; empty when it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def living(folder: str, command: str = "") -> list[int]:
    """Processes with a folder in their command line or environment, and a text in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = command_of(int(entry.name))
            told = line + (entry / "environ").read_bytes().decode(errors="replace")
            is_ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if folder in told and command in line and int(entry.name) != os.getpid() and not is_ended:
                found.append(int(entry.name))
    return found


def raylet_of(trial: Trial, name: str) -> int:
    """The raylet of the node where the only Ray worker of a name runs."""
    (worker,) = living(trial.environment["RAY_TMPDIR"], name)
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def child_with(pid: int, *texts: str) -> int:
    """The descendant of a process that a text tells."""
    return next(found for found in descendants(pid) if any(text in command_of(found) for text in texts))


def end_all(folder: str) -> None:
    """End what runs with its files below a folder."""
    for pid in living(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def serving(root: Path) -> str:
    """The generation that serves."""
    from graceful.flows.store.workspace import open_workspace

    return open_workspace(str(root)).registry.serving().champion or ""


def end_state(root: Path) -> dict[str, Any]:
    """What must not depend on a kill."""
    from graceful.flows.store.events import Decided
    from graceful.flows.store.workspace import open_workspace

    registry = open_workspace(str(root)).registry
    state = registry.serving()
    decided = [(event.generation, event.payload.outcome) for event in registry.events(Decided)]
    return {"serving": (state.champion, state.previous), "generations": registry.generations(), "decided": decided}


def kills(names: Sequence[str], stored: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Kill the named components, one after the other; `keep` gets all rows after each."""
    with tempfile.TemporaryDirectory(prefix="graceful-kills-") as temporary:
        bootstrapped = bootstrap(Path(temporary))
        number = 0

        def folder() -> Path:
            nonlocal number
            number += 1
            made = Path(temporary, str(number))
            made.mkdir()
            return made

        def play(acts: dict[str, Callable[[Trial], float]], cluster: str, environment: dict[str, str]) -> None:
            wanted = [name for name in acts if name in names]
            if not wanted:
                return
            quiet = Trial(bootstrapped, folder(), cluster, environment)
            quiet.end(quiet.start())
            expected = end_state(quiet.root)
            for name in wanted:
                trial = Trial(bootstrapped, folder(), cluster, environment)
                row: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
                try:
                    row["recovered_s"] = round(acts[name](trial), 1)
                    row["same_end"] = end_state(trial.root) == expected
                except (TimeoutError, subprocess.TimeoutExpired, StopIteration, ValueError) as error:
                    row |= {"recovered_s": None, "same_end": False, "error": f"{type(error).__name__}: {error}"}
                row |= {"ended": trial.ended, "what": " ".join((acts[name].__doc__ or "").split())}
                row["hardware"] = f"{os.cpu_count()} x {processor()}"
                stored[name] = row
                print(f"{name}: {row}", flush=True)
                keep(stored)
                end_all(str(trial.root))

        play(HERE, HERE_ALONE, {})
        if set(names) & {*ON_RAY, *AS_JOB}:
            with ray_cluster() as environment:
                play(ON_RAY, _ON_RAY.format(address="auto"), environment)
                if set(names) & set(AS_JOB):
                    play(AS_JOB, _ON_RAY.format(address=environment["JOB_SERVER"]), environment)


def main(given: Sequence[str]) -> int:
    """Kill, print one line each, and store the rows; exit code 1 where an end was another."""
    every = [*HERE, *ON_RAY, *AS_JOB]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=every, help="component; may be repeated; by default all")
    chosen = parser.parse_args(given)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kills(chosen.only or every, stored, _store)
    return int(not all(row["same_end"] for row in stored.values()))


def _store(rows: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
