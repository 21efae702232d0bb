"""Tells others what happened to a workspace: as an event of the flow server, and posted to a webhook.

Never a dependency: what cannot be delivered after a few tries is given up, and said in the log. An update that was
killed and goes on may tell the same thing again; `id` is the same then.
"""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from graceful.errors import GracefulError
from graceful.flows.runtime.environment import running_server
from graceful.flows.settings.config import load_notify_config
from graceful.flows.settings.notify import NotifyConfig

Kind = Literal["decision", "hold", "awaiting_approval", "rollback", "stuck", "unreadable", "canary", "encoder"]
TRIES = 3
_SECONDS_BETWEEN_TRIES = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """One thing that happened. `key`: what makes it the same thing when it is told again."""

    kind: Kind
    summary: str
    key: str
    generation: str | None = None
    details: dict[str, Any] | None = None


def tell(root: str, pipeline: str, config: NotifyConfig, notice: Notice) -> list[str]:
    """Deliver a notice; returns what was given up, in words, after at most as long as the tries take together."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, f"graceful/{root}/{notice.kind}/{notice.key}"))
    document = {
        "id": identity,
        "event": f"graceful.{notice.kind}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "pipeline": pipeline,
        "workspace": root,
        "generation": notice.generation,
        "summary": notice.summary,
        **(notice.details or {}),
    }
    deliveries: list[tuple[str, Callable[[], None]]] = []
    if config.webhook:
        url = config.webhook
        deliveries.append((f"the webhook at {_host(url)}", lambda: _post(url, document, config.timeout_s)))
    server = os.environ.get("PREFECT_API_URL") or (None if "://" in root else running_server(root))
    if server:
        events = f"{server.rstrip('/')}/events"
        deliveries.append(("the flow server", lambda: _post(events, [_event(document)], config.timeout_s)))
    given_up: list[str] = []
    threads = [threading.Thread(target=_deliver, args=(*one, given_up), daemon=True) for one in deliveries]
    for thread in threads:
        thread.start()
    # A server that sends one byte now and then keeps a connection open for ever: that is not waited for.
    deadline = time.monotonic() + TRIES * (config.timeout_s + _SECONDS_BETWEEN_TRIES)
    for (name, _), thread in zip(deliveries, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            given_up.append(f"{name} did not answer in time")
    for line in given_up:
        logger.warning("%s was not told (%s): %s", notice.kind, identity, line)
    return given_up


def tell_of(root: str, notice: Notice) -> None:
    """Deliver a notice as a workspace's configuration says; one that cannot be read stops nothing."""
    try:
        tell(root, *load_notify_config(root), notice)
    except GracefulError as error:
        logger.warning("%s was not told: %s", notice.kind, error)


def _deliver(name: str, post: Callable[[], None], given_up: list[str]) -> None:
    for attempt in range(TRIES):
        try:
            post()
        except Exception as error:
            if attempt == TRIES - 1:
                # The address may hold a secret: it is not said.
                status = f" {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
                given_up.append(f"{name} did not take it ({type(error).__name__}{status})")
            else:
                time.sleep(_SECONDS_BETWEEN_TRIES)
        else:
            return


def _post(url: str, document: Any, timeout_s: float) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "graceful"}
    request = urllib.request.Request(url, json.dumps(document, default=str).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=timeout_s) as answered:
        answered.read(1)


def _event(document: dict[str, Any]) -> dict[str, Any]:
    """The same as an event of the flow server, which automations can act on."""
    name = f"graceful.pipeline.{document['pipeline']}"
    return {
        "id": str(uuid.uuid4()),
        "occurred": document["at"],
        "event": document["event"],
        "resource": {"prefect.resource.id": name, "prefect.resource.name": document["pipeline"]},
        "payload": document,
    }


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or "an address that cannot be read"
