"""Kill what an update depends on, one part at a time: `python -m benchmarks kills`, about twenty minutes.

Each part dies by SIGKILL while a real command updates a small workspace on real processes; storage goes away for a
minute. Then the command goes on by itself, or is run once more, as an operator would. Written down is: how long it took
until somebody noticed, until work went on, and until the decision was carried out; whether what is left equals that of
an update which was left alone (decision, serving state, owner of every item, rows); and which processes are left.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import processor
from benchmarks.mortal_world import ON_RAY, MortalTrial, Raylets, into_store, kill, living, object_store
from benchmarks.world import bootstrap, free_port, until

RESULTS = Path(__file__).parent / "results-kills.json"
AWAY_S = 60.0
_BEGUN = 6  # epochs after which something is killed


@dataclass(frozen=True)
class Outcome:
    """What became of a kill; times in seconds after it. `code`: how the command ended that was under way, if it did."""

    what: str
    noticed: str
    noticed_s: float
    again_s: float
    end_s: float
    runs: int
    code: int | None = None
    same: bool = False
    orphans: tuple[str, ...] = ()


class Clock:
    """Seconds since a kill."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def after(self, condition: Callable[[], object], what: str) -> float:
        """When a condition came to hold."""
        until(condition, what)
        return self.now()

    def now(self) -> float:
        """How late it is."""
        return round(time.monotonic() - self._since, 1)


def _is_training(trial: MortalTrial) -> bool:
    return trial.epochs() >= _BEGUN


def _training(trial: MortalTrial, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the training is well under way."""
    _reach(trial, process, lambda: _is_training(trial), "a training")


def _reach(trial: MortalTrial, process: "subprocess.Popen[bytes]", condition: Callable[[], object], what: str) -> None:
    until(lambda: condition() or process.poll() is not None, what)
    if not condition():
        raise RuntimeError(f"it ended with {process.returncode} before {what}: {trial.said()[-3000:]}")


def _to_the_end(trial: MortalTrial, process: "subprocess.Popen[bytes]") -> int:
    """Wait until a command has ended; run it again, as an operator would, until it ends well. How often it ran."""
    runs = 1
    while process.wait(600) != 0:
        if runs == 3:
            raise RuntimeError(f"it ended with {process.returncode} three times: {trial.said()[-3000:]}")
        runs += 1
        process = trial.start()
    return runs


def _goes_on(trial: MortalTrial) -> Callable[[], bool]:
    known = trial.epochs()
    return lambda: trial.epochs() > known


def flow_server(trial: MortalTrial) -> Outcome:
    """The flow server of one update."""
    process = trial.start()
    _training(trial, process)
    goes_on = _goes_on(trial)
    kill(living(trial.mark, "graceful.flows.runtime.server")[0])
    clock = Clock()
    again = clock.after(goes_on, "an epoch")
    noticed = clock.after(lambda: "flow server does not answer" in trial.said(), "the line about it")
    runs = _to_the_end(trial, process)
    return Outcome("flow server", "a line of the update", noticed, again, clock.now(), runs)


def update_itself(trial: MortalTrial) -> Outcome:
    """The process of an update by hand."""
    process = trial.start()
    _training(trial, process)
    goes_on = _goes_on(trial)
    kill(process.pid)
    clock = Clock()
    code = process.wait(60)
    noticed = clock.now()
    process = trial.start()
    again = clock.after(goes_on, "an epoch")
    runs = 1 + _to_the_end(trial, process)
    return Outcome("update by hand", "its shell", noticed, again, clock.now(), runs, code)


def _served(trial: MortalTrial, port: int) -> "subprocess.Popen[bytes]":
    seen = trial.said().count("Next update of")
    service = trial.start("serve", "--ui-port", str(port))
    _reach(trial, service, lambda: trial.said().count("Next update of") > seen, "a service")
    return service


def _stop(service: "subprocess.Popen[bytes]") -> None:
    service.send_signal(signal.SIGTERM)
    service.wait(60)


def _end_of_served(trial: MortalTrial) -> bool:
    return trial.is_decided() and not list(trial.root.glob("under_way/*.json"))


def child_of_the_runner(trial: MortalTrial) -> Outcome:
    """The process that a service started for a run."""
    service = _served(trial, free_port())
    _training(trial, service)
    goes_on = _goes_on(trial)
    (child,) = living(trial.mark, "prefect.flow_engine") or living(trial.mark, "prefect.engine")
    kill(child)
    clock = Clock()
    noticed = clock.after(lambda: "crashed" in trial.said().lower(), "the runner's line")
    again = clock.after(goes_on, "an epoch")
    end = clock.after(lambda: _end_of_served(trial), "the decision")
    _stop(service)
    return Outcome("run of a service", "the runner: Crashed", noticed, again, end, 2, -signal.SIGKILL)


def service(trial: MortalTrial) -> Outcome:
    """`graceful serve` itself; another one is started at once."""
    first = _served(trial, free_port())
    _training(trial, first)
    kill(first.pid)
    clock = Clock()
    code = first.wait(60)
    second = _served(trial, free_port())
    noticed = clock.now()
    again = clock.after(_goes_on(trial), "an epoch")
    end = clock.after(lambda: _end_of_served(trial), "the decision")
    _stop(second)
    return Outcome("service", "the next service", noticed, again, end, 2, code)


@dataclass(frozen=True)
class Node:
    """A node to kill: that of a worker, while something is under way whose `progress` changes as it goes on."""

    what: str
    worker: str
    is_under_way: Callable[[MortalTrial], bool]
    progress: Callable[[MortalTrial], object]


NODES = {
    "training_node": Node("node of the training worker", "RayTrainWorker", _is_training, MortalTrial.epochs),
    "embedding_node": Node(
        "node of the embedding worker, evaluation set",
        "_Worker",
        lambda trial: "s  embed evaluation set with g002" in trial.said(),
        MortalTrial.said,
    ),
    "wave_node": Node(
        "node of the embedding worker, a wave", "_Worker", lambda trial: "s  re-index" in trial.said(), MortalTrial.said
    ),
}


def lost_node(node: Node, trial: MortalTrial, raylets: Raylets) -> Outcome:
    """A node; another worker goes on elsewhere."""
    process = trial.start()
    _reach(trial, process, lambda: node.is_under_way(trial) and raylets.raylet_of(node.worker), node.what)
    raylet = raylets.raylet_of(node.worker)
    assert raylet is not None
    raylets.lose(raylet)
    clock = Clock()
    noticed = clock.after(lambda: raylets.raylet_of(node.worker) or process.poll() is not None, "another worker")
    known = node.progress(trial)
    again = clock.after(lambda: node.progress(trial) != known or process.poll() is not None, "progress")
    runs = _to_the_end(trial, process)
    return Outcome(node.what, "Ray: another worker", noticed, again, clock.now(), runs)


def head(trial: MortalTrial, raylets: Raylets) -> Outcome:
    """The head of the cluster; another cluster is started once the update has ended."""
    process = trial.start()
    _training(trial, process)
    goes_on = _goes_on(trial)
    kill(raylets.head())
    clock = Clock()
    code = process.wait(120)
    noticed = clock.now()
    raylets.end()
    with closing(_Closed(Raylets())) as another:
        trial.environment.update(another.raylets.environment)
        process = trial.start()
        again = clock.after(goes_on, "an epoch")
        runs = 1 + _to_the_end(trial, process)
        return Outcome("head", "the update: one line, ended", noticed, again, clock.now(), runs, code)


def job_driver(trial: MortalTrial) -> Outcome:
    """The driver of the training's job."""
    process = trial.start()
    _training(trial, process)
    goes_on = _goes_on(trial)
    kill(living(trial.mark, "graceful.flows.runtime.job_main", "train")[-1])
    clock = Clock()
    code = process.wait(300)
    noticed = clock.now()
    process = trial.start()
    _reach(trial, process, goes_on, "an epoch")
    again = clock.now()
    runs = 1 + _to_the_end(trial, process)
    return Outcome("driver of the Ray job", "the update: one line, ended", noticed, again, clock.now(), runs, code)


def folder_away(trial: MortalTrial) -> Outcome:
    """The workspace's folder is not there for a minute."""
    process = trial.start()
    _training(trial, process)
    hidden = trial.root.with_name("away")
    known = trial.epochs()
    trial.root.rename(hidden)

    def back() -> None:
        if trial.root.exists():  # what was written meanwhile by whoever makes a folder where there is none
            trial.root.rename(trial.root.with_name("meanwhile"))
        hidden.rename(trial.root)

    return _away("folder away for 60 s", trial, process, back, lambda: trial.epochs() > known)


def store_away(trial: MortalTrial, store: int) -> Outcome:
    """The object store does not answer for a minute."""
    process = trial.start()
    _reach(trial, process, lambda: " train candidate" in trial.said(), "a training")
    os.kill(store, signal.SIGSTOP)
    said = trial.said()

    def back() -> None:
        os.kill(store, signal.SIGCONT)

    return _away("object store silent for 60 s", trial, process, back, lambda: trial.said() != said)


def _away(
    what: str,
    trial: MortalTrial,
    process: "subprocess.Popen[bytes]",
    back: Callable[[], None],
    goes_on: Callable[[], bool],
) -> Outcome:
    """Wait for a minute, and for the command's end if it comes to that; then storage is back."""
    clock, ended_s = Clock(), AWAY_S
    while clock.now() < AWAY_S:
        if ended_s == AWAY_S and process.poll() is not None:
            ended_s = clock.now()
        time.sleep(0.1)
    back()
    code = process.poll()
    process = trial.start() if code is not None else process
    again = clock.after(goes_on, "progress")
    runs = _to_the_end(trial, process) + (code is not None)
    by = "nobody: it waits" if code is None else "the update: one line, ended"
    return Outcome(what, by, ended_s, again, clock.now(), runs, code)


class _Closed:
    """A cluster that is ended with the block, also where it was ended before."""

    def __init__(self, raylets: Raylets) -> None:
        self.raylets = raylets

    def close(self) -> None:
        self.raylets.end()


def _on_raylets(
    bootstrapped: Path, folder: Path, act: Callable[[MortalTrial, Raylets], Outcome]
) -> tuple[MortalTrial, Outcome]:
    with closing(_Closed(Raylets())) as held:
        cluster = ON_RAY.format(address='"auto"')
        trial = MortalTrial(bootstrapped, folder, cluster, held.raylets.environment)
        return trial, _judged(trial, lambda: act(trial, held.raylets))


def _as_job(bootstrapped: Path, folder: Path) -> tuple[MortalTrial, Outcome]:
    with closing(_Closed(Raylets(with_jobs=True))) as held:
        trial = MortalTrial(bootstrapped, folder, ON_RAY.format(address=json.dumps(held.raylets.job_server)))
        return trial, _judged(trial, lambda: job_driver(trial))


def _here(bootstrapped: Path, folder: Path, act: Callable[[MortalTrial], Outcome]) -> tuple[MortalTrial, Outcome]:
    trial = MortalTrial(bootstrapped, folder)
    return trial, _judged(trial, lambda: act(trial))


def _in_store(bootstrapped: Path, folder: Path) -> tuple[MortalTrial, Outcome]:
    with object_store() as (store, variables):
        trial = MortalTrial(bootstrapped, folder, environment=variables)
        into_store(trial, "s3://graceful/workspace")
        return trial, _judged(trial, lambda: store_away(trial, store))


_STATES: dict[str, dict[str, Any]] = {}


def _judged(trial: MortalTrial, act: Callable[[], Outcome]) -> Outcome:
    """Carry a kill out, and look for what it left; whoever is left is ended."""
    try:
        found = act()
        _STATES[trial.mark] = trial.end_state()
        return replace(found, orphans=tuple(trial.orphans()))
    finally:
        trial.end()


Kill = Callable[[Path, Path], tuple[MortalTrial, Outcome]]
KILLS: dict[str, Kill] = {
    "flow_server": partial(_here, act=flow_server),
    "update": partial(_here, act=update_itself),
    "run": partial(_here, act=child_of_the_runner),
    "service": partial(_here, act=service),
    **{name: partial(_on_raylets, act=partial(lost_node, node)) for name, node in NODES.items()},
    "head": partial(_on_raylets, act=head),
    "job_driver": _as_job,
    "folder": partial(_here, act=folder_away),
    "store": _in_store,
}


def kills(names: Sequence[str], folder: Path, store: Callable[[dict[str, Any]], None]) -> bool:
    """Each kill in a workspace of its own, beside one that is left alone; whether all of them ended as that one."""
    bootstrapped = bootstrap(folder)
    quiet = MortalTrial(bootstrapped, folder / "quiet")
    started = time.monotonic()
    if quiet.start().wait(600) != 0:
        raise RuntimeError(quiet.said()[-3000:])
    took, expected = time.monotonic() - started, quiet.end_state()
    are_good = True
    for name in names:
        try:
            trial, outcome = KILLS[name](bootstrapped, folder / name)
        except Exception:  # what one part does to an update is no reason not to try the others
            traceback.print_exc()
            are_good = False
            continue
        state = _STATES[trial.mark]
        outcome = replace(outcome, same=state == expected)
        print(f"{name}: {outcome}", flush=True)
        if not outcome.same:
            different = {key: (state[key], expected[key]) for key in expected if state[key] != expected[key]}
            print(f"{name}: {str(different)[:3000]}", file=sys.stderr, flush=True)
        are_good = are_good and outcome.same and not outcome.orphans
        store({name: {**asdict(outcome), "undisturbed_s": round(took, 1), "hardware": _HARDWARE, "date": _today()}})
    return are_good


_HARDWARE = f"{os.cpu_count()} x {processor()}"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def _store(found: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, **found}, indent=2, sort_keys=True) + "\n")


def main(given: Sequence[str]) -> int:
    """Kill, print a line each, and store what was found; exit code 1 where an end was another one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"which; by default all: {', '.join(KILLS)}")
    chosen = parser.parse_args(given).names or list(KILLS)
    if unknown := sorted(set(chosen) - set(KILLS)):
        parser.error(f"no such kill: {', '.join(unknown)}; choose from {', '.join(KILLS)}")
    with tempfile.TemporaryDirectory(prefix="graceful-kills-") as folder:
        return int(not kills(chosen, Path(folder), _store))
