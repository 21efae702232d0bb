"""`graceful serve --http`: the application behind uvicorn, until a signal comes."""

import logging
import os
import socket

import uvicorn

from graceful.errors import GracefulError
from graceful.flows.search.connections import allow_open_files, limited_by
from graceful.flows.search.guarding import Token, is_loopback
from graceful.flows.search.http import make_app
from graceful.flows.search.searcher import GallerySearcher, OpenSearcher
from graceful.flows.settings.config import load_endpoint_config
from graceful.flows.store.workspace import require_workspace

_BACKLOG = 2_048
# A server that ends waits so long for answers that are under way.
_SECONDS_TO_END = 5
# So long it waits for its index before it listens; then /health says that nothing serves yet.
_FIRST_LOOK_S = 2.0

_log = logging.getLogger("graceful.search")


class EndpointError(GracefulError):
    """The endpoint cannot listen where it is told to."""


def serve_searches(
    root: str, host: str, port: int, num_shards: int = 0, address: str = "local", token: Token | None = None
) -> None:
    """Answer searches over HTTP until interrupted.

    With `num_shards` the index lies in so many processes of a Ray cluster, which is started here, or is at `address`.
    """
    require_workspace(root)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    log_to_terminal()
    listener = _listener(host, port)
    port = listener.getsockname()[1]
    _log.info("searches of %s: POST http://%s:%d/search", root, host, port)
    if token is None and not is_loopback(host):
        _log.warning("no token: whoever reaches %s:%d may search", host, port)
    if not num_shards:
        _serve(root, listener, token, GallerySearcher)
        return
    from graceful.flows.search.sharded import open_sharded_searcher

    with open_sharded_searcher(num_shards, address) as open_searcher:
        _serve(root, listener, token, open_searcher)


def log_to_terminal() -> None:
    """One line with its time for whatever this process says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def _serve(root: str, listener: socket.socket, token: Token | None, open_searcher: OpenSearcher) -> None:
    config = load_endpoint_config(root)
    allow_open_files(config)
    app = make_app(root, open_searcher=open_searcher, config=config, token=token, first_look_s=_FIRST_LOOK_S)
    settings = uvicorn.Config(
        app,
        http=limited_by(config),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    # Not uvicorn.run, which takes the signal that ended the server for its own and returns.
    uvicorn.Server(settings).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens; before anything is loaded, so that a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise EndpointError(
            f"answering searches: {host}:{port} cannot be listened on ({error.strerror}); choose another --host or "
            "--port"
        ) from None
