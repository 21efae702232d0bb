"""What a look at the nodes of a cluster says, and where libraries' own words go; without a cluster."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graceful.flows.cli import app
from graceful.flows.commands import check_cluster
from graceful.flows.runtime import preflight
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.head import ClusterLostError
from graceful.flows.runtime.preflight import ClusterNotReadyError, NodeProof, code_digest, require_nodes
from graceful.flows.settings.config import ClusterConfig
from tests.flows import tiny

pytestmark = pytest.mark.timeout(120)

GOOD = {"code": "abc", "text": "x", "gpus": 2, "refused": ""}


@pytest.mark.parametrize(
    ("changes", "claimed", "words"),
    [
        ({"code": "other"}, 0, "expected this version of the code (abc), found another (other)"),
        ({"text": "", "refused": "PermissionError: no"}, 0, "expected to write at /srv, found PermissionError: no"),
        ({"gpus": 0}, 1, "expected the 1 GPUs that Ray counts there, found 0"),
    ],
)
def test_what_a_node_cannot_do_is_said_with_a_remedy(changes, claimed, words):
    assert preflight._problem(GOOD, "abc", 2, "/srv") is None
    problem = preflight._problem({**GOOD, **changes}, "abc", claimed, "/srv")
    assert problem is not None
    assert problem[0].startswith(words)
    assert problem[1]


def test_a_node_without_the_claimed_gpus_and_one_that_cannot_write_say_so(tmp_path):
    seen = preflight._look(str(tmp_path), "node", claimed=1)
    assert seen["code"] == code_digest()
    assert seen["gpus"] == preflight._look(str(tmp_path), "node", claimed=2)["gpus"]
    assert not preflight._read(str(tmp_path), {"node": preflight.read_json(str(tmp_path / "node.json"))})
    (tmp_path / "file").write_text("")
    refused = preflight._look(str(tmp_path / "file" / "below"), "node", claimed=0)
    assert refused["text"] == ""
    assert "Error" in refused["refused"]


def test_a_file_of_another_node_that_is_not_seen_or_is_another_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_SECONDS_TO_SEE", 0.0)
    written = preflight._look(str(tmp_path), "one", claimed=0)["text"]
    preflight._look(str(tmp_path), "two", claimed=0)
    assert preflight._read(str(tmp_path), {"one": written, "two": "another", "three": "x"}) == ["two", "three"]


def test_the_digest_is_that_of_the_code_wherever_it_lies(tmp_path):
    """As installed, or shipped to a node: one folder with the packages inside."""
    from graceful.flows.runtime.cluster import _staged_checkout

    package = Path(str(_staged_checkout()))
    script = "from graceful.flows.runtime.preflight import code_digest; print(code_digest())"
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = [{str(package.parent)!r}, *{sys.path!r}]; {script}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert found.stdout.strip() == code_digest(), found.stderr[-2000:]


def test_a_cluster_with_a_node_that_fails_is_refused_by_its_name(monkeypatch):
    proofs = [NodeProof("a"), NodeProof("b", "expected X, found Y", "do Z"), NodeProof("c", "worse", "more")]
    monkeypatch.setattr(preflight, "look_at_nodes", lambda *_: proofs)
    with pytest.raises(ClusterNotReadyError, match=r"node b: expected X, found Y; do Z \(and 1 more"):
        require_nodes(RaySession(ClusterConfig(address="auto")), "/srv", lambda _line: None)
    require_nodes(RaySession(ClusterConfig()), "/srv", lambda _line: None)  # local: nothing is asked


def test_check_says_every_node_and_what_keeps_it_from_asking(tmp_path, monkeypatch):
    root = tiny.new_workspace(tmp_path / "ws")
    asked = CliRunner().invoke(app, ["check", "--cluster", "--root", str(root)])
    assert "cluster: local" in asked.stdout
    tiny.write_config(root, root / "digits.parquet", {"cluster.address": "auto"})
    proofs = [NodeProof("one"), NodeProof("two", "expected X, found Y", "do Z")]
    monkeypatch.setattr(check_cluster, "look_at_nodes", lambda *_: proofs)
    asked = CliRunner().invoke(app, ["check", "--cluster", "--root", str(root)])
    assert asked.exit_code == 2
    assert "node one: proven" in asked.stdout
    assert "node two: expected X, found Y; do Z" in asked.stdout

    def lost(*_):
        raise ClusterLostError("joining the Ray cluster: expected one, found none; start it")

    monkeypatch.setattr(check_cluster, "look_at_nodes", lost)
    asked = CliRunner().invoke(app, ["check", "--cluster", "--root", str(root)])
    assert (asked.exit_code, "found none; start it" in asked.stdout) == (2, True)


NOISE = """
import os, subprocess, sys
from graceful.flows.runtime.environment import divert_libraries
print(divert_libraries(sys.argv[1]))
os.write(2, b"[state-dump] of a library\\n")
subprocess.run(["sh", "-c", "echo of its process >&2"])
print("graceful: one line", file=sys.stderr)
"""


def test_what_libraries_write_past_python_goes_to_the_log_and_lines_of_ours_do_not(tmp_path):
    log = tmp_path / ".prefect" / "libraries.log"
    log.parent.mkdir()
    log.write_bytes(b"x" * (17 * 2**20))
    ended = subprocess.run(
        [sys.executable, "-c", NOISE, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == str(log)
    assert ended.stderr == "graceful: one line\n"
    assert log.read_text() == "[state-dump] of a library\nof its process\n"
    assert log.with_suffix(".log.1").stat().st_size == 17 * 2**20
