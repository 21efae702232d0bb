"""The files for Kubernetes and Slurm, as far as they can be read without either."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from graceful.flows.settings.config import ClusterConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "cluster"

# The operator's types of ray.io/v1 (raycluster_types.go): field -> type; those that must be there.
SPEC = {
    "headGroupSpec": dict, "workerGroupSpecs": list, "rayVersion": str, "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict, "headServiceAnnotations": dict, "suspend": bool,
}  # fmt: skip
HEAD = {"serviceType": str, "headService": dict, "enableIngress": bool, "rayStartParams": dict, "template": dict}
WORKERS = {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int,
    "rayStartParams": dict, "template": dict, "scaleStrategy": dict,
}  # fmt: skip


def check(found: dict[str, Any], known: dict[str, type], required: set[str]) -> None:
    assert set(found) <= set(known)
    assert required <= set(found)
    for name, value in found.items():
        assert isinstance(value, known[name]), name


def check_pod(spec: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        assert {"name", "image", "resources"} <= set(container)
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_the_ray_cluster_has_the_operators_fields_and_this_rays_version():
    found = yaml.safe_load((FOLDER / "raycluster.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    spec = found["spec"]
    check(spec, SPEC, {"headGroupSpec"})
    assert spec["rayVersion"] == ray.__version__
    check(spec["headGroupSpec"], HEAD, {"rayStartParams", "template"})
    for group in spec["workerGroupSpecs"]:
        check(group, WORKERS, {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"})
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"]
    start = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(f"--{name}" in start for name in group["rayStartParams"])
        check_pod(group["template"]["spec"])
    (resources,) = [g["rayStartParams"]["resources"] for g in spec["workerGroupSpecs"] if g["groupName"] == "embedders"]
    assert json.loads(json.loads(resources)) == {"spot": 4}  # quoted once for the shell


def test_the_update_job_names_a_command_that_exists():
    found = yaml.safe_load((FOLDER / "update.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("batch/v1", "Job")
    pod = found["spec"]["template"]["spec"]
    check_pod(pod)
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > 10
    assert pod["containers"][0]["command"][:2] == ["graceful", "update"]


def test_the_batch_script_is_shell():
    script = FOLDER / "update.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    options = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), flags=re.MULTILINE)
    assert {"nodes", "time", "signal", "requeue"} <= set(options)
    assert script.read_text().index("#SBATCH --requeue") < script.read_text().index("set -euo")


@pytest.mark.parametrize("page", ["kuberay.md", "slurm.md"])
def test_the_configuration_on_a_page_is_accepted(page):
    (block,) = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "howto" / page).read_text(), re.DOTALL | re.MULTILINE)
    ClusterConfig.model_validate(tomllib.loads(block)["cluster"])
