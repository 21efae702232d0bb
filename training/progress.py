"""Where a training leaves its trail: checkpoints, progress lines and the result, below `storage_uri/name/`.

    checkpoint-0003.pt   state after epoch 3 (torch file with tensors and plain values only)
    checkpoint-0004-000120.pt   state after 120 steps of epoch 4
    checkpoints.json     the checkpoints that are complete, newest last, each with its sha256; written after the file
    metrics.jsonl        one line per epoch
    progress.json        a line like these, of the epoch that is under way
    result.json          the finished generation; written last: a training that has one is never repeated

Every file is written whole and atomically, so a kill at any moment leaves the previous state. The trail is our own
rather than Ray Train's, because Ray rewrites its snapshot in place: a kill in that moment would make it unreadable.
Reading the lines loads no torch.
"""

import hashlib
import io
import json
import logging
from typing import Any, Protocol

from graceful.errors import UnknownFormatError
from graceful.files import exists, join, read_bytes, resolve, write_bytes
from graceful.training.generation import GenerationCard, read_card

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


class Reporter(Protocol):
    """What the loop needs of the world around it."""

    def latest(self) -> dict[str, Any] | None:
        """Return the newest complete checkpoint's state, or None; the same on every rank."""

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Record an epoch's metrics and state. Called by every rank; only rank 0 passes a state."""

    def glance(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Record how far an epoch is and, where there is one, a state in its midst. Called by rank 0."""

    def finish(self, generation_uri: str, card: GenerationCard) -> None:
        """Record the finished generation. Called by rank 0."""


class TrailReporter:
    """The trail of one run on a file system that all workers see."""

    def __init__(self, storage_uri: str, name: str, keep_checkpoints: int = 2) -> None:
        self.uri = join(storage_uri, name)
        self.keep_checkpoints = keep_checkpoints

    def latest(self) -> dict[str, Any] | None:
        """Return the newest state whose file is whole; a damaged one is logged and the one before it is taken."""
        import torch

        for entry in reversed(self._checkpoints()):
            try:
                payload = read_bytes(join(self.uri, entry["file"]))
            except FileNotFoundError:
                payload = b""
            if hashlib.sha256(payload).hexdigest() == entry["sha256"]:
                return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            logger.warning("checkpoint %s of %s is damaged or gone; taking an earlier one", entry["file"], self.uri)
        return None

    def report(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Write the progress line, then the checkpoint and the list of checkpoints; then drop old checkpoints.

        In this order: an epoch that is repeated writes its line again, one that is not repeated would never.
        """
        if state is None:
            return
        lines = [line for line in self.metrics() if line["epoch"] < metrics["epoch"]]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, metrics])
        write_bytes(join(self.uri, "metrics.jsonl"), text.encode())
        for file in self._save(state, f"checkpoint-{state['epoch']:04d}.pt"):
            self._remove(file)

    def glance(self, metrics: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Write the checkpoint and the list of checkpoints if there is a state, then the line; then drop old ones."""
        dropped = []
        if state is not None:
            dropped = self._save(state, f"checkpoint-{state['epoch']:04d}-{state['step']:06d}.pt")
        self._write_json("progress.json", {"format_version": FORMAT_VERSION, **metrics})
        for file in dropped:
            self._remove(file)

    def last_glance(self) -> dict[str, Any] | None:
        """Return how far the epoch under way was when it was last looked at."""
        return self._read_json("progress.json")

    def _save(self, state: dict[str, Any], file: str) -> list[str]:
        """Write a checkpoint, then the list; return the files that are no longer in it."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        write_bytes(join(self.uri, file), payload)
        before = self._checkpoints()
        place = (state["epoch"], state["step"])
        entries = [entry for entry in before if (entry["epoch"], entry["step"]) < place]
        sha256 = hashlib.sha256(payload).hexdigest()
        entries.append({"epoch": state["epoch"], "step": state["step"], "file": file, "sha256": sha256})
        kept = entries[-self.keep_checkpoints :]
        self._write_json("checkpoints.json", {"format_version": FORMAT_VERSION, "checkpoints": kept})
        names = {entry["file"] for entry in kept}
        return [entry["file"] for entry in before if entry["file"] not in names]

    def finish(self, generation_uri: str, card: GenerationCard) -> None:
        """Write the result, then drop the checkpoints."""
        record = {"format_version": FORMAT_VERSION, "generation_uri": generation_uri, "digest": card.digest}
        self._write_json("result.json", record)
        entries = self._checkpoints()
        self._write_json("checkpoints.json", {"format_version": FORMAT_VERSION, "checkpoints": []})
        for file in [*(entry["file"] for entry in entries), "progress.json"]:
            self._remove(file)

    def result(self) -> tuple[str, GenerationCard] | None:
        """Return folder and card of the generation that this run made, or None if it has not ended.

        A result whose generation is gone or another one counts as none: the training is made again.
        """
        record = self._read_json("result.json")
        if record is None:
            return None
        try:
            card = read_card(record["generation_uri"])
        except FileNotFoundError:
            logger.warning("the generation %s of a finished training is gone; training again", record["generation_uri"])
            return None
        return (record["generation_uri"], card) if card.digest == record["digest"] else None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the progress lines so far."""
        place = join(self.uri, "metrics.jsonl")
        return [json.loads(line) for line in read_bytes(place).splitlines()] if exists(place) else []

    def _checkpoints(self) -> list[dict[str, Any]]:
        record = self._read_json("checkpoints.json")
        return [] if record is None else record["checkpoints"]

    def _read_json(self, file: str) -> dict[str, Any] | None:
        place = join(self.uri, file)
        try:
            record: dict[str, Any] = json.loads(read_bytes(place))
        except FileNotFoundError:
            return None
        if record.get("format_version") != FORMAT_VERSION:
            raise UnknownFormatError(
                f"resuming a training: expected format {FORMAT_VERSION}, found {record.get('format_version')} (at "
                f"{place}); use the program version that wrote it, or another run name"
            )
        return record

    def _write_json(self, file: str, record: dict[str, Any]) -> None:
        write_bytes(join(self.uri, file), (json.dumps(record, indent=2) + "\n").encode())

    def _remove(self, file: str) -> None:
        file_system, path = resolve(join(self.uri, file))
        if exists(join(self.uri, file)):
            file_system.delete_file(path)
