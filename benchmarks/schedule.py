"""A schedule of every minute with updates of three: `python -m benchmarks schedule`, half an hour by default.

`graceful serve` works for real; the encoder sleeps, so that an update takes time and no processor, and the seed is
raised after each, so that every run that is carried out has something to train. Every few seconds the flow server is
asked which runs are due and wait: there must never be more than one.
"""

import argparse
import datetime
import json
import os
import signal
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import processor
from benchmarks.world import HERE_ALONE, ROOT, Trial, bootstrap, free_port, until

RESULTS = Path(__file__).parent / "results-schedule.json"
_LOOK_S = 5.0
_STEPS = 150  # fifty epochs of 150 images in batches of 64


class SlowEncoder(torch.nn.Module):
    """A linear encoder that sleeps at every training step."""

    def __init__(self, width: int, channels: int, image_size: int, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.layer = torch.nn.Linear(channels * image_size**2, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings (n, width) of images (n, channels, image_size, image_size)."""
        if self.training:
            time.sleep(self.seconds)
        embedded: torch.Tensor = self.layer(images.flatten(1))
        return embedded


def schedule(minutes: float, update_s: float, cron: str) -> dict[str, Any]:
    """Serve a workspace for so long; what was waiting, and what became of the runs."""
    with tempfile.TemporaryDirectory(prefix="graceful-schedule-") as temporary:
        bootstrapped = bootstrap(Path(temporary))
        folder = Path(temporary, "served")
        folder.mkdir()
        trial = Trial(bootstrapped, folder, HERE_ALONE, {"PYTHONPATH": str(ROOT)})
        configuration = trial.root / "graceful.toml"
        text = configuration.read_text()
        slow = f'name = "benchmarks.schedule:SlowEncoder", kwargs = {{ seconds = {update_s / _STEPS:g} }}'
        small = 'name = "small_cnn", kwargs = { block_widths = [8, 16] }'
        text = text.replace(small, slow).replace("every_minutes = 1", f'cron = "{cron}"')
        text = text.replace("epochs = 600", 'epochs = 50\nstart = "scratch"\ninterpolation = 0.0')
        configuration.write_text(text)
        port = free_port()
        service = trial.start("serve", "--ui-port", str(port))
        until(lambda: "Next update of" in trial.log.read_text(errors="replace"), "the service")
        most, looks, seed, trained = 0, 0, 0, 1
        ends = time.monotonic() + 60 * minutes
        while time.monotonic() < ends and service.poll() is None:
            runs = _ask(port, {"flow_runs": {"state": {"name": {"any_": ["Late", "AwaitingConcurrencySlot"]}}}})
            now = datetime.datetime.now(datetime.UTC)
            waiting = [run for run in runs if datetime.datetime.fromisoformat(run["expected_start_time"]) <= now]
            most, looks = max(most, len(waiting)), looks + 1
            generations = len(list(trial.root.glob("evaluations/*/decision.json")))
            if generations > trained:  # decided: something new for the next run
                trained, seed = generations, seed + 1
                configuration.write_text(text.replace("[training]", f"[training]\nseed = {seed}"))
            time.sleep(_LOOK_S)
        states = Counter(run["state_name"].split(":")[0] for run in _ask(port, {}) if run["state_name"] != "Scheduled")
        service.send_signal(signal.SIGTERM)
        code = service.wait(60)
    return {
        "minutes": minutes, "update_s": update_s, "cron": cron, "looks": looks, "most_waiting": most,
        "updates": trained - 1, "states": dict(sorted(states.items())), "ended_with": code,
        "hardware": f"{os.cpu_count()} x {processor()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def _ask(port: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/flow_runs/filter",
        data=json.dumps({**body, "limit": 200}).encode(),
        headers={"content-type": "application/json"},
    )
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return list(json.load(answer))
        except OSError:  # SQLite is busy now and then: the server says 503
            time.sleep(1.0)
    return []


def main(given: Sequence[str]) -> int:
    """Serve, print one line, and store it; exit code 1 where more than one run waited."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--update-s", type=float, default=180.0, help="seconds that an update sleeps")
    parser.add_argument("--cron", default="* * * * *")
    chosen = parser.parse_args(given)
    result = schedule(chosen.minutes, chosen.update_s, chosen.cron)
    print(json.dumps(result))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["most_waiting"] > 1)
