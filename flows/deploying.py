"""`graceful deploy`: a workspace's updates, and what is beside them, as deployments of a server that a team has.

Its workers carry the runs out, so nothing of ours has to run there: the deployment names the flow by its module, which
the workers have installed, and the workspace, which they must reach.
"""

import asyncio
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from graceful.errors import GracefulError
from graceful.flows.deployments import UPDATE, deployments
from graceful.flows.schedule import schedule_of

if TYPE_CHECKING:
    from graceful.flows.settings.config import PipelineConfig


class DeploymentError(GracefulError):
    """The updates of a workspace cannot be deployed."""


def deploy_updates(root: str, pool: str, *, name: str | None = None, scheduled: bool = True) -> dict[str, Any]:
    """Register the updates of a workspace with the server of PREFECT_API_URL; called again, it changes what is there.

    Args:
        root: Workspace, as the workers reach it.
        pool: Work pool whose workers carry the runs out.
        name: Name of the deployment; by default that of the pipeline.
        scheduled: Whether the schedule of the configuration starts runs.

    Returns:
        Name, id and page of the deployment of the updates, its schedule, and the ids of those `beside` it by name.

    Raises:
        DeploymentError: there is no server or no such pool, or another workspace has a deployment of this name.
    """
    from graceful.flows.settings.config import load_workspace_config
    from graceful.flows.store.workspace import require_workspace

    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise DeploymentError(
            "deploying updates: expected the address of your Prefect server in PREFECT_API_URL, found none; set it, or "
            "run 'graceful serve', which brings a server"
        )
    require_workspace(root)
    config = load_workspace_config(root)
    _refuse_silence(address)
    return asyncio.run(_deploy(root, config, pool, name or config.name, scheduled))


async def _deploy(root: str, config: "PipelineConfig", pool: str, name: str, scheduled: bool) -> dict[str, Any]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    async with get_client() as client:
        try:
            await client.read_work_pool(pool)
        except ObjectNotFound:
            pools = ", ".join(sorted(found.name for found in await client.read_work_pools())) or "none"
            raise DeploymentError(
                f"deploying updates: expected a work pool {pool!r}, found {pools}; run 'prefect work-pool create "
                f"{pool} --type process', or name another"
            ) from None
        await _refuse_foreign(client, root, name)
    schedules = [schedule_of(config.schedule)] if scheduled else []
    wanted = await deployments(root, config, "graceful deploy", name=name, schedules=schedules, pool=pool)
    known = {kind: str(await deployment.aapply()) for kind, deployment in wanted.items()}
    identity = known.pop(UPDATE)
    page = os.environ["PREFECT_API_URL"].removesuffix("/api")
    return {
        "deployment": f"{UPDATE}/{name}",
        "id": identity,
        "beside": {f"{kind}/{name}": other for kind, other in known.items()},
        "pool": pool,
        "schedule": config.schedule.in_words if scheduled else None,
        "page": f"{page}/deployments/deployment/{identity}",
    }


def _refuse_silence(address: str) -> None:
    """Raise DeploymentError where no server answers, before a client asks it again and again."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=20):
            return
    except urllib.error.HTTPError:
        return  # it answers, if only that somebody has to say who they are
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"deploying updates: expected a Prefect server at {address}, found none that answers ({error}); start it, "
            "or correct PREFECT_API_URL"
        ) from None


async def _refuse_foreign(client: Any, root: str, name: str) -> None:
    """Several pipelines share a server; two of one name would take each other's place."""
    from prefect.exceptions import ObjectNotFound

    try:
        known = await client.read_deployment_by_name(f"{UPDATE}/{name}")
    except ObjectNotFound:
        return
    other = known.parameters.get("workspace")
    if other != root:
        raise DeploymentError(
            f"deploying updates: expected {UPDATE}/{name} to be of this workspace, found that it is of {other}; give "
            "another --name, or another name in the configuration"
        )
