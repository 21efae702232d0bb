"""The search endpoint under many clients: 100 that send images while a probe asks for its health, 16 that send vectors.

`python -m benchmarks search_load` compares answering together with answering one by one (endpoint.batch_searches = 1).
`python -m benchmarks.search_load --before COMMIT` compares with the endpoint of another commit in the same run, the two
in turn, and stores what was seen in benchmarks/results-search-load.json.

The encoder is a real one (the small CNN, untrained), images are JPEGs of 320 x 240 noise; server, clients and probe are
processes of their own on the same cores. A client that is told to come again (429) does, and that is counted apart.
A second probe asks a bare server that does nothing: what it waits for, the machine makes everybody wait for.
"""

import argparse
import asyncio
import contextlib
import datetime
import http.client
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Ratio, processor, ratio_of

NUM_ITEMS, WIDTH, IMAGE_SIZE = 20_000, 128, 64
IMAGE_CLIENTS, VECTOR_CLIENTS, SECONDS, PAIRS = 100, 16, 10.0, 3
HEALTH_S, PROBE_EVERY_S = 0.1, 0.02
PORTS = (8_951, 8_952)
BARE_PORT = 8_953
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results-search-load.json"
PACKAGES = ("training", "indexing", "evaluation", "flows")


def search_load() -> list[Ratio]:
    """Health under 100 image clients against 100 ms, and vectors answered together against one by one."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = measured(folder, {"one by one": (None, {"batch_searches": 1}), "together": (None, {})})
    images = [one for rounds_of in rounds.values() for one in rounds_of["images"]]
    worst = max(one["health_p99_s"] for one in images)
    bare = max(one["bare_p99_s"] for one in images)
    failed = sum(one["failed"] for one in images)
    pairs = zip(rounds["one by one"]["vectors"], rounds["together"]["vectors"], strict=True)
    vectors = ratio_of(
        "search_load_vectors",
        [(1 / alone["per_second"], 1 / together["per_second"]) for alone, together in pairs],
        at_least=1.0,
        invert=True,
        note=f"searches a second by {VECTOR_CLIENTS} clients, answered together / one by one; {NUM_ITEMS:,} x {WIDTH}",
    )
    health = Ratio(
        name="search_load_health",
        ratio=round(worst / HEALTH_S, 3),
        lowest=round(min(one["health_p99_s"] for one in images) / HEALTH_S, 3),
        highest=round(worst / HEALTH_S, 3),
        num_pairs=len(images),
        target="<= 1.0",
        meets_target=worst <= HEALTH_S and not failed,
        baseline_s=HEALTH_S,
        candidate_s=round(worst, 4),
        note=f"99th percentile of /health under {IMAGE_CLIENTS} image clients / 100 ms, worst of {len(images)} runs; "
        f"{sum(one['answered'] for one in images):,} images answered, {failed} failed, "
        f"{sum(one['busy'] for one in images):,} told to come again; a bare server beside it {bare * 1e3:.0f} ms, load "
        f"{os.getloadavg()[0]:.0f}",
    )
    return [vectors, health]


Variant = tuple[str | None, dict[str, Any]]
"""A folder with the package of another commit, or None for this one; and the endpoint's settings."""


def measured(folder: str, variants: dict[str, Variant]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What was seen of each variant, by kind, round by round; the variants take turns on one machine."""
    root = os.path.join(folder, "ws")
    oldest = next((package for package, _ in variants.values() if package is not None), None)
    subprocess.run([*_python("build", root)], env=_environment(oldest), cwd=folder, check=True)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"vectors": [], "images": []} for name in variants}
    with contextlib.ExitStack() as servers:
        ports = {}
        servers.enter_context(_bare_server())
        for port, (name, (package, settings)) in zip(PORTS, variants.items(), strict=True):
            servers.enter_context(_server(folder, root, port, package, settings))
            ports[name] = port
        width_query = json.dumps({"vector": np.random.default_rng(0).standard_normal(WIDTH).tolist(), "k": 10}).encode()
        vector = _request("application/json", width_query)
        image = _request("image/jpeg", _jpeg(0))
        for number in range(PAIRS):
            for name in list(variants) if number % 2 == 0 else list(variants)[::-1]:
                for kind, request, clients in (("vectors", vector, VECTOR_CLIENTS), ("images", image, IMAGE_CLIENTS)):
                    found[name][kind].append(_load(ports[name], request, clients))
                    print(f"{name}, {kind}: {found[name][kind][-1]}", flush=True)
    return found


def _load(port: int, request: bytes, num_clients: int) -> dict[str, Any]:
    """What so many clients see who ask without a pause, and what a probe of the health sees meanwhile."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        probe, bare = (pool.apply_async(_probe, (one, SECONDS)) for one in (port, BARE_PORT))
        latencies, busy, failed = pool.apply(_ask, (port, request, num_clients, SECONDS))
        probes, bare_probes = probe.get(), bare.get()
    return {
        "per_second": round(len(latencies) / SECONDS, 1),
        "p50_s": round(float(np.median(latencies)), 4),
        "p99_s": round(float(np.percentile(latencies, 99)), 4),
        "answered": len(latencies),
        "busy": busy,
        "failed": failed,
        "health_p50_s": round(float(np.median(probes)), 4),
        "health_p99_s": round(float(np.percentile(probes, 99)), 4),
        "health_max_s": round(max(probes), 4),
        "bare_p99_s": round(float(np.percentile(bare_probes, 99)), 4),
        "probes": len(probes),
    }


def _ask(port: int, request: bytes, num_clients: int, seconds: float) -> tuple[list[float], int, int]:
    latencies: list[float] = []
    counts = {"busy": 0, "failed": 0}

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            try:
                writer.write(request)
                status = await _status(reader)
            except (OSError, EOFError):
                counts["failed"] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                started = time.perf_counter()
                continue
            if status == 429:  # asked again, and its time goes on
                counts["busy"] += 1
                await asyncio.sleep(1)
                continue
            if status != 200:
                counts["failed"] += 1
            else:
                latencies.append(time.perf_counter() - started)
            started = time.perf_counter()
        writer.close()

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(num_clients)))

    begun = time.perf_counter()
    asyncio.run(clients())
    return latencies, counts["busy"], counts["failed"]


async def _status(reader: asyncio.StreamReader) -> int:
    """Read one answer whole; its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])


def _probe(port: int, seconds: float) -> list[float]:
    """Seconds of /health, each time by a connection of its own, as a kubelet asks; one that fails counts as ten."""
    begun, found = time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                connection.request("GET", "/health")
                connection.getresponse().read()
            found.append(time.perf_counter() - started)
        except OSError:
            found.append(10.0)
        time.sleep(PROBE_EVERY_S)
    return found


@contextlib.contextmanager
def _bare_server() -> Iterator[None]:
    server = multiprocessing.get_context("spawn").Process(target=_answer_nothing, daemon=True)
    server.start()
    try:
        yield
    finally:
        server.kill()
        server.join()


def _answer_nothing() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", BARE_PORT) as server:
            await server.serve_forever()

    asyncio.run(serve())


@contextlib.contextmanager
def _server(folder: str, root: str, port: int, package: str | None, settings: dict[str, Any]) -> Iterator[None]:
    is_before = str(int(package is not None))
    command = _python("serve", root, str(port), is_before, json.dumps(settings))
    server = subprocess.Popen(command, env=_environment(package), cwd=folder)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.2)
        yield
    finally:
        server.kill()
        server.wait()


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "benchmarks.search_load", *arguments]


def _environment(package: str | None) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    if package is not None:
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join([package, str(ROOT)])}
    return {**os.environ, **threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}  # as the command sets it


def _serve(root: str, port: int, is_before: bool, settings: dict[str, Any]) -> None:
    """The endpoint as it is started by the command line of its commit."""
    import uvicorn

    from graceful.flows.search.http import make_app

    if is_before:
        uvicorn.run(make_app(root), host="127.0.0.1", port=port, log_level="warning", access_log=False)
        return
    from graceful.flows.search.connections import limited_by
    from graceful.flows.settings.endpoint import EndpointConfig

    config = EndpointConfig(**settings)
    app = make_app(root, config=config)
    uvicorn.run(app, port=port, http=limited_by(config), log_level="warning", access_log=False)


def _build(root: str) -> None:
    """A workspace whose gallery is random vectors of an untrained encoder."""
    import pyarrow as pa
    import torch

    from graceful.flows.store.workspace import Workspace
    from graceful.indexing.embedding_files import write_embedding_file
    from graceful.training.backbones import build_backbone
    from graceful.training.encoder import save_generation
    from graceful.training.generation import BackboneSpec, Preprocessing

    torch.manual_seed(0)
    workspace = Workspace(root, create=True)
    spec = BackboneSpec(name="small_cnn")
    preprocessing = Preprocessing(image_size=IMAGE_SIZE, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    network = build_backbone(spec, WIDTH, 3, IMAGE_SIZE)
    place = os.path.dirname(workspace.generation_uri("g001-000000"))
    _, card = save_generation(place, network, ordinal=1, backbone=spec, preprocessing=preprocessing, width=WIDTH)
    generation = card.generation_id
    names = [f"item-{number:07d}" for number in range(NUM_ITEMS)]
    columns = {"item_id": names, "source": names, "content_sha256": names, "label": [""] * NUM_ITEMS}
    result = workspace.gallery.ingest(pa.table({**columns, "attributes": ["{}"] * NUM_ITEMS}))
    vectors = np.random.default_rng(0).standard_normal((NUM_ITEMS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    staged = workspace.gallery.staging_file(generation, "unit")
    write_embedding_file(staged, pa.table({"revision": result.revisions}), vectors)
    workspace.gallery.commit_vectors(generation, "unit")
    workspace.registry.certify([(generation, generation)], reason="benchmark")
    workspace.registry.move_serving(workspace.registry.serving(), champion=generation, moved_by="benchmark")


def _request(kind: str, body: bytes) -> bytes:
    head = f"POST /search HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _jpeg(seed: int) -> bytes:
    from PIL import Image

    rough = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((320, 240)).save(buffer, "JPEG")
    return buffer.getvalue()


def _staged(commit: str, folder: str) -> str:
    """The package of a commit as one folder."""
    archive = subprocess.run(
        ["git", "archive", commit, "graceful", *PACKAGES], cwd=ROOT, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    for name in PACKAGES:
        os.rename(os.path.join(folder, name), os.path.join(folder, "graceful", name))
    return folder


def main(arguments: list[str]) -> None:
    """Compare with another commit; the other words are for the processes that this one starts."""
    if arguments[0] == "build":
        _build(arguments[1])
        return
    if arguments[0] == "serve":
        _serve(arguments[1], int(arguments[2]), arguments[3] == "1", json.loads(arguments[4]))
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_load", description=__doc__)
    parser.add_argument("--before", required=True, help="Commit to compare with.")
    commit = parser.parse_args(arguments).before
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(package := os.path.join(folder, "before"))
        found = measured(folder, {"before": (_staged(commit, package), {}), "after": (None, {})})
    stored = {
        "before": commit,
        "seconds": SECONDS,
        "clients": {"images": IMAGE_CLIENTS, "vectors": VECTOR_CLIENTS},
        "gallery": [NUM_ITEMS, WIDTH],
        "rounds": found,
        "load_average": os.getloadavg()[0],
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
