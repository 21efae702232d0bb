"""Training on images that are decoded while the network runs: its speed and its memory, against bare loops.

`python -m benchmarks train_224 stream_memory`. The bare loops have a DataLoader of as many processes.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Ratio, paired
from graceful.training.backbones import build_backbone
from graceful.training.generation import BackboneSpec, Preprocessing
from graceful.training.heads import build_head
from graceful.training.job import AugmentationConfig, TrainingConfig, TrainingJob
from graceful.training.manifest import LabelledImages, write_manifest
from graceful.training.material import load_material
from graceful.training.progress import TrailReporter
from graceful.training.starting import build_trainee
from graceful.training.step import Run, Stepper

_CPU = torch.device("cpu")
_PROCESSES = 1
_PICTURES, _CLASSES, _BATCH = 48, 8, 16
_MEMORY_SIZES = (10_000, 100_000, 1_000_000)
_MEMORY_STEPS = 40
_COLOUR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def train_224() -> Ratio:
    """Images per second of a streamed training at 224 px with ResNet-18 / of a bare loop with a DataLoader."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = _job(folder, _drawn(folder), 224, _BATCH, BackboneSpec(name="resnet18"))
        material = load_material(job, _CPU, Path(folder))
        run = Run(job, TrailReporter(folder, job.name), 0, 1, _CPU, None, material)
        trainee = build_trainee(job.config, _CLASSES, None).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        stepper = Stepper(run, trainee, max_lr=1e-3, total_steps=10_000)
        epochs = iter(range(1000))

        def ours() -> float:
            epoch, started = next(epochs), time.perf_counter()
            for step, batch in enumerate(material.batches(0, epoch, _PICTURES // _BATCH, 0, 1)):
                stepper.take(batch, epoch, step)
            return time.perf_counter() - started

        bare = _bare_epochs(job)
        try:
            for warm in (ours, bare):
                warm()
            return paired(
                "train_224",
                bare,
                ours,
                pairs=5,
                at_least=0.95,
                invert=True,
                note=f"ResNet-18, an epoch of {_PICTURES} drawn pictures of 256 px (2,000 take hours here), "
                f"batch {_BATCH}, float32, one thread, {_PROCESSES} decoding process on both sides; no augmentation",
            )
        finally:
            material.close()


def stream_memory() -> list[Ratio]:
    """Peak memory of a rank with its decoding processes / of a bare loop's, and of each size / of the smallest."""
    with ThreadPoolExecutor(len(_MEMORY_SIZES)) as pool:
        peaks = list(pool.map(_peaks, _MEMORY_SIZES))
    smallest, found = peaks[0][0], []
    for size, (ours, bare) in zip(_MEMORY_SIZES, peaks, strict=True):
        note = (
            f"{ours:,.0f} MiB against {bare:,.0f}, libraries and mapped files not counted, all processes; {size:,} "
            f"pictures of 8 px in Parquet shards, copied and opened, then the first {_MEMORY_STEPS} batches of 256, "
            f"{_PROCESSES} decoding process from a fork server on both sides, a linear network; the bare loop finds "
            "the copy made, and holds offsets and labels alone"
        )
        found.append(_of_memory(f"stream_memory_{size}", ours / bare, 1.25, note))
        if size != _MEMORY_SIZES[0]:
            grown = f"{ours:,.0f} MiB at {size:,} pictures, {smallest:,.0f} at {_MEMORY_SIZES[0]:,}; the same runs"
            found.append(_of_memory(f"stream_memory_growth_{size}", ours / smallest, 1.25, grown))
    return found


def _peaks(size: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        _shards(folder, size)
        return _peak_of("ours", folder), _peak_of("bare", folder)


def _of_memory(name: str, ratio: float, at_most: float, note: str) -> Ratio:
    value = round(ratio, 3)
    return Ratio(name, value, value, value, 1, f"<= {at_most}", ratio <= at_most, 0.0, 0.0, note)


class _Pictures(Dataset[Any]):
    """What one writes first: open, resize, scale."""

    def __init__(self, sources: list[str], labels: list[int]) -> None:
        self._sources, self._labels = sources, labels

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self._sources[row]).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1)), self._labels[row]


class _Offsets(Dataset[Any]):
    """A file of encoded pictures, where each starts, and its label: the least that a loop can hold of a set."""

    def __init__(self, records: str, starts: str, labels: torch.Tensor) -> None:
        self._records, self._labels = records, labels
        self._starts = torch.from_numpy(np.fromfile(starts, dtype="<i8"))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        start, end = int(self._starts[row]) + 33, int(self._starts[row + 1])
        with Path(self._records).open("rb") as file:
            file.seek(start)
            image = Image.open(io.BytesIO(file.read(end - start))).convert("L")
        return torch.from_numpy(np.array(image)[None]), int(self._labels[row])


def _bare_epochs(job: TrainingJob) -> Callable[[], float]:
    """Return a function that trains an epoch and returns its seconds."""
    images = pq.read_table(job.manifest_uri)
    names = sorted(set(images["label"].to_pylist()))
    data = _Pictures(images["source"].to_pylist(), [names.index(name) for name in images["label"].to_pylist()])
    loader = DataLoader(data, batch_size=_BATCH, shuffle=True, num_workers=_PROCESSES, persistent_workers=True)
    network = build_backbone(job.config.backbone, job.config.width, 3, 224)
    head = build_head(job.config.head, _CLASSES, job.config.width)
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in _COLOUR)

    def epoch() -> float:
        started = time.perf_counter()
        for pixels, labels in loader:
            inputs = pixels.float().div_(255.0).sub_(mean).div_(std)
            loss = head(network(inputs.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    return epoch


def _drawn(folder: str) -> LabelledImages:
    """JPEGs of 256 px: circles and lines on a gradient, the class in their number."""
    drawn = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 256, dtype=np.uint8)
    sources, digests = [], []
    for number in range(_PICTURES):
        others = drawn.integers(0, 256, (2, 1, 256), dtype=np.uint8)
        bands = [np.broadcast_to(band, (256, 256)) for band in (ramp, *others)]
        picture = Image.fromarray(np.stack(bands, 2))
        pen = ImageDraw.Draw(picture)
        for _ in range(number % _CLASSES + 1):
            left, top, side = drawn.integers(0, 180, 3).tolist()
            pen.ellipse((left, top, left + side + 8, top + side + 8), outline="white", width=4)
        path = Path(folder, f"{number:05d}.jpg")
        picture.save(path, quality=90)
        sources.append(str(path))
        digests.append(_sha256(path.read_bytes()))
    return LabelledImages(sources, np.array([str(n % _CLASSES) for n in range(_PICTURES)]), digests)


def _job(folder: str, images: LabelledImages, side: int, batch: int, backbone: BackboneSpec) -> TrainingJob:
    manifest = str(Path(folder, "manifest.parquet"))
    write_manifest(manifest, images)
    return _job_of(folder, manifest, side, batch, backbone, 3)


def _job_of(folder: str, manifest: str, side: int, batch: int, backbone: BackboneSpec, channels: int) -> TrainingJob:
    mean, std = (values[:channels] for values in _COLOUR)
    recipe = TrainingConfig(
        backbone=backbone,
        preprocessing=Preprocessing(image_size=side, channels=channels, mean=mean, std=std),
        augmentation=AugmentationConfig(kind="none"),
        constraints=(),
        mixture=0.0,
        batch_size=batch,
        precision="float32",
        pixel_memory_mib=0,
    )
    return TrainingJob(
        config=recipe,
        name="stream",
        manifest_uri=manifest,
        output_uri=folder,
        ordinal=1,
        storage_uri=folder,
        decoding_processes=_PROCESSES,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Memory, in processes of their own


def _peak_of(side: str, folder: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", side, folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return float(json.loads(done.stdout)["peak_mib"])


def _held_mib() -> float:
    """MiB that this process and all below it hold, and do not only map; what they share counts once."""
    below: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        below.setdefault(int(fields[1]), []).append(int(place.parent.name))
    todo, total = [os.getpid()], 0
    while todo:
        process = todo.pop()
        todo += below.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def _shards(folder: str, size: int) -> None:
    """Write shards of 10,000 tiny pictures, and their manifest beside them, in blocks."""
    drawn = np.random.default_rng(0)
    pictures = []
    for _ in range(1000):
        buffer = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    digests = [_sha256(picture) for picture in pictures]
    manifest = str(Path(folder, "manifest.parquet"))
    schema = pa.schema([("source", pa.string()), ("label", pa.string()), ("content_sha256", pa.string())])
    with pq.ParquetWriter(manifest, schema.with_metadata({"format_version": "1"})) as writer:
        for start in range(0, size, 10_000):
            shard = Path(folder, f"shard-{start // 10_000:04d}.parquet")
            pq.write_table(pa.table({"image": pa.array(pictures * 10, pa.binary())}), shard, row_group_size=1000)
            rows = range(10_000)
            columns = [[f"{shard}#{row}" for row in rows], [str(row % 100) for row in rows], digests * 10]
            writer.write_table(pa.table(columns, schema=schema))


def _ours(folder: str, manifest: str, look: Callable[[], None]) -> None:
    job = _job_of(folder, manifest, 8, 256, BackboneSpec(name="small_cnn"), 1)
    material = load_material(job, _CPU, Path(folder))
    look()
    steps = -(-len(material) // 256)
    batches = material.batches(0, 0, steps, 0, 1)
    _iterate(((batch.pixels, batch.labels) for batch in batches), look)
    material.close()


def _bare(folder: str, manifest: str, look: Callable[[], None]) -> None:
    labels = torch.arange(pq.read_metadata(manifest).num_rows) % 100
    data = _Offsets(f"{folder}/records.bin", f"{folder}/starts.i64", labels)
    loader = DataLoader(
        data, batch_size=256, shuffle=True, num_workers=_PROCESSES, multiprocessing_context="forkserver"
    )
    _iterate(loader, look)


def _iterate(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], look: Callable[[], None]) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 100))
    optimizer = torch.optim.AdamW(network.parameters())
    for step, (pixels, labels) in enumerate(batches):
        loss = nn.functional.cross_entropy(network(pixels.float().div_(255)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            look()
        if step == _MEMORY_STEPS:
            return


def main(side: str, folder: str) -> None:
    """Print the peak of one side on the shards in a folder."""
    torch.set_num_threads(1)
    peak = 0.0

    def look() -> None:
        nonlocal peak
        peak = max(peak, _held_mib())

    (_ours if side == "ours" else _bare)(folder, str(Path(folder, "manifest.parquet")), look)
    print(json.dumps({"peak_mib": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
