"""Proves a cluster before work goes to it: every node runs this code, shares the workspace, and has the GPUs it claims.

Each node writes a file below the workspace, then reads those of all others: storage that only looks shared is found
before a training, not by it. Every wait is bounded, and whatever fails is said of a node by its name.
"""

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graceful import files
from graceful.errors import GracefulError
from graceful.files import join, list_files, read_json, resolve, write_json
from graceful.flows.runtime.cluster import PACKAGES, RaySession
from graceful.flows.runtime.jobs import run_job

SECONDS_TO_ANSWER = 180.0
_SECONDS_TO_SEE = 10.0  # storage of several clients may show a new file late
_FOLDER = "preflight"


class ClusterNotReadyError(GracefulError):
    """A node cannot do what an update needs of it."""


@dataclass(frozen=True)
class NodeProof:
    """What was found of a node; `problem` and `remedy` are empty where it can do its work."""

    node: str
    problem: str = ""
    remedy: str = ""


def require_nodes(session: RaySession, root: str, say: Callable[[str], None]) -> None:
    """Raise ClusterNotReadyError unless every node of the cluster can work on a workspace; a local one can."""
    if session.config.address == "local":
        return
    found = look_at_nodes(session, root, say)
    failed = [proof for proof in found if proof.problem]
    if failed:
        more = f" (and {len(failed) - 1} more nodes: run 'graceful check --cluster')" if len(failed) > 1 else ""
        raise ClusterNotReadyError(f"node {failed[0].node}: {failed[0].problem}; {failed[0].remedy}{more}")


def look_at_nodes(session: RaySession, root: str, say: Callable[[str], None]) -> list[NodeProof]:
    """Join the cluster, or submit a job to it, and look at every node.

    Raises: ClusterLostError, JobFailedError.
    """
    if not session.submits_jobs:
        session.ensure()
        return [NodeProof(**found) for found in prove_nodes(root, code_digest())]
    specification = {"shared": root, "code": code_digest(), "at": time.time()}  # a new look every time
    result = run_job(
        session.config,
        join(root, "jobs"),
        "preflight",
        specification,
        lambda _found: False,
        lambda: None,
        say,
    )
    return [NodeProof(**found) for found in result["nodes"]]


def prove_nodes(shared: str, code: str) -> list[dict[str, str]]:
    """Look at every node of the cluster that this process has joined; fields of `NodeProof`."""
    nodes = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
    names = {key: str(node["NodeManagerHostname"]) for key, node in nodes.items()}
    if len(set(names.values())) < len(names):  # several on one machine
        names = {key: f"{name} ({key[:8]})" for key, name in names.items()}
    folder = join(shared, _FOLDER, uuid.uuid4().hex[:12])
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    wrong: dict[str, tuple[str, str]] = {}
    try:
        mine = uuid.uuid4().hex
        write_json(join(folder, "driver.json"), mine)
        claimed = {key: int(node["Resources"].get("GPU", 0)) for key, node in nodes.items()}
        looks = {key: (_look, (folder, key, claimed[key])) for key in nodes}
        told = _ask(looks, deadline, wrong)
        for key, answer in told.items():
            problem = _problem(answer, code, claimed[key], shared)
            if problem is not None:
                wrong[key] = problem
        texts = {"driver": mine, **{key: str(answer["text"]) for key, answer in told.items() if answer["text"]}}
        reads = {key: (_read, (folder, texts)) for key in told if key not in wrong}
        for key, unseen in _ask(reads, deadline, wrong).items():
            if unseen:
                who = "this process" if unseen[0] == "driver" else names[unseen[0]]
                wrong[key] = (
                    f"expected to read at {shared} what every node wrote, found nothing of {who}",
                    "mount the same storage at the same path on every node",
                )
        if (seen := _read(folder, texts)) and (key := seen[0]) not in wrong:
            wrong[key] = (
                f"expected what it wrote at {shared} to be read here, found nothing",
                "mount the same storage at the same path on every node",
            )
    finally:
        if list_files(folder):
            file_system, path = resolve(folder)
            file_system.delete_dir(path)
    return [
        {"node": names[key], "problem": wrong.get(key, ("", ""))[0], "remedy": wrong.get(key, ("", ""))[1]}
        for key in sorted(nodes, key=names.__getitem__)
    ]


def code_digest() -> str:
    """Digest of this code, wherever it is installed."""
    package = Path(files.__file__).parent
    folders = [package, *(package.parent / name for name in PACKAGES)]
    if not folders[1].is_dir():  # installed: the packages lie inside
        folders = [package, *(package / name for name in PACKAGES)]
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        depth = "*.py" if number == 0 else "**/*.py"
        for file in sorted(folder.glob(depth)):
            digest.update(f"{number}/{file.relative_to(folder).as_posix()}".encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _problem(answer: Mapping[str, Any], code: str, claimed: int, shared: str) -> tuple[str, str] | None:
    if answer["code"] != code:
        return (
            f"expected this version of the code ({code}), found another ({answer['code']})",
            "install the same version on every node",
        )
    if not answer["text"]:
        return (
            f"expected to write at {shared}, found {answer['refused']}",
            "mount the workspace's storage there, writable, on every node",
        )
    if answer["gpus"] < claimed:
        return (
            f"expected the {claimed} GPUs that Ray counts there, found {answer['gpus']} that PyTorch can use",
            "mend the driver, or install a PyTorch for it, or start the node with --num-gpus=0",
        )
    return None


def _ask(
    tasks: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
    deadline: float,
    wrong: dict[str, tuple[str, str]],
) -> dict[str, Any]:
    """Call a function on each node; what does not come back is entered in `wrong`."""
    answers = {}
    for key, (function, arguments) in tasks.items():
        remote: Any = ray.remote(function)
        strategy = NodeAffinitySchedulingStrategy(key, soft=False)
        # Ray hides the GPUs from what asks for none, unless told otherwise.
        environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
        chosen = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy, runtime_env=environment)
        answers[chosen.remote(*arguments)] = key
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=max(0.0, deadline - time.monotonic()))
    found: dict[str, Any] = {}
    for answer in ready:
        try:
            found[answers[answer]] = ray.get(answer, timeout=10)
        except (ray.exceptions.RayError, ImportError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            wrong[answers[answer]] = (
                f"expected it to run this code, found {type(error).__name__}: {lines[-1] if lines else ''}",
                "install graceful and what it needs on every node, in the environment that Ray was started with",
            )
    for answer in late:
        ray.cancel(answer, force=True)
        wrong[answers[answer]] = (
            f"expected an answer within {SECONDS_TO_ANSWER:g} s, found none",
            "look at 'ray status' and at the node, or take it out of the cluster",
        )
    return found


def _look(folder: str, key: str, claimed: int) -> dict[str, Any]:
    """On a node: what it runs, whether it can write, how many GPUs PyTorch sees where some are claimed."""
    answer: dict[str, Any] = {"code": code_digest(), "text": uuid.uuid4().hex, "gpus": 0, "refused": ""}
    try:
        write_json(join(folder, f"{key}.json"), answer["text"])
    except OSError as error:
        answer |= {"text": "", "refused": f"{type(error).__name__}: {error}"}
    if claimed:
        from graceful.training.encoder import usable_gpus

        answer["gpus"] = usable_gpus()
    return answer


def _read(folder: str, texts: Mapping[str, str]) -> list[str]:
    """Whose file is not there, or another."""
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while True:
        unseen = [key for key, text in texts.items() if not _holds(join(folder, f"{key}.json"), text)]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.5)


def _holds(place: str, text: str) -> bool:
    try:
        return bool(read_json(place) == text)
    except (OSError, ValueError):
        return False
