"""`graceful check --cluster`: every node proves that it can work on the workspace. Loads Ray."""

from graceful.errors import GracefulError
from graceful.flows.commands.check import Finding
from graceful.flows.runtime.cluster import RaySession
from graceful.flows.runtime.preflight import look_at_nodes
from graceful.flows.settings.config import load_workspace_config


def check_nodes(root: str) -> list[Finding]:
    """Findings about the nodes of the workspace's cluster, one for each."""
    cluster = load_workspace_config(root).cluster
    if cluster.address == "local":
        return [Finding("ok", "cluster: local, which starts with the update on this machine; there are no other nodes")]
    try:
        with RaySession(cluster) as session:
            proofs = look_at_nodes(session, root, lambda _line: None)
    except GracefulError as error:
        what, _, remedy = str(error).rpartition("; ")
        return [Finding("error", f"cluster: {what or remedy}", remedy if what else "")]
    return [
        Finding("error" if proof.problem else "ok", f"node {proof.node}: {proof.problem or 'proven'}", proof.remedy)
        for proof in proofs
    ]
