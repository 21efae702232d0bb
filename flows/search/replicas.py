"""The same application on Ray Serve: replicas in processes of their own, on one machine or on a cluster.

Every replica follows the workspace by itself, so that for a moment after a move two may serve two states; an answer
comes from one replica, and whole from the snapshot that it names. Ray's proxy holds the connections: limits on bodies,
time, pixels and on what waits are those of each replica, the limit on connections is the proxy's.
"""

import logging
import threading
from typing import Any

from graceful.flows.runtime.cluster import RaySession
from graceful.flows.search.guarding import Token
from graceful.flows.search.http import make_app
from graceful.flows.search.serving import EndpointError, log_to_terminal
from graceful.flows.settings.config import ClusterConfig, load_endpoint_config
from graceful.flows.settings.endpoint import EndpointConfig
from graceful.flows.store.workspace import require_workspace

APPLICATION = "graceful-search"
DEPLOYMENT = "search"

_SECONDS_TO_END = 3.0

_log = logging.getLogger("graceful.search")


def serve_replicas(
    root: str, host: str, port: int, num_replicas: int, address: str = "local", token: Token | None = None
) -> None:
    """Answer searches with so many replicas until interrupted.

    Raises:
        EndpointError: Ray Serve is not installed.
    """
    require_workspace(root)
    config = load_endpoint_config(root)
    _ray_serve()
    log_to_terminal()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with RaySession(ClusterConfig(address=address, num_workers=num_replicas)) as session:
        session.ensure()
        start_replicas(root, host, port, num_replicas, config, token)
        _log.info("searches of %s by %d replicas: POST http://%s:%d/search", root, num_replicas, host, port)
        try:
            threading.Event().wait()
        finally:
            _stop()


def start_replicas(
    root: str, host: str, port: int, num_replicas: int, config: EndpointConfig, token: Token | None = None
) -> None:
    """Run the application on the cluster that this process is connected to; returns when all replicas answer.

    Raises:
        EndpointError: Ray Serve is not installed.
    """
    serve = _ray_serve()

    def application() -> Any:
        return make_app(root, config=config, token=token)

    # All that one replica may have waiting reaches it: it refuses what is too much itself, with 429.
    at_a_time = 2 * (config.max_waiting + config.batch_searches) + 1
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        max_ongoing_requests=at_a_time,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=_SECONDS_TO_END,
        graceful_shutdown_wait_loop_s=0.5,
    )(serve.ingress(application)())
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    serve.run(deployment.bind(), name=APPLICATION, route_prefix="/")


def _stop() -> None:
    """End the application; another that Ray Serve runs on a cluster that was joined goes on."""
    serve = _ray_serve()
    # Its own wait has no end where the signal has ended Ray's processes too.
    ending = threading.Thread(target=serve.delete, args=(APPLICATION,), daemon=True, name="search-ending")
    ending.start()
    ending.join(_SECONDS_TO_END)


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise EndpointError(
            f"starting replicas: expected Ray Serve, found none of {error.name}; pip install 'graceful[serve]'"
        ) from None
    return serve
