"""`graceful deploy` against a real flow server: what is registered, what is refused, and a run by a real worker."""

import functools
import json
import subprocess
import sys

import pytest

from graceful.flows import deploying
from graceful.flows.deploying import DeploymentError
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
