"""`graceful deploy` against a real flow server: what is registered, what is refused, and a run by a real worker."""

import asyncio
import functools
import json
import subprocess
import sys

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from graceful.flows import deploying
from graceful.flows.deploying import DeploymentError
from graceful.flows.deployments import deployments
from graceful.flows.settings.config import load_workspace_config
from graceful.flows.store.events import Overridden
from graceful.flows.store.workspace import Workspace, open_workspace
from tests.flows import running, tiny

SCHEDULE = {"schedule": {"cron": "5 3 * * 1", "timezone": "Asia/Kathmandu"}}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_team_s_own_worker_carries_out_what_was_deployed(
    bootstrapped, digits_file, tmp_path, spawn, flow_server, command_environment
):
    ask = functools.partial(running.ask_server, flow_server["PREFECT_API_URL"])
    root = tiny.copy_workspace(bootstrapped, tmp_path / "workspace")
    tiny.write_config(root, digits_file, SCHEDULE)  # decided about before: the run finds nothing new
    ask("POST", "/work_pools/", {"name": "team", "type": "process"})

    def deploy(place, code, *further):
        log = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}"
        command = ["deploy", "--root", str(place), "--json", *further]
        process = spawn(running.command_in_child, command, "", str(log), flow_server)
        process.join(120)
        assert process.exitcode == code, log.read_text()
        text = log.read_text()
        return json.loads(text[text.index("{") : text.rindex("}") + 1])

    missing = deploy(root, 1, "--pool", "nowhere")["error"]
    assert "expected a work pool 'nowhere', found team" in missing
    first = deploy(root, 0, "--pool", "team")
    assert (first["deployment"], first["schedule"]) == ("graceful-update/tiny", "cron '5 3 * * 1'")
    assert deploy(root, 0, "--pool", "team")["id"] == first["id"], "the same deployment, changed"
    known = ask("GET", f"/deployments/{first['id']}")
    assert known["work_pool_name"] == "team"
    assert known["parameters"] == {"workspace": str(root)}
    assert known["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (schedule,) = known["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("5 3 * * 1", "Asia/Kathmandu")

    beside = {f"graceful-{kind}/tiny" for kind in ("backfill", "report")}
    assert set(first["beside"]) == beside, "no history to replay"
    for identity in first["beside"].values():
        found = ask("GET", f"/deployments/{identity}")
        assert (found["schedules"], found["parameters"]) == ([], {"workspace": str(root)})
    form = ask("GET", f"/deployments/{first['beside']['graceful-backfill/tiny']}")["parameter_openapi_schema"]
    assert set(form["required"]) == {"workspace", "generation", "reason"}
    assert "stands in the lineage" in form["properties"]["reason"]["description"]

    other = tiny.copy_workspace(root, tmp_path / "other")
    assert f"found that it is of {root}" in deploy(other, 1, "--pool", "team")["error"]
    second = deploy(other, 0, "--pool", "team", "--name", "second", "--no-schedule")
    assert (second["deployment"], second["schedule"]) == ("graceful-update/second", None)
    assert ask("GET", f"/deployments/{second['id']}")["schedules"] == []

    run = ask("POST", f"/deployments/{first['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "team", "--type", "process", "--run-once"]
    with (tmp_path / "worker.log").open("w+") as output:
        subprocess.run(
            worker, cwd=tmp_path, env={**command_environment, **flow_server}, stdout=output, stderr=output, timeout=250
        )
        output.seek(0)
        done = ask("GET", f"/flow_runs/{run}")
        assert (done["state_type"], done["state_name"]) == ("COMPLETED", "Nothing new"), output.read()[-3000:]


def test_deploying_without_a_server_is_refused_in_one_line(workspace_root, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(DeploymentError, match="found none; set it"):
        deploying.deploy_updates(str(workspace_root), "team")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(DeploymentError, match="found none that answers"):
        deploying.deploy_updates(str(workspace_root), "team")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_backfill_a_report_and_a_replay_are_runs_of_their_deployments(
    workspace_root, digits_file, tmp_path, spawn, flow_server, monkeypatch
):
    ask = functools.partial(running.ask_server, flow_server["PREFECT_API_URL"])
    strict = {**tiny.grown(5), "name": "strict", "policy.max_nfr": 1e-9, "policy.max_wave_zero_share": 0.0}
    tiny.write_config(workspace_root, digits_file, strict)
    held = running.update(workspace_root)
    assert held.outcome in ("HOLD", "INCONCLUSIVE")
    page = workspace_root / "evaluations" / held.evaluation.rpartition("/")[2] / "report.html"
    page.unlink()

    def run(root, kind, **parameters):
        """Start a run as the form does, and carry it out as a runner does; its last state, and what it leaves."""
        log = tmp_path / f"{kind}.log"
        begun = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        begun = ask("POST", f"/deployments/{deployed[root][kind]}/create_flow_run", begun)["id"]
        process = spawn(running.deployed_run_in_child, begun, str(log), flow_server, kind)
        process.join(120)
        done = ask("GET", f"/flow_runs/{begun}")
        assert done["state_type"] == "COMPLETED", log.read_text()[-3000:]
        return done

    history = tmp_path / "history"
    replayed = {"name": "history", "replay": {"grow_by": "label", "counts": [3]}}
    tiny.write_config(history, digits_file, replayed)
    Workspace(str(history)).create()
    for name, value in flow_server.items():
        monkeypatch.setenv(name, value)
    with temporary_settings({PREFECT_API_URL: flow_server["PREFECT_API_URL"]}):
        deployed = {root: asyncio.run(registered(root)) for root in (workspace_root, history)}

    done = run(workspace_root, "report")
    assert (done["state_name"], page.exists()) == (held.outcome, True)
    done = run(workspace_root, "backfill", generation=held.candidate[:4], reason="we want it", by="ann")
    assert (done["state_name"], sorted(done["tags"])) == ("FULL_BACKFILL", ["FULL_BACKFILL", "graceful"])
    workspace = open_workspace(str(workspace_root))
    assert workspace.registry.serving().champion == held.candidate
    (order,) = [event.payload for event in workspace.registry.events(Overridden)]
    assert "we want it" in str(order)
    done = run(history, "replay")
    assert done["state_name"] == "1 generations"
    assert open_workspace(str(history)).registry.serving().champion is not None


async def registered(root):
    """The ids of a workspace's deployments by the names of their flows' functions, without a pool."""
    config = load_workspace_config(str(root))
    wanted = await deployments(str(root), config, "a test", name=config.name, schedules=[])
    return {kind.removeprefix("graceful-"): await one.aapply() for kind, one in wanted.items()}
